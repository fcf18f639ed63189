"""Networks of timm, against timm's own."""

import json
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from model.checkpoint import CheckpointError, load_checkpoint, read_start
from model.names import Input, check_arch, own_input
from model.networks import Head, build_network, find_head, load_initial
from model.runs.config import Config, Setup
from model.runs.run import open_run
from pipeline.base.errors import DataError
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from pipeline.measure.calibration import apply_calibrations
from tests.training import call_train


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto.d2_in1k"])
def test_a_network_of_timm_is_timms_own(name: str) -> None:
    torch.manual_seed(0)
    ours = build_network(f"timm/{name}", 14).eval()
    torch.manual_seed(0)
    theirs = timm.create_model(name, in_chans=1, num_classes=14).eval()
    images = torch.rand(2, 1, 224, 224)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-6)
    path, head = find_head(ours)
    assert type(head) is Head is type(ours.get_submodule(path))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm/resnet19t", "has no such network; there are timm/resnet14t, timm/resnet10t, timm/resnet18"),
        ("timm/convnext_base.fb_in23k", "has no such network; there are timm/convnext_base.fb_in22k, "),
        ("timm/hf-hub:some/one", "has no such network"),
        ("vgg", "'vgg' is not one of 'resnet18', 'resnet34', "),
        ("timm/resnetv2_50", "ends in Conv2d and not in one linear layer: choose another `arch`"),
        ("timm/levit_128s", "ends in tuple and not in one linear layer"),
        ("timm/resnet10t?depth", "is not like timm/NAME?drop_path_rate=0.1&global_pool=avg"),
    ],
)
def test_what_is_no_network_here_is_named(arch: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        build_network(check_arch(arch), 14)
    assert message in str(caught.value)


def test_without_timm_its_networks_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DataError) as caught:
        build_network("timm/resnet10t", 14)
    assert str(caught.value) == "'timm/resnet10t': timm is missing: pip install 'chexpert-pipeline[timm]'"
    build_network("rescnn", 14)


def test_a_run_keeps_the_networks_input(sample_shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Its size and gray scale, from the initial weights through best.pt to scores and the exported network."""
    assert own_input("timm/resnet10t") == Input("176", False, 114.495, 57.63)
    assert own_input("timm/vit_tiny_patch16_224?depth=2") == Input("224", True, 127.5, 127.5)
    assert own_input("timm/vit_base_patch16_sapiens2") == Input("1024x768", False, 114.495, 57.63)
    run, shards, arch = tmp_path / "run", sample_shards[0], "timm/vit_tiny_patch16_224?depth=2&drop_path_rate=0.1"
    setup = Setup(shards=(str(shards),))
    assert open_run(Config(arch=arch, pretrained=False), setup, run).config.image_size == "224"
    path = tmp_path / "weights.pth"
    torch.save({"model": timm.create_model("vit_tiny_patch16_224", depth=2).state_dict()}, path)
    options = ["--shards", shards, "--run", run, "--arch", arch, "--init", path, "--image-size", "96x80"]
    assert call_train(*options, "--epochs", 1, "--limit", 16, "--batch-size", 16, "--layer-decay", 0.5) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["image_size"], config["input_scale"]) == ("96x80", [127.5, 127.5])
    assert load_checkpoint(run / "best.pt")["pixels"] == {"mean": 127.5, "std": 127.5}
    assert json.loads((run / "environment.jsonl").read_text())["packages"]["timm"] == timm.__version__

    assert call_train("export", "--run", run, "--out", tmp_path / "network.pt2") == 0
    network = build_network(arch, 14, (96, 80)).eval()
    network.load_state_dict(load_checkpoint(run / "best.pt")["weights"])
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 96, 80), np.uint8))
    exported = torch.export.load(tmp_path / "network.pt2").module()
    with torch.no_grad():
        scores = network(images.float() / 127.5 - 1).sigmoid()
        (calibrated,) = exported(images)
    fits = json.loads((run / "calibration.json").read_text())["image"]
    expected = apply_calibrations(LABELS, scores.numpy(), fits)
    np.testing.assert_allclose(calibrated, expected, rtol=0, atol=1e-5)
    film = next((shards.parent / "CheXpert-v1.0-small" / "valid").rglob("*.jpg"))
    out = ("--out", tmp_path / "scores.csv", "--heatmaps", tmp_path / "maps")
    assert call_train("predict", "--run", run, *out, film) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 1
    for arch, size, reason in (
        ("timm/vit_tiny_patch16_224", "100x80", "the sides must be multiples of 16; its own --image-size is 224"),
        ("timm/maxvit_tiny_tf_224", "96x80", r"width \(5\) must be divisible by window \(2\); its own"),
        ("timm/coatnet_nano_rw_224?depth=2", "96", "unexpected keyword argument 'depth'; its own --image-size is 224"),
    ):
        words = ("--shards", shards, "--run", tmp_path / "other", "--arch", arch, "--image-size", size)
        with pytest.raises(click.UsageError, match=f"takes no images of .*: .*{reason}"):
            call_train(*words)


def test_weights_of_timm_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        build_network("timm/resnet10t.c3_in1k", 14, pretrained=True)
    text = str(caught.value)
    assert text.startswith(
        "the weights of timm/resnet10t.c3_in1k cannot be downloaded from "
        "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors: "
    )
    assert "; download that file elsewhere and put it here, for `init` FILE; `no_pretrained` " in text
    with pytest.raises(CheckpointError, match=r"^timm/resnet50t has no weights in timm; choose another"):
        build_network("timm/resnet50t", 14, pretrained=True)


@torch.no_grad()
def test_a_file_of_timm_is_summed_over_colors_as_timm_does(tmp_path: Path) -> None:
    name, path = "tf_efficientnet_lite0", tmp_path / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=5).state_dict(), path)
    theirs = timm.create_model(
        name, pretrained=True, in_chans=1, num_classes=14, pretrained_cfg_overlay={"file": str(path)}
    )
    ours = build_network(f"timm/{name}", 14)
    head, _ = find_head(ours)
    assert load_initial(ours, read_start(path)).endswith(f" tensors; fresh: {head}.weight, {head}.bias")
    for key in (f"{head}.weight", f"{head}.bias"):
        theirs.get_parameter(key).copy_(ours.get_parameter(key))
    images = torch.rand(2, 1, 96, 96)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=1e-6)
    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match=r"weights.safetensors: damaged, or not a checkpoint"):
        load_initial(ours, read_start(path))
