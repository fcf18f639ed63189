"""Plan → batches of images, targets and masks. Stages, in order, each `Iterator → Iterator`:

    plan    steps: which samples make each batch (pipeline.stream.plan)
    fetch   the same steps; those of remote shards wait until these, downloaded ahead, are on this machine
    decode  batches: stored bytes, by the Arrow index, → uint8 [N, 1, H, W], by threads that work ahead

Reading, libjpeg-turbo and OpenCV release the interpreter lock, so threads do without copies between processes. Bytes
are read, not mapped: memory stays flat, and a file that is truncated meanwhile raises an error that names it.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import FileIO
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DataError, printable
from pipeline.base.store import read_at
from pipeline.images import Gray, decode_into, raw_header
from pipeline.manifest import checksum
from pipeline.stream.plan import WINDOW, Bools, Rows, Step
from pipeline.stream.samples import OpenSplit

# This module runs its own decoding threads; OpenCV's would only compete with them.
cv2.setNumThreads(1)

KEPT_OPEN = 2 * WINDOW  # shards: the window that is read, and the next
DOWNLOADS = 4  # at the same time
Plan = Callable[[int], Iterator[Step]]  # takes the number of the first step
Stage = Callable[[Iterator[Any]], Iterator[Any]]
Size = int | tuple[int, int]  # of square images, or height and width
logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """Of all rows of a split."""

    target: npt.NDArray[np.float32]  # [N, L], of L labels
    mask: Bools  # [N, L]


@dataclass
class Unusable:
    """Unusable images of a split, at most `allowed`; each counts once over all epochs and streams."""

    allowed: int = 0
    rows: set[int] = field(default_factory=set)

    def add(self, row: int, reason: str) -> None:
        """Count and log the image of a row once. Raises DataError with the reason if there are more than allowed."""
        if row not in self.rows:
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
        return {"rows": sorted(self.rows)}

    def load_state_dict(self, state: Mapping[str, Iterable[int]]) -> None:
        self.update(state["rows"])


class _OpenFile(FileIO):
    """A file that is closed when nothing refers to it any longer."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    def __del__(self) -> None:
        self.close()


class Reader:
    """The stored images of a split. Several threads may share it; the last KEPT_OPEN shards that are read stay open."""

    def __init__(self, split: OpenSplit) -> None:
        self.split = split
        self._open = lru_cache(KEPT_OPEN)(lambda number: _OpenFile(split.shards[number].path()))

    def locate(self, rows: Rows) -> Iterator[tuple[int, int, int, int]]:
        """The place of each row's image: what `read` takes."""
        columns = (self.split.shard, self.split.offset, self.split.length, self.split.crc)
        return zip(*(column[rows].tolist() for column in columns), strict=True)

    def read(self, shard: int, offset: int, length: int, crc: int) -> bytes:
        """An image's stored bytes. Raises DataError, OSError and, for other bytes than were indexed, ValueError."""
        file = self._open(shard)  # kept by a name: another thread may make it leave the cache, which would close it
        data = read_at(file.fileno(), length, offset)
        if checksum(data, self.split.encoding) != crc:
            raise ValueError("its bytes do not match the checksum in the index")
        return data

    def decode(self, out: Gray, shard: int, offset: int, length: int, crc: int) -> None:
        """Fill `out` [H, W], contiguous, with an image, resized to fit. Raises as `read` and `decode_into` do."""
        header = raw_header(out.shape) if self.split.encoding == "raw" else b""
        if header and length == len(header) + out.size:  # its pixels need no memory but `out`
            file, begin = self._open(shard), bytearray(len(header))
            os.preadv(file.fileno(), (begin, out.data), offset)
            if begin == header and checksum(out.data, "raw", checksum(header, "raw")) == crc:
                return
        decode_into(out, self.read(shard, offset, length, crc), self.split.encoding)


class Batch(NamedTuple):
    """B samples with L labels, and their N images, a sample's one after the other; of single images N = B."""

    step: Step
    images: npt.NDArray[np.uint8]  # [N, 1, H, W]
    sample: Rows  # [N], the position of each image's sample in the batch
    place: Rows  # [N], of the image in its sample
    projection: npt.NDArray[np.int8]  # [N], its place in PROJECTIONS
    target: npt.NDArray[np.float32]  # [B, L]
    mask: Bools  # [B, L]
    bad: list[int]  # the samples without a usable image: they have one black image and are masked

    def __repr__(self) -> str:
        shapes = f"images {list(self.images.shape)}, target {list(self.target.shape)}"
        return f"<Batch {int(self.step.step)} of epoch {int(self.step.epoch)}: {shapes}>"

    @property
    def present(self) -> Bools:
        """Which places of the samples have an image, bool [B, V]."""
        present = np.zeros(self.step.rows.shape, np.bool_)
        present[self.sample, self.place] = True
        return present

    def part(self, start: int, stop: int) -> "Batch":
        """The samples from `start` to before `stop`, as a batch."""
        samples, images = slice(start, stop), slice(*np.searchsorted(self.sample, (start, stop)))
        step, bad = self.step._replace(rows=self.step.rows[samples]), [n - start for n in self.bad if start <= n < stop]
        of_images = self.images[images], self.sample[images] - start, self.place[images], self.projection[images]
        return Batch(step, *of_images, self.target[samples], self.mask[samples], bad)


