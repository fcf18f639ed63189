"""Tar members: the header that we write, and a strict walk over what anybody wrote."""

import mmap
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pipeline.base.errors import DataError

BLOCK = 512  # bytes; tar pads every header and member to it
END = bytes(2 * BLOCK)  # two empty blocks end a tar
EXTRA, NAME = 2**16, 2**12  # bytes of an extended header, and of a name, at most
_NOT_ZERO = re.compile(rb"[^\0]")
_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = int(_TEMPLATE[148:154], 8)  # the checksum, of a header without name and size


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of a ustar member; time, owner and group are zero: same input, same bytes.

    tarfile's own header takes as long as a tenth of decoding an image, so only what differs is written here.
    Raises ValueError for a name of more than 100 bytes.
    """
    encoded = name.encode("ascii")
    if len(encoded) > 100:
        raise ValueError(f"{name} is longer than the 100 bytes of a tar's name field")
    header = bytearray(_TEMPLATE)
    header[: len(encoded)] = encoded
    header[124:135] = b"%011o" % len(data)
    header[148:155] = b"%06o\0" % (_TEMPLATE_SUM + sum(encoded) + sum(header[124:135]) - 11 * ord("0"))
    return b"".join((header, data, bytes(-len(data) % BLOCK)))


def map_file(path: Path) -> mmap.mmap:
    """The file, memory-mapped for reading. Raises DataError where it is empty."""
    with path.open("rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise DataError(f"{path}: the file is empty") from None


def walk_tar(path: Path, data: mmap.mmap) -> Iterator[Member]:
    """The members of a mapped tar (ustar, GNU or pax), in order; `path` is named in errors.

    tarfile ends silently at a damaged header. This raises DataError, naming the byte, for anything but regular
    files with relative names (and folders, which are left out), then two empty blocks, and nothing but zeros.
    """
    position = 0
    extra: dict[str, str] = {}  # what a long-name or pax header says of the member that follows it
    while (block := data[position : position + BLOCK]) != bytes(BLOCK):
        start = position + BLOCK
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            is_extra = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
            size = info.size if is_extra else int(extra.get("size", info.size))
            _check_size(size, len(data) - start)
            if is_extra:
                extra |= _read_extra(info.type, data[start : start + size])
            else:
                name = _check_name(info, extra)
                if info.type != tarfile.DIRTYPE:
                    yield Member(name, start, size)
                extra = {}
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(f"{path}: byte {position}: not a usable tar header: {error}") from None
        position = start + size + -size % BLOCK
    if extra or len(data) - position < 2 * BLOCK or _NOT_ZERO.search(data, position):
        raise DataError(f"{path}: byte {position}: an empty block, but not the end of the tar")


def _check_size(size: int, room: int) -> None:
    if not 0 <= size <= room:
        raise ValueError(f"a member of {size} bytes, where the file has {room} more")


def _check_name(info: tarfile.TarInfo, extra: Mapping[str, str]) -> str:
    """The name of a regular member; raises ValueError for any other, and for names that lead elsewhere."""
    name = extra.get("path", info.name)
    is_sparse = any(record.startswith("GNU.sparse.") for record in extra)
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or is_sparse:
        raise ValueError(f"{name} is not a regular file")
    if len(name) > NAME:
        raise ValueError(f"a name of {len(name)} characters")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} leads out of the folder")
    return name


def _read_extra(kind: bytes, body: bytes) -> dict[str, str]:
    """What an extended header says of the next member; a global one holds nothing of use here."""
    if len(body) > EXTRA:
        raise ValueError(f"an extended header of {len(body)} bytes")
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.rstrip(b"\0").decode()}
    records = {}
    while kind == tarfile.XHDTYPE and body:  # records of `<their own length> <name>=<value>\n`
        length = int(body.partition(b" ")[0])
        name, _, value = body[:length].partition(b" ")[2].partition(b"=")
        if length <= 0 or not value.endswith(b"\n"):
            raise ValueError("damaged pax record")
        records[name.decode()] = value[:-1].decode()
        body = body[length:]
    return records
