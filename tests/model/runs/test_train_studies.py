"""Training and evaluation by studies."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pandas import read_feather as read_frame
from pydicom import dcmread
from sklearn.metrics import roc_auc_score

import train
from model.checkpoint import load_checkpoint
from model.runs.commands import main
from model.runs.config import Assessment
from model.runs.predictor import of_run
from model.runs.results import evaluate_split
from model.runs.run import Run, open_rows
from model.runs.views import find_projection
from pipeline.labels import PROJECTIONS
from pipeline.manifest import Manifest
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import refused
from tests.dicoms import make_dicom
from tests.training import assert_same_run, train_until


@pytest.fixture
def make(make_job: Callable[..., Run], drawn_studies: tuple[Path, Manifest]) -> Callable[..., Run]:
    """A small job on shards of all views."""
    return partial(make_job, shards=drawn_studies[0], batch_size=8)


@pytest.mark.parametrize("fusion", [pytest.param("mean", marks=pytest.mark.soak), "attention"])
def test_a_run_by_studies_resumes_exactly(make: Callable[..., Run], fusion: str) -> None:
    options = {"fusion": fusion, "augment": "crop", "accumulate": 2}
    whole = make("whole", **options)
    train.train(whole)
    train_until(5, make("parts", **options))
    train.train(make("parts", **options))
    assert_same_run(whole.folder.with_name("parts"), whole.folder)


def test_each_study_is_scored_once_and_compared_with_late_fusion(
    make: Callable[..., Run], drawn_studies: tuple[Path, Manifest]
) -> None:
    images = make("images", epochs=1)
    train.train(images)
    frontal = make("frontal", epochs=1, views="frontal")
    train.train(frontal)
    best = images.folder / "best.pt"
    fused = make("fused", epochs=1, fusion="max", init=best)
    train.train(fused)
    table = pa.ipc.open_file(drawn_studies[0] / "valid.arrow").read_all().to_pandas()
    scored = read_frame(fused.folder / "scores-valid.arrow")
    firsts = table.groupby(["patient", "study"], sort=False).head(1)
    assert scored[["patient", "study"]].to_numpy().tolist() == firsts[["patient", "study"]].to_numpy().tolist()

    found = evaluate_split(fused, of_run(fused), Assessment(against=(images.folder, frontal.folder)))
    assert found.unit == "study"
    late = {row.scorer: row for row in found.select(metric="auroc", label="Support Devices", group=None) if row.scorer}
    assert list(late) == [f"{images.folder}, max of views", f"{images.folder}, mean of views", str(frontal.folder)]
    views = read_frame(images.folder / "scores-valid.arrow").groupby(["patient", "study"]).max()
    truth = table.groupby(["patient", "study"])["Support Devices"].first() == 1
    expected = roc_auc_score(truth, views["Support Devices"])
    assert late[f"{images.folder}, max of views"].value == pytest.approx(expected)
    assert found.get("studies").value == len(firsts)
    (file,) = fused.folder.glob("evaluation-valid-against-*.json")
    assert read_evaluation(file) == found


def test_a_frozen_backbone_is_the_first_runs(make: Callable[..., Run]) -> None:
    images = make("images", epochs=1)
    train.train(images)
    best = images.folder / "best.pt"
    fused = make("fused", epochs=1, fusion="mean", init=best, freeze=True, ema=0.0)
    train.train(fused)
    before, after = (load_checkpoint(path)["weights"] for path in (best, fused.folder / "best.pt"))
    for name, value in before.items():
        ours = after[name.replace("head.2", "head") if name.startswith("head.2") else f"backbone.{name}"]
        assert torch.equal(ours, value) != name.startswith("head.2"), name
    assert np.abs(after["projection"].numpy()).max() > 0


def test_predict_scores_the_files_of_a_study_together(
    make: Callable[..., Run], drawn_studies: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the study was scored from the shards, where its frontal's projection is not asked for."""
    fused = make("fused", epochs=1, fusion="mean", lr=1e-9, ema=0.0)  # so no projection differs from another
    train.train(fused)
    films = drawn_studies[0].parent / "CheXpert-v1.0-small" / "valid"
    expected = read_frame(fused.folder / "scores-valid.arrow").drop(columns="key")
    for option in ([], ["--group-by", r"patient\d+/study\d+"]):
        words = ["predict", "--run", fused.folder, "--out", tmp_path / "scores.csv", *option, films]
        main.main(list(map(str, words)), standalone_mode=False)
        found = pd.read_csv(tmp_path / "scores.csv")
        assert found["study"].str.extract(r"(patient\d+)/study")[0].tolist() == sorted(expected["patient"])
        ours = found.sort_values("study").iloc[:, 1:15].to_numpy()
        theirs = expected.sort_values(["patient", "study"]).iloc[:, 2:].to_numpy()
        fits = json.loads((fused.folder / "calibration.json").read_text())["image"]
        theirs = apply_calibrations(list(expected)[2:], theirs, fits)
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
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
def test_a_view_is_what_its_dicom_says_or_chexperts_name(
    tmp_path: Path, name: str, position: str | None, expected: str | None
) -> None:
    path = tmp_path / name
    path.write_bytes(make_dicom(np.zeros((9, 9), np.uint16)))
    film = dcmread(path)
    if position is not None:
        film.ViewPosition = position
    film.save_as(path)
    place = len(PROJECTIONS) if expected is None else PROJECTIONS.index(expected)
    assert find_projection(path, path.read_bytes()) == place


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--group-by", "nowhere"], "{film}: --group-by 'nowhere' is not in its path"),
        (
            ["--group-by", "CheXpert"],
            "CheXpert: 19 images, of a study there are at most 3; a study's images must lie in a folder of their own, "
            "or name it by --group-by",
        ),
    ],
)
def test_files_that_are_no_studies_are_refused(
    make: Callable[..., Run], drawn_studies: tuple[Path, Manifest], option: list[str], message: str
) -> None:
    films = drawn_studies[0].parent / "CheXpert-v1.0-small" / "valid"
    words = ["predict", "--run", make("fused", fusion="mean").folder, "--out", "unused.csv", *option, films]
    with refused(message.format(film=min(films.rglob("*.jpg")))):
        main.main(list(map(str, words)), standalone_mode=False)


def test_images_beyond_the_most_views_are_counted(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("model.runs.run", "pipeline.stream.samples"):
        monkeypatch.setattr(f"{module}.MOST_VIEWS", 1)
    job = make("run", fusion="max")
    chosen = open_rows(job, "train")
    table = chosen.split.table.to_pandas()
    left_out = len(table) - len(table.groupby(["patient", "study"]))
    assert left_out > 0
    said = f"train: {left_out} images beyond their study's first 1 are left out\n"
    assert capsys.readouterr().err == said
