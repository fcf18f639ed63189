"""Shards folder → its problems: every file against the manifest, every tar against its Arrow table.

Each file is read and hashed once, and the headers of each tar are walked. Samples are checked one by one only
if a hash differs, or for `--deep`, to locate the damage within its file.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import manifest as stated
from pipeline.base.csvs import repeated
from pipeline.base.errors import DataError
from pipeline.base.files import hash_file, is_temporary, parse_object
from pipeline.base.store import read_at, read_bytes
from pipeline.base.tar import BLOCK, Member, read_members
from pipeline.base.workers import run_threads
from pipeline.etl.writing import PARTIAL
from pipeline.identity import Ids, describe_repeats, find_shared, identify_patients
from pipeline.images import DOUBTS, ENCODINGS, ONE_LEVEL, decode_stored
from pipeline.labels import count_rows
from pipeline.manifest import CROISSANT, FACTS, NAME, Manifest, Shard, Split

PRINTED = 20  # lines on one file; a shard of another set would fill the screen
Fetch = Callable[[Shard], Path]
Progress = Callable[[int, int], None]  # shards done, total


class Verdict(NamedTuple):
    """What was checked, and what is wrong with it."""

    manifest: Manifest
    problems: dict[str, list[str]]  # file → a line for each
    warnings: list[str]


class _Checks(NamedTuple):
    """How shards are checked."""

    folder: Path
    encoding: str
    owners: Mapping[str, str]  # hash → the shard that it belongs to
    deep: bool
    fetch: Fetch | None
    flat: list[str]  # the checks add the keys of images of one level


def verify_shards(
    folder: Path, deep: bool, workers: int, progress: Progress = lambda *_: None, fetch: Fetch | None = None
) -> Verdict:
    """Check a folder of shards. If they are remote, `fetch` gives a local file of each, whose hash is the manifest's.

    Raises DataError only if there is no readable manifest: all other problems are in the report.
    """
    manifest = stated.read_manifest(folder)
    encoding = str(manifest.options["encoding"])
    if encoding not in ENCODINGS:
        raise DataError(f"{folder / NAME}: encoding '{encoding}' is unknown")
    problems, tables = dict[str, list[str]](), dict[str, pa.Table]()
    tasks: list[tuple[Shard, pa.Table | None]] = []
    for name, split in manifest.splits.items():
        problems[split.table], table = _check_table(folder, split)
        if table is not None:
            tables[name] = table
        starts = accumulate((shard.samples for shard in split.shards), initial=0)
        for shard, start in zip(split.shards, starts, strict=False):
            tasks.append((shard, None if table is None else table.slice(start, shard.samples)))
    keys = {split: Ids(table["key"], table["key"]) for split, table in tables.items()}
    patients = {split: identify_patients(table) for split, table in tables.items()}
    for ids, form in ((keys, "sample {}: is in {} too"), (patients, "{} is in {} too; splits must not share patients")):
        for first, second, names in find_shared(ids):
            file = manifest.splits[second].table
            problems[file] += [f"{folder / file}: {form.format(name, first)}" for name in names]
    checks = _Checks(folder, encoding, {shard.sha256: shard.file for shard, _ in tasks}, deep, fetch, flat=[])
    complaints = run_threads(partial(_check_shard, checks), tasks, workers, progress)
    problems |= {shard.file: lines for (shard, _), lines in zip(tasks, complaints, strict=True)}
    if fetch is None:
        path = folder / CROISSANT
        is_same = path.is_file() and read_bytes(path) == stated.format_croissant(manifest)
        fault = "not that of this manifest" if path.is_file() else "missing"
        problems[CROISSANT] = [] if is_same else [f"{path}: {fault}"]
    warnings = []
    for path in sorted(folder.iterdir()):
        if path.name == PARTIAL or is_temporary(path):
            warnings.append(f"{path}: left over from an interrupted run; delete it")
        elif path.suffix in (".tar", ".arrow") and path.name not in problems:
            warnings.append(f"{path}: the manifest does not list it")
    notes = stated.find_notes(tables.values()) | ({ONE_LEVEL: sorted(checks.flat)} if deep else {})
    warnings += describe_repeats(tables)
    warnings += stated.describe_notes({doubt: notes[doubt] for doubt in DOUBTS if notes.get(doubt)})
    return Verdict(manifest, {file: lines for file, lines in problems.items() if lines}, warnings)


def _check_table(folder: Path, split: Split) -> tuple[list[str], pa.Table | None]:
    """The problems of a split's table, and the table if it can be used for checking the tars."""
    path = folder / split.table
    try:
        table = stated.read_table(folder, split)
    except DataError as error:
        return [str(error)], None
    counts = [(unit, count, getattr(split, unit)) for unit, count in count_rows(table).items()]
    lines = [f"{path}: {now} {unit}, not {was} as in the manifest" for unit, now, was in counts if now != was]
    sizes = [shard.samples for shard in split.shards]
    if not np.array_equal(table["shard"], np.repeat(np.arange(len(sizes)), sizes)):
        return [*lines, f"{path}: its rows do not lie in the shards as the manifest counts them"], None
    return [*lines, *(f"{path}: sample {key}: appears twice" for key in repeated(table["key"]))], table


