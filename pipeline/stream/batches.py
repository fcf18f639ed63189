"""Plan → batches of images, targets and masks. Stages, in order, each `Iterator → Iterator`:

    plan    steps: which samples make each batch (pipeline.stream.plan)
    fetch   rows → location of their bytes in open shards, from the Arrow index; remote shards are downloaded ahead
    decode  stored bytes → uint8 [N, 1, H, W]; a few threads work on the next batches ahead
    label   + targets and masks [B, L], rows of arrays that were vectorized once

Nothing is parsed per sample and no tar is walked. Threads, not worker processes: reading, libjpeg-turbo and
OpenCV release the interpreter lock, so nothing is pickled or copied between processes, and batches leave in
plan order for any number of threads. Bytes are read, not mapped: memory stays flat, and a file truncated
while it is being streamed raises an error that names it.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DataError, printable
from pipeline.images import Gray, decode_into, decode_stored
from pipeline.manifest import checksum
from pipeline.stream.plan import WINDOW, Rows, Step
from pipeline.stream.samples import OpenSplit

# This module runs its own decoding threads; OpenCV's would only compete with them.
cv2.setNumThreads(1)

KEPT_OPEN = 2 * WINDOW  # shards: the window that is read, and the next
DOWNLOADS = 4  # at the same time
Stage = Callable[[Iterator[Any]], Iterator[Any]]

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """Target float32 [N, L] and mask bool [N, L] of all rows of a split, for L labels."""

    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]


@dataclass
class Unusable:
    """Unusable images of a split, at most `allowed`; each counts once over all epochs and streams."""

    allowed: int = 0
    rows: set[int] = field(default_factory=set)

    def add(self, row: int, reason: str) -> None:
        """Count and log the image of a row once. Raises DataError with the reason if there are more than allowed."""
        if row in self.rows:
            return
        self.rows.add(row)
        if len(self.rows) > self.allowed:
            limit = f"; more than {self.allowed} such images (`max_bad`)" if self.allowed else ""
            raise DataError(reason + limit)
        logger.warning("%s; left out, %d of %d allowed", reason, len(self.rows), self.allowed)

    def update(self, rows: Iterable[int]) -> None:
        """Add rows from other ranks or an earlier part of the run. Raises DataError if there are more than allowed."""
        self.rows.update(rows)
        if len(self.rows) > self.allowed:
            raise DataError(f"{len(self.rows)} images cannot be used, more than {self.allowed} (`max_bad`)")

    def state_dict(self) -> dict[str, list[int]]:
        """What a resume needs."""
        return {"rows": sorted(self.rows)}

    def load_state_dict(self, state: Mapping[str, Iterable[int]]) -> None:
        """Resume counting from this state."""
        self.update(state["rows"])


class ShardFile:
    """A shard to read from: kept open while any batch refers to it or, if not `kept`, opened for each read."""

    descriptor = -1  # not open

    def __init__(self, locate: Callable[[], Path], kept: bool = True) -> None:
        self.locate = locate
        if kept:
            self.descriptor = self._open()

    def read(self, length: int, offset: int) -> bytes:
        """`length` bytes at an offset. Raises DataError if the file cannot be opened, and OSError if reading fails."""
        if self.descriptor >= 0:
            return os.pread(self.descriptor, length, offset)
        descriptor = self._open()
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        path = self.locate()
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

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
    """A step with its images uint8 [N, 1, H, W], the sample [N] each belongs to, and its place [N] in the sample.

    `bad` lists the samples without a usable image; each has one black image.
    """

    step: Step
    images: npt.NDArray[np.uint8]
    sample: Rows
    place: Rows
    bad: list[int]


class Batch(NamedTuple):
    """Images uint8 [N, 1, H, W] of B samples, with target float32 [B, L] and mask bool [B, L] of L labels.

    The images of a sample follow each other: `sample` [N] is the position of each image's sample in the batch,
    `place` [N] the image's place in the sample, `projection` int8 [N] its place in PROJECTIONS. Where samples are
    single images N = B. `bad` lists the samples without a usable image: they have one black image and are masked.
    """

    step: Step
    images: npt.NDArray[np.uint8]
    sample: Rows
    place: Rows
    projection: npt.NDArray[np.int8]
    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]
    bad: list[int]

    def __repr__(self) -> str:
        shapes = f"images {list(self.images.shape)}, target {list(self.target.shape)}"
        return f"<Batch {int(self.step.step)} of epoch {int(self.step.epoch)}: {shapes}>"

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which places of the samples have an image, bool [B, V]."""
        present = np.zeros(self.step.rows.shape, np.bool_)
        present[self.sample, self.place] = True
        return present

    def part(self, start: int, stop: int) -> "Batch":
        """The samples from `start` to before `stop`, as a batch."""
        first, last = np.searchsorted(self.sample, (start, stop))
        return Batch(
            self.step._replace(rows=self.step.rows[start:stop]),
            self.images[first:last],
            self.sample[first:last] - start,
            self.place[first:last],
            self.projection[first:last],
            self.target[start:stop],
            self.mask[start:stop],
            [bad - start for bad in self.bad if start <= bad < stop],
        )


