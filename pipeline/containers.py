"""JPEG and PNG files as containers: what their segments and chunks say, without decoding a pixel.

ITU-T T.81, annex B; W3C PNG, section 11. Only parts that a decoder needs are no metadata: the rest may say anything.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"  # how the files begin
BASELINE, PROGRESSIVE = {0xC0, 0xC1}, 0xC2  # frame markers of a JPEG
_SOS, _EOI, _APP2, _DQT, _SCAN_DATA = 0xDA, 0xD9, 0xE2, 0xDB, 0x00  # JPEG markers; 0x00 is none, and ours
_JPEG_LS = 0xF7  # its frame marker
_END = bytes([0xFF, _EOI])
_LONGEST_KEPT = 4096  # bytes of a file's head that is remembered
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Frames, Huffman and arithmetic tables, restarts, quantization, scans.
_JPEG_IMAGE = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, _SOS, _SCAN_DATA, _EOI}
_JPEG_PLAIN = {(0xE0, b"JFIF\0", 18), (0xEE, b"Adobe", 16)}  # fixed fields; a longer JFIF holds a thumbnail
_PNG_PLAIN = set(b"IHDR PLTE IDAT IEND tRNS bKGD sBIT sRGB gAMA cHRM pHYs".split())
_MARKER = re.compile(rb"\xff+([\x01-\xfe])")
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # in a scan, 0xFF precedes 0x00 or a restart marker
# Annex K.1's luminance table, by rows, and the sum of what libjpeg (jcparam.c) makes of it at qualities 1 to 100.
_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
_PERCENT = [5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)]
_SUMS = [
    sum(min(max((int(level) * percent + 50) // 100, 1), 255) for level in _LUMINANCE.split())
    for percent in _PERCENT
]


class JpegFacts(NamedTuple):
    """A JPEG's frame marker, bits per channel, quality and EXIF, whether it holds several frames, and metadata.

    `quality` is libjpeg's, 1 to 100, whose luminance table is nearest in sum: exact for what libjpeg wrote. None for a
    JPEG without such a table.
    """

    frame: int | None
    bits: int
    quality: int | None
    exif: bytes | None
    is_multiple: bool
    has_metadata: bool


class PngFacts(NamedTuple):
    """A PNG's size, bits per channel, EXIF, whether it holds several frames, and metadata.

    `said_bits` are the significant bits that the sBIT chunk gives 16-bit levels, alpha apart; None without one.
    """

    width: int
    height: int
    depth: int
    said_bits: int | None
    exif: bytes | None
    is_multiple: bool
    has_metadata: bool


def read_jpeg_facts(jpeg: bytes) -> JpegFacts:
    """What precedes the first scan. Raises ValueError for damaged segments."""
    position = 2
    while (found := _MARKER.match(jpeg, position)) and found[1][0] not in (_SOS, _EOI):
        position = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    if found is None:
        raise ValueError("its segments are damaged")
    facts = (_read_head if position <= _LONGEST_KEPT else _read_head.__wrapped__)(jpeg[:position] + _END)
    return facts if jpeg.endswith(_END) else facts._replace(has_metadata=True)


@lru_cache(1024)
def _read_head(jpeg: bytes) -> JpegFacts:
    """The facts of a JPEG without scans. Most files of a data set begin alike."""
    head = list(_segments(jpeg))
    frame, header = next((segment for segment in head if segment[0] in _FRAMES), (None, b""))
    return JpegFacts(
        frame=frame,
        bits=header[4] if len(header) > 4 else 8,
        quality=_estimate_quality(part[4:] for marker, part in head if marker == _DQT),
        exif=next((part[4:] for _, part in head if part[4:10] == b"Exif\0\0"), None),
        is_multiple=any(marker == _APP2 and part[4:8] == b"MPF\0" for marker, part in head),
        has_metadata=any(_is_metadata(*segment) for segment in head),
    )


def read_jpeg_frame(jpeg: bytes) -> tuple[int, int, int, int]:
    """Height, width, channels and bits per channel of a JPEG or JPEG-LS. Raises ValueError for damaged segments."""
    for marker, part in _segments(jpeg):
        if marker in _FRAMES or marker == _JPEG_LS:
            return int.from_bytes(part[5:7]), int.from_bytes(part[7:9]), part[9], part[4]
    raise ValueError("it has no frame")


def strip_metadata(jpeg: bytes) -> bytes:
    """The same image without APPn (but plain JFIF and Adobe), comments and trailing bytes."""
    return b"".join([JPEG, *(part for marker, part in _segments(jpeg) if not _is_metadata(marker, part))])


def read_png_facts(png: bytes) -> PngFacts:
    """What the chunks say. Raises ValueError for damaged ones, pixels included."""
    (first, header), *rest = _chunks(png)
    if first != b"IHDR" or len(header) < 13:
        raise ValueError("it does not start with its header")
    chunks = dict(rest)
    depth, channels = header[8], 3 if header[9] & 2 else 1
    said = max(chunks.get(b"sBIT", b"")[:channels], default=0) if depth == 16 else 0
    return PngFacts(
        width=int.from_bytes(header[:4]),
        height=int.from_bytes(header[4:8]),
        depth=depth,
        said_bits=said if 1 <= said <= 16 else None,
        exif=chunks.get(b"eXIf"),
        is_multiple=b"acTL" in chunks,
        has_metadata=not chunks.keys() <= _PNG_PLAIN,
    )


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and bytes of each segment after the first marker, scans as _SCAN_DATA.

    Fill bytes between segments and what follows the end are left out. Raises ValueError without an end.
    """
    position = 2
    while found := _MARKER.match(jpeg, position):
        marker, start = found[1][0], found.end() - 2
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


def _estimate_quality(segments: Iterable[bytes]) -> int | None:
    """The quality of the last table 0, luminance's, in the quantization segments; None without one."""
    quality = None
    for tables in segments:
        while tables:
            wide, number = divmod(tables[0], 16)
            table, tables = tables[1 : 65 + 64 * wide], tables[65 + 64 * wide :]
            if number == 0:
                total = sum(table) + wide * 255 * sum(table[::2])  # 16-bit levels begin with their high byte
                quality = 1 + min(range(100), key=lambda index: abs(_SUMS[index] - total))
    return quality


def _is_metadata(marker: int, segment: bytes) -> bool:
    return marker not in _JPEG_IMAGE and (marker, segment[4:9], len(segment)) not in _JPEG_PLAIN


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each chunk; what follows the end has the type b"". Raises ValueError.

    The checksums are verified here: Pillow skips those of the pixels and of what follows them.
    """
    position, kind = len(PNG), b""
    while kind != b"IEND":
        start = position + 8
        end = start + int.from_bytes(png[position : position + 4])
        kind = png[position + 4 : start]
        position = end + 4
        if position > len(png):
            raise ValueError("the file ends early")
        if zlib.crc32(png[start - 4 : end]) != int.from_bytes(png[end:position]):
            raise ValueError(f"chunk {kind!r} is damaged")
        yield kind, png[start:end]
    if position < len(png):
        yield b"", png[position:]
