"""Where a network looks: a map per label of how much each place of a film raises the label's logit.

Convolutional networks get Grad-CAM (Selvaraju et al., ICCV 2017) in the form of HiResCAM (Draelos and Carin, 2020),
which multiplies gradients with activations place by place; behind a mean pooling and a linear layer the two are the
same. The layer is found by watching a forward pass: the last whose output is a grid that only pooling and the head
follow. Networks without one (transformers) get gradient × input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.augment import low_pass
from model.losses import label_scores

SMOOTH = 1 / 28  # of the side: standard deviation of the Gaussian that gradient × input is blurred with


def draw_maps(network: nn.Module, inputs: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Scores [B, L] of normalized images [B, 1, S, S], and their maps [B, L, S, S] in [0, 1], both float32.

    The strongest place of each map is 1; a map is 0 everywhere where no place raises the logit. `columns` [L] are the
    logits of the labels. A first step of the network that has no gradient, such as equalization, is left out.
    """
    network.eval()
    with torch.enable_grad():
        logits, entered, grid = _watch(network, inputs)
        source = entered if grid is None else grid
        maps = []
        for column in columns:
            (gradient,) = torch.autograd.grad(logits[:, column].sum(), source, retain_graph=True)
            maps.append((gradient * source).detach().float().sum(dim=1))
    raised = torch.stack(maps, dim=1).clamp_min(0)
    if grid is None:
        scale = torch.full((raised.shape[0] * raised.shape[1], 1, 1), SMOOTH * raised.shape[-1])
        raised = low_pass(raised.flatten(0, 1)[:, None], scale.to(raised.device)).view_as(raised)
    raised = F.interpolate(raised, inputs.shape[2:], mode="bilinear", align_corners=False)
    highest = raised.amax(dim=(2, 3), keepdim=True)
    return label_scores(logits[:, columns]).detach(), raised / highest.clamp_min(
        torch.finfo(torch.float32).tiny
    )


def _watch(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, what entered the first layer, and the last grid of features [B, C, H, W]; None without one."""
    entered, grid = inputs, None

    def enter(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal entered
        entered = arguments[0].detach().requires_grad_()
        return entered, *arguments[1:]

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal grid
        if not isinstance(output, Tensor):
            return
        if output.dim() == 4 and output.shape[2] == output.shape[3] > 1:
            grid = output
        elif sum(side > 1 for side in output.shape[1:]) > 1:
            grid = None  # tokens, or a grid with its channels last: what came before was no last one

    handles = [network.register_forward_pre_hook(enter)]  # after those that are there
    handles += [module.register_forward_hook(leave) for module in network.modules()]
    try:
        return network(inputs), entered, grid
    finally:
        for handle in handles:
            handle.remove()
