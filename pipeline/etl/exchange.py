"""Finished shards take the place of those in a folder: all of them or none, by a journal.

Shards are written inside `.partial`, under their final names. When they are whole, a journal lists what moves out of
the folder and what moves into it; `publish` does that, and goes on from there after a kill.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.base.errors import DataError
from pipeline.base.files import hash_file, move_file, read_arrow, read_object, write_json
from pipeline.base.store import is_remote, list_files, remove_folder
from pipeline.etl.planning import count_planned, read_planned
from pipeline.etl.writing import REJECTS, Reject
from pipeline.manifest import NAME, Manifest, read_manifest

PARTIAL = ".partial"  # inside the output folder, until the run is finished
PLANNED = ".planned"  # beside it: the plan, until it is known to be good
JOURNAL = "publish.json"  # in PARTIAL: what moves out of the folder, and what moves into it
REPLACED = "replaced"  # in PARTIAL: what moved out
_OURS = re.compile(r"(?P<split>[a-z0-9_]+)(-\d{6}\.tar|\.arrow)|rejects\.csv")


def read_unfinished(path: Path) -> dict[str, Any] | None:
    """A JSON file of an unfinished run; None where it is missing or damaged: it is written again."""
    try:
        return read_object(path)
    except (FileNotFoundError, DataError):
        return None


def publish(out: Path) -> None:
    """Move whole shards from `.partial` into the folder, as the journal says, and what they replace out of it.

    Killed at any moment, it continues when it is called again: nothing of either set is lost before the new manifest
    is in place. Does nothing without a journal.
    """
    partial = out / PARTIAL
    if is_remote(out) or (journal := read_unfinished(partial / JOURNAL)) is None:
        return
    replaced = partial / REPLACED
    replaced.mkdir(exist_ok=True)
    for name in journal["old"]:  # the manifest first: without it, no file is taken for finished
        if not (replaced / name).exists():
            move_file(out / name, replaced / name)
    for name in journal["new"]:  # the manifest last
        if (partial / name).exists():
            move_file(partial / name, out / name)
    # The journal first: it must not outlive what it names.
    (partial / JOURNAL).unlink()
    remove_folder(partial)


def exchange(out: Path, manifest: Manifest) -> None:
    """Replace the shards of a folder by finished ones. Raises DataError for a file of another origin in the way."""
    partial = out / PARTIAL
    new, old = [*manifest.files(), *([REJECTS] if manifest.rejects else []), NAME], find_written(out)
    for name in new:
        if name not in old and (out / name).exists():
            if hash_file(out / name) != hash_file(partial / name):
                raise DataError(
                    f"{out / name}: not what this command writes there; move it away, or choose another folder"
                )
            old.append(name)
    remove_folder(partial / REPLACED)  # of an earlier exchange, killed at its very end
    write_json(partial / JOURNAL, {"old": old, "new": new})
    publish(out)


def find_written(out: Path) -> list[str]:
    """The files of finished shards, the manifest first. Raises DataError for those of another program."""
    if not (out / NAME).exists():
        return []
    manifest = read_manifest(out)
    return [name for name in (NAME, REJECTS, *manifest.files()) if (out / name).exists()]


def refuse_others(out: Path, planned: Path, splits: Collection[str]) -> None:
    """Raise DataError for a file of another origin whose name a shard or table of these splits may need.

    Without a manifest, a tar or table that begins with the image that the plan puts first is taken for ours; `exchange`
    compares it with the new one.
    """
    ours = find_written(out)
    for path in list_files(out):
        match = _OURS.fullmatch(path.name)
        if path.name in ours or not match or match["split"] not in {None, *splits}:
            continue
        if is_remote(out) or not _is_planned(planned, path):
            raise DataError(
                f"{path}: not written by this command, which would replace it; choose another folder"
            )


def _is_planned(planned: Path, path: Path) -> bool:
    """Whether a shard or a table begins with what the plan puts first."""
    if path.name == REJECTS:
        return path.read_bytes().startswith(",".join(Reject._fields).encode())
    split, _, number = path.stem.rpartition("-") if path.suffix == ".tar" else (path.stem, "", "0")
    if int(number) >= count_planned(planned, split):
        return False
    first = str(read_planned(planned, split, int(number))["key"][0])
    if path.suffix == ".tar":
        with path.open("rb") as file:
            return file.read(100).partition(b".")[0].decode(errors="replace") == first
    try:
        return str(read_arrow(path, path.read_bytes())["key"][0]) == first
    except (DataError, KeyError, IndexError):
        return False
