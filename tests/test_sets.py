"""Every data set, from its files to a prediction: shards, checks, counts, two epochs of training, scores."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from model.runs.predictor import open_predictor
from pipeline.labels import label_states
from pipeline.sources.rows import read_splits
from pipeline.sources.sets import KNOWN, find_source
from tests.conftest import default_options, make_shards, run_pipeline
from tests.layouts import SETS, TABLES, list_rows
from tests.training import narrow_networks, open_small_run, quick_ends


def test_every_set_that_is_told_by_its_files_has_a_layout() -> None:
    assert SETS.keys() == KNOWN.keys()


def test_tables_are_read_as_their_rows_say(tmp_path: Path) -> None:
    """As tests/tables/rows.txt has them."""
    expected = re.split(r"^# (.+)\n", (TABLES / "rows.txt").read_text(), flags=re.MULTILINE)[5:]
    for name, rows in zip(expected[::2], expected[1::2], strict=True):
        SETS[name](tmp_path / name)
        assert list_rows(tmp_path / name) == rows.splitlines(), name


def find_seed(home: Path) -> int:
    """The first seed that leaves a batch in train, and gives dev a label with both classes."""
    for seed in range(100):
        splits, *_ = read_splits(find_source(home, {}, []), views="all", dev=0.5, seed=seed)
        if {"train", "dev"} <= splits.keys() and len(splits["train"]) > 1:
            states, _ = label_states(splits["dev"])
            if ((states == 1).any(axis=0) & (states == 0).any(axis=0)).any():
                return seed
    raise AssertionError


@pytest.fixture(autouse=True, scope="module")
def quick_training() -> Iterator[None]:
    with narrow_networks(), quick_ends():
        yield


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("epochs", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_a_set_goes_all_the_way(name: str, epochs: int, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    SETS[name](home)
    options = default_options(size=32, views="all", dev=0.5, seed=find_seed(home))
    manifest = make_shards(home, out, options).manifest
    assert (manifest.dataset["name"], manifest.rejects) == (name, ())
    run_pipeline("verify", out, "--deep")
    samples = sum(split.samples for split in manifest.splits.values())
    assert json.loads(run_pipeline("stats", out, "--format", "json").stdout)["images"] == samples
    run = open_small_run(out, tmp_path / "run", batch_size=2, epochs=epochs)
    train.train(run)
    files = sorted(path for path in home.rglob("*") if path.suffix in (".png", ".jpg", ".dicom"))[:2]
    scores, bad = open_predictor([run.folder]).score_files([[file] for file in files], 1)
    assert (bad, len(scores)) == ([], 2)
    assert ((scores > 0) & (scores < 1)).any(axis=1).all()
