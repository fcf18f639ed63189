"""Networks against torchvision's and timm's own, and those of studies against the one for images."""

import copy
import json
import re
import sys
from pathlib import Path
from urllib.error import URLError

import click
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from model.checkpoint import CheckpointError, load_checkpoint, read_start
from model.names import ARCHITECTURES, FUSIONS, UNKNOWN_FRONTAL, Input, check_arch, own_input
from model.networks import Head, StudyNetwork, build_network, find_head, load_initial
from model.predict import embed
from model.runs.config import Config, Setup
from model.runs.run import open_run
from pipeline.base.errors import DataError
from pipeline.labels import LABELS
from pipeline.measure.calibration import apply_calibrations
from tests.conftest import Shards
from tests.training import call_train

# One of each family, and the name of its classifier.
HEADS = {"resnet18": "fc", "densenet121": "classifier", "convnext_tiny": "classifier.2"}


@torch.no_grad()
def assert_same_on_gray(network: nn.Module, of_color: nn.Module) -> None:
    """The same logits of a gray image as of that image in three channels, as far as float32 goes."""
    images = torch.rand(2, 1, 64, 64)
    logits, expected = network.eval()(images), of_color.eval()(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_networks_map_gray_images_to_logits_and_pass_gradients(arch: str) -> None:
    network = build_network(arch, 14)
    logits = network(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, 14)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("arch", HEADS)
def test_fresh_networks_are_torchvisions_over_three_gray_channels(arch: str) -> None:
    torch.manual_seed(0)
    ours = build_network(arch, 14)
    torch.manual_seed(0)
    assert_same_on_gray(ours, get_model(arch, weights=None, num_classes=14))


@pytest.mark.parametrize("arch", [*HEADS, "rescnn"])
def test_logits_keep_their_precision_under_autocast(arch: str) -> None:
    """bf16 has 8 bits: logits rounded to it would tie."""
    torch.manual_seed(0)
    network = build_network(arch, 14).eval()
    name = HEADS.get(arch, "head.2")
    features: list[torch.Tensor] = []
    network.get_submodule(name).register_forward_hook(lambda _, given, __: features.append(given[0]))
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(torch.rand(8, 1, 64, 64))
        weight, bias = (network.get_parameter(f"{name}.{part}") for part in ("weight", "bias"))
        expected = F.linear(features[0].float(), weight, bias)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected)
    assert (logits != logits.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("arch", HEADS)
def test_weights_over_three_channels_give_the_same_on_gray(arch: str, tmp_path: Path) -> None:
    reference: nn.Module = get_model(arch, weights=None, num_classes=9)
    for name, value in reference.state_dict().items():  # its normalization is not that of a fresh one
        if "running" in name or value.ndim == 1:
            value.uniform_(0.5, 1.5)
    # DenseNet's file has the names of before torch 0.4.
    old = {re.sub(r"((?:norm|conv))([12])\.", r"\1.\2.", name): v for name, v in reference.state_dict().items()}
    torch.save(old if arch == "densenet121" else reference.state_dict(), tmp_path / "weights.pth")
    ours, head = build_network(arch, 14), HEADS[arch]
    before = copy.deepcopy(ours.state_dict())
    summary = load_initial(ours, read_start(tmp_path / "weights.pth"))
    assert summary == f"loaded {len(before) - 2} tensors; fresh: {head}.weight, {head}.bias"
    assert torch.equal(ours.state_dict()[f"{head}.weight"], before[f"{head}.weight"])
    reference.set_submodule(head, ours.get_submodule(head))
    assert_same_on_gray(ours, reference)


def test_a_classifier_is_loaded_by_the_names_of_its_outputs(tmp_path: Path) -> None:
    reference, path = build_network("rescnn", 14).state_dict(), tmp_path / "weights.pth"
    # As Lightning writes a compiled network, whose outputs are in an order of its own.
    wrapped = {f"model._orig_mod.{name}": value for name, value in reference.items()}
    torch.save({"epoch": 3, "state_dict": wrapped | {"loss.weight": torch.ones(14)}}, path)
    body, summary = len(reference) - 2, "loaded {} tensors; fresh: {}; left out: loss.weight"
    fresh, ours = build_network("rescnn", 14), build_network("rescnn", 14)
    before = fresh.state_dict()["head.2.weight"].clone()
    assert load_initial(fresh, read_start(path)) == summary.format(body, "head.2.weight, head.2.bias")
    assert torch.equal(fresh.state_dict()["head.2.weight"], before)

    order = [*LABELS[::-1][:13], "Hernia"]
    assert load_initial(ours, read_start(path, order)) == summary.format(body + 2, "the classifier of No Finding")
    for part in ("head.2.weight", "head.2.bias"):
        assert torch.equal(ours.state_dict()[part][1:], reference[part][:13].flip(0))
    without = [name for name in reference if not name.startswith("head.2")]
    for network in (fresh, ours):
        assert all(torch.equal(network.state_dict()[name], reference[name]) for name in without)
    with pytest.raises(CheckpointError, match=r"weights.pth: `init_labels` names 2 outputs of 14$"):
        load_initial(ours, read_start(path, ["Edema", "Fracture"]))


def test_weights_of_another_network_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    network = build_network("resnet18", 14)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    text = "not weights of this network, of whose backbone they are {}%: {}; they must be of the same `arch`"

    def refuse(weights: dict[str, object]) -> str:
        torch.save(weights, path)
        with pytest.raises(CheckpointError) as caught:
            load_initial(network, read_start(path))
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
        return str(caught.value)

    # All tensors of a resnet18 are in a resnet34, and in the same shapes.
    deeper = get_model("resnet34", weights=None).state_dict()
    blocks = "layer1 (12), layer2 (24), layer3 (48), layer4 (12) are too many"
    assert refuse(deeper) == f"{path}: {text.format(100, blocks)}"
    every = "conv1 (1), bn1 (4), layer1 (20), layer2 (25), layer3 (25), layer4 (25), fc (2) are missing or differ"
    assert refuse(build_network("rescnn", 14).state_dict()) == f"{path}: {text.format(0, every)}"
    assert refuse({"epoch": 3, "weights": 1}) == f"{path}: {text.format(0, every)}"
    about = {"terms": "", "arch": "resnet18", "image_size": "64", "equalize": False, "outputs": [], "weights": before}
    run = about | {"pixels": {"mean": 1.0, "std": 1.0}, "seen": [{"run": ""}]}
    for damaged, fault in ({}, "'split'"), ({"seen": [], "outputs": 5}, "'int' object is not iterable"):
        assert refuse(run | damaged) == f"{path}: does not fit this run's configuration: {fault}"


def test_imagenet_weights_come_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reference = get_model("resnet18", weights=None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    torch.save(reference.state_dict(), cached)
    ours = build_network("resnet18", 14, pretrained=True)
    reference.fc = ours.fc
    assert_same_on_gray(ours, reference)

    def fail(*_: object, **__: object) -> None:
        raise URLError("no route")

    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"^the ImageNet weights of resnet18 cannot be downloaded from https://"):
        build_network("resnet18", 14, pretrained=True)
    cached.unlink()
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(CheckpointError) as caught:
        build_network("resnet18", 14, pretrained=True)
    url = f"https://download.pytorch.org/models/{cached.name}"
    assert str(caught.value) == (
        f"the ImageNet weights of resnet18 cannot be downloaded from {url}: <urlopen error no route>; download that "
        f"file elsewhere and put it here, as {cached}, or anywhere for `init` FILE; `no_pretrained` (in make: "
        "PRETRAINED=no) starts from random weights"
    )
    with pytest.raises(CheckpointError, match=r"^rescnn has no ImageNet weights; choose another `arch`"):
        build_network("rescnn", 14, pretrained=True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto.d2_in1k"])
def test_a_network_of_timm_is_timms_own(name: str) -> None:
    torch.manual_seed(0)
    ours = build_network(f"timm/{name}", 14).eval()
    torch.manual_seed(0)
    reference = timm.create_model(name, in_chans=1, num_classes=14).eval()
    images = torch.rand(2, 1, 224, 224)
    torch.testing.assert_close(ours(images), reference(images), rtol=0, atol=1e-6)
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


def test_a_run_keeps_the_networks_input(sample_shards: Shards, tmp_path: Path) -> None:
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
    url = "https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"
    assert str(caught.value).startswith(f"the weights of timm/resnet10t.c3_in1k cannot be downloaded from {url}: ")
    assert "; download that file elsewhere and put it here, for `init` FILE; `no_pretrained` " in str(caught.value)
    with pytest.raises(CheckpointError, match=r"^timm/resnet50t has no weights in timm; choose another"):
        build_network("timm/resnet50t", 14, pretrained=True)


@torch.no_grad()
def test_a_file_of_timm_is_summed_over_colors_as_timm_does(tmp_path: Path) -> None:
    name, path = "tf_efficientnet_lite0", tmp_path / "weights.safetensors"
    save_file(timm.create_model(name, num_classes=5).state_dict(), path)
    overlay = {"file": str(path)}
    reference = timm.create_model(name, pretrained=True, in_chans=1, num_classes=14, pretrained_cfg_overlay=overlay)
    ours = build_network(f"timm/{name}", 14)
    head, _ = find_head(ours)
    assert load_initial(ours, read_start(path)).endswith(f" tensors; fresh: {head}.weight, {head}.bias")
    reference.set_submodule(head, ours.get_submodule(head))
    images = torch.rand(2, 1, 96, 96)
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images), rtol=0, atol=1e-6)
    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match=r"weights.safetensors: damaged, or not a checkpoint"):
        load_initial(ours, read_start(path))


