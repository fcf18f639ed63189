"""Weights from elsewhere as a run: calibrated and evaluated without training, and used like any other run."""

import json
from pathlib import Path

import click
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from pandas import read_feather as read_frame
from torch import nn

from model.checkpoint import CheckpointError
from model.names import published
from model.networks import build_network
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.measure.calibration import apply_calibrations
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import Shards
from tests.training import Capture, call_train

UNKNOWN = "It is not known which images these weights were trained on: if some of these, the results are too high."
XRV = published()["xrv:densenet121-res224-all"]
OUTPUTS, SCALE, TERMS = XRV.outputs.split("|"), XRV.scale, XRV.terms


def save_weights(path: Path, arch: str, outputs: int, images: np.ndarray, **more: object) -> nn.Module:
    """A network that no label has trained, normalized by these images, whose scores are not saturated."""
    torch.manual_seed(0)
    network = build_network(arch, outputs)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network((torch.from_numpy(images).float() - SCALE[0]) / SCALE[1])
    torch.save(network.state_dict() | more, path)
    return network.eval()


def read_images(shards: Path, split: str) -> np.ndarray:
    opened = open_shards(shards)[split]
    (batch,) = opened.batches(len(opened.table), 32, epoch=None)
    return batch.images


@pytest.mark.parametrize("export", [False, pytest.param(True, marks=pytest.mark.soak)])
@torch.no_grad()
def test_torchxrayvisions_weights_are_a_run(
    export: bool, sample_shards: Shards, tmp_path: Path, capsys: Capture
) -> None:
    shards, run, file = sample_shards[0], tmp_path / "run", tmp_path / "xrv.pt"
    images = read_images(shards, "valid")
    trained = torch.full((len(OUTPUTS),), 0.5)
    trained[OUTPUTS.index("Fracture")] = np.nan
    network = save_weights(file, "densenet121", len(OUTPUTS), images, op_threshs=trained)
    words = ("adopt", "--init", file, "--shards", shards, "--run", run, "--image-size", 32, "--workers", 1)
    assert call_train(*words) == 0
    left_out = f"{file}: no trained output for No Finding, Fracture, Support Devices: left out\n"
    assert left_out in capsys.readouterr().err
    labels = [label for label in LABELS if label in OUTPUTS and label != "Fracture"]
    assert read_evaluation(run / "evaluation-valid.json").labels == labels
    logits = network((torch.from_numpy(images).float() - SCALE[0]) / SCALE[1])
    expected = logits.double().sigmoid().numpy()[:, [OUTPUTS.index(label) for label in labels]]
    np.testing.assert_allclose(read_frame(run / "scores-valid.arrow", labels)[labels], expected, atol=1e-5)
    card = (run / "model-card.md").read_text()
    assert f"with the weights of `{file}`." in card
    assert UNKNOWN not in card  # its sets are known
    assert all(text in card for text in (TERMS, "asked for: No Finding, Fracture, Support Devices."))
    assert "| lr |" not in card
    assert not (run / "last.pt").exists()

    films = shards.parent / "CheXpert-v1.0-small" / "valid"
    predict = ("predict", "--run", run, "--out", tmp_path / "scores.csv", "--threshold", "youden", films)
    capsys.readouterr()
    assert call_train(*predict) == 0
    doubt = f"{file}: it was trained on {', '.join(XRV.seen.split())}: if on these images, figures are too good\n"
    assert doubt in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "scores.csv")
    keys = table.file.str.extract(r"(patient\d+)/(study\d+)/(view\d+_\w+)\.jpg").agg("_".join, axis=1)
    order = open_shards(shards)["valid"].table["key"].to_pylist()
    fits = json.loads((run / "calibration.json").read_text())["image"]
    calibrated = apply_calibrations(labels, expected, fits)
    np.testing.assert_allclose(table.set_index(keys).loc[order, labels], calibrated, atol=1e-5)
    for suffix in (".pt2", ".onnx") if export else ():
        assert call_train("export", "--run", run, "--out", tmp_path / f"model{suffix}") == 0
    if export:
        (scores,) = torch.export.load(tmp_path / "model.pt2").module()(torch.from_numpy(images))
        np.testing.assert_allclose(scores, calibrated, atol=1e-4)
        (scores,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images})
        np.testing.assert_allclose(scores, calibrated, atol=1e-4)
    with pytest.raises(DataError, match=r"is a run of another configuration: image_size is 32, not 320"):
        call_train("train", "--shards", shards, "--run", run, "--arch", "densenet121", "--no-pretrained")


def test_what_a_file_does_not_say_is_asked_for(
    run: Path, sample_shards: Shards, tmp_path: Path, capsys: Capture
) -> None:
    """A file without names needs them; weights of a run know all, and what they were trained on."""
    shards, file, out = sample_shards[0], tmp_path / "weights.pt", tmp_path / "out"
    save_weights(file, "rescnn", 3, read_images(shards, "valid"))
    words = ("adopt", "--shards", shards, "--run", out, "--workers", 1, "--init", file)
    with pytest.raises(click.UsageError, match=r"weights.pt does not say which network it is for: name it by --arch$"):
        call_train(*words)
    more = (*words, "--arch", "rescnn", "--image-size", 32)
    with pytest.raises(click.UsageError, match=r"no output of Edema is known: name them by --init-labels$"):
        call_train(*more, "--labels", "Edema")
    with pytest.raises(CheckpointError, match=r"`init_labels` names 2 outputs of 3$"):
        call_train(*more, "--init-labels", "Edema,Fracture")
    assert not out.exists()
    assert call_train(*more, "--init-labels", "Edema,Hernia,Fracture") == 0
    assert "its gray scale is not known: images are scaled by the shards'" in capsys.readouterr().err
    assert read_evaluation(out / "evaluation-dev.json").labels == ["Edema", "Fracture"]
    assert UNKNOWN in (out / "model-card.md").read_text()

    film = next((shards.parent / "CheXpert-v1.0-small" / "valid").rglob("*.jpg"))
    predict = f"predict --run {out} --out {tmp_path}/scores.csv {film} --heatmaps {tmp_path}/maps".split()
    assert call_train(*predict) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 1
    assert call_train("export", "--run", out, "--out", tmp_path / "model.pt2") == 0
    assert call_train("evaluate", "--run", out, "--split", "train", "--workers", 1) == 0

    again, second = tmp_path / "again", ("adopt", "--init", run, "--workers", 1)
    assert call_train(*second, "--shards", shards, "--run", again) == 0
    for name in ("scores-valid.arrow", "calibration.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes()
    card = (again / "model-card.md").read_text()
    assert "Of valid, 0 patients and 0 images are among those that these weights were trained on." in card
    with pytest.raises(DataError, match=rf"train: {run}/best.pt trained on \d+ of these \d+ images; evaluate on"):
        call_train("evaluate", "--run", again, "--split", "train", "--workers", 1)
