"""Shards → a contact sheet: images chosen by seed, with their labels.

    pipeline show shards --label Edema --state uncertain --n 24 --out edema.png

Every image is checked against its checksum, as in training. A caption shows the sample's key in the tar and its labels,
but never age or sex.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from pipeline.base.errors import DataError
from pipeline.base.files import write_atomically
from pipeline.images import Gray, decode_stored, resize
from pipeline.labels import LABELS, STATES
from pipeline.stream.batches import Reader
from pipeline.stream.plan import Rows
from pipeline.stream.samples import OpenSplit

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
# Radiologists read images on a dark background, so the sheet is dark.
PAPER, INK, FAINT = "#14171b", "#e4e8ec", "#98a2ad"
# Sign and color of each state in captions; blank cells are not listed.
SIGNS = {"positive": ("+", "#ff8c3a"), "uncertain": ("?", "#f0e442"), "negative": ("−", "#56b4e9")}
TILE = 256  # pixels: the longer side of an image on the sheet
GAP = 14  # pixels
TEXT, LINE = 12, 16  # pixels: font size and line spacing of captions
WIDEST = 8  # images in a row
NARROWEST = 180  # pixels: room for a caption below a smaller image
COLORS = "inferno"  # of matplotlib, for heat maps: brightness increases with strength, also in grayscale
STRONGEST = 0.6  # opacity of a heat map at its maximum
SCALE = 10  # pixels: the height of the color scale

Caption = Sequence[tuple[str, str]]  # paragraphs: text and color


def find_state(split: OpenSplit, rows: Rows, label: str, state: str) -> Rows:
    """The `rows` whose label is in that state. Raises DataError, with the counts, if there are none."""
    column = split.table[label].take(pa.array(rows))
    value = STATES[state]
    inside = column.is_null() if value is None else pc.fill_null(pc.equal(column, value), False)
    chosen: Rows = rows[inside.to_numpy()]
    if len(chosen) == 0:
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
        states = ", ".join(f"{counts.get(value, 0):,} {name}" for name, value in STATES.items())
        raise DataError(f"{split.name}: no image is {state} for {label}; there are {states}")
    return chosen


def spread_rows(rows: Rows, n: int, seed: int) -> Rows:
    """At most `n` of `rows`, in order: a random one of each of `n` equal stretches."""
    if len(rows) <= n:
        return rows
    random = np.random.default_rng(seed)
    return np.array([random.choice(stretch) for stretch in np.array_split(rows, n)])


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


def fit(pixels: Gray, side: int) -> Gray:
    """The image resized so that its longer side has `side` pixels, enlarged at most twofold."""
    scale = min(side / max(pixels.shape), 2)
    height, width = (max(1, round(length * scale)) for length in pixels.shape)
    return resize(pixels, height, width)


def _describe_rows(split: OpenSplit, rows: Rows) -> list[Caption]:
    columns = split.table.select(["key", *LABELS])
    return [describe_sample(row) for row in columns.take(pa.array(rows)).to_pylist()]


def describe_sample(row: Mapping[str, object]) -> Caption:
    """Key and labels of a row of the table, such as `+ Edema, Fracture`; blank labels are not listed."""
    caption = [(str(row["key"]), FAINT)]
    for state, (sign, color) in SIGNS.items():
        labels = [label for label in LABELS if row[label] == STATES[state]]
        if labels:
            caption.append((f"{sign} {', '.join(labels)}", color))
    return caption


def draw_images(title: str, split: OpenSplit, rows: Rows) -> Image.Image:
    """A sheet of those images with captions, about as many rows as columns."""
    tiles = [fit(image, TILE) for image in read_images(split, rows)]
    columns = min(math.ceil(math.sqrt(len(tiles))), WIDEST)
    return draw_sheet(title, tiles, _describe_rows(split, rows), columns)


def draw_variants(
    title: str,
    split: OpenSplit,
    rows: Rows,
    shape: tuple[int, int],
    vary: Callable[[npt.NDArray[np.uint8]], Sequence[npt.NDArray[np.uint8]]],
) -> Image.Image:
    """A sheet with a row per image: as training reads it, of this height and width, then its variants.

    `vary` turns the whole batch, uint8 [B, H, W], into variants of the same shape, one per epoch.
    """
    batch = np.stack([resize(image, *shape) for image in read_images(split, rows)])
    variants = [batch, *vary(batch)]
    epochs: list[Caption] = [[(f"epoch {epoch}", FAINT)] for epoch in range(1, len(variants))]
    captions = [caption for original in _describe_rows(split, rows) for caption in (original, *epochs)]
    tiles = [variant[number] for number in range(len(batch)) for variant in variants]
    return draw_sheet(title, tiles, captions, len(variants))


def draw_sheet(
    title: str, tiles: Sequence[Gray], captions: Sequence[Caption], columns: int, text_size: int = TEXT
) -> Image.Image:
    """Images (uint8 [H, W] or [H, W, 3]) row by row at full size, each with its caption below, and the title on top."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), text_size)
    spacing = round(text_size * LINE / TEXT)
    columns = min(columns, len(tiles))
    width = max(NARROWEST, *(tile.shape[1] for tile in tiles))
    full = columns * (width + GAP) + GAP

    def wrap(caption: Caption, width: int) -> list[tuple[str, str]]:
        """Its lines of at most `width` pixels."""
        letters = int(width / font.getlength("m"))
        return [(line, color) for text, color in caption for line in textwrap.wrap(text, letters)]

    heading, texts = wrap([(title, INK)], full - 2 * GAP), [wrap(caption, width) for caption in captions]
    heights = [len(tile) + spacing * len(text) for tile, text in zip(tiles, texts, strict=True)]
    rows = [max(heights[start : start + columns]) for start in range(0, len(tiles), columns)]
    top = spacing * len(heading) + 2 * GAP
    sheet = Image.new("RGB", (full, top + sum(rows) + GAP * len(rows)), PAPER)
    drawing, lines = ImageDraw.Draw(sheet), [(GAP, GAP, heading)]
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        row, column = divmod(number, columns)
        left, upper = GAP + column * (width + GAP), top + sum(rows[:row]) + GAP * row
        sheet.paste(Image.fromarray(tile), (left + (width - tile.shape[1]) // 2, upper))
        lines.append((left, upper + len(tile) + 2, text))
    for left, upper, text in lines:
        for number, (line, color) in enumerate(text):
            drawing.text((left, upper + number * spacing), line, color, font)
    return sheet


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet atomically, in the format of its suffix (see FORMATS)."""
    data = io.BytesIO()
    sheet.save(data, FORMATS[path.suffix.lower()], quality=90)
    write_atomically(path, data.getvalue())


def blend(pixels: Gray, heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The image [H, W] as RGB, overlaid with a map [h, w] in [0, 1] resized to it; unchanged where the map is 0."""
    strength = resize((heat * 255).round().astype(np.uint8), *pixels.shape)
    alpha = STRONGEST * strength[..., None] / 255
    mixed: npt.NDArray[np.float64] = (1 - alpha) * pixels[..., None] + alpha * _color(strength)
    return mixed.round().astype(np.uint8)


def draw_overlay(pixels: Gray, heat: npt.NDArray[np.float32], lines: list[str], side: int = 512) -> Image.Image:
    """The blend, its longer side of `side` pixels (enlarged at most twofold), above a color scale and the caption."""
    picture = blend(fit(pixels, side), heat)
    ramp = np.linspace(0, 255, picture.shape[1]).round().astype(np.uint8)
    scale = np.broadcast_to(_color(ramp), (SCALE, len(ramp), 3)).astype(np.uint8)
    caption = [(line, INK) for line in ("Color scale: from 0 to 1, the strongest", *lines)]
    return draw_sheet("", [np.vstack([picture, scale])], [caption], 1)


def _color(strength: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The colors [..., 3], up to 255, of strengths."""
    colors: npt.NDArray[np.float64] = matplotlib.colormaps[COLORS](strength)[..., :3] * 255
    return colors
