"""score.py, which `export` writes beside an ONNX file, makes the pixels of `predict`, to the last level."""

import io
import runpy
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from model.export import SCRIPT
from pipeline.images import ImageOptions, decode_stored, prepare, resize

SQUARES = ("no", "pad", "crop", "stretch")
OPTIONS = [ImageOptions(size=64, square=square, encoding="jpeg", quality=95, max_pixels=10**7) for square in SQUARES]
OPTIONS += [ImageOptions(None, "no", "jpeg", 90, 10**7), ImageOptions(64, "no", "raw", 95, 10**7, bits=14)]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def draw_kinds(height: int, width: int) -> Iterator[tuple[str, bytes]]:
    """Images of every kind that predict reads."""
    generator = np.random.default_rng(height)

    def draw() -> Image.Image:
        coarse = generator.integers(0, 256, (max(2, height // 30), max(2, width // 30)), np.uint8)
        shades = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return Image.fromarray((shades + generator.integers(-8, 9, shades.shape)).clip(0, 255).astype(np.uint8))

    gray, alpha = draw(), draw()
    color = Image.merge("RGB", [gray, draw(), draw()])
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 13 + 7)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image in {"gray": gray, "color": color, "CMYK": color.convert("CMYK")}.items():
        yield f"JPEG {name}", encode(image, "JPEG", quality=90)
        yield f"JPEG {name}, progressive and turned", encode(image, "JPEG", progressive=True, exif=turned)
    yield "JPEG progressive", encode(gray, "JPEG", progressive=True)
    yield "JPEG RGB", encode(color, "JPEG", keep_rgb=True)
    palette, both = color.quantize(64), Image.merge("LA", [gray, alpha])
    kinds = {"gray": gray, "color": color, "palette": palette, "alpha": both, "1 bit": gray.convert("1")}
    for name, image in kinds.items():
        yield f"PNG {name}", encode(image, "PNG", exif=turned)
    yield "PNG color and alpha", encode(Image.merge("RGBA", [*color.split(), alpha]), "PNG")
    yield "PNG palette, transparent", encode(palette, "PNG", transparency=3)
    yield "PNG all transparent", encode(Image.merge("LA", [gray, Image.new("L", gray.size)]), "PNG")
    yield "PNG 16 bits", encode(deep, "PNG")
    yield "PNG 16 bits, transparent", encode(deep, "PNG", transparency=int(np.asarray(deep)[0, 0]))
    chunk, data = b"sBIT\x0d", encode(deep, "PNG")
    yield "PNG 13 of 16 bits", data[:33] + struct.pack(">I5sI", 1, chunk, zlib.crc32(chunk)) + data[33:]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., Any]]:
    """The script's functions, loaded where nothing but what it needs can be imported."""
    fake: Any = ModuleType("onnxruntime")
    texts = dict.fromkeys(("labels", "image_size", "images", "thresholds"), "{}")
    texts |= {"threshold_rule": "none", "use": ""}
    metadata = SimpleNamespace(custom_metadata_map=texts)
    fake.InferenceSession = lambda _: SimpleNamespace(get_modelmeta=lambda: metadata)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(sys, "argv", ["score.py", "model.onnx"])
    for name in ("model", "pipeline", "cv2", "simplejpeg", "torch"):
        monkeypatch.setitem(sys.modules, name, None)
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("shape", [(200, 165), (80, 60), (31, 77), (520, 130), (64, 64)])
def test_pixels_are_those_of_the_shards(shape: tuple[int, int], script: dict[str, Callable[..., Any]]) -> None:
    for (name, data), options in product(draw_kinds(*shape), OPTIONS):
        stored = decode_stored(prepare(data, options).data, options.encoding)
        pixels = script["prepare"](data, **options._asdict())
        np.testing.assert_array_equal(pixels, stored, err_msg=f"{name} {options}")
        for height, width in ((32, 32), (48, 40), (150, 224)):
            np.testing.assert_array_equal(script["resize"](pixels, height, width), resize(stored, height, width))


def test_a_kind_that_pillow_reads_differently_is_refused(script: dict[str, Callable[..., Any]]) -> None:
    deep = cv2.imencode(".png", np.full((8, 8, 3), 300, np.uint16))[1].tobytes()
    with pytest.raises(AssertionError, match=r"^neither JPEG nor PNG of 8 bits or 16 gray"):
        script["prepare"](deep, **OPTIONS[0]._asdict())


def test_the_script_is_short_and_needs_three_packages() -> None:
    lines = Path(SCRIPT).read_text().splitlines()
    assert len(lines) < 60
    imports = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imports - {"io", "json", "sys"} == {"numpy", "onnxruntime", "PIL"}
