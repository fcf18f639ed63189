"""Network → optimizer; step → learning rate; weights of a step → their running average."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from model.frozen import find_depths

MAX_WARMUP_STEPS = 500


def build_optimizer(
    network: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) in its fused form, on a CPU twice as fast as a loop over tensors.

    Weight decay applies to matrices and kernels only, not to parameters with one weight per output: norms, biases,
    and ConvNeXt's channel scales [C, 1, 1]. The learning rate of a parameter is `layer_decay` to the power of its depth
    below the head (Clark et al., ICLR 2020; Bao et al., ICLR 2022): `scale` of its group.
    """
    depths = find_depths(network) if layer_decay < 1 else {}
    groups: list[dict[str, Any]] = []
    for depth in sorted({0, *depths.values()}):
        members = [parameter for parameter in network.parameters() if depths.get(parameter, 0) == depth]
        decayed = [parameter for parameter in members if parameter[0].numel() > 1]
        others = [parameter for parameter in members if parameter[0].numel() == 1]
        scale = layer_decay**depth
        groups += [
            {"params": decayed, "weight_decay": weight_decay, "scale": scale},
            {"params": others, "weight_decay": 0.0, "scale": scale},
        ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


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

    The decay grows with the number of `updates` before this one, (1 + n) / (10 + n) up to `decay`, so that a
    short run forgets its start; the first update copies. BatchNorm's statistics are averaged too, and its counters
    copied. This equals torch's AveragedModel with `use_buffers`, except that the latter reads its counter back from
    the device at every step, and so waits for it.
    """
    share = 1.0 if updates == 0 else 1 - min(decay, (1 + updates) / (10 + updates))
    averages, values = _tensors(average), _tensors(network)
    torch._foreach_lerp_(
        [tensor for tensor in averages if tensor.is_floating_point()],
        [tensor for tensor in values if tensor.is_floating_point()],
        share,
    )
    for ours, theirs in zip(averages, values, strict=True):
        if not ours.is_floating_point():
            ours.copy_(theirs)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
