import io
import struct

import numpy as np
import pytest
from PIL import Image

from pipeline.images import ImageError, decode_jpeg, prepare_image, resize, strip_metadata

PIXELS = 1_000_000


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **({"format": "JPEG", "quality": 90} | options))  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture
def gray() -> Image.Image:
    """A smooth 200×160 test image."""
    rows, columns = np.mgrid[:160, :200]
    waves = 127 + 60 * np.sin(rows / 17) + 60 * np.cos(columns / 23)
    return Image.fromarray(waves.astype(np.uint8))


def test_fitting_gray_jpeg_keeps_its_pixels_and_loses_its_metadata(gray: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x9286] = "SECRET name"
    source = encode(gray, exif=exif, comment=b"SECRET comment", icc_profile=b"SECRET profile")
    assert source.count(b"SECRET") == 3
    stored, pixels = prepare_image(source, size=160, quality=50, max_pixels=PIXELS)
    assert b"SECRET" not in stored
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(stored))), np.asarray(Image.open(io.BytesIO(source)))
    )
    np.testing.assert_array_equal(pixels, decode_jpeg(stored))
    assert strip_metadata(stored) == stored


def test_larger_image_gets_its_shorter_side(gray: Image.Image) -> None:
    stored, _ = prepare_image(encode(gray), size=80, quality=95, max_pixels=PIXELS)
    image = Image.open(io.BytesIO(stored))
    assert (image.size, image.mode) == ((100, 80), "L")
    reference = np.asarray(
        Image.open(io.BytesIO(encode(gray))).resize((100, 80), Image.Resampling.LANCZOS), float
    )
    assert np.abs(np.asarray(image, float) - reference).mean() < 1


def test_colour_progressive_and_16_bit_sources_become_baseline_gray(gray: Image.Image) -> None:
    levels = np.asarray(gray, np.uint16)
    sources = {
        "rgb": encode(gray.convert("RGB"), quality=95),
        "progressive": encode(gray, progressive=True, quality=95),
        "cmyk": encode(gray.convert("CMYK"), quality=95),
        "png": encode(gray, format="PNG"),
        "png16": encode(Image.fromarray(levels * 257), format="PNG"),
    }
    for name, source in sources.items():
        stored, _ = prepare_image(source, size=160, quality=95, max_pixels=PIXELS)
        image = Image.open(io.BytesIO(stored))
        assert (image.format, image.mode, "progressive" in image.info) == ("JPEG", "L", False), name
        assert np.abs(np.asarray(image, float) - levels).mean() < 1.5, name


def test_every_truncation_is_found(gray: Image.Image) -> None:
    source = encode(gray)
    for end in range(0, len(source) - 2, 97):
        with pytest.raises(ImageError):
            prepare_image(source[:end], size=160, quality=95, max_pixels=PIXELS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"not an image", "not a readable JPEG or PNG: cannot identify image file"),
        (b"\xff\xd8\xff\xe0 nothing", "not a readable JPEG: "),
    ],
)
def test_unreadable_data_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        prepare_image(data, size=160, quality=95, max_pixels=PIXELS)
    assert str(caught.value).startswith(message)


def test_size_is_read_from_the_header_before_decoding(gray: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"^200×160 is more than 31,999 pixels \(--max-pixels\)$"):
        prepare_image(encode(gray), size=160, quality=95, max_pixels=31_999)
    forged = bytearray(encode(gray))
    frame = forged.index(b"\xff\xc0")
    forged[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    bomb = encode(Image.new("L", (9000, 9000)), format="PNG")
    for data, size in ((bytes(forged), "60000×60000"), (bomb, "9000×9000")):
        with pytest.raises(ImageError, match=f"^{size} is more than 50,000,000 pixels"):
            prepare_image(data, size=160, quality=95, max_pixels=50_000_000)


def test_resize_is_pillows_antialiased_bilinear(gray: Image.Image) -> None:
    expected = np.asarray(gray.resize((64, 48), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize(np.asarray(gray), 48, 64), expected)
