"""Stored images and heat maps → the pictures of `predict --heatmaps`: the image, its map over it, and a caption."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.base.errors import DataError
from pipeline.images import Gray, decode_stored, resize
from pipeline.stream.batches import Reader
from pipeline.stream.plan import Rows
from pipeline.stream.samples import OpenSplit

# Radiologists read images on a dark background.
PAPER, INK = "#14171b", "#e4e8ec"
SIDE = 512  # pixels: the longer side of a picture
NARROWEST = 180  # pixels: room for a caption below a smaller image
GAP, SCALE = 14, 10  # pixels: the edge, and the height of the color scale
TEXT, LINE = 12, 16  # pixels: font size and line spacing of captions
COLORS = "inferno"  # of matplotlib: brightness increases with strength, also in grayscale
STRONGEST = 0.6  # opacity of a heat map at its maximum


def read_images(split: OpenSplit, rows: Rows) -> Iterator[Gray]:
    """The stored images of those rows, uint8 [H, W], of any size.

    Raises DataError naming shard and sample if one does not match its checksum or does not decode.
    """
    reader = Reader(split)
    for row, place in zip(rows.tolist(), reader.locate(rows), strict=True):
        try:
            yield decode_stored(reader.read(*place), split.encoding)
        except (ValueError, OSError) as error:
            file = split.shards[split.shard[row]].path()
            raise DataError(f"{file}: sample {split.table['key'][row]}: {error}") from None


def draw_overlay(pixels: Gray, heat: npt.NDArray[np.float32], lines: Sequence[str]) -> Image.Image:
    """An image [H, W], enlarged at most twofold, its map [h, w] in [0, 1] over it, a color scale and a caption.

    The image is unchanged where the map is 0.
    """
    colors = matplotlib.colormaps[COLORS](np.arange(256))[:, :3] * 255
    times = min(SIDE / max(pixels.shape), 2)
    height, width = (max(1, round(length * times)) for length in pixels.shape)
    strength = resize((heat * 255).round().astype(np.uint8), height, width)
    alpha = STRONGEST * strength[..., None] / 255
    mixed = ((1 - alpha) * resize(pixels, height, width)[..., None] + alpha * colors[strength]).round()
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)
    picture = Image.fromarray(np.vstack([mixed, np.tile(colors[ramp], (SCALE, 1, 1))]).astype(np.uint8))

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), TEXT)
    full = max(NARROWEST, width)
    letters = int(full / font.getlength("m"))
    caption = [
        part for line in ("Color scale: from 0 to 1, the strongest", *lines) for part in textwrap.wrap(line, letters)
    ]
    bottom = 2 * GAP + picture.height
    sheet = Image.new("RGB", (full + 2 * GAP, bottom + LINE * len(caption) + GAP), PAPER)
    sheet.paste(picture, (GAP + (full - width) // 2, 2 * GAP))
    for number, line in enumerate(caption):
        ImageDraw.Draw(sheet).text((GAP, bottom + 2 + number * LINE), line, INK, font)
    return sheet
