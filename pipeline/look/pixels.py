"""Shards → gray levels of each image: at its edge, where no disease is visible, and overall; images → altered ones.

Images are measured at 224 × 224 pixels, so that corners are comparable across formats. A network that still predicts a
label with the center covered uses something else than the lungs: a letter, a border, the corners' brightness. One that
predicts it from shuffled patches uses texture or brightness, not anatomy (Maguolo and Nanni, A critic evaluation of
methods for COVID-19 automatic detection from X-ray images, 2021).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.measure.metrics import Floats
from pipeline.stream.dataset import Selection, open_shards
from pipeline.stream.plan import Rows
from pipeline.stream.samples import NothingSelectedError, OpenSplit

SIDE = 224  # pixels
EDGE = SIDE // 32  # the border's width
CORNER = SIDE // 6  # from the edge to a corner's inner sides: outside the central two thirds
LETTER = 12  # pixels, at least, of a letter in a corner
ANY_POLICY = {"uncertain": "zeros", "blank": "zeros"}  # labels are not used
BLACK, SATURATED = 5, 250  # gray levels: at most, at least
CENTER = 0.8  # fraction of each side of an altered image's center; the lungs lie within
PATCHES = 8  # along each side of an image whose patches are shuffled
_FIRST, _LAST = slice(EDGE, CORNER), slice(SIDE - CORNER, SIDE - EDGE)
CORNERS = {
    "upper left": np.s_[:, _FIRST, _FIRST],
    "upper right": np.s_[:, _FIRST, _LAST],
    "lower left": np.s_[:, _LAST, _FIRST],
    "lower right": np.s_[:, _LAST, _LAST],
}
Images = npt.NDArray[np.uint8]  # [N, 1, H, W], or [N, H, W]
Measured = dict[str, Floats]  # covariates [N] of images


def measure_shards(
    sources: Iterable[tuple[Path, str]], views: str, threads: int, progress: Callable[[int], None]
) -> tuple[Measured, Measured]:
    """Acquisition and content covariates [N] of the images of folders' splits, in table order, of these views.

    `progress` is called with the number of images measured so far. Raises DataError for a damaged image.
    """
    at_edge, content = list[Measured](), list[Measured]()
    for folder, name in sources:
        try:
            images = open_shards(folder)[name].where(views=views)
        except NothingSelectedError:
            continue
        for batch in images.batches(64, SIDE, epoch=None, threads=threads):
            pixels = batch.images[:, 0]
            at_edge.append(measure_edge(pixels))
            content.append(measure_content(pixels))
            content[-1]["stored bytes"] = images.split.length[batch.step.images].astype(float)
            progress(sum(len(part["sharpness"]) for part in content))
    return _concatenate(at_edge), _concatenate(content)


def measure_edges(split: OpenSplit, rows: Rows, threads: int) -> Measured:
    """The results of `measure_edge` for the images in rows [N], ascending; damaged images are black."""
    images = Selection(split, ANY_POLICY, rows)
    batches = images.batches(64, SIDE, epoch=None, threads=threads, max_bad=len(rows))
    return _concatenate([measure_edge(batch.images[:, 0]) for batch in batches])


def measure_edge(pixels: Images) -> Measured:
    """Gray levels of images uint8 [N, 224, 224]: of the border; inside it, of each corner's background and letter."""
    border = np.ones(pixels.shape[1:], np.bool_)
    border[EDGE:-EDGE, EDGE:-EDGE] = False
    measured: Measured = {"border's gray level": pixels[:, border].mean(axis=1)}
    for name, place in CORNERS.items():
        levels = np.partition(pixels[place].reshape(len(pixels), -1), (LETTER - 1, -LETTER), axis=1).astype(float)
        measured[f"darkest in the {name} corner"] = levels[:, LETTER - 1]
        measured[f"brightest in the {name} corner"] = levels[:, -LETTER]
    return measured


def measure_content(pixels: Images) -> Measured:
    """Content covariates of images uint8 [N, 224, 224]; sharpness is the variance of the Laplacian."""
    return {
        "mean gray level": pixels.mean(axis=(1, 2)),
        "spread of gray levels": pixels.std(axis=(1, 2)),
        "sharpness": np.array([cv2.Laplacian(image, cv2.CV_32F).var() for image in pixels], float),
        "share of black pixels": (pixels <= BLACK).mean(axis=(1, 2)),
        "share of saturated pixels": (pixels >= SATURATED).mean(axis=(1, 2)),
    }


def cover(center: bool, level: int, images: Images) -> Images:
    """The images with the central box, `CENTER` of each side, or all but that box, set to one gray level."""
    height, width = images.shape[2:]
    top, left = (round(side * (1 - CENTER) / 2) for side in (height, width))
    box = np.s_[..., top : height - top, left : width - left]
    covered = images.copy() if center else np.full_like(images, level)
    covered[box] = level if center else images[box]
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


ALTERATIONS: dict[str, Callable[[int, Images], Images]] = {
    "center covered": partial(cover, True),
    "center alone": partial(cover, False),
    "patches shuffled": shuffle_patches,
}


def _concatenate(parts: Sequence[Measured]) -> Measured:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
