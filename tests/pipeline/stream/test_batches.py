import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import BatchDataset, DataError, open_shards
from pipeline.base.errors import MachineError
from pipeline.images import decode_into, decode_stored
from pipeline.labels import LABELS
from pipeline.manifest import FACTS, read_table
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream import batches as stream
from pipeline.stream.batches import Batch, BatchStream, Labels, Unusable, stream_batches
from pipeline.stream.loader import LoaderStream
from pipeline.stream.plan import Rows, Samples, Step, plan_evaluation, plan_training
from pipeline.stream.samples import OpenSplit, find_images, find_studies, open_split
from tests.conftest import REPOSITORY, Shards, flip, make_shards, refused

Train = Callable[..., BatchStream]


@pytest.fixture
def split(shards: Shards) -> OpenSplit:
    return open_split(*shards, "train")


def best_labels(split: OpenSplit) -> Labels:
    """All targets and masks, by the policies of the shards."""
    return Labels(*make_targets(split.table, parse_uncertain_policy("best"), "zeros", seed=0))


def training(split: OpenSplit, samples: Samples | None = None, start_step: int = 0, **options: Any) -> BatchStream:
    """An epoch of training; of all images if no samples are given. The options are those of plan and stream."""
    given = {"size": 32, "batch_size": 4, "epoch": 0} | options
    reading = {name: given.pop(name) for name in ("size", "threads", "bad") if name in given}
    samples = find_images(split) if samples is None else samples
    plan = partial(plan_training, samples, given.pop("batch_size"), 0, given.pop("epoch"), **given)
    stream_ = LoaderStream(plan, *stream_batches(split, best_labels(split), plan, **reading).stages)
    stream_.load_state_dict({"step": start_step})
    return stream_


def evaluation(split: OpenSplit, batch_size: int, rows: Rows | None = None, **options: Any) -> BatchStream:
    """All images, or those of the rows, in table order."""
    plan = partial(plan_evaluation, find_images(split, rows), batch_size)
    return stream_batches(split, best_labels(split), plan, size=32, **options)


@pytest.fixture
def train(split: OpenSplit) -> Train:
    """Training on images, with the options of `training`."""
    return partial(training, split)


@pytest.fixture(params=["image", "study"])
def epoch(request: pytest.FixtureRequest, study_shards: Shards) -> Train:
    """Training on images or on studies, from shards of both, with the options of `training`."""
    split = open_split(*study_shards, "train")
    samples = find_images(split) if request.param == "image" else find_studies(split)[0]
    return partial(training, split, samples)


