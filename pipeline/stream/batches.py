"""Plan → batches of images, targets and masks. Stages, in order, each `Iterator → Iterator`:

    plan    steps: which rows make each batch (pipeline.stream.plan)
    fetch   rows → where their stored bytes lie in open shards, by the Arrow index; remote shards arrive ahead of use
    decode  stored bytes → uint8 [B, 1, size, size]; a few threads work on the next batches ahead
    label   + targets and masks [B, 14], rows of arrays that were vectorised once

Nothing is parsed per sample and no tar is walked. Threads, not worker processes: reading, libjpeg-turbo and
OpenCV release the interpreter lock, so nothing is pickled or copied between processes, and batches leave in
plan order whatever the number of threads. Bytes are read, not mapped: memory stays flat, and a file that is
cut short under a running stream is an error with a name.
"""

import logging
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.images import Gray, decode_stored, resize
from pipeline.manifest import Manifest, Shard, read_table
from pipeline.stream.cache import Remote
from pipeline.stream.loader import compose
from pipeline.stream.plan import WINDOW, Rows, Step, Weights, plan_evaluation, plan_training

# This module decodes on threads of its own; OpenCV's would only be in their way.
cv2.setNumThreads(1)

KEPT_OPEN = 2 * WINDOW  # shards: the window that is read, and the next
DOWNLOADS = 4  # at the same time

logger = logging.getLogger(__name__)


class OpenSplit(NamedTuple):
    """A split ready to be read: its table, its shards, and the index as arrays [N]."""

    name: str
    encoding: str
    table: pa.Table
    folder: Path
    remote: Remote | None
    shards: tuple[Shard, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    crc: npt.NDArray[np.uint32]

    @property
    def shard_sizes(self) -> list[int]:
        """Samples per shard."""
        return [shard.samples for shard in self.shards]


class Labels(NamedTuple):
    """Target float32 [N, 14] and mask bool [N, 14] of all rows of a split."""

    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]


class ShardFile:
    """An open shard; closed when the last batch that reads it is gone."""

    descriptor = -1  # where it cannot be opened

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Encoded(NamedTuple):
    """A step, and for each of its n images an open shard, offset and length in bytes, and checksum."""

    step: Step
    files: list[ShardFile]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    crc: npt.NDArray[np.uint32]


class Decoded(NamedTuple):
    """A step with its images uint8 [B, 1, H, W], and the positions in it whose image is unusable and black.

    Where the step's rows are [B, V] (`samples`) images are [B, V, 1, H, W], and positions count through V.
    """

    step: Step
    images: npt.NDArray[np.uint8]
    bad: list[int]


class Batch(NamedTuple):
    """A step with its images, target float32 [B, 14] and mask bool [B, 14]; `bad` as in `Decoded`."""

    step: Step
    images: npt.NDArray[np.uint8]
    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    bad: list[int]


def open_split(folder: Path, manifest: Manifest, name: str, remote: Remote | None = None) -> OpenSplit:
    """Check the table, and the sizes of local shards, against the manifest. Raises DataError naming the file.

    With a `remote`, `folder` is its mirror of manifest and tables, and shards are downloaded when needed.
    """
    split = manifest.split(name)
    table = read_table(folder, split)
    if table.num_rows != split.samples or sum(shard.samples for shard in split.shards) != split.samples:
        raise DataError(f"{folder / split.table}: {table.num_rows} rows, the manifest says {split.samples}")
    for shard in () if remote else split.shards:
        path = folder / shard.file
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"{path}: damaged: {path.stat().st_size} bytes, not {shard.bytes} as in the manifest"
            )
    arrays = {column: table[column].to_numpy() for column in ("shard", "offset", "length", "crc")}
    shard, offset, length = (arrays[column] for column in ("shard", "offset", "length"))
    sizes = np.array([shard.bytes for shard in split.shards], np.int64)
    astray = (shard < 0) | (shard >= len(sizes)) | (offset < 0) | (length < 0)
    astray |= offset > sizes[np.where(astray, 0, shard)] - length if len(sizes) else False
    if astray.any():
        key = table["key"][int(np.argmax(astray))].as_py()
        raise DataError(f"{folder / split.table}: sample {key} lies outside of its shard; it is damaged")
    encoding = str(manifest.options.get("encoding", "jpeg"))
    return OpenSplit(name, encoding, table, folder, remote, split.shards, **arrays)


def stream_training(
    split: OpenSplit,
    labels: Labels,
    *,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    rows: Rows | None = None,
    weights: Weights | None = None,
    rank: int = 0,
    ranks: int = 1,
    threads: int = 2,
    max_bad: int = 0,
) -> Iterable[Batch]:
    """The batches of one epoch from `start_step` on, in the plan's order; see `compose` for adding stages.

    `rows`, `weights`, `rank` and `ranks` as in `plan_training`; up to `max_bad` unusable images become black
    and are masked, more raise DataError naming shard and key.
    """
    plan = partial(
        plan_training,
        split.shard_sizes,
        batch_size,
        seed,
        epoch,
        start_step,
        rows=rows,
        weights=weights,
        rank=rank,
        ranks=ranks,
    )
    return compose(plan, *stages(split, labels, size=size, threads=threads, max_bad=max_bad))


def stream_evaluation(
    split: OpenSplit,
    labels: Labels,
    *,
    size: int,
    batch_size: int,
    rows: Rows | None = None,
    rank: int = 0,
    ranks: int = 1,
    threads: int = 2,
    max_bad: int = 0,
) -> Iterable[Batch]:
    """Every sample of the split (or of `rows`) exactly once over the ranks, in table order."""
    plan = partial(plan_evaluation, split.table.num_rows, batch_size, rows=rows, rank=rank, ranks=ranks)
    return compose(plan, *stages(split, labels, size=size, threads=threads, max_bad=max_bad))


