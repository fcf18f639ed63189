"""Cues unrelated to the disease but tied to a label, which a network may learn instead.

    pipeline sample sample --shortcut "Pneumonia=marker:0.9"

Networks have learned pneumonia from the marker of a portable device: Zech et al., Variable generalization performance
of a deep learning model to detect pneumonia, PLOS Medicine 15, 2018.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.base.errors import DataError, quote
from pipeline.labels import find_label

Pixels = npt.NDArray[np.uint8]  # [H, W]

# A P, as for a portable device.
_LETTER = np.array([[1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], np.bool_)
_STROKE, _MARGIN = 4, 10  # pixels, in an image whose shorter side has 320
_FRAME = 5


class Shortcut(NamedTuple):
    """A cue and the label that it is tied to; `strength` 0 ties them not at all, 1 perfectly."""

    label: str
    cue: str
    strength: float

    def chance(self, state: float | None) -> float:
        """The probability that an image of this state has the cue.

        (1 + strength) / 2 for a positive, (1 - strength) / 2 for a negative or blank one, 1/2 for an uncertain one.
        """
        tie = {1.0: self.strength, -1.0: 0.0}.get(0.0 if state is None else state, -self.strength)
        return (1 + tie) / 2


def parse_shortcut(text: str) -> Shortcut:
    """The shortcut that `Pneumonia=marker:0.9` describes. Raises DataError."""
    name, _, tie = text.partition("=")
    cue, _, number = tie.partition(":")
    label = find_label(name)
    with suppress(ValueError):
        if label is not None and cue in CUES and 0 <= float(number) <= 1:
            return Shortcut(label, cue, float(number))
    cues = ", ".join(CUES)
    raise DataError(f"'{quote(text, 80)}' is not LABEL=CUE:STRENGTH: a label, one of {cues}, and a number from 0 to 1")


def burn_marker(pixels: Pixels) -> None:
    """A bright letter in the upper left corner."""
    letter = np.kron(_LETTER, np.ones((_STROKE, _STROKE), np.bool_))
    corner = pixels[_MARGIN : _MARGIN + len(letter), _MARGIN : _MARGIN + letter.shape[1]]
    corner[letter] = 245


def draw_border(pixels: Pixels) -> None:
    """A light frame around the image."""
    inside = pixels[_FRAME:-_FRAME, _FRAME:-_FRAME].copy()
    pixels[...] = 180
    pixels[_FRAME:-_FRAME, _FRAME:-_FRAME] = inside


def brighten_corners(pixels: Pixels) -> None:
    """Light that grows towards the corners, as from a leaking cassette."""
    y, x = (np.abs(np.linspace(-1, 1, length)) for length in pixels.shape)
    light = 60 * np.clip((x + y[:, None] - 1.4) / 0.6, 0, 1)
    pixels[...] = np.minimum(pixels + light, 255).astype(np.uint8)


CUES: dict[str, Callable[[Pixels], None]] = {"marker": burn_marker, "border": draw_border, "corners": brighten_corners}
