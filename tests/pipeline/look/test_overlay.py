"""The pictures of heat maps, and the images below them."""

import re

import numpy as np
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.look.overlay import draw_overlay, read_images
from pipeline.stream.samples import open_split
from tests.conftest import Shards, flip


def test_an_image_changes_only_where_its_map_is_above_0() -> None:
    pixels = np.arange(0, 250, 10, dtype=np.uint8).repeat(20).reshape(25, 20)
    heat = np.zeros((25, 20), np.float32)
    heat[:, 10:] = 1
    picture = np.asarray(draw_overlay(pixels, heat, ["Edema: score 0.500"]))
    assert picture.shape == (28 + 50 + 10 + 3 * 16 + 14, 180 + 2 * 14, 3)  # the caption's first line is wrapped
    image = picture[28 : 28 + 50, 14 + 70 : 14 + 70 + 40]
    expected = np.asarray(Image.fromarray(pixels).resize((40, 50), Image.Resampling.BILINEAR), int)
    assert (image[:, :15] == image[:, :15, :1]).all()  # gray
    assert abs(image[:, :15, 0] - expected[:, :15]).max() <= 1
    brightest = np.array([252, 255, 164])  # the end of matplotlib's inferno
    assert abs(image[:, 25:] - (0.4 * expected[:, 25:, None] + 0.6 * brightest)).max() <= 2


def test_a_damaged_image_is_named(shards: Shards) -> None:
    folder, manifest = shards
    flip(folder / "train-000000.tar", 600)  # inside the first image
    reason = r"patient\d+_study\d_view1_frontal: its bytes do not match the checksum in the index"
    with pytest.raises(DataError, match=f"^{re.escape(str(folder))}/train-000000.tar: sample {reason}$"):
        list(read_images(open_split(folder, manifest, "train"), np.arange(3)))
