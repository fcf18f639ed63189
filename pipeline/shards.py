"""Label table + image files → tar shards, an Arrow index per split, and the manifest.

Stages: find CSVs → read labels → split patients → shuffle rows → cut into shards → write each shard in a
worker process → write the Arrow tables → write the manifest, last. A shard is a pure function of its rows and
options, so the bytes on disk do not depend on the number of workers. Format: shards/README.md.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import DataError
from pipeline.images import ImageError, prepare_image
from pipeline.labels import LABELS, find_csvs, hash_fraction, read_labels, select_views, split_patients
from pipeline.manifest import NAME, Manifest, Shard, Split, read_manifest, write_manifest, write_table

_BLOCK = 512  # bytes; tar pads every header and member to it
_OURS = re.compile(r"\.?(train|dev|valid)(-\d{6}\.tar|\.arrow)(\.tmp)?")


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards; meanings and defaults are those of `pipeline shards --help`."""

    size: int
    views: str
    dev: float
    seed: int
    samples_per_shard: int
    quality: int
    max_pixels: int


class ShardTask(NamedTuple):
    """All that a worker needs to write one shard."""

    path: Path
    root: Path
    rows: pa.Table
    options: Options


class ShardResult(NamedTuple):
    """What a worker reports of its shard: where each JPEG lies [n], and moments of the gray levels."""

    shard: Shard
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    crc: npt.NDArray[np.uint32]
    moments: tuple[int, int, int]


def plan_splits(folder: Path, options: Options) -> tuple[dict[str, pa.Table], dict[str, Path]]:
    """Label table per split (train, dev, valid; empty ones left out) in shuffled order, and the CSVs read.

    Raises DataError where a CSV is bad, a patient is in two CSVs, or no image is left.
    """
    csvs = find_csvs(folder)
    tables = {split: read_labels(csv) for split, csv in csvs.items()}
    if len(tables) == 2:
        shared = pc.is_in(tables["valid"]["patient"], value_set=tables["train"]["patient"].combine_chunks())
        row = pc.index(shared, True).as_py()
        if row >= 0:
            patient = tables["valid"]["patient"][row].as_py()
            where = f"{csvs['valid']}, line {row + 2}"
            raise DataError(f"{where}: {patient} is in train.csv too; splits must not share patients")
    if "train" in tables:
        train, dev = split_patients(tables.pop("train"), options.dev, options.seed)
        tables = {"train": train, "dev": dev} | tables
    tables = {name: select_views(table, options.views) for name, table in tables.items()}
    tables = {name: _shuffle(table, options.seed) for name, table in tables.items() if table.num_rows}
    if not tables:
        raise DataError(f"{folder}: no {options.views} images in its CSVs")
    return tables, csvs


def write_shards(
    source: Path,
    out: Path,
    options: Options,
    policies: Mapping[str, str],
    workers: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Manifest, bool]:
    """Write the CheXpert folder `source` into `out`; returns the manifest and whether it is new.

    Finished shards of the same input and options are left as they are. `progress` gets (images done, total).
    Raises DataError for bad input, an unusable image, or `out` holding other shards without `overwrite`.
    """
    tables, csvs = plan_splits(source, options)
    hashes = {csv.name: hashlib.sha256(csv.read_bytes()).hexdigest() for csv in csvs.values()}
    wanted = {"options": asdict(options), "policies": dict(policies), "sources": hashes}
    if (out / NAME).exists() and not overwrite:
        manifest = read_manifest(out)
        _refuse_difference(out, manifest, wanted)
        return manifest, False

    out.mkdir(parents=True, exist_ok=True)
    # The manifest goes first: what is left of an older set must never look finished.
    (out / NAME).unlink(missing_ok=True)
    for path in out.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()

    root = next(iter(csvs.values())).parent
    results = _run(_tasks(tables, out, root, options), workers)
    total = sum(table.num_rows for table in tables.values())
    done = 0
    splits: dict[str, Split] = {}
    moments: dict[str, tuple[int, int, int]] = {}
    for name, table in tables.items():
        of_split: list[ShardResult] = []
        for _ in range(_shard_count(table, options)):
            of_split.append(next(results))
            done += of_split[-1].shard.samples
            progress(done, total)
        splits[name] = _write_index(out, name, table, of_split)
        moments[name] = tuple(map(sum, zip(*(result.moments for result in of_split), strict=True)))  # type: ignore[assignment]
    manifest = Manifest(**wanted, pixels=_pixel_statistics(moments), splits=splits)
    write_manifest(out, manifest)
    return manifest, True


