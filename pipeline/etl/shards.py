"""A dataset's folder → tar shards, an Arrow index per split, and the manifest (format: shards/README.md).

Planning, writing and finishing run in processes of their own, so that this one stays small at any size.

Shards converge: a file whose hash matches its record or the manifest stays, anything else is written. So the same
command resumes a run that was killed, and restores finished shards that were damaged. Every file appears complete
under its name, and none is removed to be rewritten.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import claimed, hash_file, read_object, remove_temporaries, sync_folder, write_json
from pipeline.base.options import option
from pipeline.base.store import check_access, is_remote, list_files, make_folder, named_failures, remove_folder
from pipeline.base.workers import count_cpus, run_alone, run_tasks, run_threads
from pipeline.etl import writing
from pipeline.etl.cluster import run_on_cluster
from pipeline.etl.writing import PARTIAL, Options, Request
from pipeline.manifest import CROISSANT, NAME, Manifest, read_manifest, write_manifest
from pipeline.sources.rows import MISSING, find_missing
from pipeline.sources.source import Source

STARTED = "options.json"  # in PARTIAL: the request
POLICIES = {"uncertain": "best", "blank": "zeros"}  # if none are given
Stated = Mapping[str, Mapping[str, object]]  # what decides shards: options, policies, …


@dataclass(frozen=True)
class Execution:
    """How shards are written; it decides none of their bytes."""

    workers: int = option(count_cpus, low=1, shown="all cores")
    max_bad: float = option(0.001, "Stop above this share of rejects.", low=0, high=1)
    scheduler: str | None = option(None, "Run on the Dask cluster at tcp://host:8786.", metavar="URL")
    strict: bool = option(False, "Refuse labels with one class; exit with 3 on any reject or lost picture.")


class RunSummary(NamedTuple):
    """Totals of a run; `is_new` is False if the shards existed already."""

    manifest: Manifest
    is_new: bool
    bytes_in: int = 0
    stripped: int = 0
    resumed: int = 0  # samples in shards that an earlier run had finished
    notes: tuple[str, ...] = ()  # of `read_splits`
    restored: tuple[str, ...] = ()  # files of finished shards that were missing or damaged


Choice = Mapping[str, str | None]  # the policies, by their names
Progress = Callable[[int, int, int], None]  # images done, images in all, rejects


def write_shards(
    source: Source, out: Path, options: Options, policies: Choice, how: Execution, progress: Progress = lambda *_: None
) -> RunSummary:
    """Write `source` into `out`, or resume an earlier run with the same options.

    `out` may be a path of `pipeline.base.store`. A policy of None is that of the existing shards, else the default.
    Raises DataError for bad input, too many unusable images, shards of other options or CSVs in `out`, and anything
    that `strict` rejects before it writes shards.
    """
    check_access(out)
    named_files = source.csvs | {f"facts-{number}": path for number, path in enumerate(source.facts, 1)}
    hashes = {name: hash_file(path) for name, path in named_files.items()}
    with named_failures(out, "cannot be written"):
        before = read_manifest(out).policies if (out / NAME).exists() else _read_started(out).get("policies", {})
        chosen = {name: policies.get(name) or str(before.get(name, default)) for name, default in POLICIES.items()}
        request = Request(out, source, options, chosen, hashes, how.strict)
        manifest, damaged = _read_finished(request, how.workers)
        if manifest is None or damaged:
            make_folder(out)
            with nullcontext() if is_remote(out) else claimed(out):
                # Look again: another process may have finished them before it released the folder.
                manifest, damaged = _read_finished(request, how.workers)
                try:
                    if manifest is None or damaged:
                        return _converge(request, manifest, damaged, how, progress)
                finally:
                    if not is_remote(out):
                        remove_temporaries(request.partial)
        return RunSummary(manifest, False)


def _read_started(out: Path) -> Stated:
    """The request of the unfinished run; empty if there is none, or its file is damaged."""
    with suppress(FileNotFoundError, DataError):
        return read_object(out / PARTIAL / STARTED)
    return {}


def _read_finished(request: Request, workers: int) -> tuple[Manifest | None, list[str]]:
    """The manifest, if any, and the files that are missing or do not match its hashes; DataError if it is another's."""
    if not (request.out / NAME).exists():
        return None, []
    manifest = read_manifest(request.out)
    _refuse_difference(request.out, {name: getattr(manifest, name) for name in request.wanted}, request.wanted)
    files = manifest.files()
    intact = run_threads(lambda name: writing.is_intact(request.out / name, files[name]), list(files), workers)
    damaged = sorted(name for name, matches in zip(files, intact, strict=True) if not matches)
    if not damaged:
        remove_folder(request.partial)  # of a run that was killed at its very end
    return manifest, damaged


