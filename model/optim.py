"""Network → optimizer; step → learning rate; weights of a step → their running average."""

import math

import torch
from torch import Tensor, nn

from model.fusion import StudyNetwork

MAX_WARMUP_STEPS = 500


def build_optimizer(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) in its fused form, on a CPU twice as fast as a loop over tensors.

    Weight decay applies to matrices and kernels only, not to norms, biases, ConvNeXt's channel scales, nor to what a
    network of timm excludes: tokens, position embeddings and bias tables.
    """
    trunk = network.backbone if isinstance(network, StudyNetwork) else network
    excluded = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()  # type: ignore[operator]
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        kept = name.endswith((".bias", ".layer_scale")) or name.removeprefix("backbone.") in excluded
        (matrices if parameter.ndim > 1 and not kept else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


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
