"""The device and its precision; network + batches → scores, in the order of the batches; the AUROC of recent ones."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.augment import normalize
from model.losses import label_scores
from model.ranks import Ranks
from pipeline.base.errors import DataError

Array = npt.NDArray[np.generic]
Inputs = tuple[Tensor, ...]  # of a network: images, and what else `network_inputs` gives


class DivergedError(DataError):
    """A loss or score is not finite; the same settings would give the same result."""


class MemoryExhaustedError(DataError):
    """The device has too little memory for a step; the same settings would run out again."""


def find_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(amp: str) -> torch.dtype:
    """The precision of autocast on this machine; float32 means none.

    `auto`: bf16 if the GPU supports it, else fp16; off on CPUs, where it is slower. Raises DataError.
    """
    on_gpu = torch.cuda.is_available()
    if amp == "auto" and on_gpu:
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