def _refuse_difference(out: Path, before: Stated, wanted: Stated) -> None:
    for group, values in wanted.items():
        was = before.get(group, {})
        difference = describe_difference(was, values, sorted(values.keys() | was.keys()))
        if difference and group == "sources":
            name = difference.partition(" ")[0]
            difference = f"the {'file' if '-' in name else 'CSV of'} {name} differs"  # a split's name has no hyphen
        if difference:
            raise DataError(f"{out} holds other shards: {difference}; remove it, or name another folder")


def _converge(
    request: Request, manifest: Manifest | None, damaged: list[str], how: Execution, progress: Progress
) -> RunSummary:
    """Plan, write missing shards, and finish; if there is a manifest, rewrite damaged files only, to the same bytes."""
    out, partial, before = request.out, request.partial, _read_started(request.out)
    starts = manifest is None and before != request.started
    if starts:
        # A run that has written no shard yet may be started anew with other options.
        if before and any(path.suffix == ".tar" for path in list_files(out)):
            _refuse_difference(out, before, request.started)
        remove_folder(partial)
    make_folder(partial)
    rows, notes = run_alone(writing.write_plan, request, f"planning {out}")
    hashes = manifest.files() if manifest else {}
    tasks = [writing.ShardTask(request, split, number) for split in rows for number in range(len(rows[split]))]
    tasks = [task._replace(sha256=hashes.get(task.path.name)) for task in tasks]
    names = {writing.REJECTS, CROISSANT, *(f"{split}.arrow" for split in rows), *(task.path.name for task in tasks)}
    for path in list_files(out) if starts else ():
        if path.name in names:
            reason = "not written by this command, which would replace it"
            raise DataError(f"{path}: {reason}; remove it, or name another folder")
    write_json(partial / STARTED, request.started)
    sync_folder(partial)  # before the first shard, which would be nobody's without it
    sync_folder(out)
    # A table needs the records of all shards of its split.
    splits = [name for name in rows if manifest is None or manifest.splits[name].table in damaged]
    needed = [task for task in tasks if task.split in splits or task.path.name in damaged]
    records = run_threads(writing.find_record, needed, how.workers)
    unfinished = [task for task, record in zip(needed, records, strict=True) if record is None]
    finished = [record for record in records if record is not None]
    resumed = sum(record.shard.samples for record in finished)
    total = sum(map(sum, rows.values()))  # the share of rejects is one of all images
    absent = sum(rows[task.split][task.number] for task in unfinished)
    finished += _write_tasks(partial, unfinished, how, progress, total - absent, total)
    step = f"writing the tables of {out}"
    if manifest is None:
        manifest = run_alone(writing.finish, (request, {split: len(rows[split]) for split in rows}), step)
    else:
        for split in splits:
            entry = run_alone(writing.index_split, (request, split, len(rows[split])), step).entry
            if entry != manifest.splits[split]:
                raise DataError(f"{out / entry.table}: {writing.CHANGED}")
        write_manifest(out, manifest)
    remove_folder(partial)
    bytes_in, stripped = (sum(getattr(record, name) for record in finished) for name in ("bytes_in", "stripped"))
    return RunSummary(manifest, not damaged, bytes_in, stripped, resumed, notes, tuple(damaged))


def _name_unseen(record: writing.ShardRecord) -> str:
    """A source file that this process sees and its worker does not; "" if there is no such file."""
    missing = [reject.file for reject in record.rejects if reject.reason == MISSING and "://" not in reject.file]
    unseen = sorted({*missing} - {*find_missing(missing, ())})
    return f"does not see {unseen[0]}" if unseen else ""


def _write_tasks(
    partial: Path, tasks: Sequence[writing.ShardTask], how: Execution, progress: Progress, resumed: int, total: int
) -> list[writing.ShardRecord]:
    """Write shards in processes or on a cluster. Raises DataError for more rejects than are allowed."""
    done, finished, rejects = 0, list[writing.ShardRecord](), list[writing.Reject]()

    def tick(items: int) -> None:
        progress(min(resumed + items, total), total, len(rejects))

    tick(0)
    if how.scheduler is None:
        results = run_tasks(writing.write_shard, tasks, how.workers, tick)
    else:
        results = run_on_cluster(writing.write_shard, tasks, how.scheduler, partial / STARTED, _name_unseen)
    # Closed explicitly: when this raises, the workers must have ended before the caller goes on.
    with closing(results) as records:
        for record in records:
            finished.append(record)
            rejects += record.rejects
            done += record.shard.samples + len(record.rejects)
            if how.scheduler is not None:
                tick(done)
            if len(rejects) > how.max_bad * total:
                writing.write_rejects(partial, rejects)
                count = f"{len(rejects)} of {total:,} images cannot be used, more than `max_bad` {how.max_bad:.2%}"
                first = f"the first: {rejects[0].file}: {rejects[0].reason}"
                raise DataError(f"{count}; {partial / writing.REJECTS} lists them; {first}")
    progress(total, total, len(rejects))
    return finished
