"""Tar members: the header that we write, and the members of any tar, or the damage to them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.base.errors import DataError, quote
from pipeline.base.store import named_reads, open_to_read

BLOCK = 512  # bytes; tar pads every header and member to it
END = bytes(2 * BLOCK)  # two empty blocks end a tar
LONGEST_HEADER = 2**16  # bytes of an extended header, at most
_TEMPLATE = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = int(_TEMPLATE[148:154], 8)  # the checksum, of a header without name and size


class Member(NamedTuple):
    """A regular file in a tar: its name, and the position of its bytes."""

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


class _Headers(io.BufferedReader):
    """A tar of which only headers are read; tarfile would trust any size that a header states."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return super().read(size)


def read_members(path: Path, name: object = None) -> Iterator[Member]:
    """The files in a tar (ustar, GNU or pax) in order, without folders.

    tarfile ends silently at a damaged header. This raises DataError, naming `name` (else `path`) and the byte, unless
    the tar consists of regular files, then two empty blocks, and nothing but zeros.
    """
    position, size = 0, path.stat().st_size
    try:
        with named_reads(path), _Headers(path.open("rb", buffering=0), BLOCK) as file:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if not position < tar.offset <= size:
                    raise tarfile.ReadError(f"a member of {info.size:,} bytes")
                info.name.encode()  # only here: GNU's short form of a long name may end within a character
                if not (info.isreg() or info.isdir()) or info.issparse():
                    raise tarfile.ReadError(f"{quote(info.name, 80)} is not a regular file")
                position = tar.offset
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
            position = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{name or path}: byte {position}: not a usable tar header: {error}") from None
    with open_to_read(path) as rest:
        rest.seek(position)
        if size - position < len(END) or any(map(any, iter(lambda: rest.read(2**20), b""))):
            raise DataError(f"{name or path}: byte {position}: neither a tar header nor the end of the tar")
