"""DICOM file → 8-bit gray pixels, and nothing of any other tag.

By pydicom and decoders under permissive licenses (pyproject.toml names each). Gray levels follow DICOM PS3.3, C.11:
modality LUT or rescaling, then the first VOI LUT or window, or else the range of the pixels; MONOCHROME1 is inverted.
Functions of pydicom's compute all this once per possible level, not per pixel.
"""

import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.errors import needs
from pipeline.containers import JPEG, read_jpeg_shape

if TYPE_CHECKING:
    from pydicom import Dataset

Levels = npt.NDArray[np.integer[Any]]

# Only these are parsed: none of them names a patient.
_CHECKED = ["SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BurnedInAnnotation"]
_CHECKED += ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"]
_USED = ["ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction"]
_USED += ["WindowCenter", "WindowWidth", "PixelData"]
_NO_PREAMBLE = re.compile(rb"[\x02\x08]\0[\0-\x18]\0")  # the first tag: (0002,…) or (0008,…)
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1".ljust(22, b"\0")
_OTHER_TAGS = 2**24  # bytes, at most, beside the pixels of a deflated file
# Strict decoders before GDCM, which makes something of damaged data too.
_DECODERS = ("pylibjpeg", "pyjpegls", "pillow", "pydicom", "gdcm")
_lock = threading.Lock()


def is_dicom(data: bytes) -> bool:
    """Whether a file begins like a DICOM, with or without its preamble."""
    return data[128:132] == b"DICM" or _NO_PREAMBLE.match(data) is not None


def open_dicom(data: bytes, max_pixels: int) -> "Dataset":
    """The header, checked. Raises ValueError for what is no single gray image, DataError where pydicom is missing.

    Messages quote no text of the file: it may be a patient's data.
    """
    with needs("dicom"):
        from pydicom import dcmread, uid
    data = _inflate(data, 4 * max_pixels + _OTHER_TAGS)
    with _quietly("its header is damaged"):
        dataset = dcmread(BytesIO(data), force=True, specific_tags=[*_CHECKED, *_USED])
        found = {name: dataset.get(name) for name in _CHECKED}
        has_pixels = "PixelData" in dataset
        if has_pixels and "TransferSyntaxUID" not in dataset.file_meta:
            plain = {(True, True): uid.ImplicitVRLittleEndian, (False, True): uid.ExplicitVRLittleEndian}
            guess = plain.get(dataset.original_encoding, uid.ExplicitVRBigEndian)
            dataset.file_meta.TransferSyntaxUID = guess
    if not has_pixels:
        raise ValueError("it has no pixels, or ends early")
    if found["NumberOfFrames"] is not None and _check_number(found, "NumberOfFrames", 1, 2**31 - 1) > 1:
        raise ValueError("more than one frame")
    if found["SamplesPerPixel"] not in (None, 1) or found["PhotometricInterpretation"] not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        raise ValueError("its pixels are not gray")
    if str(found["BurnedInAnnotation"]).upper() == "YES":
        raise ValueError("it has annotations burned in, which may name the patient (BurnedInAnnotation)")
    for name, low, high in (("Rows", 1, 65535), ("Columns", 1, 65535), ("PixelRepresentation", 0, 1)):
        _check_number(found, name, low, high)
    allocated = _check_number(found, "BitsAllocated", 1, 32)
    bits = _check_number(found, "BitsStored", 1, allocated)
    if found["HighBit"] is None:  # in one of twenty of CheXpert Plus
        found["HighBit"] = dataset.HighBit = bits - 1
    _check_number(found, "HighBit", bits - 1, allocated - 1)
    return dataset


