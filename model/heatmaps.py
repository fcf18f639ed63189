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
    with torch.enable_grad():
        logits, entered, grids = _watch(network, inputs)
        maps = []
        for column in columns:
            gradients = torch.autograd.grad(logits[:, column].sum(), grids or [entered], retain_graph=True)
            if grids:
                gradients = tuple(gradient.clamp_min(0) for gradient in gradients)
            parts = map(_weigh, grids or [entered], gradients)
            sized = [_smooth(part, inputs.shape[2:]) for part in parts]
            maps.append(_scale(torch.stack(sized).sum(dim=0)))
    return label_scores(logits[:, columns]).detach(), torch.cat(maps, dim=1)


def _weigh(source: Tensor, gradient: Tensor) -> Tensor:
    """The positive contribution of each place to the logit, [B, 1, h, w]."""
    return (gradient * source).detach().float().sum(dim=1, keepdim=True).clamp_min(0)


def _scale(maps: Tensor) -> Tensor:
    """Maps [B, 1, h, w] scaled to a maximum of 1; all-zero maps stay 0."""
    highest = maps.amax(dim=(2, 3), keepdim=True)
    return maps / highest.clamp_min(torch.finfo(torch.float32).tiny)


def _smooth(maps: Tensor, shape: torch.Size) -> Tensor:
    """Maps [B, 1, h, w] at the size of the input [H, W], blurred."""
    sized = F.interpolate(maps, shape, mode="bilinear")
    return _scale(low_pass(sized, torch.full((len(maps), 1, 1), SMOOTH * max(shape), device=maps.device)))


def _is_scaled(grid: torch.Size, shape: torch.Size) -> bool:
    """Whether a grid [h, w] has the aspect of the input [H, W], up to rounding of a side."""
    return abs(grid[1] - grid[0] * shape[1] / shape[0]) < 1


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
        if output.dim() == 4 and min(output.shape[2:]) > 1 and _is_scaled(output.shape[2:], inputs.shape[2:]):
            grids[output.shape[2]] = output
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
