"""A decision on an image is the same wherever it is made."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from pandas import read_feather as read_frame

from pipeline import open_shards
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from tests.training import WORDS, call_train


@pytest.mark.parametrize("members", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_evaluate_predict_and_exports_decide_alike(
    members: int, run: Path, sample_shards: tuple[Path, Manifest], tmp_path: Path
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
    for chosen in (files, files[:1]):
        words = ("predict", "--run", run, "--out", tmp_path / "scores.csv", "--threshold", rule)
        assert call_train(*words, *chosen) == 0
        table = pd.read_csv(tmp_path / "scores.csv")
        found = table[[f"{label} positive" for label in labels]].to_numpy()
        np.testing.assert_array_equal(found, expected[: len(chosen)])

    (batch,) = dev.batches(len(order), 32, epoch=None)
    assert call_train("export", "--run", run, "--out", tmp_path / "model.pt2", "--threshold", rule) == 0
    _, decisions = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(batch.images))
    np.testing.assert_array_equal(decisions.numpy()[:, columns], expected)
    assert call_train("export", "--run", run, "--out", tmp_path / "model.onnx", "--threshold", rule) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    parts = [session.run(["decisions"], {"images": part})[0] for part in np.array_split(batch.images, 5)]
    np.testing.assert_array_equal(np.concatenate(parts)[:, columns], expected)