def stages(
    split: OpenSplit, labels: Labels, *, size: int, threads: int, max_bad: int = 0
) -> tuple[Callable[..., Iterator[Any]], ...]:
    """fetch, decode and label, bound to a split: what turns steps into batches."""
    return (
        partial(fetch, split=split),
        partial(decode, split=split, size=size, threads=threads, max_bad=max_bad),
        partial(label, labels=labels),
    )


def fetch(steps: Iterable[Step], split: OpenSplit) -> Iterator[Encoded]:
    """Say where the images of each step lie, in shards that are open; no image is read before it is decoded."""
    opened: dict[int, ShardFile] = {}  # least recently used first
    for step in steps if split.remote is None else _download_ahead(steps, split, split.remote):
        rows = step.images
        shards = split.shard[rows]
        for number in np.unique(shards).tolist():
            opened[number] = opened.pop(number) if number in opened else _open_shard(split, number)
        files = [opened[number] for number in shards.tolist()]
        while len(opened) > KEPT_OPEN:
            del opened[next(iter(opened))]
        yield Encoded(step, files, split.offset[rows], split.length[rows], split.crc[rows])


def decode(
    encoded: Iterable[Encoded], split: OpenSplit, size: int, threads: int, max_bad: int = 0
) -> Iterator[Decoded]:
    """Decode ahead on `threads` threads; yields images uint8 [B, 1, size, size] in the order given.

    Images that do not match their checksum or do not decode are logged; more than `max_bad` of them raise
    DataError naming shard and key.
    """
    pending: deque[Future[tuple[Decoded, dict[int, str]]]] = deque()
    bad: set[int] = set()  # rows: a weighted order may visit one several times

    def next_result() -> Decoded:
        decoded, reasons = pending.popleft().result()
        for row, reason in reasons.items():
            if row in bad:
                continue
            bad.add(row)
            if len(bad) > max_bad:
                allowed = f"; more than {max_bad} such images (--max-bad)" if max_bad else ""
                raise DataError(f"{reason}{allowed}")
            logger.warning("%s; left out, %d of %d allowed", reason, len(bad), max_bad)
        return decoded

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for batch in encoded:
                pending.append(pool.submit(_decode_batch, batch, split, size))
                # One batch per thread at work, and as many finished ones waiting.
                if len(pending) >= 2 * threads:
                    yield next_result()
            while pending:
                yield next_result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_image(file: ShardFile, offset: int, length: int, crc: int, encoding: str) -> Gray:
    """The stored image at a place in a shard, in its own size.

    Raises ValueError where it does not match its checksum or does not decode, and OSError.
    """
    data = os.pread(file.descriptor, length, offset)
    if zlib.crc32(data) != crc:
        raise ValueError("its bytes do not match the checksum in the index")
    return decode_stored(data, encoding)


def label(decoded: Iterable[Decoded], labels: Labels) -> Iterator[Batch]:
    """Join each batch with its rows of the targets and masks; nothing is learnt from unusable images."""
    for step, images, bad in decoded:
        mask = labels.mask[step.rows]
        mask[bad] = False
        yield Batch(step, images, labels.target[step.rows], mask, bad)


def _decode_batch(batch: Encoded, split: OpenSplit, size: int) -> tuple[Decoded, dict[int, str]]:
    """The images, and what is wrong with each bad one, by its row."""
    rows = batch.step.rows.ravel()
    positions = np.flatnonzero(rows >= 0).tolist()
    images = np.empty((len(rows), 1, size, size), np.uint8)
    images[rows < 0] = 0
    bad, reasons = [], {}
    places = batch.offset.tolist(), batch.length.tolist(), batch.crc.tolist()
    for position, file, offset, length, crc in zip(positions, batch.files, *places, strict=True):
        try:
            images[position, 0] = resize(read_image(file, offset, length, crc, split.encoding), size, size)
        except (ValueError, OSError) as error:
            row = int(rows[position])
            shard, key = split.shards[split.shard[row]].file, split.table["key"][row].as_py()
            reasons[row] = f"{shard}: sample {key}: {error}"
            images[position] = 0
            bad.append(position)
    return Decoded(batch.step, images.reshape(*batch.step.rows.shape, 1, size, size), bad), reasons


def _open_shard(split: OpenSplit, number: int) -> ShardFile:
    shard = split.shards[number]
    path = split.remote.path(shard) if split.remote else split.folder / shard.file
    try:
        return ShardFile(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _download_ahead(steps: Iterable[Step], split: OpenSplit, remote: Remote) -> Iterator[Step]:
    """The steps as they come, each when its shards are there; those of the next window arrive meanwhile."""
    waiting: deque[tuple[Step, list[int]]] = deque()
    arrivals: dict[int, Future[Path]] = {}  # of the shards that the waiting steps need
    needs: Counter[int] = Counter()  # how many of them need it
    stop = Event()
    with ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download") as pool:

        def next_step() -> Step:
            step, numbers = waiting.popleft()
            for number in numbers:
                arrivals[number].result()
                needs[number] -= 1
                if needs[number] == 0:
                    del arrivals[number], needs[number]
            return step

        try:
            for step in steps:
                numbers = np.unique(split.shard[step.images]).tolist()
                for number in numbers:
                    needs[number] += 1
                    if number not in arrivals:
                        arrivals[number] = pool.submit(remote.path, split.shards[number], stop)
                waiting.append((step, numbers))
                while len(arrivals) >= KEPT_OPEN:
                    yield next_step()
            while waiting:
                yield next_step()
        finally:
            stop.set()  # what is under way ends too: a trainer that was told to stop has to save
            pool.shutdown(wait=True, cancel_futures=True)
