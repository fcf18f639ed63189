import io
import struct
import zlib
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from pipeline import images
from pipeline.containers import read_jpeg_facts, strip_metadata
from pipeline.images import Gray, ImageError, ImageOptions, decode_into, decode_stored, prepare, resize
from tests.conftest import refused

ORIGINAL = ImageOptions(size=None, square="no", encoding="jpeg", quality=95, max_pixels=1_000_000)
FITTING, RAW = ORIGINAL._replace(size=160), ORIGINAL._replace(encoding="raw")
SECRET = b"SECRET"


def encode(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **({"format": "JPEG", "quality": 90} | options))  # type: ignore[arg-type]
    return file.getvalue()


def encode_png(image: Image.Image, **options: object) -> bytes:
    return encode(image, format="PNG", **options)


def decode(data: bytes) -> Gray:
    """Pillow's decoder: a second opinion."""
    return np.asarray(Image.open(io.BytesIO(data)))


def difference(pixels: Gray, reference: Gray) -> float:
    return float(np.abs(pixels.astype(float) - reference).mean())


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(rows: bytes, width: int, height: int, bits: int, color: int, *chunks: bytes) -> bytes:
    """A PNG of unfiltered rows, with these chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    parts = [header, *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def add_metadata(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image with SECRET in every place that the format has for text."""
    exif = Image.Exif()
    exif[0x9286] = "SECRET name"
    data = encode(image, format=kind, exif=exif, icc_profile=SECRET * 30, **options)
    if kind == "PNG":
        texts = chunk(b"tEXt", b"Name\0SECRET") + chunk(b"prVt", SECRET)
        return data[:33] + texts + data[33:] + SECRET
    segments = ((0xE0, b"JFXX\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), (0xED, b"Photoshop"), (0xFE, b""))
    added = [struct.pack(">BBH", 255, m, 2 + len(t + SECRET)) + t + SECRET for m, t in segments]
    # Before the first scan, after the last one, and after the end.
    return data[:2] + b"".join(added) + data[2:-2] + added[-1] + data[-2:] + SECRET


@pytest.fixture
def gray() -> Image.Image:
    """A smooth 200×160 test image."""
    rows, columns = np.mgrid[:160, :200]
    waves = 127 + 60 * np.sin(rows / 17) + 60 * np.cos(columns / 23)
    return Image.fromarray(waves.astype(np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
def test_original_jpeg_keeps_its_coefficients_and_loses_its_metadata(gray: Image.Image, progressive: bool) -> None:
    source = add_metadata(gray, "JPEG", progressive=progressive)
    assert source.count(SECRET) == 37
    stored, pixels, stripped, *_ = prepare(source, ORIGINAL)
    assert stripped
    assert stored == encode(gray, progressive=progressive)  # nothing else was lost
    np.testing.assert_array_equal(pixels, decode_stored(stored, "jpeg"))
    assert prepare(stored, ORIGINAL)[0:3:2] == (stored, False)
    assert strip_metadata(stored) == stored


@pytest.mark.parametrize("encoding", images.ENCODINGS)
@pytest.mark.parametrize("size", [None, 160, 80])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_metadata_never_gets_through(gray: Image.Image, kind: str, size: int | None, encoding: str) -> None:
    options = ORIGINAL._replace(size=size, encoding=encoding)
    dirty, clean = prepare(add_metadata(gray, kind), options), prepare(encode(gray, format=kind), options)
    assert SECRET not in dirty.data
    assert (dirty.stripped, clean.stripped) == (True, False)
    assert dirty.data == clean.data


@pytest.mark.parametrize("encoding", images.ENCODINGS)
@pytest.mark.parametrize("size", [None, 160, 80])
def test_every_encoding_comes_back_also_into_a_batch(gray: Image.Image, size: int | None, encoding: str) -> None:
    source, options = encode(gray.convert("RGB")), ORIGINAL._replace(size=size, encoding=encoding)
    stored, pixels, *_ = prepare(source, options)
    assert stored == prepare(source, options).data
    assert pixels.shape == ((80, 100) if size == 80 else (160, 200))
    back = decode_stored(memoryview(stored), encoding)
    assert difference(back, pixels) < (1 if encoding == "jpeg" else 1e-9)
    for shape in ((160, 200), (80, 100), (120, 120), (300, 300), (20, 30)):  # itself, and each filter
        batch = np.full((3, *shape), 7, np.uint8)
        decode_into(batch[1], stored, encoding)
        np.testing.assert_array_equal(batch[1], resize(back, *shape))
        assert (batch[[0, 2]] == 7).all()


def test_raw_is_a_view_of_a_npy_file_and_strict(gray: Image.Image) -> None:
    stored, pixels, *_ = prepare(encode(gray), FITTING._replace(encoding="raw"))
    np.testing.assert_array_equal(np.load(io.BytesIO(stored), allow_pickle=False), pixels)
    view = memoryview(stored)
    assert np.shares_memory(decode_stored(view, "raw"), np.frombuffer(view, np.uint8))

    def save(array: npt.NDArray[Any]) -> bytes:
        np.save(file := io.BytesIO(), array)
        return file.getvalue()

    strange = [save(pixels.astype(np.int16)), save(pixels[None]), save(np.asfortranarray(pixels))]
    strange += [stored[:8] + b"\0" + stored[9:]]
    for damaged, message in (
        *((data, "not a .npy file of gray pixels, uint8 [H, W]") for data in strange),
        *((save(np.zeros(shape, np.uint8)), "an image without pixels") for shape in ((0, 1), (1, 0))),
        (stored[:-1], "31999 bytes of pixels, not 160×200"),
        (stored + b"x", "32001 bytes of pixels, not 160×200"),
    ):
        with refused(message, ValueError):
            decode_stored(damaged, "raw")


@pytest.mark.parametrize(
    ("square", "size", "shape"),
    [("no", 80, (80, 100)), ("no", 500, (160, 200)), ("pad", 100, (100, 100)), ("pad", 200, (200, 200))]
    + [(square, size, (size, size)) for square in ("crop", "stretch") for size in (40, 160, 300)],
)
def test_sizes_and_squares_are_pillows(gray: Image.Image, square: str, size: int, shape: tuple[int, int]) -> None:
    options = FITTING._replace(size=size, square=square)
    stored, pixels, *_ = prepare(encode(gray), options)
    prepare(encode(ImageOps.invert(gray)), options)  # the next image leaves these pixels alone
    assert pixels.shape == decode(stored).shape == shape
    source, lanczos = Image.fromarray(decode(encode(gray))), Image.Resampling.LANCZOS
    expected = Image.new("L", shape)
    if square == "pad":
        expected.paste(source.resize((size, size * 4 // 5), lanczos), (0, size // 10))
        assert not pixels[: size // 10].any()
        assert not pixels[-(size // 10) :].any()
    else:
        expected = source.resize(shape[::-1], lanczos, (20, 0, 180, 160) if square == "crop" else None)
    assert difference(pixels, np.asarray(expected)) < 0.5


def test_tiny_images_of_every_shape_can_be_resized() -> None:
    for shape in product((1, 2, 5, 9, 31, 200), range(1, 20)):
        source = encode(Image.new("L", shape, 200))
        for square, size in product(images.SQUARES, (1, 3, 8)):
            pixels = prepare(source, FITTING._replace(size=size, square=square)).pixels
            assert pixels.max() == 200
            assert square == "no" or pixels.shape == (size, size)


@pytest.mark.parametrize("size", [(2828, 2320), (2817, 2313), (1501, 997)])
def test_scaled_decode_is_within_a_gray_level_of_a_full_one(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).normal(0, 6, size[::-1])
    waves = 125 + 85 * np.sin(np.arange(size[0]) / 100)[None]
    source = encode(Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8)))
    pixels = prepare(source, FITTING._replace(size=224, max_pixels=7_000_000)).pixels
    reference = Image.open(io.BytesIO(source)).resize(pixels.shape[::-1], Image.Resampling.LANCZOS)
    assert difference(pixels, np.asarray(reference)) < 0.7


def test_color_progressive_and_16_bit_sources_become_baseline_gray(gray: Image.Image) -> None:
    levels = np.asarray(gray)
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    sources = [encode(gray, progressive=True, quality=95)]
    sources += [encode(gray.convert(mode), quality=95) for mode in ("RGB", "CMYK")]
    pngs = [encode_png(image) for image in (gray, deep, *map(gray.convert, ("RGB", "RGBA", "P")))]
    for number, source in enumerate([*sources, *pngs]):
        stored, pixels, *_ = prepare(source, FITTING)
        image = Image.open(io.BytesIO(stored))
        assert (image.format, image.mode, "progressive" in image.info) == ("JPEG", "L", False), number
        assert difference(np.asarray(image), levels) < 1.5, number
        assert source in sources or np.array_equal(pixels, levels), number


def test_png_levels() -> None:
    def levels(image: Image.Image, **options: object) -> list[int]:
        return prepare(encode_png(image, **options), RAW).pixels[0].tolist()  # type: ignore[no-any-return]

    assert levels(Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], np.uint16))) == [0, 0, 1, 128, 255]
    assert levels(Image.fromarray(np.array([[False, True]]))) == [0, 255]
    assert levels(Image.fromarray(np.array([[[200, 255], [200, 128], [200, 0]]], np.uint8), "LA")) == [200, 100, 0]
    assert levels(Image.fromarray(np.array([[7, 200]], np.uint8)), transparency=200) == [7, 0]
    assert prepare(make_png(b"\0" + b"\xff" * 6, 1, 1, 16, 2), ORIGINAL).pixels.tolist() == [[255]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_exif_orientation_is_applied(kind: str) -> None:
    levels = np.arange(0, 240, 10).astype(np.uint8).reshape(4, 6).repeat(8, 0).repeat(8, 1)
    turns = {2: levels[:, ::-1], 3: levels[::-1, ::-1], 4: levels[::-1], 5: levels.T}
    turns |= {6: levels[::-1].T, 7: levels[::-1, ::-1].T, 8: levels.T[::-1], 9: levels}
    for orientation, expected in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = encode(Image.fromarray(levels), format=kind, exif=exif, quality=100)
        prepared = prepare(source, ORIGINAL)
        assert prepared.stripped
        assert difference(prepared.pixels, expected) < 1
        assert difference(decode(prepared.data), expected) < 1.5
    damaged = encode(Image.fromarray(levels), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert prepare(damaged, ORIGINAL).pixels.shape == levels.shape


@pytest.mark.parametrize("size", [None, 160, 20, 40, 10])
def test_every_truncation_is_found(gray: Image.Image, size: int | None) -> None:
    for source in (encode(gray), encode(gray, progressive=True), encode(gray.convert("CMYK")), encode_png(gray)):
        for end in {*range(0, len(source), 97), *range(len(source) - 20, len(source))}:
            with pytest.raises(ImageError):
                prepare(source[:end], ORIGINAL._replace(size=size))


def test_damage_to_what_is_stored_is_found(gray: Image.Image) -> None:
    for encoding in ("jpeg", "png"):
        stored = prepare(encode(gray), FITTING._replace(encoding=encoding)).data
        for end in (*range(0, len(stored), 97), len(stored) - 1):
            with pytest.raises(ValueError, match=r"."):
                decode_stored(memoryview(stored)[:end], encoding)
    flipped = bytearray(stored)
    flipped[len(stored) // 2] ^= 1
    with refused("chunk b'IDAT' is damaged", ValueError):
        decode_stored(bytes(flipped), "png")


def test_unreadable_data_says_why(gray: Image.Image) -> None:
    palette, head = encode_png(gray.convert("P")), b"\x89PNG\r\n\x1a\n"
    start = palette.index(b"PLTE") - 4
    bare = palette[:start] + palette[start + 12 + int.from_bytes(palette[start : start + 4]) :]
    transparent = make_png(b"\0" * 4, 1, 1, 8, 2, chunk(b"tRNS", b"\0\7"))
    several = {"save_all": True, "append_images": [gray.rotate(180)]}
    unknown = "not a readable JPEG, PNG or DICOM: cannot identify image file"
    for data, message in (
        (b"", "the file is empty"),
        (b"\0" * 4096, unknown),
        (b"GIF89a, not supported", unknown),
        (b"\xff\xd8\xff\xe0 nothing", "not a readable JPEG: "),
        (head, "not a readable PNG: the file ends early"),
        (head + chunk(b"IEND", b""), "not a readable PNG: it does not start with its header"),
        (bare, "not a readable PNG: "),
        (make_png(b"\0" * 9, 16, 1, 8, 0), "not a readable PNG: its pixels are damaged"),  # 9 bytes of 17
        (transparent, "not a readable PNG: its transparent level is damaged"),
        *((encode(gray, format=kind, **several), "more than one frame") for kind in ("PNG", "MPO")),
    ):
        with pytest.raises(ImageError, match=f"^{message}"):
            prepare(data, FITTING)
    with refused("a square needs a size", ValueError):
        prepare(encode(gray), ORIGINAL._replace(square="pad"))


def test_size_is_read_from_the_header_before_decoding(gray: Image.Image) -> None:
    """Of what is prepared, and of what is stored."""
    for kind in ("JPEG", "PNG"):
        with refused("200×160 is more than 31,999 pixels (--max-pixels)", ImageError):
            prepare(encode(gray, format=kind), FITTING._replace(max_pixels=31_999))
    forged = bytearray(encode(gray))
    frame = forged.index(b"\xff\xc0")
    forged[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    for data, encoding in ((bytes(forged), "jpeg"), (make_png(b"", 60_000, 60_000, 8, 0), "png")):
        with refused("60000×60000 is more than 50,000,000 pixels (--max-pixels)", ImageError):
            prepare(data, FITTING._replace(max_pixels=50_000_000))
        with refused("60000×60000 is more than 268,435,456 pixels", ValueError):
            decode_stored(data, encoding)


def test_resize_is_close_to_lanczos_and_does_not_alias(gray: Image.Image) -> None:
    pixels = np.asarray(gray)  # [160, 200]
    assert resize(pixels, 160, 200) is pixels
    for height, width in ((120, 110), (80, 100), (79, 100), (80, 99), (20, 30)):
        expected = np.asarray(gray.resize((width, height), Image.Resampling.LANCZOS))
        assert difference(resize(pixels, height, width), expected) < 0.6
    stripes = np.tile(np.array([[0, 0, 255]], np.uint8), (90, 40))  # finer than what a width of 40 can show
    assert abs(resize(stripes, 30, 40).astype(int) - 85).max() < 20


def deep_png(levels: npt.NDArray[Any], *chunks: bytes) -> bytes:
    """A 16-bit PNG of levels [H, W], RGB [H, W, 3], gray and alpha [H, W, 2] or RGBA [H, W, 4]."""
    height, width = levels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[levels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return make_png(rows, width, height, 16, kind, *chunks)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_bits_of_a_16_bit_png_that_hold_the_picture(bits: int, channels: int) -> None:
    gray = np.random.default_rng(bits).integers(0, 2**bits, (20, 30)).astype(np.uint16)
    gray[0, :2] = 1, 2**bits - 1
    opaque = np.full_like(gray, 65535)

    def pixels(levels: npt.NDArray[Any], stated: int | None, bits_option: int | None) -> Gray:
        parts = [levels] * (channels - (channels in (2, 4))) + [opaque] * (channels in (2, 4))
        sbit = [] if stated is None else [chunk(b"sBIT", bytes([stated] * channels))]
        data = deep_png(np.stack(parts, 2) if channels > 1 else levels, *sbit)
        return prepare(data, RAW._replace(bits=bits_option)).pixels

    for stated, option in ((bits, None), (None, bits), (16, bits), (None, None)):  # the user's word counts most
        np.testing.assert_array_equal(pixels(gray, stated, option), np.floor(gray * (255 / (2**bits - 1)) + 0.5))
    np.testing.assert_array_equal(pixels(gray, bits, 16), np.floor(gray / 257 + 0.5))
    # As the PNG specification wants it: scaled up, with the lower bits repeating the upper ones.
    scaled = gray << (16 - bits) | gray >> (2 * bits - 16)
    np.testing.assert_array_equal(pixels(scaled, bits, None), pixels(scaled, None, None))
    assert pixels(scaled, bits, None).max() == 255
    with pytest.raises(ImageError, match=r"^a level of 65,535 has more than 12 bits \(--bits\)$"):
        pixels(scaled, None, 12)


def test_bits_are_stated_or_seen_and_what_was_assumed_is_noted() -> None:
    """Highest level, bits of the table and of the user → highest gray level, and notes."""
    levels = np.arange(1, 257).reshape(16, 16)
    assumed = "a 16-bit PNG read as {} bits, by its highest level (--bits)"
    for highest, stated, bits, gray, notes in (
        (255, None, None, 255, (assumed.format(8),)),
        (4080, None, None, 254, (assumed.format(12),)),
        (4080, 12, None, 254, ()),
        (65280, 12, None, 254, ()),
        (65280, None, None, 254, ()),
        (1020, 12, None, 64, (images.NEARLY_BLACK,)),
        (1020, None, 16, 4, (images.NEARLY_BLACK, images.FEW_LEVELS)),
    ):
        data = deep_png((levels * highest // 256).astype(np.uint16))
        prepared = prepare(data, RAW._replace(bits=bits), stated)
        assert (prepared.pixels.max(), prepared.notes) == (gray, notes)


def test_images_of_few_gray_levels_are_noted(gray: Image.Image) -> None:
    flat, few = Image.new("L", gray.size, 90), gray.point(lambda level: level // 32 * 32)
    for data in (encode(flat), encode_png(flat)):
        assert prepare(data, FITTING).notes == (images.ONE_LEVEL,)
    for data in (encode_png(few), encode(gray)):  # few, but as many as in the file
        assert prepare(data, ORIGINAL).notes == ()


def test_a_transparent_level_is_black_whatever_its_bits(gray: Image.Image) -> None:
    levels = np.asarray(gray).astype(np.uint16) * 16
    expected = np.floor(levels * (255 / 4095) + 0.5)
    levels[:, :9], expected[:, :9] = 65535, 0  # beyond the 12 bits of the picture
    for image in (levels, np.stack([levels] * 3, 2)):
        clear = chunk(b"tRNS", b"\xff" * (2 if image.ndim == 2 else 6))
        np.testing.assert_array_equal(prepare(deep_png(image, clear), RAW).pixels, expected)
    for bits, pixel, pixels in ((4, b"\x7f\xe0", [119, 0, 238]), (2, b"\x78", [85, 0, 170])):
        clear = chunk(b"tRNS", struct.pack(">H", 2**16 - 1))  # its upper bits say nothing
        assert prepare(make_png(b"\0" + pixel, 3, 1, bits, 0, clear), RAW).pixels.tolist() == [pixels]


def test_alpha_of_0_everywhere_is_ignored(gray: Image.Image) -> None:
    clear = gray.convert("LA")
    clear.putalpha(0)
    deep = np.asarray(gray).astype(np.uint16) * 257
    pngs = [encode_png(clear), encode_png(clear.convert("RGBA"))]
    pngs += [deep_png(np.stack([*[deep] * colors, deep * 0], 2)) for colors in (1, 3)]
    for data in pngs:
        np.testing.assert_array_equal(prepare(data, ORIGINAL).pixels, np.asarray(gray))


def test_an_image_too_long_for_a_jpeg_is_refused_by_reason() -> None:
    data, options = encode_png(Image.new("L", (70_000, 20))), ORIGINAL._replace(max_pixels=2_000_000)
    most = "a side has at most 65,500 pixels (--encoding png or raw has no such limit)"
    with refused(f"70000×20 does not fit into a JPEG: {most}", ImageError):
        prepare(data, options)
    for encoding in ("png", "raw"):
        stored = prepare(data, options._replace(encoding=encoding)).data
        assert decode_stored(stored, encoding).shape == (20, 70_000)


def test_the_original_is_described() -> None:
    image = Image.effect_noise((90, 70), 40)
    for quality, mode in product((1, 10, 50, 75, 95, 100), ("L", "RGB")):
        data = encode(image.convert(mode), quality=quality)
        assert prepare(data, ORIGINAL._replace(size=16)).original == (90, 70, len(data), 8, quality)
    turned = Image.Exif()
    turned[0x0112] = 6
    data = encode(image, exif=turned)
    assert prepare(data, FITTING).original == (70, 90, len(data), 8, 90)
    levels = np.asarray(image)
    for pixels, bits in ((levels, 8), (levels.astype(np.uint16) << 8, 16), (levels > 128, 1)):
        data = encode_png(Image.fromarray(pixels))
        assert prepare(data, FITTING).original == (90, 70, len(data), bits, None)
    # Tables of 16 bits, as other programs write them: the same levels, each after a zero byte.
    data = encode(image, quality=50)
    table = data[data.index(b"\xff\xdb") :][: 2 + 67]
    wide = b"\xff\xdb\x00\x83\x10" + b"".join(b"\0" + bytes([level]) for level in table[5:])
    assert read_jpeg_facts(data.replace(table, wide)).quality == 50
    assert read_jpeg_facts(data.replace(table, b"")).quality is None