class BatchStream:
    """The batches of one epoch, in the order of its plan. Torch's DataLoader takes a LoaderStream.

    `stages` are fetch and decode; add your own, from iterator to iterator: `stream.stages.append(equalize)`. Iterating
    starts at the first step or, once, at the state that `load_state_dict` was given.
    """

    def __init__(self, plan: Plan, *stages: Stage) -> None:
        self.plan, self.stages = plan, list(stages)
        # Leaving a loop early must not change where the next iteration starts, so position and start differ.
        self.step = self._start = 0

    def __repr__(self) -> str:
        return f"<BatchStream at step {self.step} of {len(self)}>"

    def __iter__(self) -> Iterator[Batch]:
        self.step, self._start = self._start, 0
        return self.run(self.step)

    def __len__(self) -> int:
        """The number of batches in the epoch, independent of the position."""
        return sum(1 for _ in self.plan(0))

    def run(self, start: int, worker: int = 0, workers: int = 1) -> Iterator[Batch]:
        """The batches from a step on or, for one of several workers, its share of them: every `workers`-th."""
        batches: Iterator[Any] = islice(self.plan(start), worker, None, workers)
        for stage in self.stages:
            batches = stage(batches)
        for batch in batches:
            # In a worker, the position from which `run` reaches its next batch after skipping other workers' batches.
            self.step = batch.step.step + workers - worker
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
    split: OpenSplit, labels: Labels, plan: Plan, size: Size, threads: int = 2, bad: Unusable | None = None
) -> BatchStream:
    """The batches of a plan, such as partial(plan_evaluation, samples, batch_size).

    The unusable images that `bad` allows (none by default) are left out, or black and masked if they are a sample's
    only ones; more raise DataError naming shard and key.
    """
    shape, bad = (size, size) if isinstance(size, int) else size, bad or Unusable()
    decoded = partial(decode, split=split, labels=labels, shape=shape, threads=threads, bad=bad)
    return BatchStream(plan, partial(fetch, split=split), decoded)


def fetch(steps: Iterable[Step], split: OpenSplit) -> Iterator[Step]:
    """The steps, each when its shards are on this machine; remote ones of the next window arrive meanwhile."""
    if not any(file.remote for file in split.shards):
        yield from steps
        return
    listed = [(step, np.unique(split.shard[step.images]).tolist()) for step in steps]
    waiting = iter(dict.fromkeys(chain.from_iterable(numbers for _, numbers in listed)))  # as they are first needed
    arrivals: dict[int, Future[Path]] = {}
    needed: set[int] = set()
    stop = Event()
    pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="download")
    try:
        for step, numbers in listed:
            needed.update(numbers)
            for number in islice(waiting, len(needed) + WINDOW - len(arrivals)):
                arrivals[number] = pool.submit(split.shards[number].path, stop)
            for number in numbers:
                arrivals[number].result()
            yield step
    finally:
        stop.set()  # downloads in progress end at their next piece, so that an interrupted trainer can save
        pool.shutdown(wait=False, cancel_futures=True)


def decode(
    steps: Iterable[Step], split: OpenSplit, labels: Labels, shape: tuple[int, int], threads: int, bad: Unusable
) -> Iterator[Batch]:
    """Decode ahead, on threads, into images of a shape [H, W]; yields the batches in the order given, adds to `bad`."""
    reader = Reader(split)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        futures = (pool.submit(_decode_batch, step, reader, labels, shape) for step in steps)
        try:
            pending = deque(islice(futures, 2 * threads))  # a batch per thread at work, and as many that wait
            while pending:
                batch, reasons = pending.popleft().result()
                for row, reason in reasons.items():
                    bad.add(row, reason)
                yield batch
                pending.extend(islice(futures, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def choose_usable(sample: Rows, place: Rows, usable: Bools) -> tuple[Bools, list[int]]:
    """Which images [N] stay, and the samples without a usable image, whose first one stays."""
    seen = np.zeros(sample[-1] + 1, np.bool_)
    seen[sample[usable]] = True
    return usable | ~seen[sample] & (place == 0), np.flatnonzero(~seen).tolist()


def _decode_batch(step: Step, reader: Reader, labels: Labels, shape: tuple[int, int]) -> tuple[Batch, dict[int, str]]:
    """The batch of a step, and the reason for each bad image, by row."""
    split, rows = reader.split, step.images
    sample, place = np.nonzero(step.rows >= 0)
    images = np.empty((len(rows), 1, *shape), np.uint8)
    usable, reasons = np.ones(len(rows), np.bool_), {}
    for position, stored in enumerate(reader.locate(rows)):
        try:
            reader.decode(images[position, 0], *stored)
        except (ValueError, OSError) as error:
            row = int(rows[position])
            file = split.shards[split.shard[row]].shard.file
            reasons[row] = printable(f"{file}: sample {split.table['key'][row]}: {error}")
            images[position], usable[position] = 0, False
    bad: list[int] = []
    if reasons:
        kept, bad = choose_usable(sample, place, usable)
        images, sample, place, rows = images[kept], sample[kept], place[kept], rows[kept]
    first = step.rows[:, 0]  # the images of a sample share their labels
    mask = labels.mask[first]
    mask[bad] = False  # nothing is learned from a sample without a usable image
    return Batch(step, images, sample, place, split.projection[rows], labels.target[first], mask, bad), reasons
