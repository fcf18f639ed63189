import io
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.labels import make_targets, parse_uncertain_policy
from pipeline.manifest import Manifest
from pipeline.plan import plan_training
from pipeline.stream import (
    Batch,
    Encoded,
    Labels,
    OpenSplit,
    compose,
    open_split,
    stages,
    stream_evaluation,
    stream_training,
)

Shards = tuple[Path, Manifest]
LINEAR = cv2.INTER_LINEAR_EXACT


@pytest.fixture
def split(shards: Shards) -> OpenSplit:
    return open_split(*shards, "train")


@pytest.fixture
def labels(split: OpenSplit) -> Labels:
    return Labels(*make_targets(split.table, parse_uncertain_policy("best"), "zeros", seed=0))


def training(split: OpenSplit, labels: Labels, **options: Any) -> list[Batch]:
    defaults = {"size": 32, "batch_size": 4, "seed": 0, "epoch": 0}
    return list(stream_training(split, labels, **(defaults | options)))


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.step[:2] == other.step[:2]
        for ours, theirs in zip((batch.step.rows, *batch[1:]), (other.step.rows, *other[1:]), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_batches_hold_what_plain_readers_find(shards: Shards, split: OpenSplit, labels: Labels) -> None:
    folder, manifest = shards
    images = {}
    for shard in manifest.split("train").shards:
        with tarfile.open(folder / shard.file) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    image = Image.open(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
                    images[member.name[:-4]] = cv2.resize(np.asarray(image), (32, 32), interpolation=LINEAR)
    batches = training(split, labels)
    assert len(batches) == split.table.num_rows // 4
    for batch in batches:
        assert batch.images.shape == (4, 1, 32, 32)
        assert batch.images.dtype == np.uint8
        for position, row in enumerate(batch.step.rows):
            np.testing.assert_array_equal(
                batch.images[position, 0], images[split.table["key"][int(row)].as_py()]
            )
        np.testing.assert_array_equal(batch.target, labels.target[batch.step.rows])
        np.testing.assert_array_equal(batch.mask, labels.mask[batch.step.rows])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("start_step", [0, 1, 3])
def test_same_batches_at_any_number_of_threads_and_from_any_step(
    split: OpenSplit, labels: Labels, threads: int, start_step: int
) -> None:
    whole = training(split, labels, threads=3)
    assert_equal(training(split, labels, threads=threads, start_step=start_step), whole[start_step:])


def test_epochs_differ(split: OpenSplit, labels: Labels) -> None:
    first, second = (
        np.concatenate([batch.step.rows for batch in training(split, labels, epoch=e)]) for e in (0, 1)
    )
    assert first.tolist() != second.tolist()


def test_evaluation_sees_every_sample_once(split: OpenSplit, labels: Labels) -> None:
    batches = list(stream_evaluation(split, labels, size=32, batch_size=5))
    np.testing.assert_array_equal(
        np.concatenate([b.step.rows for b in batches]), np.arange(split.table.num_rows)
    )
    np.testing.assert_array_equal(np.concatenate([b.target for b in batches]), labels.target)


def test_a_stage_of_the_users_own(split: OpenSplit, labels: Labels) -> None:
    def keep_even_steps(encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        return (batch for batch in encoded if batch.step.step % 2 == 0)

    plan = partial(plan_training, split.shard_sizes, 4, 0, 0)
    fetch, decode, label = stages(split, labels, size=32, threads=2)
    batches = list(compose(plan, fetch, keep_even_steps, decode, label))
    assert_equal(batches, training(split, labels)[::2])


def test_a_flipped_bit_is_named(shards: Shards, split: OpenSplit, labels: Labels) -> None:
    row = 5
    path = shards[0] / split.files[split.shard[row]]
    data = bytearray(path.read_bytes())
    data[split.offset[row] + split.length[row] // 2] ^= 1
    path.write_bytes(data)
    key = split.table["key"][row].as_py()
    with pytest.raises(DataError) as caught:
        list(stream_evaluation(open_split(*shards, "train"), labels, size=32, batch_size=4))
    assert str(caught.value) == (
        f"{path.name}: sample {key}: its bytes do not match the checksum in the index"
    )


def test_missing_and_truncated_shards_are_found_before_the_first_batch(shards: Shards) -> None:
    folder, manifest = shards
    shard = folder / manifest.split("train").shards[1].file
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(1024)
    with pytest.raises(
        DataError, match=rf"train-000001.tar: damaged: 1024 bytes, not {size} as in the manifest$"
    ):
        open_split(folder, manifest, "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001.tar: the shard is missing$"):
        open_split(folder, manifest, "train")


def test_an_abandoned_stream_ends_its_threads(split: OpenSplit, labels: Labels) -> None:
    import threading

    iterator = iter(stream_training(split, labels, size=32, batch_size=2, seed=0, epoch=0, threads=2))
    next(iterator)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    del iterator
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())
