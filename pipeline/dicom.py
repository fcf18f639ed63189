"""DICOM file → 8-bit gray pixels, and nothing of any other tag.

By pydicom and decoders under permissive licenses (pyproject.toml names each). Gray levels follow DICOM PS3.3: padding
(C.7.5.1.1.2) is black, modality LUT or rescaling (C.11.1), then the first VOI LUT or window (C.11.2), or else the range
of the pixels; MONOCHROME1 is inverted. All this is computed once per possible level, not per pixel. The formulas are
written out here: pydicom's functions lack padding, and clip indices in the type of a table's entries.
"""

import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.errors import needs
from pipeline.containers import JPEG, read_jpeg_frame

if TYPE_CHECKING:
    from pydicom import Dataset

Levels = npt.NDArray[np.integer[Any]]
Measured = npt.NDArray[np.floating[Any]]

# Only these are parsed: none of them names a patient.
_CHECKED = ["SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BurnedInAnnotation"]
_CHECKED += ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"]
_USED = ["ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction"]
_USED += ["WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData"]
_NO_PREAMBLE = re.compile(rb"[\x02\x08]\0[\0-\x18]\0")  # the first tag: (0002,…) or (0008,…)
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1".ljust(22, b"\0")
_OTHER_TAGS = 2**24  # bytes, at most, beside the pixels of a deflated file
# Strict decoders before GDCM, which makes something of damaged data too.
_DECODERS = ("pylibjpeg", "pyjpegls", "pillow", "pydicom", "gdcm")
_J2K = b"\xff\x4f\xff\x51"  # how a JPEG 2000 stream begins
_STREAMS = (JPEG, _J2K, b"\0\0\0\x0cjP  ")
MISSED = "a window that shows all pixels as one level, replaced by their range"


class GrayFilm(NamedTuple):
    """8-bit gray [H, W], the bits of a stored value, how many values the file has beside padding, and a note or ""."""

    pixels: npt.NDArray[np.uint8]
    bits: int
    levels: int
    note: str


class _Stored(NamedTuple):
    """Unsigned words [H, W], and the part of each that counts: `bits` above `shift`, two's complement if signed."""

    words: Levels
    bits: int
    shift: int
    is_signed: bool


class _Frame(NamedTuple):
    """What a JPEG, JPEG-LS or JPEG 2000 stream says of its pixels; only JPEG 2000 says whether they are signed."""

    shape: tuple[int, int, int]  # height, width, channels
    bits: int
    is_signed: bool | None


class _Silence:
    """No warning or log of pydicom's while any thread is inside: they quote what they stumble over.

    Counted, not locked: Python's filters of warnings are the whole process's, but decoders run side by side.
    """

    def __init__(self) -> None:
        self.lock, self.threads, self.undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.threads == 0:
                logger = logging.getLogger("pydicom")
                self.undo.callback(setattr, logger, "propagate", logger.propagate)
                self.undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                logger.propagate = False
            self.threads += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                self.undo.close()


_silence = _Silence()


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


def read_position(data: bytes) -> str:
    """The ViewPosition of a DICOM that can be opened, in capitals: AP, PA, LL, RL, …; empty where it has none."""
    from pydicom import dcmread

    with _quietly("its header is damaged"):
        dataset = dcmread(BytesIO(data), stop_before_pixels=True, force=True, specific_tags=["ViewPosition"])
        return str(dataset.get("ViewPosition") or "").strip().upper()


def decode_dicom(dataset: "Dataset") -> GrayFilm:
    """Gray pixels [H, W] of an opened DICOM. Raises ValueError for damaged ones, and where a decoder is missing."""
    stored = _decode(dataset)
    with _quietly("its window or lookup table cannot be applied"):
        return _render(dataset, stored)


