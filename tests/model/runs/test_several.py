"""A run on several folders of shards."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from model.runs.overlap import read_seen
from model.runs.run import Run, open_training
from pipeline.identity import name_patients
from pipeline.manifest import read_manifest, read_table
from pipeline.measure.evaluation import read_evaluation
from pipeline.stream.plan import epoch_order
from tests.conftest import make_shards, write_chexpert
from tests.training import Capture, assert_same_run, open_small_run, train_until


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Shards of 20 patients of CheXpert, and of 20 of another hospital under the same numbers."""
    folders = []
    for seed, name in enumerate(("", "childrens")):
        base = tmp_path_factory.mktemp("set")
        write_chexpert(base / "films", "train", range(1, 21), seed)
        write_chexpert(base / "films", "valid", range(30, 35), seed)
        make_shards(base / "films", base / "shards", called=name)
        folders.append(base / "shards")
    return folders


def open_mixed(two: list[Path], folder: Path, **changes: Any) -> Run:
    return open_small_run(two, folder, mix=(1.0, 3.0), batch_size=8, epochs=2, **changes)


def test_a_mixed_run_that_was_stopped_and_resumed_is_the_same(two: list[Path], tmp_path: Path) -> None:
    run, parts = (tmp_path / name for name in ("run", "parts"))
    train.train(open_mixed(two, run))
    train_until(3, open_mixed(two, parts))
    train.train(open_mixed(two, parts))
    assert_same_run(parts, run)
    evaluation = read_evaluation(run / "evaluation-valid.json")
    sizes = {row.group: row.value for row in evaluation.select(metric="images", label=None)}
    assert (sizes["set=chexpert"], sizes["set=childrens"]) == (10, 10)
    seen, _ = read_seen(run)
    patients = read_table(two[1], read_manifest(two[1]).split("train"))["patient"]
    for namespace, known in (("childrens", True), ("nih", False)):
        digests = [hashlib.sha256(name.encode()).digest() for name in name_patients(patients, namespace).to_pylist()]
        hashes = [int.from_bytes(digest[:8], signed=True) for digest in digests]
        assert (np.isin(hashes, seen["patients"].numpy()) == known).all()


def test_each_folder_is_drawn_as_often_as_its_share_says(two: list[Path], tmp_path: Path) -> None:
    chosen, _, _, weights, _ = open_training(open_mixed(two, tmp_path / "run"))
    folder, sizes = chosen.split.folder[chosen.rows], chosen.samples.shard_sizes
    drawn = [folder[epoch_order(sizes, 0, epoch, weights=weights)] for epoch in range(40)]
    assert np.concatenate(drawn).mean() == pytest.approx(0.75, abs=0.03)


def test_folders_that_dev_leaves_out_are_reported(two: list[Path], tmp_path: Path, capsys: Capture) -> None:
    other = Path(shutil.copytree(two[1], tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["splits"]["dev"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    warning = f"{other}: no dev split, so checkpoint and thresholds are chosen on {two[0]} alone"
    for folders, count in (([two[0], other], 1), (two, 0)):
        open_training(open_small_run(folders, tmp_path / str(count), epochs=1))
        assert capsys.readouterr().err.count(warning) == count
