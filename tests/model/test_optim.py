import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.checkpoint import load_checkpoint, save_checkpoint
from model.networks import StudyNetwork, build_network
from model.optim import build_optimizer, find_depths, scheduled_lr, set_lr, update_average
from pipeline.base.errors import DataError


def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One update from a batch of its own."""
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    network(images).square().sum().backward()
    optimizer.step()


def test_matrices_and_kernels_decay_and_nothing_else() -> None:
    with torch.device("meta"):
        network = build_network("convnext_tiny", 14)
    decayed, others = build_optimizer(network, lr=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    free = {names[parameter] for parameter in others["params"]}
    layers = dict(network.named_modules())
    assert free == {
        name
        for name in names.values()
        if name.endswith(("bias", "layer_scale"))
        or isinstance(layers[name.rpartition(".")[0]], nn.LayerNorm | nn.BatchNorm2d)
    }
    assert len(free) + len(decayed["params"]) == len(names)


def test_steps_are_adamws_and_continue_from_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = build_network("rescnn", 14).to(memory_format=torch.channels_last)
    copied = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, lr=1e-3, weight_decay=0.1)
    matrices, others = ([p for p in copied.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, foreach=False, fused=False)
    pairs = list(zip(ours.parameters(), copied.parameters(), strict=True))
    for seed in range(3):
        step(ours, optimizer, seed)
        for mine, other in pairs:
            other.grad = mine.grad
        reference.step()
    torch.testing.assert_close(*zip(*pairs, strict=True), rtol=1e-5, atol=1e-7)

    save_checkpoint(tmp_path / "last.pt", {"network": ours.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = build_network("rescnn", 14).to(memory_format=torch.channels_last)
    restored, saved = build_optimizer(resumed, lr=1.0, weight_decay=1.0), load_checkpoint(tmp_path / "last.pt")
    resumed.load_state_dict(saved["network"])
    restored.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(ours, optimizer, seed)
        step(resumed, restored, seed)
    torch.testing.assert_close(resumed.state_dict(), ours.state_dict(), rtol=0, atol=0)


BLOCKS = {  # the depth of some parameters
    "rescnn": "stem.0.weight 9, stem.1.bias 9, blocks.0.branch.0.weight 8, blocks.2.shortcut.1.weight 6, "
    "blocks.7.branch.7.bias 1, head.2.weight 0, head.2.bias 0",
    "resnet18": "conv1.weight 9, bn1.weight 9, layer1.0.conv1.weight 8, layer4.0.downsample.0.weight 2, "
    "layer4.1.bn2.bias 1, fc.bias 0",
    "densenet121": "features.conv0.weight 5, features.norm0.bias 5, features.denseblock1.denselayer6.conv2.weight 4, "
    "features.transition1.conv.weight 4, features.denseblock4.denselayer1.norm1.weight 1, features.norm5.weight 1, "
    "classifier.weight 0",
}


@pytest.mark.parametrize("arch", BLOCKS)
def test_blocks_learn_at_rates_that_decay_with_depth(arch: str) -> None:
    rates = {name: 0.5 ** int(depth) for name, depth in map(str.split, BLOCKS[arch].split(", "))}
    network = build_network(arch, 14)
    optimizer = build_optimizer(network, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    set_lr(optimizer, 0.3)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert groups.keys() == set(names.values())
    assert {name: groups[name]["lr"] for name in rates} == {name: 0.3 * rate for name, rate in rates.items()}
    plain = build_optimizer(network, lr=1.0, weight_decay=0.1)
    decay = {names[p]: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert {name: group["weight_decay"] for name, group in groups.items()} == decay
    study = StudyNetwork(network, "attention", frozen=False)
    depths = find_depths(study)
    new = ("projection", "attention.weight", "head.weight", "head.bias")
    for name, parameter in study.named_parameters():
        rate = 1.0 if name in new else groups[name.removeprefix("backbone.")]["scale"]
        assert 0.5 ** depths[parameter] == rate, name


SMALL_TIMM = "beit_base_patch16_224 dm_nfnet_f0 maxvit_pico_rw_256 resnet18 swin_tiny_patch4_window7_224"
SMALL_TIMM += " tf_efficientnet_lite0 vit_tiny_patch16_224"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("names", [SMALL_TIMM.split(), pytest.param(None, marks=pytest.mark.soak)])
def test_groups_of_timms_networks_are_timms(names: list[str] | None) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

    def values_of(groups: list[dict[str, Any]]) -> dict[nn.Parameter, tuple[float, float]]:
        scale = "scale" if "scale" in groups[0] else "lr_scale"
        return {p: (group["weight_decay"], group.get(scale, 1.0)) for group in groups for p in group["params"]}

    for name in names or timm.list_models():
        try:
            with torch.device("meta"):
                network = build_network(f"timm/{name}", 14)
        except DataError:  # its classifier is not one linear layer
            assert names is None
            continue
        kept = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()  # type: ignore[operator]
        references = {
            1.0: values_of(param_groups_weight_decay(network, 0.1, no_weight_decay_list=kept)),
            0.5: values_of(param_groups_layer_decay(network, 0.1, kept, layer_decay=0.5)),
        }
        for share, expected in references.items():
            assert values_of(build_optimizer(network, 1.0, 0.1, share).param_groups) == expected, name
        study = StudyNetwork(network, "attention", frozen=False)
        new = dict.fromkeys([study.projection, study.attention.weight], (0.1, 1.0))
        for share, expected in references.items():
            fused = values_of(build_optimizer(study, 1.0, 0.1, share).param_groups)
            assert fused == expected | new, name
            assert fused.keys() == set(study.parameters()), name


@pytest.mark.parametrize(("total", "warmup"), [(1, 1), (9, 1), (200, 20), (20_000, 500)])
def test_the_schedule_is_linear_then_a_cosine_to_zero(total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    rise = LinearLR(optimizer, 1 / warmup, 1.0, max(1, warmup - 1))
    fall = CosineAnnealingLR(optimizer, max(1, total - warmup))
    schedule = SequentialLR(optimizer, [rise, fall], [warmup])
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [scheduled_lr(0.3, number, total) for number in range(total)] == pytest.approx(expected, rel=1e-6)
    assert max(expected) == pytest.approx(0.3)


def test_the_average_is_torchs_with_a_warming_decay() -> None:
    network = build_network("rescnn", 14)
    optimizer = build_optimizer(network, lr=1e-2, weight_decay=0.0)
    average = copy.deepcopy(network)
    count = 0

    def warming(averages: Any, values: Any, _: object) -> None:
        get_ema_multi_avg_fn(min(0.3, (1 + count) / (10 + count)))(averages, values, count)

    reference = AveragedModel(network, multi_avg_fn=warming, use_buffers=True)
    for count in range(6):
        step(network, optimizer, seed=count)
        update_average(average, network, decay=0.3, updates=count)
        reference.update_parameters(network)
        if count == 0:
            torch.testing.assert_close(average.state_dict(), network.state_dict(), rtol=0, atol=0)
    ours, expected = average.state_dict(), reference.module.state_dict()
    for name in [name for name in ours if name.endswith("num_batches_tracked")]:
        assert int(ours.pop(name)) == 6
        expected.pop(name)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert not torch.equal(ours["head.2.weight"], network.state_dict()["head.2.weight"])
