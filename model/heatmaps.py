"""Heat maps: per label, how much each place of an image raises the label's logit.

Convolutional networks get LayerCAM (Jiang et al., IEEE TIP 2021): positive gradients times activations, summed over
channels, of the last layer of each of the `GRIDS` coarsest resolutions, each blurred and scaled to 1, and added. The
layers are found by watching a forward pass: those whose output is a grid, if only pooling and the head follow.
Networks without one (transformers) get gradient × input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.augment import low_pass
from model.losses import label_scores

GRIDS = 3
SMOOTH = 1 / 20  # of the longer side: the blur's standard deviation; it moves the strongest place into a strong area


def draw_maps(network: nn.Module, inputs: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Scores [B, L] of normalized images [B, 1, H, W], and their maps [B, L, H, W] in [0, 1], both float32.

    Each map's maximum is 1; a map is all 0 if no place raises the logit. `columns` [L] are the
    logits of the labels. A first step of the network that has no gradient, such as equalization, is left out.
    """
    network.eval()
    blur = torch.full((len(inputs), 1, 1), SMOOTH * max(inputs.shape[2:]), device=inputs.device)
    with torch.enable_grad():
        logits, entered, grids = _watch(network, inputs)
        maps = []
        for column in columns:
            gradients = torch.autograd.grad(logits[:, column].sum(), grids or [entered], retain_graph=True)
            parts = []
            for source, gradient in zip(grids or [entered], gradients, strict=True):
                raising = (gradient.clamp_min(0) if grids else gradient) * source
                part = raising.detach().float().sum(dim=1, keepdim=True).clamp_min(0)
                parts.append(_scale(low_pass(F.interpolate(part, inputs.shape[2:], mode="bilinear"), blur)))
            maps.append(_scale(torch.stack(parts).sum(dim=0)))
    return label_scores(logits[:, columns]).detach(), torch.cat(maps, dim=1)


def _scale(maps: Tensor) -> Tensor:
    """Maps [B, 1, h, w] scaled to a maximum of 1; all-zero maps stay 0."""
    highest = maps.amax(dim=(2, 3), keepdim=True)
    return maps / highest.clamp_min(torch.finfo(torch.float32).tiny)


def _watch(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the input of the first layer, and the last feature grids [B, C, h, w], if any."""
    entered = inputs
    grids: dict[int, Tensor] = {}  # by height

    def enter(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal entered
        entered = arguments[0].detach().requires_grad_()
        return entered, *arguments[1:]

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        height, width = output.shape[2:] if output.dim() == 4 else (0, 0)
        # A grid has the aspect of the input, up to rounding of a side.
        if min(height, width) > 1 and abs(width - height * inputs.shape[3] / inputs.shape[2]) < 1:
            grids[height] = output
        elif sum(side > 1 for side in output.shape[1:]) > 1:
            grids.clear()  # tokens, or a channels-last grid: earlier grids were not the last

    handles = [network.register_forward_pre_hook(enter)]  # after existing hooks
    handles += [module.register_forward_hook(leave) for module in network.modules()]
    try:
        logits = network(inputs)
        return logits, entered, [grids[side] for side in sorted(grids)[:GRIDS]]
    finally:
        for handle in handles:
            handle.remove()
