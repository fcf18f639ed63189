"""Several runs as one, and what predict and export make of them."""

import json
import shutil
from pathlib import Path

import click
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from pandas import read_feather as read_frame

from model.runs import results
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from pipeline.measure.calibration import apply_calibration
from pipeline.measure.evaluate import MEMBERS
from pipeline.measure.evaluation import read_evaluation
from tests.training import WORDS, call_train

pytestmark = pytest.mark.soak  # it trains, or builds large networks: half a minute


def read_json(path: Path) -> dict[str, object]:
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def pair(
    one_epoch: Path, sample_shards: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two runs that differ in their seed, and how their scores are calibrated; tests get copies."""
    folder = tmp_path_factory.mktemp("pair")
    runs = folder / "a", folder / "b"
    shutil.copytree(one_epoch, runs[0])
    assert call_train("train", "--shards", sample_shards[0], "--run", runs[1], *WORDS, "--seed", 1) == 0
    for run, temperature in zip(runs, (0.8, 1.5), strict=True):
        chosen = read_json(run / "calibration.json")
        for label in ("Edema", "Fracture"):
            chosen["image"][label] |= {"temperature": temperature, "bias": -0.4}  # type: ignore[index]
        (run / "calibration.json").write_text(json.dumps(chosen))
    return runs


@pytest.fixture
def runs(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return tuple(Path(shutil.copytree(run, tmp_path / run.name)) for run in pair)  # type: ignore[return-value]


def calibrated(run: Path, scores: pd.DataFrame) -> np.ndarray:
    fits = json.loads((run / "calibration.json").read_text())["image"]
    return np.column_stack([apply_calibration(scores[label].to_numpy(), fits[label]) for label in LABELS])


def test_an_ensemble_is_the_mean_of_calibrated_scores_everywhere(
    runs: tuple[Path, Path], sample_shards: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = runs
    both, out = ("--run", one, "--run", two), tmp_path / "both"
    shards = ("--shards", sample_shards[0])
    with pytest.MonkeyPatch.context() as patch:
        settings: list[dict[str, object]] = []
        patch.setattr(results, "write_report", lambda *given: settings.append(results.describe_settings(*given[:2])))
        assert call_train("evaluate", *shards, *both, "--out", out) == 0
    assert settings[0]["seed"] == "0; 1"
    assert settings[0]["members"] == [str(one), str(two)]
    assert "AUROC of the ensemble minus the mean of its members" in capsys.readouterr().out
    frames = [read_frame(run / "scores-valid.arrow") for run in runs]
    expected = np.mean([calibrated(run, frame) for run, frame in zip(runs, frames, strict=True)], axis=0)
    scores = read_frame(out / "scores-valid.arrow")[list(LABELS)].to_numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-6)

    found = read_evaluation(out / "evaluation-valid.json")
    theirs = [read_evaluation(run / "evaluation-valid.json") for run in runs]
    for key in ("Edema", "macro"):
        figures = [one.get("auroc", key).number for one in theirs]
        members = [found.get("auroc", key, scorer=str(run)).value for run in runs]
        assert members == pytest.approx(figures)
        gain = found.get("auroc_difference", key, scorer=MEMBERS)
        assert gain.value == pytest.approx(found.get("auroc", key).number - np.mean(figures))
        assert (gain.low or 0) <= gain.number <= (gain.high or 0)  # equal if no pair changes its order

    films = sample_shards[0].parent / "CheXpert-v1.0-small" / "valid"
    table = tmp_path / "mean.csv"
    assert call_train("predict", *both, "--out", table, films) == 0
    means = pd.read_csv(table)
    keys = means.file.str.extract(r"(patient\d+)/(study\d+)/(view\d+_\w+)\.jpg").agg("_".join, axis=1)
    order = open_shards(sample_shards[0])["valid"].table["key"].to_pylist()
    np.testing.assert_allclose(means.set_index(keys).loc[order, list(LABELS)], expected, atol=2e-6)
    assert set(means["run"]) == {f"{one} + {two}"}
    assert set(means["shards"]) == {settings[0]["manifest"]}
    with pytest.raises(DataError, match=r"^`threshold` needs an ensemble's folder; first run: python -m train eval"):
        call_train("predict", *both, "--out", table, "--threshold", "youden", films)

    assert call_train("predict", "--run", out, "--out", table, "--threshold", "youden", films) == 0
    decided = pd.read_csv(table).set_index(keys).loc[order]
    ours = read_frame(out / "scores-valid.arrow")
    np.testing.assert_allclose(decided[list(LABELS)], calibrated(out, ours), atol=2e-6)
    model = tmp_path / "model.onnx"
    assert call_train("export", "--run", out, "--out", model, "--threshold", "youden") == 0
    session = onnxruntime.InferenceSession(model)
    (batch,) = open_shards(sample_shards[0])["valid"].batches(len(order), 32, epoch=None)
    values, _ = session.run(["scores", "decisions"], {"images": batch.images})
    np.testing.assert_allclose(values, decided[list(LABELS)], atol=1e-5)
    (two / "calibration.json").unlink()
    with pytest.raises(DataError, match=rf"no calibration.json; first run: python -m train evaluate --run {two}$"):
        call_train("predict", "--run", two, "--out", table, films)
    assert call_train("evaluate", *shards, "--run", out, "--split", "dev") == 0
    gains = read_evaluation(out / "evaluation-dev.json").select(scorer=MEMBERS, metric="auroc_difference")
    assert {row.label for row in gains} >= {"Edema", "macro"}
    assert (two / "calibration.json").exists()
    (two / "best.pt").write_bytes((one / "best.pt").read_bytes())
    with pytest.raises(DataError, match=f"^{two}: trained on since {out} was evaluated; first run: python -m train"):
        call_train("predict", "--run", out, "--out", table, films)


def test_runs_that_make_no_ensemble_are_refused(
    runs: tuple[Path, Path], sample_shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    one, two = runs
    shards, config = ("--shards", sample_shards[0]), json.loads((two / "config.json").read_text())

    def refuse(message: str, *words: object, **changes: object) -> None:
        (two / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(DataError, match=message):
            call_train("evaluate", *shards, "--run", one, "--run", two, *words)

    with pytest.raises(click.UsageError, match=f"^--out is for several --run: the results of {one} go into its"):
        call_train("evaluate", *shards, "--run", one, "--out", tmp_path / "out")
    refuse("make no ensemble: `views` is all and frontal$", views="frontal")
    refuse("make no ensemble: `fusion` is image and study$", fusion="max")
    refuse("make no ensemble: `shards` is ", manifest="0" * 64)
    refuse("`run` names the same run twice", "--run", one)
    refuse(f"^{one} is a run, or an ensemble of others; choose another `out`$", "--out", one)
    (two / "config.json").write_text(json.dumps(config | {"image_size": "48"}))
    with pytest.raises(DataError, match="the members have different `image_size`"):
        call_train("export", "--run", one, "--run", two, "--out", tmp_path / "model.onnx")
