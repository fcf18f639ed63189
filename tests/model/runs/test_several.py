"""A run on several folders of shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from model.runs.overlap import hash_patients, read_seen
from model.runs.run import Run, check_reported, open_rows, training_labels, training_weights
from pipeline.manifest import read_manifest, read_table
from pipeline.measure.evaluation import read_evaluation
from pipeline.stream.plan import epoch_order
from tests.conftest import make_shards, write_chexpert
from tests.training import assert_same_run, open_small_job, train_until


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


def open_mixed(two: list[Path], run: Path, **changes: Any) -> Run:
    return open_small_job(two, run, mix=(1.0, 3.0), batch_size=8, epochs=2, **changes)


def test_a_mixed_run_that_was_stopped_and_resumed_is_the_same(two: list[Path], tmp_path: Path) -> None:
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    train.train(open_mixed(two, whole))
    train_until(3, open_mixed(two, parts))
    train.train(open_mixed(two, parts))
    assert_same_run(parts, whole)
    evaluation = read_evaluation(whole / "evaluation-valid.json")
    sizes = {row.group: row.value for row in evaluation.select(metric="images", label=None)}
    assert (sizes["set=chexpert"], sizes["set=childrens"]) == (10, 10)
    seen, _ = read_seen(whole)
    table = read_table(two[1], read_manifest(two[1]).split("train"))
    for namespace, known in (("childrens", True), ("nih", False)):
        found = np.isin(hash_patients(table, namespace), seen["patients"].numpy())
        assert (found == known).all()


def test_each_folder_is_drawn_as_often_as_its_share_says(two: list[Path], tmp_path: Path) -> None:
    job = open_mixed(two, tmp_path / "run")
    chosen = open_rows(job, "train")
    weights = training_weights(job, training_labels(job, chosen), chosen)
    folder = chosen.split.folder[chosen.rows]
    sizes = chosen.samples.shard_sizes
    drawn = [folder[epoch_order(sizes, 0, epoch, weights=weights)] for epoch in range(40)]
    assert np.concatenate(drawn).mean() == pytest.approx(0.75, abs=0.03)


def test_folders_that_dev_leaves_out_are_said(
    two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(two[1], tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["splits"]["dev"]
    (other / "manifest.json").write_text(json.dumps(manifest))
    said = f"{other}: no dev split, so checkpoint and thresholds are chosen on {two[0]} alone"
    for folders, count in (([two[0], other], 1), (two, 0)):
        job = open_small_job(folders, tmp_path / str(count), epochs=1)
        check_reported(job, open_rows(job, "dev"))
        assert capsys.readouterr().err.count(said) == count
