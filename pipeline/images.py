"""Image file → the bytes stored in a shard → uint8 array for a batch.

Every image is decoded once before it enters a shard, so a damaged file is found here. Sizes are read from the
header first, and metadata (EXIF, comments, color profiles: patient data) never gets through.
"""

import io
import re
import struct
from contextlib import suppress
from functools import lru_cache
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from pipeline import containers
from pipeline.containers import Picture
from pipeline.dicom import MISSED, decode_dicom, is_dicom, open_dicom, read_position

Gray = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.integer]

ENCODINGS = {"jpeg": "jpg", "png": "png", "raw": "npy"}  # encoding → file suffix
LONGEST_JPEG = 65_500  # libjpeg's limit, in pixels of a side
STORED_PIXELS = 2**28  # at most in any stored image: a forged header costs no memory
SCALES = (8, 4, 2)  # a JPEG is decoded at 1 / these
SQUARES = ("no", "pad", "crop", "stretch")
FEW = 16  # gray levels: no chest image has fewer
ONE_LEVEL, FEW_LEVELS = "one level of gray", f"fewer than {FEW} gray levels, though the file has more"
NEARLY_BLACK = "nearly black: less than a quarter of the bits stated are used"
DOUBTS = (ONE_LEVEL, FEW_LEVELS, NEARLY_BLACK, MISSED)