class BatchStream:
    """The batches of one epoch, in the order of its plan.

    `stages` are fetch, decode and label; insert your own, from iterator to iterator, wherever you like:

        stream.stages.insert(2, equalize)  # between decode and label

    Iterating starts at the first step or, once, at the state that `load_state_dict` was given. A stream is one epoch,
    however often it is iterated. Torch's DataLoader takes a LoaderStream.
    """

    def __init__(self, plan: Callable[[int], Iterator[Step]], *stages: Stage) -> None:
        """`plan` takes the number of the first step."""
        self.plan, self.stages = plan, list(stages)
        # Leaving a loop early must not change where the next iteration starts, so position and start differ.
        self.step = self._start = 0

    def __repr__(self) -> str:
        return f"<BatchStream at step {self.step} of {len(self)}>"

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        return self.run(start)

    def __len__(self) -> int:
        """The number of batches in the epoch, independent of the position."""
        return sum(1 for _ in self.plan(0))

    def run(self, start: int, worker: int = 0, workers: int = 1) -> Iterator[Batch]:
        """The batches from a step on or, for one of several workers, its share of them: every `workers`-th."""
        self.step = start
        return self._run(islice(self.plan(start), worker, None, workers), workers - worker)

    def _run(self, steps: Iterator[Step], ahead: int) -> Iterator[Batch]:
        batches: Iterator[Any] = steps
        for stage in self.stages:
            batches = stage(batches)
        for batch in batches:
            # In a worker, the position from which `run` reaches its next batch after skipping other workers' batches.
            self.step = batch.step.step + ahead
            yield batch
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """What a resume needs: the number of the next step."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the step of this state. Raises DataError if it is not the state of a stream."""
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise DataError(f"{dict(state)} is not the state of a stream: its step is a number from 0 on")
        self.step = self._start = step


def stream_batches(
    split: OpenSplit,
    labels: Labels,
    plan: Callable[[int], Iterator[Step]],
    *,
    size: int | tuple[int, int],
    threads: int = 2,
    bad: Unusable | None = None,
    kind: type[BatchStream] = BatchStream,
) -> BatchStream:
    """The batches of a plan: of an epoch of training, or of all samples in table order.

        plan = partial(plan_training, samples, batch_size, seed, epoch)
        plan = partial(plan_evaluation, samples, batch_size)

    Images are `size` pixels square, or of a height and width. The unusable images that `bad` allows (none by default)
    are left out, or black and masked if they are a sample's only ones; more raise DataError naming shard and key.
    """
    shape = (size, size) if isinstance(size, int) else size
    return kind(
        plan,
        partial(fetch, split=split),
        partial(decode, split=split, shape=shape, threads=threads, bad=bad or Unusable()),
        partial(label, split=split, labels=labels),
    )


def fetch(steps: Iterable[Step], split: OpenSplit) -> Iterator[Encoded]:
    """Locate the images of each step in open shards; bytes are read only when decoded."""
    opened: dict[int, ShardFile] = {}  # least recently used first
    for step in _download_ahead(steps, split) if split.is_remote else steps:
        rows = step.images
        shards = split.shard[rows]
        numbers = np.unique(shards).tolist()
        # Keeping the shards of a larger batch open could exceed the process's limit of open files.
        kept = len(numbers) <= KEPT_OPEN
        by_number = {
            number: opened.pop(number) if number in opened else ShardFile(partial(split.locate, number), kept)
            for number in numbers
        }
        if kept:
            opened |= by_number
        files = [by_number[number] for number in shards.tolist()]
        while len(opened) > KEPT_OPEN:
            del opened[next(iter(opened))]
        yield Encoded(step, files, split.offset[rows], split.length[rows], split.crc[rows])