def _decode(dataset: "Dataset") -> _Stored:
    """The stored values, decompressed."""
    from pydicom.pixels import get_decoder

    with _quietly("its transfer syntax is unknown"):
        syntax = dataset.file_meta.TransferSyntaxUID
        decoder = get_decoder(syntax)
        is_encapsulated = dataset["PixelData"].is_undefined_length
    if syntax.is_encapsulated != is_encapsulated:
        raise ValueError(f"its pixels are not {syntax.name}, as its header says")
    plugin, frame = "", None
    options: dict[str, Any] = {"samples_per_pixel": 1, "view_only": True, "correct_unused_bits": False}
    if is_encapsulated:
        plugin, frame = _choose_plugin(dataset, decoder.available_plugins)
    else:
        size = -(-dataset.Rows * dataset.Columns * dataset.BitsAllocated // 8)
        if len(dataset.PixelData or b"") > max(2 * size - 1, size + 1):  # a byte may fill up
            raise ValueError("more than one frame")
    if frame:  # what is compressed says itself what it is (PS3.5, 8.2): headers that differ are common
        options |= {"bits_allocated": 8 if frame.bits <= 8 else 16 if frame.bits <= 16 else 32}
        options |= {"bits_stored": frame.bits, "pixel_representation": int(frame.is_signed or False)}
    with _quietly(f"its pixels are damaged, or end early ({syntax.name})"):
        words, _ = decoder.as_array(dataset, index=0, raw=True, decoding_plugin=plugin, **options)
        words = words.astype(words.dtype.newbyteorder("="), copy=False).view(f"u{words.itemsize}")
    bits, is_signed = dataset.BitsStored, dataset.PixelRepresentation == 1
    if frame is None:
        return _Stored(words, bits, dataset.HighBit + 1 - bits, is_signed)
    # Sign bits would lie above the stored ones: without any, the values are those of the header.
    if frame.is_signed or int(words.max()) >> bits or bits > frame.bits:
        bits = frame.bits
    if frame.is_signed not in (None, is_signed):
        is_signed = _is_smoother_signed(words, bits)
    return _Stored(words, bits, 0, is_signed)


def _choose_plugin(dataset: "Dataset", available: Collection[str]) -> tuple[str, _Frame | None]:
    """Which decoder to use, and what the only frame says of itself (RLE: nothing). Raises ValueError."""
    from pydicom.encaps import generate_fragments, parse_basic_offsets
    from pydicom.uid import JPEGExtended12Bit, RLELossless

    syntax, frame = dataset.file_meta.TransferSyntaxUID, None
    plugin = next((name for name in _DECODERS if name in available), "")
    with _quietly(f"its pixels are damaged ({syntax.name})"):
        file = BytesIO(dataset.PixelData)
        frames = len(parse_basic_offsets(file))
        fragments = [fragment for fragment in generate_fragments(file) if fragment]
        if syntax == RLELossless:  # a frame is one fragment (PS3.5, A.4.2)
            frames = max(frames, len(fragments))
        else:
            frames = max(frames, sum(fragment.startswith(_STREAMS) for fragment in fragments))
            frame = _read_frame(b"".join(fragments))
    if frames > 1:
        raise ValueError("more than one frame")
    if frame and frame.shape != (dataset.Rows, dataset.Columns, 1):  # before a decoder allots memory for it
        raise ValueError(f"its pixels are of another size than its header says ({syntax.name})")
    if frame and syntax == JPEGExtended12Bit and frame.bits > 8 and plugin != "pylibjpeg":
        raise ValueError("a JPEG of 12 bits, whose decoder is under the GPL: pip install pylibjpeg-libjpeg")
    if not plugin:
        raise ValueError(f"there is no decoder for {syntax.name}: pip install 'chexpert-pipeline[dicom]'")
    return plugin, frame


def _is_smoother_signed(words: Levels, bits: int) -> bool:
    """Whether neighbors differ less as signed values: what to believe where stream and header disagree.

    Both are wrong in real files, and a wrong sign makes black of white.
    """
    levels = (words & np.array(2**bits - 1, words.dtype)).astype(np.int64)
    signed = levels - ((levels >> (bits - 1)) << bits)
    return bool(np.abs(np.diff(signed)).sum() < np.abs(np.diff(levels)).sum())


@contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """Raise ValueError(failure) for any error, and let nothing out of what pydicom says of it."""
    with _silence:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic in pylibjpeg-rle's Rust is no Exception
            raise ValueError(failure) from None


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


def _read_frame(stream: bytes) -> _Frame:
    """What a JPEG, JPEG-LS or JPEG 2000 stream says of its pixels. Raises ValueError, struct.error."""
    if stream.startswith(JPEG):
        height, width, channels, bits = read_jpeg_frame(stream)
        return _Frame((height, width, channels), bits, None)
    # ITU-T T.800, A.5.1: the size of the grid, the offset of the image in it, tiles, channels, sign and bits.
    fields = struct.unpack_from(">4I16xHB", stream, stream.index(_J2K) + 8)
    shape = fields[1] - fields[3], fields[0] - fields[2], fields[4]
    return _Frame(shape, (fields[5] & 127) + 1, fields[5] > 127)


def _render(dataset: "Dataset", stored: _Stored) -> GrayFilm:
    """8-bit gray [H, W], computed once for each value that occurs."""
    words, bits, shift, is_signed = stored
    width = 8 * words.itemsize
    if width > 16:
        values, places = np.unique(words, return_inverse=True)
    else:  # a histogram takes a tenth of the time of sorting
        values = np.flatnonzero(cv2.calcHist([words], [0], None, [2**width], [0, 2**width]))
    values = values.astype(np.int64)
    levels = (values >> shift) & (2**bits - 1)
    whole = values  # all bits of the words
    if is_signed:
        levels, whole = levels - (levels >> (bits - 1) << bits), values - (values >> (width - 1) << width)
    is_padding = _find_padding(dataset, is_signed, levels) | _find_padding(dataset, is_signed, whole)
    seen = is_padding.all() | ~is_padding
    measured = _measure(dataset, levels, seen)
    low, high = measured[seen].min(), measured[seen].max()
    shown, note = _apply_voi(dataset, measured, low, high), ""
    if shown is not None and low < high and np.ptp(np.rint(255 * shown[seen])) == 0:
        shown, note = None, MISSED
    if shown is None:
        shown = (measured - low) / ((high - low) or 1)
    if not np.isfinite(measured + shown).all():
        raise ValueError
    gray = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        gray = 255 - gray
    gray[is_padding] = 0
    if width > 16:
        pixels = gray[places].reshape(words.shape)
    else:
        table = np.zeros(2**width, np.uint8)
        table[values] = gray
        pixels = _look_up(table, words)
    return GrayFilm(pixels, bits, len(np.unique(measured[seen])), note)


def _find_padding(dataset: "Dataset", is_signed: bool, levels: Levels) -> npt.NDArray[np.bool_]:
    """Which levels are padding (C.7.5.1.1.2)."""
    given = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if given[0] in (None, ""):
        return np.zeros(len(levels), np.bool_)
    # Their type depends on that of the pixels, and is often the other one.
    ends = [int(value) & 0xFFFF for value in given if value not in (None, "")]
    ends = [end - 2**16 if is_signed and end >= 2**15 else end for end in ends]
    is_padding: npt.NDArray[np.bool_] = (min(ends) <= levels) & (levels <= max(ends))
    return is_padding


def _measure(dataset: "Dataset", levels: Levels, seen: npt.NDArray[np.bool_]) -> Measured:
    """Levels after the modality LUT or rescaling (C.11.1)."""
    tables = dataset.get("ModalityLUTSequence")
    if tables and not _is_empty(tables[0]):
        return _apply_table(dataset, tables[0], levels, levels[seen].min(), levels[seen].max())[0]
    slope, intercept = _read_number(dataset, "RescaleSlope"), _read_number(dataset, "RescaleIntercept")
    return levels * (slope or 1.0) + (intercept or 0.0)


def _apply_voi(dataset: "Dataset", measured: Measured, low: float, high: float) -> Measured | None:
    """The first VOI LUT or window (C.11.2), black 0 to white 1; None without one. The pixels are `low` to `high`."""
    tables = dataset.get("VOILUTSequence")
    if tables and not _is_empty(tables[0]):
        shown, entries = _apply_table(dataset, tables[0], measured, low, high)
        # The range of its entries: the number of bits that tables state is often wrong.
        return (shown - float(entries.min())) / (float(np.ptp(entries)) or 1.0)
    center, width = _read_number(dataset, "WindowCenter"), _read_number(dataset, "WindowWidth")
    if center is None or width is None:
        return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if width <= 0 or (function == "LINEAR" and width < 1):
        raise ValueError
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (measured - center) / width)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise ValueError
    edge = center - width / 2
    return np.where(
        measured <= edge, 0, np.where(measured > edge + width, 1, (measured - edge) / (width or 1))
    )