Image.MAX_IMAGE_PIXELS = None  # our own limit is checked, which the user can set
_TURN = Image.Transpose  # by the EXIF orientation, from 2 on
_TURNS = {2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE}
_TURNS |= {6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
_NPY = re.compile(
    rb"(?s)\x93NUMPY\x01\x00(..){'descr': '\|u1', 'fortran_order': False, 'shape': \((\d+), (\d+)\), } *\n"
)


class ImageError(ValueError):
    """An image that cannot be used; the message says why, the caller knows which."""


class ImageOptions(NamedTuple):
    """How images are stored; meanings and defaults are those of `pipeline shards --help`."""

    size: int | None  # the shorter side; None keeps the original
    square: str  # one of SQUARES; of all but `no` the result is size×size, enlarged if need be
    encoding: str
    quality: int
    max_pixels: int
    bits: int | None = None  # how many of a 16-bit PNG hold the picture; None: as it states, else as its levels need


class Original(NamedTuple):
    """An image file before conversion."""

    width: int  # of the upright image
    height: int
    file_bytes: int
    bits: int  # per channel
    jpeg_quality: int | None  # as in `Facts`


class Prepared(NamedTuple):
    """An image as a shard stores it."""

    data: bytes
    pixels: Gray  # [H, W], which `data` encode
    stripped: bool  # whether metadata was left behind
    original: Original
    levels: npt.NDArray[np.int64]  # [256]: counts of every 16th pixel; all would take as long as encoding them
    notes: tuple[str, ...]  # assumptions, and doubtful conversions of gray levels (`DOUBTS`)


def prepare(data: bytes, options: ImageOptions, stated_bits: int | None = None) -> Prepared:
    """Turn a JPEG, PNG or gray DICOM of any kind into what a shard stores.

    `stated_bits` is the table's number of used bits for a 16-bit PNG that does not state its own. `pad` keeps the
    aspect and centers on black, `crop` takes the center, `stretch` distorts it. A gray JPEG that fits already keeps its
    coefficients: only its metadata is lost. An EXIF orientation is applied to the pixels, since the tag is lost too.

    Raises ImageError, ValueError for bad options, and DataError if DICOM files need a missing package.
    """
    if options.size is None and options.square != "no":
        raise ValueError("a square needs a size")
    if not data:
        raise ImageError("the file is empty")
    kind = "JPEG" if data.startswith(containers.JPEG) else "PNG" if data.startswith(containers.PNG) else "DICOM"
    if kind == "DICOM" and not is_dicom(data):
        raise ImageError("not a readable JPEG, PNG or DICOM: cannot identify image file")
    try:
        if kind == "JPEG":
            source = _read_jpeg(data, options)
        elif kind == "PNG":
            source = _read_png(data, options.max_pixels, options.bits, stated_bits)
        else:
            dicom = open_dicom(data, options.max_pixels)
            _check_pixels(dicom.Columns, dicom.Rows, options.max_pixels)
            source = decode_dicom(dicom)
    except (ImageError, ImportError):  # the latter names a package to install
        raise
    except Exception as error:  # of any kind, for a damaged file
        raise ImageError(f"not a readable {kind}: {error}") from error
    original = Original(source.shape[1], source.shape[0], len(data), source.bits, source.quality)
    pixels = source.pixels if source.copy else _fit(source, options)
    sampled = np.bincount(pixels[::4, ::4].ravel(), minlength=256)
    notes, levels = source.notes, int(np.count_nonzero(sampled))
    if levels < FEW and (levels := len(np.unique(pixels))) < FEW:
        in_file = len(np.unique(source.pixels if source.levels is None else source.levels))
        notes += (ONE_LEVEL,) if levels == 1 else (FEW_LEVELS,) if levels < min(FEW, in_file) else ()
    stored = source.copy or _encode(pixels, options)
    return Prepared(stored, pixels, source.stripped, original, sampled, notes)


def find_position(data: bytes) -> str:
    """The ViewPosition of a file that `prepare` takes: AP, PA, LL, …; empty if absent."""
    return "" if data.startswith((containers.JPEG, containers.PNG)) else read_position(data)


def decode_stored(data: bytes | memoryview, encoding: str) -> Gray:
    """Gray pixels [H, W] of a stored image; raw ones are a view of `data`. Raises ValueError for damaged data."""
    if encoding == "jpeg":  # libjpeg's warnings count as errors
        _read_shape(data, STORED_PIXELS)
        return simplejpeg.decode_jpeg(data, colorspace="GRAY")[:, :, 0]  # type: ignore[no-any-return]
    if encoding == "png":
        try:
            return _read_png(bytes(data), STORED_PIXELS).pixels
        except Exception as error:  # of many kinds, for a damaged file
            raise ValueError(str(error)) from error
    header = _NPY.match(data)
    if header is None or int.from_bytes(header[1], "little") != header.end() - 10:
        raise ValueError("not a .npy file of gray pixels, uint8 [H, W]")
    height, width = int(header[2]), int(header[3])
    if not height or not width:
        raise ValueError("an image without pixels")
    if len(data) - header.end() != height * width:
        raise ValueError(f"{len(data) - header.end()} bytes of pixels, not {height}×{width}")
    return np.frombuffer(data, np.uint8, offset=header.end()).reshape(height, width)


def decode_into(out: Gray, data: bytes | memoryview, encoding: str) -> None:
    """Decode a stored image and resize it to fill `out` [H, W], contiguous. Raises ValueError for damaged data."""
    if encoding == "jpeg" and _read_shape(data, STORED_PIXELS)[:2] == out.shape:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", buffer=out)
        return
    resized = resize(decode_stored(data, encoding), out.shape[0], out.shape[1], out)
    if resized is not out:
        out[:] = resized


@lru_cache
def raw_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the pixels of a raw image of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def resize(pixels: Gray, height: int, width: int, out: Gray | None = None) -> Gray:
    """The pixels resized to [height, width], antialiased, maybe in `out`; the image itself if it has that shape."""
    if pixels.shape == (height, width):
        return pixels
    # Up to a scale of two, OpenCV's bilinear filter is as close to Lanczos as Pillow's antialiased ones, at a quarter
    # of their time, and its levels are the same on every CPU: from 320×320 to 224×224, it differs by 0.46 gray levels
    # and takes 0.10 ms, Pillow's Hamming 0.45 and 0.38. Beyond it would alias: to 128×128, 0.97 beside Hamming's 0.57.
    if pixels.shape[0] <= 2 * height and pixels.shape[1] <= 2 * width:
        return cv2.resize(pixels, (width, height), out, interpolation=cv2.INTER_LINEAR_EXACT)  # type: ignore[return-value]
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.HAMMING))