def decode(
    encoded: Iterable[Encoded], split: OpenSplit, shape: tuple[int, int], threads: int, bad: Unusable
) -> Iterator[Decoded]:
    """Decode ahead on `threads` threads; yields images uint8 [N, 1, H, W] of a shape in the order given.

    Images that do not match their checksum or do not decode are added to `bad`. Raises DataError naming shard and key.
    """
    pending: deque[Future[tuple[Decoded, dict[int, str]]]] = deque()

    def next_result() -> Decoded:
        decoded, reasons = pending.popleft().result()
        for row, reason in reasons.items():
            bad.add(row, reason)
        return decoded

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for batch in encoded:
                pending.append(pool.submit(_decode_batch, batch, split, shape))
                # One batch per thread at work, and as many finished ones waiting.
                if len(pending) >= 2 * threads:
                    yield next_result()
            while pending:
                yield next_result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_image(file: ShardFile, offset: int, length: int, crc: int, encoding: str) -> Gray:
    """The stored image at an offset in a shard, at its stored size.

    Raises ValueError if it does not match its checksum or does not decode, and OSError.
    """
    return decode_stored(_read_bytes(file, offset, length, crc, encoding), encoding)


def read_into(out: Gray, file: ShardFile, offset: int, length: int, crc: int, encoding: str) -> None:
    """The same, resized to fill `out` [H, W]."""
    decode_into(out, _read_bytes(file, offset, length, crc, encoding), encoding)


def _read_bytes(file: ShardFile, offset: int, length: int, crc: int, encoding: str) -> bytes:
    data = file.read(length, offset)
    if checksum(data, encoding) != crc:
        raise ValueError("its bytes do not match the checksum in the index")
    return data


def label(decoded: Iterable[Decoded], split: OpenSplit, labels: Labels) -> Iterator[Batch]:
    """Add the samples' rows of the targets and masks; nothing is learned from samples without a usable image."""
    for step, images, sample, place, bad in decoded:
        first = step.rows[:, 0]  # the images of a sample share their labels
        mask = labels.mask[first]
        mask[bad] = False
        projection = split.projection[step.rows[sample, place]]
        yield Batch(step, images, sample, place, projection, labels.target[first], mask, bad)


def choose_usable(sample: Rows, place: Rows, usable: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], list[int]]:
    """Which images [N] stay, and the samples without a usable image, whose first one stays."""
    seen = np.zeros(sample[-1] + 1, np.bool_)
    seen[sample[usable]] = True
    return usable | ~seen[sample] & (place == 0), np.flatnonzero(~seen).tolist()


def _decode_batch(batch: Encoded, split: OpenSplit, shape: tuple[int, int]) -> tuple[Decoded, dict[int, str]]:
    """The decoded images, and the reason for each bad one, by row."""
    rows = batch.step.rows
    sample, place = np.nonzero(rows >= 0)
    images = np.empty((len(sample), 1, *shape), np.uint8)
    usable, reasons = np.ones(len(sample), np.bool_), {}
    places = zip(batch.files, batch.offset.tolist(), batch.length.tolist(), batch.crc.tolist(), strict=True)
    for position, (file, offset, length, crc) in enumerate(places):
        try:
            read_into(images[position, 0], file, offset, length, crc, split.encoding)
        except (ValueError, OSError) as error:
            row = int(rows[sample[position], place[position]])
            shard, key = split.shards[split.shard[row]].file, split.table["key"][row].as_py()
            reasons[row] = printable(f"{shard}: sample {key}: {error}")
            images[position], usable[position] = 0, False
    bad: list[int] = []
    if reasons:
        kept, bad = choose_usable(sample, place, usable)
        images, sample, place = images[kept], sample[kept], place[kept]
    return Decoded(batch.step, images, sample, place, bad), reasons


def _download_ahead(steps: Iterable[Step], split: OpenSplit) -> Iterator[Step]:
    """The steps as they come, each when its shards are there; those of the next window arrive meanwhile."""
    waiting: deque[tuple[Step, list[int]]] = deque()
    arrivals: dict[int, Future[Path]] = {}  # of the shards that the waiting steps need
    needs: Counter[int] = Counter()  # how many of them need it
    stop = Event()
    pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download")

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
                    arrivals[number] = pool.submit(split.locate, number, stop)
            waiting.append((step, numbers))
            while len(arrivals) >= KEPT_OPEN:
                yield next_step()
        while waiting:
            yield next_step()
    finally:
        stop.set()  # downloads in progress end at their next piece, so that an interrupted trainer can save
        pool.shutdown(wait=False, cancel_futures=True)