def write_shard(task: ShardTask) -> ShardResult:
    """Write one tar under a temporary name, then rename it. Raises DataError naming an unusable image."""
    temporary = task.path.with_name(f".{task.path.name}.tmp")
    try:
        result = _write_tar(task, temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(task.path)
    return result


def _write_tar(task: ShardTask, path: Path) -> ShardResult:
    sha256 = hashlib.sha256()
    position = 0
    offset, length, crc = [], [], []
    count = total = squares = 0
    with path.open("wb") as file:

        def write(data: bytes) -> None:
            nonlocal position
            file.write(data)
            sha256.update(data)
            position += len(data)

        for row in task.rows.to_pylist():
            if _stop is not None and _stop.is_set():
                raise CancelledError
            jpeg, pixels = _load_image(task, row["path"])
            write(_tar_header(f"{row['key']}.jpg", len(jpeg)))
            offset.append(position)
            length.append(len(jpeg))
            crc.append(zlib.crc32(jpeg))
            write(jpeg + bytes(-len(jpeg) % _BLOCK))
            facts = _sample_json(row)
            write(_tar_header(f"{row['key']}.json", len(facts)) + facts + bytes(-len(facts) % _BLOCK))
            levels = np.bincount(pixels.ravel(), minlength=256)
            count += pixels.size
            total += int(levels @ np.arange(256))
            squares += int(levels @ np.arange(256) ** 2)
        write(bytes(2 * _BLOCK))  # two empty blocks end a tar
        file.flush()
        os.fsync(file.fileno())
    shard = Shard(task.path.name, task.rows.num_rows, position, sha256.hexdigest())
    return ShardResult(
        shard,
        np.array(offset, np.int64),
        np.array(length, np.int32),
        np.array(crc, np.uint32),
        (count, total, squares),
    )


def _load_image(task: ShardTask, relative: str) -> tuple[bytes, npt.NDArray[np.uint8]]:
    path, options = task.root / relative, task.options
    try:
        # A link inside the set may point anywhere: what is read must lie under the root.
        if not path.resolve(strict=True).is_relative_to(task.root.resolve()):
            raise DataError(f"{path}: leads out of {task.root}")
        return prepare_image(path.read_bytes(), options.size, options.quality, options.max_pixels)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such image, but the CSV lists it") from None


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size  # time, owner and group stay zero: same input, same bytes
    return info.tobuf(tarfile.USTAR_FORMAT)


def _sample_json(row: Mapping[str, Any]) -> bytes:
    """Raw labels and view facts of one row, for readers that have the tar alone."""
    facts = {name: row[name] for name in ("key", "patient", "study", "view", "sex", "age", "projection")}
    return json.dumps(facts | {"labels": {label: row[label] for label in LABELS}}).encode()


def _shuffle(table: pa.Table, seed: int) -> pa.Table:
    """Rows in an order that depends on (seed, key) alone: CheXpert's own order is not random."""
    draws = np.array([hash_fraction("shuffle", seed, key) for key in table["key"].to_pylist()])
    return table.take(np.argsort(draws, kind="stable"))


def _shard_count(table: pa.Table, options: Options) -> int:
    return len(range(0, table.num_rows, options.samples_per_shard))


def _tasks(tables: Mapping[str, pa.Table], out: Path, root: Path, options: Options) -> Iterator[ShardTask]:
    for name, table in tables.items():
        for number in range(_shard_count(table, options)):
            start = number * options.samples_per_shard
            rows = np.arange(start, min(start + options.samples_per_shard, table.num_rows))
            # take() copies: a slice would carry the whole table to the worker.
            yield ShardTask(out / f"{name}-{number:06d}.tar", root, table.take(rows), options)


def _write_index(out: Path, name: str, table: pa.Table, results: list[ShardResult]) -> Split:
    """Write `<split>.arrow`: the label table without paths, plus where each sample's JPEG lies."""
    numbers = np.repeat(np.arange(len(results), dtype=np.int32), [result.shard.samples for result in results])
    index = table.drop_columns(["path"]).append_column("shard", pa.array(numbers))
    for column in ("offset", "length", "crc"):
        index = index.append_column(column, pa.array(np.concatenate([getattr(r, column) for r in results])))
    studies = pa.TableGroupBy(table, ["patient", "study"]).aggregate([]).num_rows
    return Split(
        samples=table.num_rows,
        studies=studies,
        patients=pc.count_distinct(table["patient"]).as_py(),
        table=f"{name}.arrow",
        table_sha256=write_table(out / f"{name}.arrow", index),
        shards=tuple(result.shard for result in results),
    )


def _pixel_statistics(moments: Mapping[str, tuple[int, int, int]]) -> dict[str, float]:
    """Mean and standard deviation of train's gray levels (of the first split's where there is no train)."""
    count, total, squares = moments.get("train", next(iter(moments.values())))
    mean = total / count
    return {"mean": round(mean, 4), "std": round((squares / count - mean**2) ** 0.5, 4)}


def _refuse_difference(out: Path, manifest: Manifest, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    for group, values in wanted.items():
        there = getattr(manifest, group)
        for name in sorted(values.keys() | there.keys()):
            if values.get(name) != there.get(name):
                difference = f"{name} is {there.get(name)} there and {values.get(name)} here"
                raise DataError(
                    f"{out} holds other shards: {difference}; choose another folder or --overwrite"
                )


# Worker processes. Spawned, not forked: safe beside threads, and the same on every platform.
_stop: Any = None  # an Event in worker processes; None where write_shard is called directly


def _run(tasks: Iterator[ShardTask], workers: int) -> Iterator[ShardResult]:
    """Results in task order, with a bounded number of shards in flight."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(stop,))
    pending: deque[Future[ShardResult]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(write_shard, task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError("a worker process was killed (out of memory?); run the same command again") from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


def _start_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets `stop`
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker outlives a SIGKILLed parent unless it watches for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