def _read_jpeg(data: bytes, options: ImageOptions) -> Picture:
    height, width, colorspace = _read_shape(data, options.max_pixels)
    facts = containers.read_jpeg_facts(data)
    if facts.is_multiple:
        raise ImageError("more than one frame")
    if (turn := _find_turn(facts.exif)) is not None:
        pixels = np.asarray(Image.fromarray(_decode_any(data, colorspace)).transpose(turn))
        return Picture(pixels, pixels.shape, facts.bits, facts.has_metadata, facts.quality)
    inner = _inner_shape((height, width), options)
    # Decode at the smallest scale of at least 1.5 times the target, by the rule of Pillow's `draft`, so that the script
    # beside an exported network gets the same pixels. libjpeg has fast code for these scales alone.
    least = min(height // (3 * inner[0] // 2), width // (3 * inner[1] // 2))
    part = next((part for part in SCALES if part <= least), 1)
    pixels = _decode_any(data, colorspace, ceil(height / part), ceil(width / part))
    # A last row or column that stands for less than half of its size would shift all others.
    pixels = pixels[: round(height / part), : round(width / part)]
    fits = inner == (height, width) and (options.square == "no" or height == width)
    # A progressive JPEG decodes three times slower: it is kept only if the original is requested.
    keeps = facts.frame in containers.BASELINE or (facts.frame == containers.PROGRESSIVE and options.size is None)
    is_kept = fits and keeps and colorspace == "Gray" and options.encoding == "jpeg"
    copy = containers.strip_metadata(data) if is_kept else None
    stripped = copy != data if copy else facts.has_metadata
    return Picture(pixels, (height, width), facts.bits, stripped, facts.quality, copy)


def _read_shape(data: bytes | memoryview, max_pixels: int) -> tuple[int, int, str]:
    """Height, width and color space of a JPEG."""
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    _check_pixels(width, height, max_pixels)
    return height, width, colorspace


def _decode_any(data: bytes, colorspace: str, height: int = 0, width: int = 0) -> Gray:
    """Gray pixels [H, W] at the smallest of libjpeg's scales with this size; 0: in full size."""
    is_cmyk = colorspace not in ("Gray", "YCbCr", "RGB")
    pixels = simplejpeg.decode_jpeg(data, "CMYK" if is_cmyk else "GRAY", min_height=height, min_width=width)
    if is_cmyk:  # Adobe stores inks inverted, and every reader expects it
        size = pixels.shape[1], pixels.shape[0]
        return np.asarray(Image.frombuffer("CMYK", size, 255 - pixels, "raw", "CMYK", 0, 1).convert("L"))
    return pixels[:, :, 0]  # type: ignore[no-any-return]


def _read_png(data: bytes, max_pixels: int, bits: int | None = None, stated_bits: int | None = None) -> Picture:
    """Gray pixels of a PNG. Raises exceptions of many kinds for a damaged one."""
    chunks, plain = containers.read_png(data)
    width, height, depth, color = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    if b"acTL" in chunks:
        raise ImageError("more than one frame")
    _check_pixels(width, height, max_pixels)
    if color == 3:
        image: Image.Image = Image.open(io.BytesIO(data), formats=("PNG",))
        levels, alpha = np.asarray(image.convert("L")), None
        if image.has_transparency_data:
            alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    else:
        levels, alpha = _decode_levels(plain, depth, chunks.get(b"tRNS"))
    if alpha is not None and not alpha.any():  # a fully transparent image is a mistake
        alpha = None
    pixels, notes = levels, tuple[str, ...]()
    if depth == 16:
        if alpha is not None:
            levels[alpha == 0] = 0  # whatever is hidden says nothing about the bits
        significant = max(chunks.get(b"sBIT", b"")[: 3 if color & 2 else 1], default=0)  # alpha apart
        full, notes = _choose_full(int(levels.max()), significant if 1 <= significant <= 16 else stated_bits, bits)
        pixels = ((levels.astype(np.uint32) * 255 + full // 2) // full).astype(np.uint8)
    if pixels.ndim == 3:
        pixels = np.asarray(Image.fromarray(pixels).convert("L"))
    if alpha is not None:
        pixels = ((pixels * alpha.astype(np.uint32) + 127) // 255).astype(np.uint8)
    if (turn := _find_turn(chunks.get(b"eXIf"))) is not None:
        pixels = np.asarray(Image.fromarray(pixels).transpose(turn))
    has_metadata = not chunks.keys() <= containers.PNG_PLAIN
    return Picture(pixels, pixels.shape, depth, has_metadata, levels=levels if depth == 16 else None, notes=notes)


def _decode_levels(plain: bytes, depth: int, clear: bytes | None) -> tuple[Levels, Levels | None]:
    """Levels [H, W] or RGB [H, W, 3] of a PNG without a palette, scaled to 8 or 16 bits, and 8-bit alpha or None."""
    # OpenCV is faster than Pillow, which gives 16-bit color 8 bits. Other chunks than those of a `plain` PNG could make
    # it print warnings and add channels.
    decoded = cv2.imdecode(np.frombuffer(plain, np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != (np.uint16 if depth == 16 else np.uint8):
        raise ValueError("its pixels are damaged")
    stored: Levels = np.asarray(decoded, decoded.dtype)
    levels = stored if stored.ndim == 2 else stored[:, :, 2::-1]
    if stored.shape[2:] == (4,):
        return levels, stored[:, :, 3] >> (depth - 8)
    if clear is None:  # else the level, or RGB, that is transparent (tRNS)
        return levels, None
    colors = levels.reshape(*levels.shape[:2], -1)
    if len(clear) != 2 * colors.shape[2]:
        raise ValueError("its transparent level is damaged")
    level = (np.frombuffer(clear, ">u2") & (2**depth - 1)) * (255 // (2**depth - 1) or 1)
    return levels, np.where((colors == level).all(axis=2), 0, 255)


def _choose_full(highest: int, stated: int | None, bits: int | None) -> tuple[int, tuple[str, ...]]:
    """The level that is white in a 16-bit PNG, and notes; `stated` are the bits of its file or table."""
    if bits and highest >> bits:
        raise ImageError(f"a level of {highest:,} has more than {bits} bits (--bits)")
    # If nobody says it, the fewest bits of those that devices have.
    used = bits or stated or next(depth for depth in (8, 10, 12, 14, 16) if not highest >> depth)
    # The PNG specification (W3C, 11.3.2.7) has levels of fewer bits scaled up to 16; exports of DICOM often leave them
    # as they are, and then none exceeds the stated bits.
    used = 16 if highest >> used else used
    if bits or stated:
        return 2**used - 1, () if highest >> (used - 2) else (NEARLY_BLACK,)
    return 2**used - 1, () if used == 16 else (f"a 16-bit PNG read as {used} bits, by its highest level (--bits)",)


def _find_turn(exif: bytes | None) -> Image.Transpose | None:
    """What turns an image upright; None, as in viewers, if it is, or no orientation can be read."""
    tags = Image.Exif()
    with suppress(Exception):  # of many kinds, for a damaged tag
        tags.load(exif or b"")
        return _TURNS.get(tags.get(0x0112, 1))
    return None


@lru_cache
def _inner_shape(shape: tuple[int, int], options: ImageOptions) -> tuple[int, int]:
    """Height and width that the image, or its crop, is resized to; a padded square has bars around it."""
    if options.size is None:
        return shape
    if options.square in ("crop", "stretch"):
        return options.size, options.size
    scale = options.size / max(shape) if options.square == "pad" else min(1, options.size / min(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _fit(source: Picture, options: ImageOptions) -> Gray:
    """The pixels cropped, resized or padded as the options require."""
    pixels, (height, width) = source.pixels, _inner_shape(source.shape, options)
    if options.square == "crop":
        side = min(pixels.shape)
        top, left = ((length - side) // 2 for length in pixels.shape)
        pixels = pixels[top : top + side, left : left + side]
    pixels = resize(pixels, height, width)
    if options.square != "pad" or options.size is None:
        return np.ascontiguousarray(pixels)
    top, left = (options.size - height) // 2, (options.size - width) // 2
    return np.pad(pixels, ((top, options.size - height - top), (left, options.size - width - left)))


def _encode(pixels: Gray, options: ImageOptions) -> bytes:
    """The pixels in the requested encoding, and nothing else."""
    height, width = pixels.shape
    if options.encoding == "jpeg":
        if max(height, width) > LONGEST_JPEG:
            most = f"a side has at most {LONGEST_JPEG:,} pixels (--encoding png or raw has no such limit)"
            raise ImageError(f"{width}×{height} does not fit into a JPEG: {most}")
        # Not simplejpeg, which below quality 96 takes a fast transform: at 95 its error is half as large again.
        return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, options.quality])[1].tobytes()
    if options.encoding == "raw":
        return raw_header(pixels.shape) + pixels.tobytes()
    file = io.BytesIO()
    # At 224×224, level 1: 25.8 kB in 2.0 ms, 4: 22.0 kB in 3.3 ms, 6: 22.1 kB in 5.9 ms.
    Image.fromarray(pixels).save(file, "PNG", compress_level=4)
    return file.getvalue()


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        option = "" if max_pixels == STORED_PIXELS else " (--max-pixels)"  # an option for sources
        raise ImageError(f"{width}×{height} is more than {max_pixels:,} pixels{option}")