def assert_equal(batches: list[Any], expected: list[Any]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.step[:2] == other.step[:2]
        for array, wanted in zip((batch.step.rows, *batch[1:]), (other.step.rows, *other[1:]), strict=True):
            np.testing.assert_array_equal(array, wanted)


def join(parts: Sequence[Batch]) -> Batch:
    """The slices of several ranks as one batch."""
    starts = np.cumsum([0, *(len(part.target) for part in parts)])
    names = ("images", "place", "projection", "target", "mask")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    sample = np.concatenate([part.sample + start for part, start in zip(parts, starts, strict=False)])
    rows = np.concatenate([part.step.rows for part in parts])
    return parts[0]._replace(step=parts[0].step._replace(rows=rows), sample=sample, **columns)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_same_batches_for_any_threads_and_ranks_and_from_any_step(epoch: Train, threads: int, ranks: int) -> None:
    expected = list(epoch(threads=3))
    steps = len(expected)
    # Resumed in the middle, once more from there, with one step to go, and at the exact end.
    for start in (0, 1, 3, steps - 1, steps):
        streams = [epoch(threads=threads, start_step=start, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [len(stream_) for stream_ in streams] == [steps] * ranks
        assert_equal([join(parts) for parts in zip(*streams, strict=True)], expected[start:])


def test_a_resume_decodes_nothing_of_what_was_done(epoch: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Mock(wraps=decode_into)
    monkeypatch.setattr(stream, "decode_into", counted)
    batches = list(epoch(start_step=3))
    assert len(batches) == len(epoch()) - 3 > 1
    assert counted.call_count == sum((batch.step.rows >= 0).sum() for batch in batches)


def test_a_stage_of_the_users_own(train: Train) -> None:
    def keep_even_steps(steps: Iterable[Step]) -> Iterator[Step]:
        return (step for step in steps if step.step % 2 == 0)

    def invert(batches: Iterable[Batch]) -> Iterator[Batch]:
        return (batch._replace(images=255 - batch.images) for batch in batches)

    stream_ = train()
    stream_.stages.insert(1, keep_even_steps)  # between fetch and decode
    stream_.stages.append(invert)
    assert_equal(list(stream_), list(invert(list(train())[::2])))


def test_a_stream_continues_from_its_state_and_then_starts_over(train: Train) -> None:
    expected = list(train())
    for wrap in (lambda stream: stream, BatchDataset):
        for done in range(len(expected)):
            first, second = wrap(train()), wrap(train())
            batches = [batch for _, batch in zip(range(done), first, strict=False)]
            assert first.state_dict() == {"step": done}
            second.load_state_dict(first.state_dict())
            assert_equal(batches + list(second), expected)
        assert second.state_dict() == {"step": 0}
        assert_equal(list(second), expected)


def test_whoever_leaves_a_stream_finds_the_beginning_next(train: Train) -> None:
    stream_ = train(size=16)
    every = list(range(len(stream_)))

    def steps() -> list[int]:
        return [batch.step.step for batch in stream_]

    next(iter(stream_))
    assert steps() == every
    assert [steps() for _ in stream_] == [every] * len(every)
    stream_.load_state_dict({"step": 3})
    assert (stream_.step, len(stream_)) == (3, len(every))
    assert next(iter(stream_)).step.step == 3
    assert stream_.state_dict() == {"step": 4}
    assert steps() == every, "a loaded state is a start once"


@pytest.mark.parametrize(
    ("workers", "persistent", "is_wrapped"), [(0, False, False), (0, False, True), (1, True, False), (2, False, True)]
)
def test_a_loader_starts_over_after_it_was_left_early(
    train: Train, workers: int, persistent: bool, is_wrapped: bool
) -> None:
    stream_ = train(size=16, start_step=1)
    dataset: Any = BatchDataset(stream_) if is_wrapped else stream_
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=persistent)
    every = list(range(len(dataset)))
    batches = iter(loader)
    first = next(batches)
    assert isinstance(first.images, torch.Tensor)
    assert [first.step.step, next(batches).step.step] == [1, 2]
    for start in (0, 0, 2, 0):
        if start:
            dataset.load_state_dict({"step": start})  # which workers that persist have to learn
        assert [batch.step.step for batch in loader] == every[start:]
    for state in ({}, {"step": -1}):
        with pytest.raises(DataError, match=r"is not the state of a stream: its step is a number from 0 on$"):
            dataset.load_state_dict(state)


def flip_bit(folder: Path, split: OpenSplit, row: int) -> str:
    """Damage the image of a row; returns the error that names it."""
    path = folder / split.shards[split.shard[row]].shard.file
    flip(path, split.offset[row] + split.length[row] // 2)
    key = split.table["key"][row].as_py()
    return f"{path.name}: sample {key}: its bytes do not match the checksum in the index"


def test_bad_images_are_named_and_logged_up_to_a_limit(
    shards: Shards, split: OpenSplit, train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    """What the batches hold in their place is in test_samples."""
    first, last = (flip_bit(shards[0], split, row) for row in (5, 12))
    unusable = Unusable(2)
    stream_: Any = train(bad=unusable)
    list(stream_)
    texts, counts = zip(*(text.split("; ") for text in caplog.messages), strict=True)
    assert {*texts} == {first, last}
    assert counts == ("left out, 1 of 2 allowed", "left out, 2 of 2 allowed")
    assert stream_.stages[1].keywords["labels"].mask.all()  # the rows of the split itself are untouched
    with refused(f"{last}; more than 1 such images (`max_bad`)"):
        list(evaluation(split, 4, bad=Unusable(1)))
    # One budget for all streams that share it, and a state that others go on from.
    list(train(epoch=1, bad=unusable))
    assert unusable.state_dict() == {"rows": [5, 12]}
    assert len(caplog.messages) == 3
    with refused(flip_bit(shards[0], split, 20)):
        list(evaluation(split, 4, rows=np.array([20])))
    resumed = Unusable(2)
    resumed.load_state_dict(unusable.state_dict())
    with pytest.raises(DataError, match=r"; more than 2 such images \(`max_bad`\)$"):
        list(evaluation(split, 4, rows=np.array([20]), bad=resumed))
    with pytest.raises(DataError, match=r"^3 images cannot be used, more than 2 \(`max_bad`\)$"):
        unusable.update({7})


def test_a_shard_cut_short_under_a_running_stream_is_named(shards: Shards, split: OpenSplit) -> None:
    batches = iter(evaluation(split, 1, threads=1))
    next(batches)
    last = split.shards[-1].shard
    (shards[0] / last.file).write_bytes(b"")
    key = split.table["key"][split.table.num_rows - last.samples].as_py()
    with refused(f"{last.file}: sample {key}: its bytes do not match the checksum in the index"):
        list(batches)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux alone")
@pytest.mark.parametrize("batch_size", [1, 12])
def test_files_stay_open_only_as_long_as_they_are_read(
    shards: Shards, split: OpenSplit, train: Train, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Even those of a batch of many shards, which could exceed the limit of open files."""

    def open_tars() -> int:
        paths = []
        for link in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # another thread closed it meanwhile
                paths.append(str(link.readlink()))
        return sum(path.startswith(str(shards[0])) for path in paths)

    assert len(split.shards) > 3
    expected = list(train(batch_size=batch_size))
    monkeypatch.setattr(stream, "KEPT_OPEN", 1)
    batches, counts = [], set()
    for batch in train(batch_size=batch_size, threads=1):
        batches.append(batch)
        counts.add(open_tars())
    assert_equal(batches, expected)
    # The last that was read, and the one before while it is being replaced; none once the thread has read them all.
    assert max(counts) in (1, 2)
    assert open_tars() == 0


# A reader of Hugging Face leaves its tars open until they are collected.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets_reads_the_same(
    chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """By the call in shards/README.md, from shards whose first samples are blank: it guesses types from five."""
    make_shards(chexpert, tmp_path / "first")
    keys = [key for split in open_shards(tmp_path / "first").values() for key in split.table["key"].to_pylist()[:5]]
    for csv in (chexpert / "train.csv", chexpert / "valid.csv"):
        frame = pd.read_csv(csv, dtype=str)
        names = frame["Path"].str.removesuffix(".jpg").str.split("/").str[-3:].str.join("_")
        frame["Edema"] = np.where(names.isin(keys), "", "1.0")
        frame.to_csv(csv, index=False)
    folder = tmp_path / "shards"
    manifest = make_shards(chexpert, folder).manifest

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "shards" / "README.md").read_text()
    code = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_dataset" in code)
    variables: dict[str, Any] = {}
    exec(code.replace("features)  #", f"features, streaming={streaming})  #"), variables)  # noqa: S102
    assert variables["splits"].keys() == manifest.splits.keys() == {"train", "dev", "valid"}
    for name, samples in variables["splits"].items():
        assert isinstance(samples, datasets.IterableDataset) == streaming
        split = manifest.splits[name]
        rows = read_table(folder, split).to_pylist()
        assert {row["Edema"] for row in rows[:5]} == {None} != {row["Edema"] for row in rows}
        tars = [(folder / shard.file).read_bytes() for shard in split.shards]
        for sample, row in zip(samples, rows, strict=True):
            jpeg = tars[row["shard"]][row["offset"] : row["offset"] + row["length"]]
            np.testing.assert_array_equal(np.asarray(sample["jpg"]), decode_stored(jpeg, "jpeg"))
            facts = {name: row[name] for name in FACTS.names if name not in LABELS}
            assert sample["json"] == facts | {"labels": {label: row[label] for label in LABELS}}


def test_missing_and_truncated_shards_are_found_before_the_first_batch(shards: Shards) -> None:
    shard = shards[0] / shards[1].split("train").shards[1].file
    size = shard.stat().st_size
    os.truncate(shard, 1024)
    with refused(f"{shard}: damaged: 1024 bytes, not {size} as in the manifest"):
        open_split(*shards, "train")
    shard.unlink()
    with refused(f"{shard}: the shard is missing"):
        open_split(*shards, "train")


def test_an_abandoned_stream_ends_its_threads(train: Train) -> None:
    before = set(threading.enumerate())  # a test that failed in a stream may have left some
    iterator = iter(train(batch_size=2))
    next(iterator)
    assert any(thread.name.startswith("decode") for thread in set(threading.enumerate()) - before)
    del iterator
    assert set(threading.enumerate()) <= before


def load(stream_: BatchStream, context: str) -> Iterable[Any]:
    """The batches through two workers of a DataLoader that are started this way."""
    options: dict[str, Any] = {"batch_size": None, "num_workers": 2, "multiprocessing_context": context}
    for batch in DataLoader(BatchDataset(stream_), **options):
        arrays = {name: value.numpy() for name, value in batch._asdict().items() if name not in ("step", "bad")}
        yield Batch(batch.step._replace(rows=batch.step.rows.numpy()), **arrays, bad=batch.bad)


# Those that import torch anew take seconds.
@pytest.mark.parametrize(
    "context", ["fork", *(pytest.param(name, marks=pytest.mark.soak) for name in ("spawn", "forkserver"))]
)
def test_the_workers_of_a_loader_share_the_batches_in_their_order(split: OpenSplit, train: Train, context: str) -> None:
    streams = [train(size=16, start_step=1), evaluation(split, 4)]
    for stream_ in streams if context == "fork" else streams[:1]:
        shared = list(load(stream_, context))
        assert len(shared) == len(stream_) - (stream_ is streams[0]) > 2
        assert_equal(shared, list(stream_))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_continues_where_it_was(train: Train, workers: int) -> None:
    def loader() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(BatchDataset(train(size=16)), batch_size=None, num_workers=workers)

    last = len(train()) - 1
    for done in (0, 3, last):
        first, second = loader(), loader()
        batches = iter(first)
        steps = [int(next(batches)[0][1]) for _ in range(done)]
        second.load_state_dict(first.state_dict())
        assert steps + [int(batch[0][1]) for batch in second] == list(range(last + 1))


def test_full_shared_memory_is_named(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=RuntimeError("No space left on device (28)")))
    with refused("shared memory: No space left on device (28); make room in it", MachineError):
        train()