def _check_shard(checks: _Checks, task: tuple[Shard, pa.Table | None]) -> list[str]:
    """The problems of a shard, as precisely as possible; its rows are None if the split's table is unusable."""
    shard, rows = task
    path = checks.folder / shard.file
    try:
        if checks.fetch:
            path, file, is_intact = Path(shard.file), checks.fetch(shard), True
        else:
            # Read, not mapped: a bad sector then is an error here, and not the end of the process.
            file, digest, size = path, hash_file(path), path.stat().st_size
            is_intact = digest == shard.sha256
            if not is_intact and digest in checks.owners:
                return [f"{path}: holds what belongs in {checks.owners[digest]}"]
            if size != shard.bytes:
                return [f"{path}: damaged: {size} bytes, not {shard.bytes} as in the manifest"]
        members, complaints = list(read_members(file, path)), list[str]()
        if rows is not None:
            with file.open("rb") as tar:
                complaints += _check_samples(checks, rows, members, tar, checks.deep or not is_intact)
    except FileNotFoundError:
        return [f"{path}: the shard is missing"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]
    except DataError as error:
        return [str(error)]
    unexplained = [] if is_intact else ["damaged: its sha256 is not the manifest's"]
    return [f"{path}: {complaint}" for complaint in complaints or unexplained]


def _check_samples(checks: _Checks, rows: pa.Table, members: list[Member], tar: BinaryIO, deep: bool) -> Iterator[str]:
    """A problem for each row that does not match its members."""
    # Our own tars hold nothing but each row's image and JSON, and end in two empty blocks.
    expected = [f"{key}.{end}" for key in rows["key"].to_pylist() for end in (ENCODINGS[checks.encoding], "json")]
    names = [member.name for member in members]
    for number, (name, wanted) in enumerate(zip_longest(names, expected, fillvalue="nothing")):
        if name != wanted:
            yield f"member {number}: {name} in the tar, {wanted} in the table"
            return
    end = members[-1].offset + members[-1].size if members else 0
    rest = os.fstat(tar.fileno()).st_size - (end + -end % BLOCK)
    if rest != 2 * BLOCK:
        yield f"{rest} bytes after the last member, not two empty blocks"
    needed = rows if deep else rows.select(["key", "offset", "length"])
    for row, image, json in zip(needed.to_pylist(), members[::2], members[1::2], strict=True):
        complaint = None
        if (image.offset, image.size) != (row["offset"], row["length"]):
            found = f"{image.name} is {image.size} bytes at {image.offset}"
            complaint = f"{found}, not {row['length']} at {row['offset']} as in the table"
        elif deep:
            complaint = _check_content(checks, row, *(read_at(tar.fileno(), p.size, p.offset) for p in (image, json)))
        if complaint:
            yield f"sample {row['key']}: {complaint}"


def _check_content(checks: _Checks, row: Mapping[str, object], content: bytes, json: bytes) -> str | None:
    if stated.checksum(content, checks.encoding) != row["crc"]:
        return "its bytes do not match the checksum in the index"
    try:
        levels = decode_stored(content, checks.encoding)
    except ValueError as error:
        return f"does not decode: {error}"
    if levels.min() == levels.max():
        checks.flat.append(str(row["key"]))
    try:
        document = parse_object("its JSON", json)
        facts = document | document["labels"]
        differing = next((name for name in FACTS.names if facts[name] != row[name]), None)
    except (DataError, KeyError, TypeError) as error:
        return f"its JSON is damaged: {error}"
    return differing and f"{differing} is {facts[differing]} in its JSON, {row[differing]} in the table"
