import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from model.checkpoint import CheckpointError, read_start
from model.names import ARCHITECTURES
from model.networks import build_network, load_initial
from pipeline.labels import LABELS

# One of each family, and the name of its classifier.
HEADS = {"resnet18": "fc", "densenet121": "classifier", "convnext_tiny": "classifier.2"}


def trained(arch: str) -> nn.Module:
    """torchvision's network with 9 outputs, whose normalization is not that of a fresh one."""
    network: nn.Module = get_model(arch, weights=None, num_classes=9)
    for name, value in network.state_dict().items():
        if "running" in name or value.ndim == 1:
            value.uniform_(0.5, 1.5)
    return network.eval()


@torch.no_grad()
def assert_same_on_gray(network: nn.Module, of_color: nn.Module) -> None:
    """The same logits of a gray image as of that image in three channels, as far as float32 goes."""
    images = torch.rand(2, 1, 64, 64)
    logits, expected = network.eval()(images), of_color.eval()(images.expand(-1, 3, -1, -1))
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * scale)


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
    theirs = trained(arch)
    # DenseNet's file has the names of before torch 0.4.
    old = {re.sub(r"((?:norm|conv))([12])\.", r"\1.\2.", name): v for name, v in theirs.state_dict().items()}
    torch.save(old if arch == "densenet121" else theirs.state_dict(), tmp_path / "weights.pth")
    ours, head = build_network(arch, 14), HEADS[arch]
    before = ours.state_dict()[f"{head}.weight"].clone()
    loaded = load_initial(ours, read_start(tmp_path / "weights.pth"))
    count = len(ours.state_dict()) - 2
    assert loaded == f"loaded {count} tensors; fresh: {head}.weight, {head}.bias"
    assert torch.equal(ours.state_dict()[f"{head}.weight"], before)
    theirs.set_submodule(head, ours.get_submodule(head))
    assert_same_on_gray(ours, theirs)


def test_a_classifier_is_loaded_by_the_names_of_its_outputs(tmp_path: Path) -> None:
    theirs, path = build_network("rescnn", 14).state_dict(), tmp_path / "weights.pth"
    # As Lightning writes a compiled network, whose outputs are in an order of its own.
    wrapped = {f"model._orig_mod.{name}": value for name, value in theirs.items()}
    torch.save({"epoch": 3, "state_dict": wrapped | {"loss.weight": torch.ones(14)}}, path)
    body = len(theirs) - 2
    left_out = "; left out: loss.weight"
    fresh, ours = build_network("rescnn", 14), build_network("rescnn", 14)
    before = fresh.state_dict()["head.2.weight"].clone()
    said = load_initial(fresh, read_start(path))
    assert said == f"loaded {body} tensors; fresh: head.2.weight, head.2.bias{left_out}"
    assert torch.equal(fresh.state_dict()["head.2.weight"], before)

    order = [*LABELS[::-1][:13], "Hernia"]
    said = load_initial(ours, read_start(path, order))
    assert said == f"loaded {body + 2} tensors; fresh: the classifier of No Finding{left_out}"
    for part in ("head.2.weight", "head.2.bias"):
        assert torch.equal(ours.state_dict()[part][1:], theirs[part][:13].flip(0))
    without = [name for name in theirs if not name.startswith("head.2")]
    for network in (fresh, ours):
        assert all(torch.equal(network.state_dict()[name], theirs[name]) for name in without)
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

    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match=r"weights.pth: damaged, or not a checkpoint"):
        load_initial(network, read_start(path))


def test_imagenet_weights_come_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = get_model("resnet18", weights=None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    cached = tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    torch.save(theirs.state_dict(), cached)
    ours = build_network("resnet18", 14, pretrained=True)
    theirs.fc = ours.fc
    assert_same_on_gray(ours, theirs)

    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"^the ImageNet weights of resnet18 cannot be downloaded from https://"):
        build_network("resnet18", 14, pretrained=True)


def test_a_failed_download_names_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, *_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(CheckpointError) as caught:
        build_network("densenet121", 14, pretrained=True)
    assert str(caught.value) == (
        "the ImageNet weights of densenet121 cannot be downloaded from https://download.pytorch.org/models/"
        "densenet121-a639ec97.pth: <urlopen error no route>; download that file elsewhere and put it here, as "
        f"{tmp_path}/hub/checkpoints/densenet121-a639ec97.pth, or anywhere for `init` FILE; "
        "`no_pretrained` (in make: PRETRAINED=no) starts from random weights"
    )
    with pytest.raises(CheckpointError, match=r"^rescnn has no ImageNet weights; choose another `arch`"):
        build_network("rescnn", 14, pretrained=True)
