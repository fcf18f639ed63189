"""Training with a frozen backbone, on embeddings that are computed once."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import train
from model.checkpoint import load_checkpoint
from model.networks import build_network
from model.runs import embeddings
from model.runs.job import Job
from model.runs.scoring import score_best
from pipeline import DataError
from pipeline.base.files import read_arrow
from pipeline.manifest import Manifest
from pipeline.stream import batches
from tests.conftest import run_pipeline
from tests.test_train import make_job, open_small_job  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def no_results() -> Iterator[None]:
    """The evaluations at the end of a run take longer than training it here."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "finish_run", lambda job: {})
        yield


@pytest.fixture(scope="module")
def init(sample_shards: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a small run on images."""
    job = open_small_job(sample_shards[0], tmp_path_factory.mktemp("init") / "run", epochs=1)
    assert train.train(job) == 0
    return job.run / "best.pt"


@pytest.fixture
def make(
    make_job: Callable[..., Job],  # noqa: F811
    sample_shards: tuple[Path, Manifest],
    init: Path,
    tmp_path: Path,
) -> Callable[..., Job]:
    """A small job with a frozen backbone, on shards of its own."""
    folder = shutil.copytree(sample_shards[0], tmp_path / "shards")
    return partial(make_job, shards=folder, init=init, freeze=True, augment="none", lr=1e-2)


def history(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: weights, averages, optimizer, position, and every number of the metrics."""
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (run, other))
    assert ours.pop("precision") == theirs.pop("precision")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were read, as one number in a list."""
    count, read = [0], batches.read_into

    def reading(*arguments: Any) -> Any:
        count[0] += 1
        return read(*arguments)

    monkeypatch.setattr(batches, "read_into", reading)
    return count


@pytest.mark.parametrize("augment", ["robust", pytest.param("crop", marks=pytest.mark.soak)])
def test_only_the_last_layer_learns(make: Callable[..., Job], init: Path, augment: str) -> None:
    job = make("run", augment=augment, epochs=1, ema=0.0)
    assert train.train(job) == 0
    assert not (Path(str(job.shards)) / "embeddings").exists()
    before, after = load_checkpoint(init)["weights"], load_checkpoint(job.run / "best.pt")["weights"]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"head.2.weight", "head.2.bias"}
    optimizer = load_checkpoint(job.run / "last.pt")["optimizer"]
    assert [tuple(state["exp_avg"].shape) for state in optimizer["state"].values()] == [(14, 256), (14,)]


@pytest.mark.parametrize("fusion", [None, pytest.param("attention", marks=pytest.mark.soak)])
def test_embeddings_give_what_the_images_give(
    make: Callable[..., Job],
    study_shards: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fusion: str | None,
) -> None:
    """The same losses, weights and scores; and once they are there, no image is read to train."""
    options: dict[str, Any] = {"fusion": fusion, "batch_size": 8, "balance": "Edema", "accumulate": 2}
    if fusion:
        options["shards"] = study_shards[0]
    cached = make("cached", **options)
    assert train.train(cached) == 0
    count = count_reads(monkeypatch)
    assert train.train(make("again", **options)) == 0
    assert count == [0]
    assert_same_run(tmp_path / "again", cached.run)
    monkeypatch.setattr(Job, "on_embeddings", False)
    bypassed = make("bypassed", **options)
    assert train.train(bypassed) == 0
    assert count[0] > 0
    for ours, theirs in zip(history(cached), history(bypassed), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
    networks = [load_checkpoint(job.run / "best.pt")["weights"] for job in (cached, bypassed)]
    torch.testing.assert_close(*networks, rtol=0, atol=1e-5)
    one, other = (score_best(job, "valid")[0].scores for job in (cached, bypassed))  # of images
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_an_interrupted_run_continues_exactly_and_keeps_what_was_embedded(
    make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embeddings, "EVALUATION_BATCH", 32)
    whole = make("whole")
    assert train.train(whole) == 0
    folder = tmp_path / "shards" / "embeddings"
    expected = {path.name: path.read_bytes() for path in folder.glob("*.arrow")}
    assert {name.split("-")[0] for name in expected} == {"train", "dev"}
    shutil.rmtree(folder)
    assert train.train(make("parts", stop_after=3)) == 143  # in the third batch of train
    (path,) = folder.glob("*.arrow")
    assert read_arrow(path, path.read_bytes())["row"].to_pylist() == list(range(64))
    count = count_reads(monkeypatch)
    assert train.train(make("parts", stop_after=10)) == 143  # in the first epoch
    assert {path.name: path.read_bytes() for path in folder.glob("*.arrow")} == expected
    splits = whole.manifest.splits
    assert count == [splits["train"].samples - 64 + splits["dev"].samples]
    assert train.train(make("parts")) == 0
    assert_same_run(tmp_path / "parts", whole.run)


@pytest.mark.soak
def test_each_use_has_the_embeddings_of_its_own_inputs(
    make: Callable[..., Job], tmp_path: Path, sample_shards: tuple[Path, Manifest]
) -> None:
    """Another seed or head shares them; other weights, another size or other shards do not. Rows add up."""
    folder = tmp_path / "shards" / "embeddings"

    def names() -> set[str]:
        return {path.name for path in folder.iterdir()} - {".lock"}

    assert train.train(make("limited", epochs=1, batch_size=8, limit=20)) == 0
    first = names()
    (path,) = (folder / name for name in first if name.startswith("train"))
    before = read_arrow(path, path.read_bytes())
    assert train.train(make("all", epochs=1, seed=1, where=("sex=Female",))) == 0
    assert names() == first
    after = read_arrow(path, path.read_bytes())
    rows = after["row"].to_numpy()
    assert (np.diff(rows) > 0).all()
    assert len(after) > len(before)
    kept = after.filter(pa.array(np.isin(rows, before["row"].to_numpy())))
    assert kept.equals(before)

    wider = make("larger", epochs=1, image_size=40)
    assert train.train(wider) == 0
    assert len(names()) == 2 * len(first)
    other = make("other", epochs=1, init=wider.run / "best.pt")  # the same backbone, another head
    assert train.train(other) == 0
    assert len(names()) == 2 * len(first)
    weights = load_checkpoint(wider.run / "best.pt")
    weights["weights"]["stem.0.weight"] *= 2
    torch.save(weights, tmp_path / "changed.pt")
    assert train.train(make("changed", epochs=1, init=tmp_path / "changed.pt")) == 0
    assert len(names()) == 3 * len(first)
    for command in (["verify", tmp_path / "shards", "--deep"], ["stats", tmp_path / "shards"]):
        done = run_pipeline(*command)
        assert (done.returncode, "embeddings" in done.stdout + done.stderr) == (0, False)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def overwrite(path: Path) -> None:
    path.write_bytes(b"foreign")


@pytest.mark.parametrize(
    "how", [*(pytest.param(how, marks=pytest.mark.soak) for how in (damage, overwrite)), "swap"]
)
def test_a_damaged_or_foreign_file_is_named_and_computed_again(
    make: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: Any
) -> None:
    first = make("first", epochs=1)
    assert train.train(first) == 0
    paths = sorted((tmp_path / "shards" / "embeddings").glob("*.arrow"))
    expected = [path.read_bytes() for path in paths]
    if how == "swap":
        paths[0].write_bytes(expected[1])  # dev's are train's
    else:
        how(paths[0])
    capsys.readouterr()
    assert train.train(make("second", epochs=1)) == 0
    said = capsys.readouterr().err
    assert f"{paths[0]}: damaged, or of something else; computed again\n" in said
    assert [path.read_bytes() for path in paths] == expected
    assert_same_run(tmp_path / "second", first.run)


@pytest.mark.soak
def test_unusable_images_are_left_out_and_counted_each_time(
    make: Callable[..., Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make("first", epochs=1, max_bad=0.02)
    shard = tmp_path / "shards" / job.manifest.splits["train"].shards[0].file
    data = bytearray(shard.read_bytes())
    row = read_arrow(tmp_path, (tmp_path / "shards" / "train.arrow").read_bytes()).slice(3, 1).to_pylist()[0]
    data[row["offset"] + row["length"] // 2] ^= 255
    shard.write_bytes(data)
    for run in ("first", "second"):
        caplog.clear()
        assert train.train(make(run, epochs=1, max_bad=0.02)) == 0
        assert [record.getMessage() for record in caplog.records if row["key"] in record.getMessage()] == [
            f"{shard.name}: sample {row['key']}: its bytes do not match the checksum in the index; left out, "
            "1 of 2 allowed"
        ]
    with pytest.raises(DataError, match=f"{shard.name}: sample {row['key']}: its bytes do not match"):
        train.train(make("strict", epochs=1))


@pytest.mark.soak
def test_where_the_shards_cannot_be_written_the_run_keeps_them(
    make: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path / "shards")
    job = make("run", epochs=1)
    assert train.train(job) == 0
    assert not (tmp_path / "shards" / "embeddings").exists()
    assert len(list((job.run / "embeddings").glob("*.arrow"))) == 2


def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(
    make: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any) -> torch.nn.Module:
        network = build_network(*arguments)
        network.register_forward_hook(lambda _, __, logits: 2 * logits)
        return network

    monkeypatch.setattr(train, "build_network", build)
    with pytest.raises(DataError) as caught:
        train.train(make("run"))
    assert str(caught.value) == "`freeze` with `augment` none is for networks that end in a linear layer"
