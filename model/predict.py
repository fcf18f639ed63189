"""Network + images → scores, heat maps and embeddings; the device and its precision."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.augment import low_pass, normalize
from model.losses import label_scores
from model.networks import StudyNetwork, find_head
from model.ranks import Ranks
from pipeline.base.errors import DataError

Array = npt.NDArray[np.generic]
Inputs = tuple[Tensor, ...]  # of a network: images, and what else `network_inputs` gives
GRIDS = 3  # of a heat map: the coarsest resolutions of features
SMOOTH = 1 / 20  # of the longer side: a map's blur, which moves the strongest place into a strong area


class DivergedError(DataError):
    """A loss or score is not finite; the same settings would give the same result."""


class MemoryExhaustedError(DataError):
    """The device has too little memory for a step; the same settings would run out again."""


def find_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(amp: str) -> torch.dtype:
    """The precision of autocast on this machine; float32 means none. Raises DataError."""
    on_gpu = torch.cuda.is_available()
    if amp == "auto" and on_gpu:  # off on CPUs, where it is slower
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and not on_gpu:
        raise DataError("`amp` fp16 needs a GPU; use bf16 or off on this machine")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def to_device(array: Array, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def network_inputs(device: torch.device, by_study: bool, images: Array, *views: Array) -> Inputs:
    """A network's inputs on the device: images uint8 [N, 1, H, W].

    `by_study`, also the `views`: each study's filled places, bool [B, V], and the projections, int8 [N].
    """
    return tuple(to_device(array, device) for array in (images, *(views if by_study else ())))


@contextmanager
def explain_memory(doing: str, remedy: str) -> Iterator[None]:
    """Raise MemoryExhaustedError, with the current activity and the remedy, if torch cannot allocate memory."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is no such class
        texts = ("can't allocate memory", "not enough memory", "out of memory")
        if isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts):
            raise MemoryExhaustedError(f"out of memory {doing}; {remedy}") from error
        raise


@torch.inference_mode()
def predict_scores(
    network: nn.Module, columns: list[int], batches: Iterable[Inputs], mean: float, std: float, precision: torch.dtype
) -> npt.NDArray[np.float64]:
    """Scores [N, L] in [0, 1] of the labels `columns` [L], for batches of inputs on the network's device.

    In float64, scores tie only beyond logits of ±36, not ±16. Raises DivergedError if a score is not finite.
    """
    network.eval()
    parts = []
    for images, *others in batches:
        inputs = normalize(images, mean, std).contiguous(memory_format=torch.channels_last)
        with (
            explain_memory(f"while scoring {len(images)} images at once", "choose a smaller `image_size`"),
            torch.autocast(images.device.type, precision, enabled=precision != torch.float32),
        ):
            logits = network(inputs, *others)
        parts.append(label_scores(logits[:, columns].cpu().double()))
    scores = torch.cat(parts).numpy() if parts else np.empty((0, len(columns)))
    if not np.isfinite(scores).all():
        raise DivergedError("the network's scores are not finite; train with a lower `lr`, or `amp` off")
    return scores


def measure_recent(recent: list[tuple[Tensor, Tensor, Tensor]], ranks: Ranks) -> float:
    """The mean AUROC of all ranks' batches since the last call, over labels with both classes; NaN if there are none.

    A hint of overfitting, to compare with dev's, not a measurement: images are augmented, and the weights change.
    Soft targets count as the nearer class.
    """
    from torchmetrics.functional.classification import binary_auroc  # here, because it takes seconds to import

    own = [torch.cat(part).cpu() for part in zip(*recent, strict=True)]
    recent.clear()
    scores, target, mask = (torch.cat(part) for part in zip(*ranks.list_all(own), strict=True))
    areas = []
    # Label by label: torchmetrics gives 0 for a label with one class.
    for score, truth, known in zip(scores.T, target.T >= 0.5, (mask & (target >= 0)).T, strict=True):
        if len(truth[known].unique()) == 2:
            areas.append(binary_auroc(score[known], truth[known].long(), validate_args=False).item())
    return sum(areas) / len(areas) if areas else math.nan


def draw_maps(network: nn.Module, inputs: Tensor, columns: list[int]) -> tuple[Tensor, Tensor]:
    """Scores [B, L] of normalized images [B, 1, H, W], and their maps [B, L, H, W] in [0, 1], both float32.

    They say how much each place raises a label's logit; `columns` [L] are these logits. Each map's maximum is 1; a map
    is all 0 if no place raises the logit. Convolutional networks get LayerCAM (Jiang et al., IEEE TIP 2021): positive
    gradients times activations, summed over channels, of the last layer of each of the `GRIDS` coarsest resolutions,
    each blurred and scaled to 1, and added. Networks without grids (transformers) get gradient × input. A first step of
    the network that has no gradient, such as equalization, is left out.
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
    """Logits, the input of the first layer, and the last feature grids [B, C, h, w], if only the head follows them."""
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


def embed(network: nn.Module, inputs: Tensor) -> Tensor:
    """Embeddings [N, features] of images [N, 1, H, W]. Raises DataError if the logits are not linear in them."""
    if isinstance(network, StudyNetwork):
        features: Tensor = network.backbone(inputs)
        return features
    head = find_head(network)[1]
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    try:
        logits = network(inputs)
    finally:
        handle.remove()
    if not (captured and captured[-1].ndim == 2 and torch.equal(head(captured[-1]), logits)):
        raise DataError("embeddings are for networks that end in a linear layer")
    return captured[-1]