def _apply_table(
    dataset: "Dataset", table: "Dataset", levels: npt.NDArray[Any], low: float, high: float
) -> tuple[Measured, Levels]:
    """A table's entries (C.11.1.1, C.11.2.1.1) at the levels, and all of them. The pixels are `low` to `high`."""
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    count = count & 0xFFFF or 2**16
    data = table.LUTData
    if not isinstance(data, bytes):
        data = (np.atleast_1d(data) & 0xFFFF).astype("<u2").tobytes()
    elif table["LUTData"].VR == "OW" and not dataset.original_encoding[1]:
        data = np.frombuffer(data, ">u2", len(data) // 2).astype("<u2").tobytes()
    if len(data) < count or not 8 <= bits <= 16:
        raise ValueError
    # Entries of 8 bits may be one or two a word, whatever the type says.
    entries = np.frombuffer(data, "<u2" if len(data) >= 2 * count else "u1", count)
    # The first level is signed if levels can be negative; its type is often the other one, and implicit in many files.
    if not 0 <= first < 2**15:
        starts = sorted((first & 0xFFFF, (first & 0xFFFF) - 2**16), reverse=bool(low >= 0))
        likely = starts[0] if low < 0 else first
        first = next((start for start in starts if start <= high and start + count > low), likely)
    places = np.clip(np.rint(levels - first), 0, count - 1).astype(np.int64)
    return entries[places].astype(np.float64), entries.astype(np.int64)


def _is_empty(table: "Dataset") -> bool:
    return not table.get("LUTDescriptor") or table.get("LUTData") in (None, b"", "", [])


def _read_number(dataset: "Dataset", name: str) -> float | None:
    """The first number of an element; None where it is absent or empty."""
    value = dataset.get(name)
    values = [] if value in (None, "") else [value] if isinstance(value, (str, int, float)) else [*value]
    return float(values[0]) if values else None


def _look_up(table: npt.NDArray[np.uint8], places: Levels) -> npt.NDArray[np.uint8]:
    """The table's entry at each place: `table[places]`, nine times as fast by OpenCV."""
    try:
        return cv2.LUT(places, table)  # type: ignore[return-value]
    except cv2.error:  # before version 5, for 16 bits
        return table[places]
