"""Image file → gray JPEG bytes for a shard → uint8 array for a batch.

Every image is decoded once in full before it enters a shard, so a truncated file is found here. Sizes are
read from the header first, and metadata (EXIF, comments, colour profiles: patient data) never gets through.
"""

import io
import struct
import warnings

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Gray = npt.NDArray[np.uint8]

_SOI, _SOS, _APP0, _COMMENT = 0xD8, 0xDA, 0xE0, 0xFE
_BASELINE = (0xC0, 0xC1)


class ImageError(Exception):
    """An image that cannot be used; the message says why, the caller knows which."""


def prepare_image(data: bytes, size: int, quality: int, max_pixels: int) -> tuple[bytes, Gray]:
    """The JPEG bytes to store, and the pixels [H, W] that were encoded.

    The shorter side becomes `size`; a smaller image is not enlarged. A baseline gray JPEG that fits already
    keeps its own coefficients: nothing is lost but its metadata. Raises ImageError.
    """
    pixels, is_gray_jpeg = decode_source(data, max_pixels)
    if min(pixels.shape) > size:
        pixels = resize_shorter_side(pixels, size)
    elif is_gray_jpeg and (stripped := strip_metadata(data)) is not None:
        return stripped, pixels
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels[:, :, None]), quality=quality, colorspace="GRAY"
    )
    return encoded, pixels


def decode_source(data: bytes, max_pixels: int) -> tuple[Gray, bool]:
    """Pixels [H, W] of a JPEG or PNG of any kind, and whether it is a gray JPEG. Raises ImageError."""
    if not data:
        raise ImageError("the file is empty")
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(width, height, max_pixels)
            if colorspace in ("Gray", "YCbCr", "RGB"):
                return decode_jpeg(data), colorspace == "Gray"
        except ValueError as error:
            raise ImageError(f"not a readable JPEG: {error}") from error
    return _decode_with_pillow(data, max_pixels), False


def decode_jpeg(data: bytes | memoryview) -> Gray:
    """Gray pixels [H, W]. Raises ValueError for damaged data: libjpeg's warnings count as errors."""
    pixels: Gray = simplejpeg.decode_jpeg(data, colorspace="GRAY")[:, :, 0]
    return pixels


def resize(pixels: Gray, height: int, width: int) -> Gray:
    """Antialiased bilinear resize to [height, width]; the image itself where it has that shape."""
    if pixels.shape == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def resize_shorter_side(pixels: Gray, size: int) -> Gray:
    """Antialiased Lanczos resize that keeps the aspect; the shorter side becomes `size`."""
    height, width = pixels.shape
    scale = size / min(height, width)
    shape = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS))


def strip_metadata(jpeg: bytes) -> bytes | None:
    """The same image without APP1–APP15, comments and trailing bytes; None where it is not baseline.

    Segments as in ITU-T T.81, annex B. JFIF's APP0 holds no patient data and stays.
    """
    kept = [jpeg[:2]]
    position = 2
    while position + 4 <= len(jpeg) and jpeg[position] == 0xFF:
        marker = jpeg[position + 1]
        if marker == 0xFF:  # a fill byte before a marker
            position += 1
            continue
        (length,) = struct.unpack_from(">H", jpeg, position + 2)
        is_frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        if is_frame and marker not in _BASELINE:
            return None
        if marker == _SOS:
            # No 0xFFD9 can occur inside entropy-coded data: 0xFF is followed by 0x00 or a restart marker.
            end = jpeg.find(b"\xff\xd9", position)
            return None if end < 0 else b"".join(kept) + jpeg[position : end + 2]
        if not (_APP0 < marker <= 0xEF or marker == _COMMENT):
            kept.append(jpeg[position : position + 2 + length])
        position += 2 + length
    return None


def _decode_with_pillow(data: bytes, max_pixels: int) -> Gray:
    """PNG and the rare JPEG colour spaces; 16-bit gray is scaled to 8 bits, transparency is dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: max_pixels is checked below
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        _check_pixels(image.width, image.height, max_pixels)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"not a readable JPEG or PNG: {error}") from error
    if image.mode.startswith("I"):
        # 257 = 65535 / 255: full scale maps to full scale.
        return np.asarray((np.asarray(image, np.uint32) + 128) // 257, np.uint8)
    return np.asarray(image.convert("L"))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width}×{height} is more than {max_pixels:,} pixels (--max-pixels)")
