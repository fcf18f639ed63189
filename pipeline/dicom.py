"""DICOM file → 8-bit gray pixels, and no other tag.

By pydicom and decoders under permissive licenses (pyproject.toml names each). Gray levels follow DICOM PS3.3: padding
(C.7.5.1.1.2) is black, modality LUT or rescaling (C.11.1), then the first VOI LUT or window (C.11.2), or else the range
of the pixels; MONOCHROME1 is inverted. The formulas are written out here: pydicom's functions lack padding, and clip
indices in the type of a table's entries.
"""

import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.base.errors import needs
from pipeline.containers import JPEG, Picture, read_jpeg_facts

if TYPE_CHECKING:
    from pydicom import Dataset

Levels = npt.NDArray[np.integer]
Measured = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

# Only these are parsed: none of them names a patient.
_TAGS = ["SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BurnedInAnnotation", "PixelData"]
_TAGS += ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"]
_TAGS += ["ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "VOILUTFunction"]
_TAGS += ["WindowCenter", "WindowWidth", "PixelPaddingValue", "PixelPaddingRangeLimit"]
_NO_PREAMBLE = re.compile(rb"[\x02\x08]\0[\0-\x18]\0")  # the first tag: (0002,…) or (0008,…)
_DEFLATED, _EXPLICIT = b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1".ljust(22, b"\0")
_J2K = b"\xff\x4f\xff\x51"  # how a JPEG 2000 stream begins
MISSED = "a window that shows all pixels as one level, replaced by their range"
_lock, _inside, _undo = threading.Lock(), list[str](), ExitStack()


class _UnfitError(ValueError):
    """A DICOM file that cannot be used; the reason quotes nothing from the file, which may hold patient data."""


@contextmanager
def _quietly(failure: str) -> Iterator[None]:
    """Raise ValueError(failure) for any foreign error, and silence pydicom, whose messages quote the file."""
    with _lock:  # threads inside are counted, not locked out: Python's filters of warnings are the process's
        if not _inside:
            logger = logging.getLogger("pydicom")
            _undo.callback(setattr, logger, "propagate", logger.propagate)
            _undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            logger.propagate = False
        _inside.append(failure)
    try:
        yield
    except (_UnfitError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in pylibjpeg-rle's Rust is no Exception
        raise _UnfitError(failure) from None
    finally:
        with _lock:
            _inside.pop()
            if not _inside:
                _undo.close()


def is_dicom(data: bytes) -> bool:
    """Whether a file begins like a DICOM, with or without its preamble."""
    return data[128:132] == b"DICM" or _NO_PREAMBLE.match(data) is not None


def open_dicom(data: bytes, max_pixels: int) -> "Dataset":
    """The header, checked. Raises ValueError unless it is a single gray image, DataError if pydicom is missing."""
    with needs("dicom"):
        from pydicom import dcmread, uid
    end = 144 + int.from_bytes(data[140:144], "little")  # of the file meta information
    if data[128:136] == b"DICM\2\0\0\0" and _DEFLATED in data[:end]:
        longest = 4 * max_pixels + 2**24  # bytes, with other tags beside the pixels
        stream = zlib.decompressobj(-zlib.MAX_WBITS)
        with _quietly("its deflated part is damaged"):
            inflated = stream.decompress(data[end:], longest)
        if not stream.eof:
            raise _UnfitError(f"its deflated part ends early, or has more than {longest:,} bytes")
        data = data[:end].replace(_DEFLATED, _EXPLICIT) + inflated
    with _quietly("its header is damaged"):
        dicom = dcmread(BytesIO(data), force=True, specific_tags=_TAGS)
        if "PixelData" not in dicom:
            raise _UnfitError("it has no pixels, or ends early")
        if "TransferSyntaxUID" not in dicom.file_meta:
            plain = {(True, True): uid.ImplicitVRLittleEndian, (False, True): uid.ExplicitVRLittleEndian}
            dicom.file_meta.TransferSyntaxUID = plain.get(dicom.original_encoding, uid.ExplicitVRBigEndian)
        if dicom.get("NumberOfFrames") is not None and _check_number(dicom, "NumberOfFrames", 1, 2**31 - 1) > 1:
            raise _UnfitError("more than one frame")
        is_gray = dicom.get("PhotometricInterpretation") in ("MONOCHROME1", "MONOCHROME2")
        if dicom.get("SamplesPerPixel", 1) not in (None, 1) or not is_gray:
            raise _UnfitError("its pixels are not gray")
        if str(dicom.get("BurnedInAnnotation")).upper() == "YES":
            raise _UnfitError("it has annotations burned in, which may name the patient (BurnedInAnnotation)")
        for name, low, high in (("Rows", 1, 65535), ("Columns", 1, 65535), ("PixelRepresentation", 0, 1)):
            _check_number(dicom, name, low, high)
        allocated = _check_number(dicom, "BitsAllocated", 1, 32)
        bits = _check_number(dicom, "BitsStored", 1, allocated)
        if dicom.get("HighBit") is None:  # in one of twenty of CheXpert Plus
            dicom.HighBit = bits - 1
        _check_number(dicom, "HighBit", bits - 1, allocated - 1)
    return dicom


def read_position(data: bytes) -> str:
    """The ViewPosition of a DICOM that can be opened, in capitals: AP, PA, LL, RL, …; empty if absent."""
    from pydicom import dcmread

    with _quietly("its header is damaged"):
        dicom = dcmread(BytesIO(data), stop_before_pixels=True, force=True, specific_tags=["ViewPosition"])
        return str(dicom.get("ViewPosition") or "").strip().upper()


def _check_number(dicom: "Dataset", name: str, low: int, high: int) -> int:
    number = dicom.get(name)
    if not isinstance(number, int) or not low <= number <= high:
        raise _UnfitError(f"its {name} is missing, or is not a number from {low} to {high}")
    return int(number)


def _decode(dicom: "Dataset") -> tuple[Levels, int, int, bool]:
    """Unsigned words [H, W], and their significant bits: how many, above which one, and whether they are signed."""
    from pydicom.pixels import get_decoder

    with _quietly("its transfer syntax is unknown"):
        syntax = dicom.file_meta.TransferSyntaxUID
        decoder = get_decoder(syntax)
        if syntax.is_encapsulated != dicom["PixelData"].is_undefined_length:
            raise _UnfitError(f"its pixels are not {syntax.name}, as its header says")
    bits, shift, is_signed = dicom.BitsStored, dicom.HighBit + 1 - dicom.BitsStored, dicom.PixelRepresentation == 1
    options: dict[str, Any] = {"samples_per_pixel": 1, "view_only": True, "correct_unused_bits": False}
    with _quietly(f"its pixels are damaged, or end early ({syntax.name})"):
        depth, has_sign = 0, False
        if syntax.is_encapsulated:
            options["decoding_plugin"], depth, has_sign = _choose_plugin(dicom, decoder.available_plugins)
        else:
            size = -(-dicom.Rows * dicom.Columns * dicom.BitsAllocated // 8)
            if len(dicom.PixelData or b"") > max(2 * size - 1, size + 1):  # a byte may fill up
                raise _UnfitError("more than one frame")
        if depth:  # compressed data states its own format (PS3.5, 8.2): headers that differ are common
            options |= {"bits_allocated": 8 if depth <= 8 else 16 if depth <= 16 else 32}
            options |= {"bits_stored": depth, "pixel_representation": int(has_sign)}
        words, _ = decoder.as_array(dicom, index=0, raw=True, **options)
        words = words.astype(words.dtype.newbyteorder("="), copy=False).view(f"u{words.itemsize}")
        if depth:
            # Sign bits would lie above the stored ones: without any, the values are those of the header.
            bits = depth if has_sign or int(words.max()) >> bits or bits > depth else bits
            if is_signed != has_sign:
                # Both are wrong in real files, and a wrong sign makes black of white: neighbors differ less by the
                # right one, padding apart, which is far from any neighbor. If they say nothing, the header decides.
                levels = words.astype(np.int64) & (2**bits - 1)
                signed = _to_signed(levels, bits)
                is_padding = _find_padding(dicom, True, signed) | _find_padding(dicom, False, levels)
                counted = ~(is_padding[:, 1:] | is_padding[:, :-1])
                as_signed, unsigned = (np.abs(np.diff(values))[counted].sum() for values in (signed, levels))
                is_signed = bool(as_signed < unsigned or (as_signed == unsigned and is_signed))
            shift = 0
    return words, bits, shift, is_signed


def _choose_plugin(dicom: "Dataset", available: Collection[str]) -> tuple[str, int, bool]:
    """Which decoder to use; the bits that the only frame states, 0 for RLE, and whether they are signed."""
    from pydicom.encaps import generate_fragments, parse_basic_offsets
    from pydicom.uid import JPEGExtended12Bit, RLELossless

    syntax, file = dicom.file_meta.TransferSyntaxUID, BytesIO(dicom.PixelData)
    # Strict decoders before GDCM, which makes something of damaged data too.
    decoders = ("pylibjpeg", "pyjpegls", "pillow", "pydicom", "gdcm")
    plugin = next((name for name in decoders if name in available), "")
    offsets = len(parse_basic_offsets(file))
    fragments = [fragment for fragment in generate_fragments(file) if fragment]
    # Of RLE, a frame is one fragment (PS3.5, A.4.2).
    beginnings = b"" if syntax == RLELossless else (JPEG, _J2K, b"\0\0\0\x0cjP  ")
    if max(offsets, sum(part.startswith(beginnings) for part in fragments)) > 1:
        raise _UnfitError("more than one frame")
    if not plugin:
        raise _UnfitError(f"there is no decoder for {syntax.name}: pip install 'chexpert-pipeline[dicom]'")
    if syntax == RLELossless:
        return plugin, 0, False
    stream = b"".join(fragments)
    if stream.startswith(JPEG):  # which does not state a sign
        facts = read_jpeg_facts(stream)
        shape, bits, is_signed = facts.shape, facts.bits, False
    else:  # ITU-T T.800, A.5.1: the size of the grid, the offset of the image in it, tiles, channels, sign and bits
        *grid, channels, depth = struct.unpack_from(">4I16xHB", stream, stream.index(_J2K) + 8)
        shape = (grid[1] - grid[3], grid[0] - grid[2], channels)
        bits, is_signed = depth % 128 + 1, depth > 127
    if shape != (dicom.Rows, dicom.Columns, 1):  # before a decoder allots memory for it
        raise _UnfitError(f"its pixels are of another size than its header says ({syntax.name})")
    if syntax == JPEGExtended12Bit and bits > 8 and plugin != "pylibjpeg":
        raise _UnfitError("a JPEG of 12 bits, whose decoder is under the GPL: pip install pylibjpeg-libjpeg")
    return plugin, bits, is_signed


def _to_signed(values: Levels, bits: int) -> Levels:
    """Two's complement of so many bits."""
    return values - (values >> (bits - 1) << bits)


def decode_dicom(dicom: "Dataset") -> Picture:
    """An opened DICOM in gray. Raises ValueError for damaged pixels, and if a decoder is missing."""
    words, bits, shift, is_signed = _decode(dicom)
    with _quietly("its window or lookup table cannot be applied"):
        # Gray is computed once for each possible value of the words, or each that occurs in words of 32 bits.
        ends = cv2.minMaxLoc(words)[:2] if words.itemsize <= 2 else ()
        values: Levels = np.arange(int(max(ends, default=0)) + 1)
        places = words
        if not ends:
            values, places = np.unique(words.astype(np.int64), return_inverse=True)
        levels = (values >> shift) & (2**bits - 1)
        if is_signed:
            levels, values = _to_signed(levels, bits), _to_signed(values, 8 * words.itemsize)
        is_padding = _find_padding(dicom, is_signed, levels) | _find_padding(dicom, is_signed, values)
        modality, voi = _find_table(dicom, "ModalityLUTSequence"), _find_table(dicom, "VOILUTSequence")
        occurs = np.ones(len(values), np.bool_)
        is_rising = not (modality or voi or is_signed or is_padding.any()) and (np.diff(levels) > 0).all()
        if ends and is_rising:
            occurs = np.isin(values, ends)  # windows rise with the levels, too: no other decides
        elif ends:
            occurs = cv2.calcHist([words], [0], None, [len(values)], [0, len(values)]).ravel() > 0
        seen = occurs & ~is_padding if (occurs & ~is_padding).any() else occurs
        if modality:  # C.11.1
            measured = _apply_table(dicom, modality, levels, seen)[0]
        else:
            slope, intercept = _read_number(dicom, "RescaleSlope"), _read_number(dicom, "RescaleIntercept")
            measured = levels * (slope or 1.0) + (intercept or 0.0)
        low, high = measured[seen].min(), measured[seen].max()
        shown, notes = _apply_voi(dicom, voi, measured, seen), tuple[str, ...]()
        if shown is not None and low < high and np.ptp(np.rint(255 * shown[seen])) == 0:
            shown, notes = None, (MISSED,)
        if shown is None:
            shown = (measured - low) / ((high - low) or 1)
        if not np.isfinite(measured + shown).all():
            raise ValueError
        gray = np.rint(255 * np.clip(shown, 0, 1)).astype(np.uint8)
        if dicom.PhotometricInterpretation == "MONOCHROME1":
            gray = 255 - gray
        gray[is_padding] = 0
        try:  # nine times as fast as indexing
            pixels = cv2.LUT(places, np.pad(gray, (0, 256**words.itemsize - len(gray))) if ends else gray)
        except cv2.error:  # of more than 16 bits, or before OpenCV 5 of 16
            pixels = gray[places]
        in_file = places if is_rising else measured[seen]
        return Picture(np.asarray(pixels, np.uint8), pixels.shape, bits, levels=in_file, notes=notes)


def _find_padding(dicom: "Dataset", is_signed: bool, levels: Levels) -> Bools:
    """Which levels are padding (C.7.5.1.1.2)."""
    given = [dicom.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    # Their type depends on that of the pixels, and is often the other one.
    ends = np.array([int(value) & 0xFFFF for value in given if value not in (None, "")])
    if given[0] in (None, ""):
        return np.zeros(levels.shape, np.bool_)
    if is_signed:
        ends = _to_signed(ends, 16)
    return np.asarray((ends.min() <= levels) & (levels <= ends.max()))


def _apply_voi(dicom: "Dataset", table: "Dataset | None", measured: Measured, seen: Bools) -> Measured | None:
    """The first VOI LUT or window (C.11.2), black 0 to white 1; None without one."""
    if table:
        entries, white = _apply_table(dicom, table, measured, seen)
        return entries / white
    center, width = _read_number(dicom, "WindowCenter"), _read_number(dicom, "WindowWidth")
    if center is None or width is None:
        return None
    function = str(dicom.get("VOILUTFunction") or "").strip().upper() or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width < (function == "LINEAR") or not width:
        raise ValueError
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (measured - center) / width)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    edge = center - width / 2
    return np.where(measured <= edge, 0, np.where(measured > edge + width, 1, (measured - edge) / (width or 1)))


def _apply_table(dicom: "Dataset", table: "Dataset", levels: Levels | Measured, seen: Bools) -> tuple[Measured, int]:
    """A table's entries at the levels (C.11.1.1, C.11.2.1.1), and the highest that its bits can have."""
    count, first, bits = (int(number) for number in table.LUTDescriptor)
    count, data = count & 0xFFFF or 2**16, table.LUTData
    if not isinstance(data, bytes):
        data = (np.atleast_1d(data) & 0xFFFF).astype("<u2").tobytes()
    elif table["LUTData"].VR == "OW" and not dicom.original_encoding[1]:
        data = np.frombuffer(data, ">u2", len(data) // 2).astype("<u2").tobytes()
    # Entries of 8 bits may be one or two a word, whatever the type says.
    if not 8 <= bits <= 16 or (len(data) < 2 * count and len(data) not in (count, count + 1)):
        raise ValueError
    entries = np.frombuffer(data, "<u2" if len(data) >= 2 * count else "u1", count)
    low, high, highest = levels[seen].min(), levels[seen].max(), int(entries.max())
    if highest >> bits or not highest >> (bits - 2):  # the number of bits that tables state is often wrong
        bits = max(1, highest.bit_length())
    # The first level is signed if levels can be negative; its type is often the other one, and implicit in many files.
    if not 0 <= first < 2**15:
        starts = sorted((first & 0xFFFF, (first & 0xFFFF) - 2**16), reverse=bool(low >= 0))
        likely = starts[0] if low < 0 else first
        first = next((start for start in starts if start <= high and start + count > low), likely)
    places = np.clip(np.rint(levels) - first, 0, count - 1).astype(np.int64)
    return entries[places].astype(np.float64), 2**bits - 1


def _find_table(dicom: "Dataset", name: str) -> "Dataset | None":
    """The first lookup table of a sequence that is not empty."""
    tables = (item for item in dicom.get(name) or [] if item.get("LUTDescriptor"))
    return next((table for table in tables if table.get("LUTData") not in (None, b"", "", [])), None)


def _read_number(dicom: "Dataset", name: str) -> float | None:
    """The first number of an element; None if it is absent or empty."""
    value = dicom.get(name)
    values = [] if value in (None, "") else [value] if isinstance(value, (str, int, float)) else [*value]
    return float(values[0]) if values else None
