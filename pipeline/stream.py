"""Plan → batches of images, targets and masks. Stages, in order, each `Iterator → Iterator`:

    plan    steps: which rows make each batch (pipeline.plan)
    fetch   rows → their stored bytes, sliced out of the memory-mapped tars by the Arrow index
    decode  stored bytes → uint8 [B, 1, size, size]; a few threads work on the next batches ahead
    label   + targets and masks [B, 14], rows of arrays that were vectorised once

Nothing is parsed per sample and no tar is walked. Threads, not worker processes: libjpeg-turbo and Pillow
release the interpreter lock, so nothing is pickled or copied between processes, and batches leave in plan
order whatever the number of threads.
"""

import mmap
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import DataError
from pipeline.images import Gray, decode_stored, resize
from pipeline.manifest import Manifest, read_table
from pipeline.plan import Step, plan_evaluation, plan_training


class OpenSplit(NamedTuple):
    """A split ready to be read: its table, one memory map per shard, and the index as arrays [N]."""

    name: str
    encoding: str
    table: pa.Table
    files: tuple[str, ...]
    shard_sizes: tuple[int, ...]
    maps: tuple[mmap.mmap, ...]
    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    length: npt.NDArray[np.int32]
    crc: npt.NDArray[np.uint32]


class Encoded(NamedTuple):
    """A step with its stored images, views into the memory-mapped tars, and their checksums."""

    step: Step
    images: list[memoryview]
    crcs: npt.NDArray[np.uint32]


class Batch(NamedTuple):
    """Images uint8 [B, 1, H, W], target float32 [B, 14], mask bool [B, 14], and the step they belong to."""

    step: Step
    images: npt.NDArray[np.uint8]
    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]


class Labels(NamedTuple):
    """Target float32 [N, 14] and mask bool [N, 14] of all rows of a split."""

    target: npt.NDArray[np.float32]
    mask: npt.NDArray[np.bool_]


def open_split(folder: Path, manifest: Manifest, name: str) -> OpenSplit:
    """Check table and shard sizes against the manifest, map the shards. Raises DataError naming the file."""
    split = manifest.split(name)
    table = read_table(folder, split)
    if table.num_rows != split.samples or sum(shard.samples for shard in split.shards) != split.samples:
        raise DataError(f"{folder / split.table}: {table.num_rows} rows, the manifest says {split.samples}")
    maps = []
    for shard in split.shards:
        path = folder / shard.file
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing")
        if path.stat().st_size != shard.bytes:
            raise DataError(
                f"{path}: damaged: {path.stat().st_size} bytes, not {shard.bytes} as in the manifest"
            )
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    arrays = {column: table[column].to_numpy() for column in ("shard", "offset", "length", "crc")}
    return OpenSplit(
        name,
        str(manifest.options.get("encoding", "jpeg")),
        table,
        files=tuple(shard.file for shard in split.shards),
        shard_sizes=tuple(shard.samples for shard in split.shards),
        maps=tuple(maps),
        **arrays,
    )


def stream_training(
    split: OpenSplit,
    labels: Labels,
    *,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    threads: int = 2,
) -> Iterable[Batch]:
    """The batches of one epoch from `start_step` on, in the plan's order; see `compose` for adding stages."""
    plan = partial(plan_training, split.shard_sizes, batch_size, seed, epoch, start_step)
    return compose(plan, *stages(split, labels, size=size, threads=threads))


def stream_evaluation(
    split: OpenSplit, labels: Labels, *, size: int, batch_size: int, threads: int = 2
) -> Iterable[Batch]:
    """Every sample of the split exactly once, in table order."""
    plan = partial(plan_evaluation, split.table.num_rows, batch_size)
    return compose(plan, *stages(split, labels, size=size, threads=threads))


def stages(
    split: OpenSplit, labels: Labels, *, size: int, threads: int
) -> tuple[Callable[..., Iterator[Any]], ...]:
    """fetch, decode and label, bound to a split: what turns steps into batches."""
    return (
        partial(fetch, split=split),
        partial(decode, split=split, size=size, threads=threads),
        partial(label, labels=labels),
    )


def compose(*parts: Callable[..., Any]) -> Iterable[Any]:
    """A `webdataset.DataPipeline` of the stages; users can put stages of their own between them."""
    import webdataset  # here, because it imports torch, which the rest of this package does without

    pipeline: Iterable[Any] = webdataset.DataPipeline(*parts)
    return pipeline


def fetch(steps: Iterable[Step], split: OpenSplit) -> Iterator[Encoded]:
    """Slice the images of each step out of the mapped tars; no byte is read before the decoder wants it."""
    views = [memoryview(mapped) for mapped in split.maps]
    for step in steps:
        places = zip(split.shard[step.rows], split.offset[step.rows], split.length[step.rows], strict=True)
        images = [views[shard][offset : offset + length] for shard, offset, length in places]
        yield Encoded(step, images, split.crc[step.rows])


def decode(
    encoded: Iterable[Encoded], split: OpenSplit, size: int, threads: int
) -> Iterator[tuple[Step, Gray]]:
    """Decode ahead on `threads` threads; yields (step, images uint8 [B, 1, size, size]) in the order given.

    Raises DataError naming shard and key where bytes do not match their checksum or do not decode.
    """
    pending: deque[tuple[Step, Future[Gray]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for batch in encoded:
                pending.append((batch.step, pool.submit(_decode_batch, batch, split, size)))
                # One batch per thread at work, and as many finished ones waiting.
                if len(pending) >= 2 * threads:
                    step, future = pending.popleft()
                    yield step, future.result()
            while pending:
                step, future = pending.popleft()
                yield step, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def label(decoded: Iterable[tuple[Step, Gray]], labels: Labels) -> Iterator[Batch]:
    """Join each batch with its rows of the targets and masks."""
    for step, images in decoded:
        yield Batch(step, images, labels.target[step.rows], labels.mask[step.rows])


def _decode_batch(batch: Encoded, split: OpenSplit, size: int) -> Gray:
    images = np.empty((len(batch.images), 1, size, size), np.uint8)
    for position, image in enumerate(batch.images):
        if zlib.crc32(image) != batch.crcs[position]:
            raise _damaged(batch, position, split, "its bytes do not match the checksum in the index")
        try:
            images[position, 0] = resize(decode_stored(image, split.encoding), size, size)
        except ValueError as error:
            raise _damaged(batch, position, split, str(error)) from None
    return images


def _damaged(batch: Encoded, position: int, split: OpenSplit, reason: str) -> DataError:
    row = int(batch.step.rows[position])
    key = split.table["key"][row].as_py()
    return DataError(f"{split.files[split.shard[row]]}: sample {key}: {reason}")
