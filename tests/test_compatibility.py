"""Shards and a run of format version 1, made once by version 0.1 of this program: later ones read them.

data/version-1.tar.xz holds `shards` of 13 drawn patients, all views, and a `run` of rescnn stopped after the first of
two epochs, whose weights were replaced by a pattern that compresses. It is never made anew: a version that
cannot read it has to say how to convert.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

import train
from model.runs.commands import main
from model.runs.config import read_config
from model.runs.job import StopFlag
from model.runs.scores import read_scores
from pipeline import open_shards
from pipeline.manifest import read_manifest, read_table
from pipeline.stream.samples import open_split
from tests.conftest import run_pipeline

COUNTS = {"train": 24, "dev": 6, "valid": 9}
FIRST = {"key": "patient00009_study2_view1_frontal", "age": 29, "No Finding": -1, "Edema": 1, "Pneumonia": 0}
FIRST |= {"Atelectasis": None, "shard": 0, "offset": 512, "length": 1029, "crc": 2330442302}
PIXELS = 129.075
SCORES = [
    0.6367,
    0.6989,
    0.7361,
    0.7411,
    0.7163,
    0.635,
    0.6973,
    0.7428,
    0.7476,
    0.7217,
    0.6338,
    0.6958,
    0.7463,
    0.7564,
]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).parent / "data" / "version-1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_shards_of_version_1_are_read(old: Path) -> None:
    verified = run_pipeline("verify", old / "shards", "--deep")
    assert verified.returncode == 0, verified.stderr
    manifest = read_manifest(old / "shards")
    split = open_split(old / "shards", manifest, "train")
    assert {name: entry.samples for name, entry in manifest.splits.items()} == COUNTS
    row = split.table.slice(0, 1).to_pylist()[0]
    assert {name: row[name] for name in FIRST} == FIRST
    (batch,) = open_shards(old / "shards")["train"].batches(split.table.num_rows, 32, epoch=None)
    assert batch.images.mean() == pytest.approx(PIXELS, abs=0.5)


def test_a_run_of_version_1_scores_as_it_did_and_continues(
    old: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopFlag, "listen", lambda self: self)

    def call(*words: object) -> int:
        return int(main.main(list(map(str, words)), standalone_mode=False, obj=train.train))

    run, shards = old / "run", old / "shards"
    config = read_config(run)
    assert (config.sync_bn, config.fusion, config.freeze) == (False, None, False)  # options since then
    assert call("evaluate", "--shards", shards, "--run", run, "--split", "valid") == 0
    keys = read_table(shards, read_manifest(shards).split("valid"))["key"]
    scores = read_scores(run / "scores-valid.arrow", keys)
    np.testing.assert_allclose(scores[0], SCORES, atol=1e-3)
    options = ["--arch", "rescnn", "--batch-size", 4, "--image-size", 32, "--lr", "1e-3", "--epochs", 2]
    assert call("--shards", shards, "--run", run, *options, "--workers", 1) == 0
    assert f"{run}: continuing after step 6 of 12" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    assert (
        call("--shards", shards, "--run", run, *options, "--workers", 1) == 0
    )  # and is finished, not scored again
    said = capsys.readouterr()
    assert f"{run}: finished, after step 12 of 12; another --run goes on by --init {run}\n" in said.err
    assert "Scoring" not in said.err
    assert said.err.endswith(f"next: python train.py predict --run {run} --out scores.csv FILMS\n")
