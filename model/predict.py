"""Network + batches → scores, in the order of the batches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.augment import normalize
from model.losses import label_scores
from pipeline.base.errors import DataError


class DivergedError(DataError):
    """A loss or score is not finite; the same settings would give the same result."""


class MemoryExhaustedError(DataError):
    """The device has too little memory for a step; the same settings would run out again."""


@contextmanager
def explain_memory(doing: str, remedy: str) -> Iterator[None]:
    """Raise MemoryExhaustedError, with the current activity and the remedy, if torch cannot allocate memory."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is no such class
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
        ):
            raise
        raise MemoryExhaustedError(f"out of memory {doing}; {remedy}") from error


@torch.inference_mode()
def predict_scores(
    network: nn.Module,
    columns: list[int],
    batches: Iterable[tuple[Tensor, ...]],
    mean: float,
    std: float,
    precision: torch.dtype,
) -> npt.NDArray[np.float64]:
    """Scores [N, L] in [0, 1] of the labels `columns` [L], for batches of uint8 images [B, 1, H, W].

    In float64, scores tie only beyond logits of ±36, not ±16. The network's other inputs may follow the images; all are
    on the network's device. Raises DivergedError if a score is not finite.
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
