"""Network → optimizer; step → learning rate; weights of a step → their running average."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from model.networks import StudyNetwork, find_head

MAX_WARMUP_STEPS = 500


def build_optimizer(network: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) in its fused form, on a CPU twice as fast as a loop over tensors.

    Weight decay applies to matrices and kernels only, not to norms, biases, ConvNeXt's channel scales, nor to what a
    timm network excludes: tokens, position embeddings and bias tables. A group's `scale` of the learning rate is
    `layer_decay` to the power of its depth below the head (Clark et al., ICLR 2020; Bao et al., ICLR 2022).
    """
    trunk = network.backbone if isinstance(network, StudyNetwork) else network
    if type(trunk).__module__.startswith("timm."):
        from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay

        excluded = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()  # type: ignore[operator]
        if isinstance(network, StudyNetwork):  # layers are counted down from the head
            trunk.set_submodule(network.place, network.head)
        if layer_decay < 1:
            groups = param_groups_layer_decay(trunk, weight_decay, excluded, layer_decay=layer_decay)
        else:
            groups = param_groups_weight_decay(trunk, weight_decay, no_weight_decay_list=excluded)
        if isinstance(network, StudyNetwork):
            trunk.set_submodule(network.place, nn.Identity())
        # The layers that fuse views learn at the head's rate.
        known = {parameter for group in groups for parameter in group["params"]} | set(trunk.parameters())
        added = [parameter for parameter in network.parameters() if parameter not in known]
        groups += [{"params": added, "weight_decay": weight_decay}] if added else []
        groups = [group | {"scale": group.get("lr_scale", 1.0)} for group in groups]
    else:
        depths = find_depths(network) if layer_decay < 1 else {}
        parts: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            decays = parameter.ndim > 1 and not name.endswith(".layer_scale")
            parts.setdefault((depths.get(parameter, 0), decays), []).append(parameter)
        groups = [
            {"params": members, "weight_decay": weight_decay * decays, "scale": layer_decay**depth}
            for (depth, decays), members in sorted(parts.items(), key=lambda item: (item[0][0], not item[0][1]))
        ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def find_depths(network: nn.Module) -> dict[nn.Parameter, int]:
    """How many blocks before the head each parameter is; 0 for the head and for layers that fuse views.

    Blocks are the network's modules in definition order, with a Sequential or ModuleList replaced by its members: of a
    ResNet the stem and the residual blocks, of a DenseNet the dense blocks, of a vision transformer the layers. A
    module whose children have weights begins a block; a single layer belongs to the previous block. The first block
    includes what precedes it, such as a transformer's position embeddings.
    """
    head = find_head(network)[1]
    trunk = network.backbone if isinstance(network, StudyNetwork) else network
    number, begun = 0, False
    blocks = dict.fromkeys(trunk.parameters(recurse=False), 0)
    for part in _open(trunk):
        if head in part.modules() or not [*part.parameters()]:
            continue
        number += begun and any([*layer.parameters()] for layer in part.children())
        begun = True
        blocks |= dict.fromkeys(part.parameters(), number)
    return {parameter: number + 1 - blocks.get(parameter, number + 1) for parameter in network.parameters()}


def _open(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, with lists of modules expanded."""
    for child in module.children():
        yield from _open(child) if isinstance(child, (nn.Sequential, nn.ModuleList)) else [child]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def scheduled_lr(peak: float, step: int, total: int) -> float:
    """Linear warmup over a tenth of the run, at most 500 steps, then cosine decay to zero."""
    warmup = min(MAX_WARMUP_STEPS, max(1, total // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, updates: int) -> None:
    """Update `average`, a copy of the network that holds the exponential moving average of its weights.

    The decay grows with the number of `updates` before this one, (1 + n) / (10 + n) up to `decay`, so that a short run
    forgets its start; the first update copies. BatchNorm's statistics are averaged too, and its counters copied. In
    torch, AveragedModel with `use_buffers` does the same, but reads its counter from the device, and so waits for it.
    """
    share = 1.0 if updates == 0 else 1 - min(decay, (1 + updates) / (10 + updates))
    averages, values = ([*module.parameters(), *module.buffers()] for module in (average, network))
    means, latest = ([tensor for tensor in tensors if tensor.is_floating_point()] for tensors in (averages, values))
    torch._foreach_lerp_(means, latest, share)
    for mean, value in zip(averages, values, strict=True):
        if not mean.is_floating_point():
            mean.copy_(value)
