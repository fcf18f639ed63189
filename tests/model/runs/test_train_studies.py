"""Training and evaluation by studies."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas import read_feather as read_frame
from sklearn.metrics import roc_auc_score

import train
from model.checkpoint import load_checkpoint
from model.runs.config import Assessment
from model.runs.predictor import of_run
from model.runs.results import evaluate_split
from model.runs.run import open_rows
from model.runs.views import find_projection
from pipeline.labels import PROJECTIONS
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import Shards, refused
from tests.dicoms import make_dicom
from tests.training import Capture, MakeRun, Patch, assert_same_run, call_train, train_until


@pytest.fixture
def make(make_run: MakeRun, drawn_studies: Shards) -> MakeRun:
    """A small run on shards of all views."""
    return partial(make_run, shards=drawn_studies[0], batch_size=8)


@pytest.mark.parametrize("fusion", [pytest.param("mean", marks=pytest.mark.soak), "attention"])
def test_a_run_by_studies_resumes_exactly(make: MakeRun, fusion: str) -> None:
    options = {"fusion": fusion, "augment": "crop", "accumulate": 2}
    run = make("run", **options)
    train.train(run)
    train_until(5, make("parts", **options))
    train.train(make("parts", **options))
    assert_same_run(run.folder.with_name("parts"), run.folder)


def test_each_study_is_scored_once_and_compared_with_late_fusion(make: MakeRun, drawn_studies: Shards) -> None:
    images, frontal = make("images", epochs=1), make("frontal", epochs=1, views="frontal")
    train.train(images)
    train.train(frontal)
    fused = make("fused", epochs=1, fusion="max", init=images.folder / "best.pt")
    train.train(fused)
    table = read_frame(drawn_studies[0] / "valid.arrow")
    scored = read_frame(fused.folder / "scores-valid.arrow")
    firsts = table.groupby(["patient", "study"], sort=False).head(1)
    assert scored[["patient", "study"]].to_numpy().tolist() == firsts[["patient", "study"]].to_numpy().tolist()

    evaluation = evaluate_split(fused, of_run(fused), Assessment(against=(images.folder, frontal.folder)))
    assert evaluation.unit == "study"
    rows = evaluation.select(metric="auroc", label="Support Devices", group=None)
    late = {row.scorer: row.value for row in rows if row.scorer}
    assert list(late) == [f"{images.folder}, max of views", f"{images.folder}, mean of views", str(frontal.folder)]
    views = read_frame(images.folder / "scores-valid.arrow").groupby(["patient", "study"]).max()
    truth = table.groupby(["patient", "study"])["Support Devices"].first() == 1
    expected = roc_auc_score(truth, views["Support Devices"])
    assert late[f"{images.folder}, max of views"] == pytest.approx(expected)
    assert evaluation.get("studies").value == len(firsts)
    (file,) = fused.folder.glob("evaluation-valid-against-*.json")
    assert read_evaluation(file) == evaluation


def test_a_frozen_backbone_is_the_first_runs(make: MakeRun) -> None:
    images = make("images", epochs=1)
    train.train(images)
    best = images.folder / "best.pt"
    fused = make("fused", epochs=1, fusion="mean", init=best, freeze=True, ema=0.0)
    train.train(fused)
    before, after = (load_checkpoint(path)["weights"] for path in (best, fused.folder / "best.pt"))
    for name, value in before.items():
        head = name.startswith("head.2")
        place = name.replace("head.2", "head") if head else f"backbone.{name}"
        assert torch.equal(after[place], value) != head, name
    assert np.abs(after["projection"].numpy()).max() > 0


def test_predict_scores_the_files_of_a_study_together(
    make: MakeRun, drawn_studies: Shards, tmp_path: Path, capsys: Capture
) -> None:
    """As the study was scored from the shards, where its frontal's projection is not asked for."""
    fused = make("fused", epochs=1, fusion="mean", lr=1e-9, ema=0.0)  # so no projection differs from another
    train.train(fused)
    films = drawn_studies[0].parent / "CheXpert-v1.0-small" / "valid"
    scores = read_frame(fused.folder / "scores-valid.arrow").drop(columns="key").sort_values(["patient", "study"])
    labels, fits = list(scores)[2:], json.loads((fused.folder / "calibration.json").read_text())["image"]
    expected = apply_calibrations(labels, scores[labels].to_numpy(), fits)
    for option in ([], ["--group-by", r"patient\d+/study\d+"]):
        assert call_train("predict", "--run", fused.folder, "--out", tmp_path / "scores.csv", *option, films) == 0
        table = pd.read_csv(tmp_path / "scores.csv")
        assert table["study"].str.extract(r"(patient\d+)/study")[0].tolist() == scores["patient"].tolist()
        np.testing.assert_allclose(table.sort_values("study").iloc[:, 1:15], expected, atol=2e-6)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"images in {len(expected)} studies, 0 unusable")


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("view1_lateral.dcm", "PA", "PA"),
        ("a.dcm", "LL", "lateral"),
        ("a.dcm", "LLD", "other"),
        ("view3_lateral.dcm", "", "lateral"),
        ("a_view2_lateral.dcm", None, None),
    ],
)
def test_a_view_is_what_its_dicom_says_or_chexperts_name(name: str, position: str | None, expected: str | None) -> None:
    place = len(PROJECTIONS) if expected is None else PROJECTIONS.index(expected)
    facts = {} if position is None else {"ViewPosition": position}
    assert find_projection(Path(name), make_dicom(np.zeros((9, 9), np.uint16), **facts)) == place


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "{film}: --group-by 'nowhere' is not in its path"),
        (
            "CheXpert",
            "CheXpert: 19 images, of a study there are at most 3; a study's images must lie in a folder of their own, "
            "or name it by --group-by",
        ),
    ],
)
def test_files_that_are_no_studies_are_refused(
    make: MakeRun, drawn_studies: Shards, pattern: str, message: str
) -> None:
    films = drawn_studies[0].parent / "CheXpert-v1.0-small" / "valid"
    run = make("fused", fusion="mean").folder
    with refused(message.format(film=min(films.rglob("*.jpg")))):
        call_train("predict", "--run", run, "--out", "unused.csv", "--group-by", pattern, films)


def test_images_beyond_the_most_views_are_counted(make: MakeRun, monkeypatch: Patch, capsys: Capture) -> None:
    for module in ("model.runs.run", "pipeline.stream.samples"):
        monkeypatch.setattr(f"{module}.MOST_VIEWS", 1)
    table = open_rows(make("run", fusion="max"), "train").split.table.to_pandas()
    left_out = len(table) - len(table.groupby(["patient", "study"]))
    assert left_out > 0
    assert capsys.readouterr().err == f"train: {left_out} images beyond their study's first 1 are left out\n"