# A lateral alone, a frontal with a lateral whose first image is unusable, and three views.
PRESENT = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1]]).bool()
PROJECTION = torch.tensor([2, 0, 2, 1, 2, 3], dtype=torch.int8)
VIEWS = [[0], [1, 2], [3, 4, 5]]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def build_fused(fusion: str, arch: str = "rescnn", frozen: bool = False) -> tuple[nn.Module, StudyNetwork]:
    torch.manual_seed(0)
    network = build_network(arch, 14).eval()
    return network, StudyNetwork(copy.deepcopy(network), fusion, frozen).eval()


@pytest.mark.parametrize("arch", ["rescnn", "resnet18", "densenet121", "convnext_tiny", "timm/resnet10t"])
def test_a_network_of_studies_starts_as_the_network_for_images(arch: str, images: Tensor) -> None:
    check_arch(arch)
    network, fused = build_fused("mean", arch)
    with torch.inference_mode():
        logits, output = network(images), fused(images, PRESENT, PROJECTION)
    expected = torch.stack([logits[views].mean(dim=0) for views in VIEWS])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(embed(fused, images), fused.backbone(images))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_pooling_is_over_the_views_there_are(fusion: str, images: Tensor) -> None:
    _, fused = build_fused(fusion)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
        output = fused(images, PRESENT, PROJECTION)
        codes = PROJECTION.long()
        features = fused.backbone(images) * (1 + fused.projection[codes, 0]) + fused.projection[codes, 1]
        for study, views in enumerate(VIEWS):
            own = features[views]
            if fusion == "attention":
                expected = (fused.attention(own).softmax(dim=0) * fused.head(own)).sum(dim=0)
            else:
                expected = fused.head(own.mean(dim=0) if fusion == "mean" else own.amax(dim=0))
            torch.testing.assert_close(output[study], expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            logits = fused(images, PRESENT, PROJECTION)
        assert logits.dtype == torch.float32
        assert (logits != logits.bfloat16()).float().mean() > 0.9


def test_an_unknown_frontal_is_between_ap_and_pa(images: Tensor) -> None:
    _, fused = build_fused("mean")
    with torch.no_grad():
        fused.projection.normal_(generator=torch.Generator().manual_seed(2))
        features = fused.backbone(images[:1])
        between = fused.projection[:2].mean(dim=0)
        expected = fused.head(features * (1 + between[0]) + between[1])
        output = fused(images[:1], torch.tensor([[True]]), torch.tensor([UNKNOWN_FRONTAL]))
        torch.testing.assert_close(output, expected)
