"""JPEG and PNG files as containers: the contents of their segments and chunks, without decoding pixels.

ITU-T T.81, annex B; W3C PNG, section 11. Only parts that a decoder needs are no metadata: the rest may say anything.
"""

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from zlib_ng import zlib_ng

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how the files begin
BASELINE, PROGRESSIVE = {0xC0, 0xC1}, 0xC2  # frame markers of a JPEG
_SOS, _EOI, _APP2, _DQT, _SCAN_DATA = 0xDA, 0xD9, 0xE2, 0xDB, 0x00  # JPEG markers; 0x00 is none, and ours
_END = bytes([0xFF, _EOI])
_LONGEST_KEPT = 4096  # bytes of a file's head that are cached
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and JPEG-LS
_JPEG_IMAGE = _FRAMES | {0xC4, 0xCC, _DQT, 0xDD, _SOS, _SCAN_DATA, _EOI}  # and Huffman, arithmetic tables, restarts
_JPEG_PLAIN = {(0xE0, b"JFIF\0", 18), (0xEE, b"Adobe", 16)}  # fixed fields; a longer JFIF holds a thumbnail
PNG_PLAIN = set(b"IHDR PLTE IDAT IEND tRNS bKGD sBIT sRGB gAMA cHRM pHYs".split())
_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan, 0xFF precedes 0x00 or a restart marker
# Annex K.1's luminance table, by rows, and the sum of what libjpeg (jcparam.c) makes of it at qualities 1 to 100.
_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_PERCENT = np.array([5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)])
_SUMS = np.clip((np.array(_LUMINANCE.split(), int) * _PERCENT[:, None] + 50) // 100, 1, 255).sum(axis=1)


class Picture(NamedTuple):
    """A decoded image in gray, and what is known of its file."""

    pixels: npt.NDArray[np.uint8]  # full size or DCT-scaled
    shape: tuple[int, int]  # full height and width
    bits: int  # per channel of the file
    stripped: bool = True  # whether the file has metadata
    quality: int | None = None
    copy: bytes | None = None  # the file without metadata, if that can be stored
    levels: npt.NDArray[Any] | None = None  # holds each gray level of the file; None: as in `pixels`
    notes: tuple[str, ...] = ()  # assumptions


class Facts(NamedTuple):
    """What precedes the scans of a JPEG."""

    shape: tuple[int, int, int]  # height, width, channels
    bits: int  # per channel
    exif: bytes | None
    is_multiple: bool
    has_metadata: bool
    frame: int | None  # the marker of its kind
    quality: int | None  # libjpeg's, 1 to 100, by the nearest sum of a luminance table: exact for what libjpeg wrote


def read_jpeg_facts(jpeg: bytes) -> Facts:
    """What precedes the first scan of a JPEG or JPEG-LS. Raises ValueError for damaged segments."""
    position = 2
    while (segment := _MARKER.match(jpeg, position)) and segment[1][0] not in (_SOS, _EOI):
        position = segment.end() + int.from_bytes(jpeg[segment.end() : segment.end() + 2])
    if segment is None:
        raise ValueError("its segments are damaged")
    facts = (_read_head if position <= _LONGEST_KEPT else _read_head.__wrapped__)(jpeg[:position] + _END)
    return facts if jpeg.endswith(_END) else facts._replace(has_metadata=True)


@lru_cache(1024)
def _read_head(jpeg: bytes) -> Facts:
    """The facts of a JPEG without scans. Most files of a data set begin alike."""
    head = list(_segments(jpeg))
    frame, header = next((part for part in head if part[0] in _FRAMES and len(part[1]) > 9), (None, bytes(10)))
    bits, height, width, channels = struct.unpack_from(">BHHB", header, 4)
    exif = next((part[4:] for _, part in head if part[4:10] == b"Exif\0\0"), None)
    is_multiple = any(marker == _APP2 and part[4:8] == b"MPF\0" for marker, part in head)
    quality = None
    for tables in (part[4:] for marker, part in head if marker == _DQT):
        while tables:
            wide, number = divmod(tables[0], 16)
            table, tables = tables[1 : 65 + 64 * wide], tables[65 + 64 * wide :]
            if number == 0:  # luminance's; 16-bit levels begin with their high byte
                total = sum(table) + wide * 255 * sum(table[::2])
                quality = 1 + int(np.abs(_SUMS - total).argmin())
    has_metadata = any(_is_metadata(*segment) for segment in head)
    return Facts((height, width, channels), bits, exif, is_multiple, has_metadata, frame, quality)


def strip_metadata(jpeg: bytes) -> bytes:
    """The same image without APPn (but plain JFIF and Adobe), comments and trailing bytes."""
    return b"".join([JPEG, *(part for marker, part in _segments(jpeg) if not _is_metadata(marker, part))])


def read_png(png: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """Type → content of a PNG's chunks but for its pixels (b"" for what follows the end); the file without the others.

    All checksums are verified: decoders skip some. Raises ValueError.
    """
    position, kind = len(PNG), b""
    chunks, plain, view = dict[bytes, bytes](), list[bytes | memoryview]([PNG]), memoryview(png)
    while kind != b"IEND":
        start = position + 8
        end = start + int.from_bytes(png[position : position + 4])
        kind, chunk = png[position + 4 : start], view[position : end + 4]
        if end + 4 > len(png):
            raise ValueError("the file ends early")
        if zlib_ng.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:]):
            raise ValueError(f"chunk {kind!r} is damaged")
        if not chunks and (kind != b"IHDR" or end - start != 13):
            raise ValueError("it does not start with its header")
        chunks[kind] = b"" if kind == b"IDAT" else png[start:end]
        plain += [chunk] if kind in (b"IHDR", b"IDAT", b"IEND") else []
        position = end + 4
    trailing = {b"": png[position:]} if position < len(png) else {}
    return chunks | trailing, b"".join(plain)


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and bytes of each segment after the first marker, without fill bytes between them; scans as _SCAN_DATA."""
    position = 2
    while segment := _MARKER.match(jpeg, position):
        marker, start = segment[1][0], segment.end() - 2
        if marker == _EOI:
            yield marker, jpeg[start : start + 2]
            return
        position = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4])
        yield marker, jpeg[start:position]
        if marker == _SOS:
            start = position
            end = _AFTER_SCAN.search(jpeg, start)
            position = end.start() if end else len(jpeg)
            yield _SCAN_DATA, jpeg[start:position]
    raise ValueError("its segments are damaged")


def _is_metadata(marker: int, segment: bytes) -> bool:
    return marker not in _JPEG_IMAGE and (marker, segment[4:9], len(segment)) not in _JPEG_PLAIN
