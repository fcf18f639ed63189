"""A decision on an image is the same wherever it is made."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from pandas import read_feather as read_frame

from model.predict import predict_scores
from model.runs.score_commands import show_number
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.measure.calibration import apply_calibration
from tests.conftest import Shards, start
from tests.training import WORDS, call_train

FACTS = {
    "image_size": "[32, 32]",
    "threshold_rule": "sensitivity>=0.9",
    "dataset": "synthetic images by `pipeline sample`",
    "license": "none needed: the images show no patient",
    "started_from": "random weights",
    "use": "For research. Not for clinical use.",
}


@pytest.mark.parametrize("members", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_evaluate_predict_and_exports_decide_alike(
    members: int, run: Path, sample_shards: Shards, tmp_path: Path
) -> None:
    rule, shards = "sensitivity", ("--shards", sample_shards[0])
    if members > 1:
        runs = ("--run", run, "--run", tmp_path / "other")
        assert call_train("train", *shards, *runs[2:], *WORDS, "--seed", 1) == 0
        run = tmp_path / "both"
        assert call_train("evaluate", *shards, *runs, "--out", run, "--split", "dev") == 0
    fits = json.loads((run / "calibration.json").read_text())["image"]
    labels = [label for label in LABELS if fits[label]["thresholds"][rule] is not None]
    limits = [fits[label]["thresholds"][rule] for label in labels]
    columns = [LABELS.index(label) for label in labels]
    expected = read_frame(run / "scores-dev.arrow")[labels].to_numpy() >= limits
    assert 0.1 < expected.mean() < 0.9

    dev = open_shards(sample_shards[0])["dev"]
    films = sample_shards[0].parent / "CheXpert-v1.0-small" / "train"
    order = dev.table["key"].to_pylist()
    files = [films.joinpath(*key.split("_", 2)).with_suffix(".jpg") for key in order]
    for chosen in (files[:1], files):
        words = ("predict", "--run", run, "--out", tmp_path / "scores.csv", "--threshold", rule)
        assert call_train(*words, *chosen) == 0
        table = pd.read_csv(tmp_path / "scores.csv")
        np.testing.assert_array_equal(table[[f"{label} positive" for label in labels]], expected[: len(chosen)])

    (batch,) = dev.batches(len(order), 32, epoch=None)
    assert call_train("export", "--run", run, "--out", tmp_path / "model.pt2", "--threshold", rule) == 0
    _, decisions = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(batch.images))
    np.testing.assert_array_equal(decisions.numpy()[:, columns], expected)
    assert call_train("export", "--run", run, "--out", tmp_path / "model.onnx", "--threshold", rule) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert facts | FACTS | {"run": str(run)} == facts
    for fact, value in {"labels": list(LABELS), "calibration": fits}.items():
        assert json.loads(facts[fact]) == value
    config = json.loads((run / "config.json").read_text()) if members == 1 else {"manifest": facts["shards"]}
    assert facts["shards"] == config["manifest"]
    assert len(json.loads(facts["normalization"])) == len(json.loads(facts["member_calibrations"])) == members
    assert json.loads(facts["images"])["size"] == sample_shards[1].options["size"]
    for label, limit in zip(labels, limits, strict=True):
        scaled = apply_calibration(np.array([limit]), fits[label])[0]
        assert json.loads(facts["thresholds"])[rule][label] == scaled
    parts = [session.run(["decisions"], {"images": part})[0] for part in np.array_split(batch.images, 5)]
    np.testing.assert_array_equal(np.concatenate(parts)[:, columns], expected)
    script = start(sys.executable, tmp_path / "score.py", tmp_path / "model.onnx", *files)
    assert script.stderr == f"{FACTS['use']}\n"
    # Without run, shards and threshold_rule
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(script.stdout)), table.iloc[:, :-3], rtol=0, atol=1e-5)
    (tmp_path / "score.py").write_text("print('mine')")
    with pytest.raises(DataError, match=f"^{tmp_path}/score.py: another program; export writes a script of this name"):
        call_train("export", "--run", run, "--out", tmp_path / "model.onnx")
    with pytest.raises(DataError, match=r"model.h5: export writes .onnx or .pt2$"):
        call_train("export", "--run", run, "--out", tmp_path / "model.h5")
    with pytest.raises(DataError, match=f"^{tmp_path}/no/model.onnx: "):
        call_train("export", "--run", run, "--out", tmp_path / "no" / "model.onnx")


def test_scores_at_the_extremes_do_not_tie() -> None:
    """Neither calibrated nor as text: logits from -32 to 31.75, a quarter apart."""
    images = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    scores = predict_scores(torch.nn.Flatten(), [0], [(images,)], 128.0, 4.0, torch.float32)[:, 0]
    calibrated = apply_calibration(scores, {"temperature": 1.1, "bias": 0.5})
    for values in (scores, calibrated):
        written = np.array([float(show_number(score)) for score in values])
        assert (np.diff(written) > 0).all()
        np.testing.assert_allclose(written, values, rtol=1e-8)
