"""Does a network look at the lungs? Its AUROC on the same images with the lungs covered, and with only the lungs.

A network that still predicts a label with the center of the image covered uses something else: a letter, a border or
the brightness of the corners. One that predicts it from shuffled patches uses texture or brightness, not anatomy. (The
test of Maguolo and Nanni, A critic evaluation of methods for COVID-19 automatic detection from X-ray images, 2021.)
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from model.runs.job import Job
from model.runs.predictor import Predictor
from pipeline.measure.metrics import Floats

CENTER = 0.8  # fraction of each side; the lungs lie within
PATCHES = 8  # along each side

Images = npt.NDArray[np.uint8]  # [N, 1, H, W]


def cover_center(level: int, images: Images) -> Images:
    """The images with the central box, `CENTER` of each side, set to one gray level."""
    covered = images.copy()
    covered[_center(images)] = level
    return covered


def cover_border(level: int, images: Images) -> Images:
    """The images with everything except the central box set to one gray level."""
    covered = np.full_like(images, level)
    covered[_center(images)] = images[_center(images)]
    return covered


def shuffle_patches(level: int, images: Images) -> Images:
    """The images with their 8×8 patches shuffled, in the same order for all; the remaining edge is set to `level`."""
    height, width = (side // PATCHES for side in images.shape[2:])
    cropped = images[..., : height * PATCHES, : width * PATCHES]
    patches = cropped.reshape(-1, 1, PATCHES, height, PATCHES, width).swapaxes(3, 4)
    order = np.argsort(np.random.Philox(key=0).random_raw(PATCHES**2), kind="stable")
    moved = patches.reshape(-1, 1, PATCHES**2, height, width)[:, :, order].reshape(patches.shape).swapaxes(3, 4)
    shuffled = np.full_like(images, level)
    shuffled[..., : height * PATCHES, : width * PATCHES] = moved.reshape(cropped.shape)
    return shuffled


ALTERATIONS: Mapping[str, Callable[[int, Images], Images]] = MappingProxyType(
    {"center covered": cover_center, "center alone": cover_border, "patches shuffled": shuffle_patches}
)


def score_altered(predictor: Predictor, job: Job, split: str) -> dict[str, Floats]:
    """A predictor's scores [N, L] of altered images, by alteration.

    Covered parts get train's mean gray level. Raises Stopped.
    """
    level = round(job.manifest.pixels["mean"])
    return {
        name: predictor.score(job, split, partial(alter, level)).images.scores for name, alter in ALTERATIONS.items()
    }


def _center(images: Images) -> tuple[Any, ...]:
    margins = (round(side * (1 - CENTER) / 2) for side in images.shape[2:])
    return (..., *(slice(margin, side - margin) for side, margin in zip(images.shape[2:], margins, strict=True)))
