"""A film and a heat map → the film with the map over it, a color scale, and a caption."""

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pipeline.images import Gray, resize
from pipeline.look.sheet import INK, LINE, NARROWEST, PAPER, TEXT, fit

COLORS = "inferno"  # of matplotlib: as bright as strong, also in gray print
STRONGEST = 0.6  # how much of the film the strongest place hides
SCALE = 10  # pixels: the height of the color scale


def blend(film: Gray, heat: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The film [H, W] as RGB, with a map [S, S] in [0, 1] stretched over it; where that is 0 the film is bare."""
    strength = resize((heat * 255).round().astype(np.uint8), *film.shape)
    alpha = STRONGEST * strength[..., None] / 255
    mixed: npt.NDArray[np.float64] = (1 - alpha) * film[..., None] + alpha * _color(strength)
    return mixed.round().astype(np.uint8)


def draw_overlay(film: Gray, heat: npt.NDArray[np.float32], lines: list[str], side: int = 512) -> Image.Image:
    """The blend, its longer side of `side` pixels (a film is enlarged at most twofold), above scale and caption."""
    picture = blend(fit(film, side), heat)
    height, width = picture.shape[:2]
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT)
    whole = Image.new("RGB", (max(width, NARROWEST), height + SCALE + LINE * (len(lines) + 1) + 8), PAPER)
    whole.paste(Image.fromarray(picture))
    ramp = np.linspace(0, 255, whole.width).round().astype(np.uint8)
    whole.paste(
        Image.fromarray(np.broadcast_to(_color(ramp), (SCALE, whole.width, 3)).astype(np.uint8)), (0, height)
    )
    drawing = ImageDraw.Draw(whole)
    for number, line in enumerate(["0", *lines]):
        drawing.text((2, height + SCALE + 2 + LINE * number), line, INK, font)
    drawing.text((whole.width - 2, height + SCALE + 2), "1, strongest", INK, font, anchor="ra")
    return whole


def _color(strength: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The colors [..., 3], up to 255, of strengths."""
    colors: npt.NDArray[np.float64] = matplotlib.colormaps[COLORS](strength)[..., :3] * 255
    return colors