def decode_dicom(dataset: "Dataset") -> npt.NDArray[np.uint8]:
    """Gray pixels [H, W] of an opened DICOM. Raises ValueError for damaged ones, and where a decoder is missing."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import JPEGExtended12Bit, RLELossless

    plugin, shape = "", (dataset.Rows, dataset.Columns, 1)
    with _quietly("its transfer syntax is unknown"):
        syntax = dataset.file_meta.TransferSyntaxUID
        decoder = get_decoder(syntax)
        is_encapsulated = dataset["PixelData"].is_undefined_length
    if syntax.is_encapsulated != is_encapsulated:
        raise ValueError(f"its pixels are not {syntax.name}, as its header says")
    if is_encapsulated:
        plugin = next((name for name in _DECODERS if name in decoder.available_plugins), "")
        if syntax == JPEGExtended12Bit and dataset.BitsStored > 8 and plugin != "pylibjpeg":
            raise ValueError(
                "a JPEG of 12 bits, whose decoder is under the GPL: pip install pylibjpeg-libjpeg"
            )
        if not plugin:
            raise ValueError(f"there is no decoder for {syntax.name}: pip install 'chexpert-pipeline[dicom]'")
        with _quietly(f"its pixels are damaged ({syntax.name})"):
            frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
            claimed = shape if syntax == RLELossless else _read_shape(frame)
        if claimed != shape:  # before a decoder allots memory for it
            raise ValueError(f"its pixels are of another size than its header says ({syntax.name})")
    with _quietly(f"its pixels are damaged, or end early ({syntax.name})"):
        stored, _ = decoder.as_array(
            dataset, raw=True, decoding_plugin=plugin, view_only=True, correct_unused_bits=False
        )
    with _quietly("its window or lookup table cannot be applied"):
        return _draw(dataset, stored)


@contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """Raise ValueError(failure) for any error, and let no warning out: pydicom's quote what they stumble over.

    One thread at a time: Python's filters of warnings are the whole process's.
    """
    logger = logging.getLogger("pydicom")
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        propagates, logger.propagate = logger.propagate, False
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in pylibjpeg-rle's Rust is no Exception
            raise ValueError(failure) from None
        finally:
            logger.propagate = propagates


def _check_number(found: Mapping[str, object], name: str, low: int, high: int) -> int:
    number = found[name]
    if not isinstance(number, int) or not low <= number <= high:
        raise ValueError(f"its {name} is missing, or is not a number from {low} to {high}")
    return int(number)


def _inflate(data: bytes, longest: int) -> bytes:
    """A deflated file as a plain one, of bounded length; another one as it is. Raises ValueError."""
    end = 144 + int.from_bytes(data[140:144], "little")  # of the file meta information
    if data[128:136] != b"DICM\2\0\0\0" or _DEFLATED not in data[:end]:
        return data
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data[end:], longest)
    except zlib.error:
        raise ValueError("its deflated part is damaged") from None
    if not stream.eof:
        raise ValueError(f"its deflated part ends early, or has more than {longest:,} bytes")
    return data[:end].replace(_DEFLATED, _EXPLICIT) + inflated


def _read_shape(stream: bytes) -> tuple[int, int, int]:
    """Height, width and channels of a JPEG, JPEG-LS or JPEG 2000 stream. Raises ValueError, struct.error."""
    if stream.startswith(JPEG):
        return read_jpeg_shape(stream)
    # ITU-T T.800, A.5.1: the size of the grid, the offset of the image in it, tiles, channels.
    fields = struct.unpack_from(">4I16xH", stream, stream.index(b"\xff\x4f\xff\x51") + 8)
    return fields[1] - fields[3], fields[0] - fields[2], fields[4]


def _draw(dataset: "Dataset", stored: Levels) -> npt.NDArray[np.uint8]:
    """8-bit gray [H, W] of stored values [H, W], through a table of all the values that their bits can have."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    places = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(f"u{stored.itemsize}")
    if places.itemsize > 2:
        values, places = np.unique(places, return_inverse=True)
        places = places.reshape(stored.shape)
    else:
        values = np.arange(2 ** (8 * places.itemsize))
    bits = dataset.BitsStored
    levels = (values.astype(np.int64) >> (dataset.HighBit + 1 - bits)) & (2**bits - 1)
    if dataset.PixelRepresentation == 1:  # two's complement
        levels -= (levels >> (bits - 1)) << bits
    measured = apply_modality_lut(levels, dataset)
    shown = apply_voi_lut(measured, dataset)
    if shown is measured:  # neither a table nor a window
        there = _look_up(measured.astype(np.float32), places)
        black, white = there.min(), there.max()
    elif shown.dtype == np.float64:
        black, white = apply_voi_lut(np.array([-1e12, 1e12]), dataset)  # far outside of any window
    else:
        # The range of its entries: the number of bits that tables state is often wrong.
        table = apply_voi_lut(np.arange(-(2**15), 2**16), dataset)
        black, white = table.min(), table.max()
    scaled = (shown.astype(np.float64) - black) / ((white - black) or 1) * 255
    if not np.isfinite(scaled).all():
        raise ValueError
    gray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return _look_up(255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray, places)


def _look_up(table: npt.NDArray[Any], places: Levels) -> npt.NDArray[Any]:
    """The table's entry at each place: `table[places]`, nine times as fast by OpenCV."""
    try:
        return cv2.LUT(places, table)
    except cv2.error:  # before version 5 for more than 8 bits, and for more than 16
        return np.asarray(table[places])
