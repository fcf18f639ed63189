"""Several runs as one, and what predict and export make of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from pandas import read_feather as read_frame

from model.runs import predictor, results
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluate import MEMBERS
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import Shards, refused
from tests.training import WORDS, Capture, call_train

pytestmark = pytest.mark.soak  # it trains, or builds large networks: half a minute


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def pair(one_epoch: Path, sample_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in their seed, and how their scores are calibrated; tests get copies."""
    folder = tmp_path_factory.mktemp("pair")
    runs = folder / "a", folder / "b"
    shutil.copytree(one_epoch, runs[0])
    assert call_train("train", "--shards", sample_shards[0], "--run", runs[1], *WORDS, "--seed", 1) == 0
    for run, temperature in zip(runs, (0.8, 1.5), strict=True):
        calibration = read_json(run / "calibration.json")
        for label in ("Edema", "Fracture"):
            calibration["image"][label] |= {"temperature": temperature, "bias": -0.4}
        (run / "calibration.json").write_text(json.dumps(calibration))
    return runs


@pytest.fixture
def runs(pair: tuple[Path, Path], tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(run, tmp_path / run.name)) for run in pair]


def calibrated(run: Path, split: str = "valid") -> np.ndarray:
    scores = read_frame(run / f"scores-{split}.arrow")[list(LABELS)].to_numpy()
    return apply_calibrations(LABELS, scores, read_json(run / "calibration.json")["image"])


def test_an_ensemble_is_the_mean_of_calibrated_scores_everywhere(
    runs: list[Path], sample_shards: Shards, tmp_path: Path, capsys: Capture
) -> None:
    first, second = runs
    both, out, shards = ("--run", first, "--run", second), tmp_path / "both", ("--shards", sample_shards[0])
    with pytest.MonkeyPatch.context() as patch:
        settings: list[dict[str, object]] = []
        patch.setattr(results, "write_report", lambda *given: settings.append(results.describe_settings(*given[:2])))
        assert call_train("evaluate", *shards, *both, "--out", out) == 0
    assert settings[0]["seed"] == "0; 1"
    assert settings[0]["members"] == [str(first), str(second)]
    assert "AUROC of the ensemble minus the mean of its members" in capsys.readouterr().out
    expected = (calibrated(first) + calibrated(second)) / 2
    np.testing.assert_allclose(read_frame(out / "scores-valid.arrow")[list(LABELS)], expected, atol=1e-6)

    evaluation = read_evaluation(out / "evaluation-valid.json")
    for key in ("Edema", "macro"):
        own = [read_evaluation(run / "evaluation-valid.json").get("auroc", key).number for run in runs]
        assert [evaluation.get("auroc", key, scorer=str(run)).value for run in runs] == pytest.approx(own)
        gain = evaluation.get("auroc_difference", key, scorer=MEMBERS)
        assert gain.value == pytest.approx(evaluation.get("auroc", key).number - np.mean(own))
        assert (gain.low or 0) <= gain.number <= (gain.high or 0)  # equal if no pair changes its order

    films, table = sample_shards[0].parent / "CheXpert-v1.0-small" / "valid", tmp_path / "mean.csv"
    assert call_train("predict", *both, "--out", table, films) == 0
    means = pd.read_csv(table)
    keys = means.file.str.extract(r"(patient\d+)/(study\d+)/(view\d+_\w+)\.jpg").agg("_".join, axis=1)
    valid = open_shards(sample_shards[0])["valid"]
    order = valid.table["key"].to_pylist()
    np.testing.assert_allclose(means.set_index(keys).loc[order, list(LABELS)], expected, atol=2e-6)
    assert set(means["run"]) == {f"{first} + {second}"}
    assert set(means["shards"]) == {settings[0]["manifest"]}
    with pytest.raises(DataError, match=r"^`threshold` needs an ensemble's folder; first run: python -m train eval"):
        call_train("predict", *both, "--out", table, "--threshold", "youden", films)

    assert call_train("predict", "--run", out, "--out", table, "--threshold", "youden", films) == 0
    decided = pd.read_csv(table).set_index(keys).loc[order]
    np.testing.assert_allclose(decided[list(LABELS)], calibrated(out), atol=2e-6)
    model = tmp_path / "model.onnx"
    assert call_train("export", "--run", out, "--out", model, "--threshold", "youden") == 0
    (batch,) = valid.batches(len(order), 32, epoch=None)
    values, _ = onnxruntime.InferenceSession(model).run(["scores", "decisions"], {"images": batch.images})
    np.testing.assert_allclose(values, decided[list(LABELS)], atol=1e-5)
    (second / "calibration.json").unlink()
    missing = f"{second}: no calibration.json; first run: python -m train evaluate --run {second}"
    with pytest.MonkeyPatch.context() as patch, refused(missing):
        patch.setattr(predictor, "load_network", None)  # which takes seconds: a missing calibration is reported first
        call_train("predict", *both, "--out", table, films)
    with refused(missing):
        call_train("predict", "--run", second, "--out", table, films)
    assert call_train("evaluate", *shards, "--run", out, "--split", "dev") == 0
    gains = read_evaluation(out / "evaluation-dev.json").select(scorer=MEMBERS, metric="auroc_difference")
    assert {row.label for row in gains} >= {"Edema", "macro"}
    assert (second / "calibration.json").exists()
    (second / "best.pt").write_bytes((first / "best.pt").read_bytes())
    with pytest.raises(DataError, match=f"^{second}: trained on since {out} was evaluated; first run: python -m train"):
        call_train("predict", "--run", out, "--out", table, films)


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"views": "frontal"}, [], "make no ensemble: `views` is all and frontal$"),
        ({"fusion": "max"}, [], "make no ensemble: `fusion` is image and study$"),
        ({"manifest": "0" * 64}, [], "make no ensemble: `shards` is "),
        ({}, ["--run", "{first}"], "`run` names the same run twice"),
        ({}, ["--out", "{first}"], "^{first} is a run, or an ensemble of others; choose another `out`$"),
    ],
)
def test_runs_that_make_no_ensemble_are_refused(
    runs: list[Path], sample_shards: Shards, changes: dict[str, str], words: list[str], message: str
) -> None:
    first, second = runs
    (second / "config.json").write_text(json.dumps(read_json(second / "config.json") | changes))
    more = [word.format(first=first) for word in words]
    with pytest.raises(DataError, match=message.format(first=first)):
        call_train("evaluate", "--shards", sample_shards[0], "--run", first, "--run", second, *more)


def test_what_an_ensemble_does_not_take_is_refused(runs: list[Path], tmp_path: Path) -> None:
    first, second = runs
    with pytest.raises(click.UsageError, match=f"^--out is for several --run: the results of {first} go into its"):
        call_train("evaluate", "--run", first, "--out", tmp_path / "out")
    (second / "config.json").write_text(json.dumps(read_json(second / "config.json") | {"image_size": "48"}))
    with pytest.raises(DataError, match="the members have different `image_size`"):
        call_train("export", "--run", first, "--run", second, "--out", tmp_path / "model.onnx")
