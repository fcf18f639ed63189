"""Tars against tarfile, which writes and reads them in its three formats."""

import tarfile
from pathlib import Path
from typing import Any, Literal

import pytest

from pipeline.base.tar import LONGEST_HEADER, read_members, tar_member
from tests.conftest import refused

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
END = bytes(1024)


def member(name: str, data: bytes = b"", form: Literal[0, 1, 2] = tarfile.PAX_FORMAT, **changes: Any) -> bytes:
    """A member as tarfile writes it."""
    info = tarfile.TarInfo(name)
    for key, value in ({"size": len(data)} | changes).items():
        setattr(info, key, value)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 300_000])
@pytest.mark.parametrize("name", ["a", "patient00001_study1.jpg", "x" * 100])
def test_members_are_those_of_tarfile(name: str, size: int) -> None:
    assert tar_member(name, b"d" * size) == member(name, b"d" * size, tarfile.USTAR_FORMAT)
    with refused(f"{'x' * 101} is longer than the 100 bytes of a tar's name field", ValueError):
        tar_member("x" * 101, b"")


@pytest.mark.parametrize("form", FORMATS)
def test_any_tar_is_read_as_by_tarfile(tmp_path: Path, form: Literal[0, 1, 2]) -> None:
    path, folder = tmp_path / "x.tar", member("f", type=tarfile.DIRTYPE)
    long = "n" * 60 + "/" + "ä" * (15 if form == tarfile.USTAR_FORMAT else 99)
    largest = b"1 comment=".ljust(LONGEST_HEADER - 1, b"x") + b"\n"
    extended = member("p", f"{len(largest)} comment=".encode() + largest[16:], type=tarfile.XHDTYPE)
    extended += member("p", type=tarfile.XHDTYPE)  # without any text
    path.write_bytes(
        folder + member(long, b"1" * 700, form) + folder + member("empty", form=form) + extended
        + member("z", b"3", form) + END
    )  # fmt: skip
    with tarfile.open(path) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [name for name, *_ in expected] == [long, "empty", "z"]
    assert list(read_members(path)) == expected


A, REST = member("a", b"x" * 600), "neither a tar header nor the end of the tar"
NOT_REGULAR = "is not a regular file"
NOT_TEXT = r"… 'utf-8' codec can't encode character '\udcff' in position 0: surrogates not allowed"


@pytest.mark.parametrize(
    ("data", "place", "problem"),
    [
        (b"", 0, "not a usable tar header: empty file"),
        (A[:100], 0, "not a usable tar header: truncated header"),
        (b"b" + A[1:] + END, 0, "not a usable tar header: bad checksum"),
        (A + b"b" + A[1:] + END, 1536, REST),
        (A, 1536, REST),
        (A + END[1:], 1536, REST),
        (A + END + END[1:] + b"x", 1536, REST),
        (A + END + bytes(3 * 2**20) + b"x", 1536, REST),
        (A + member("b", b"x" * 600)[:-1], 1536, "not a usable tar header: a member of 600 bytes"),
        (A + member("b", size=2**33, form=tarfile.GNU_FORMAT), 1536, "… a member of 8,589,934,592 bytes"),
        (A + member("b", size=-1024, form=tarfile.GNU_FORMAT) + END, 1536, "… a member of -1,024 bytes"),
        (A + member("b", size=-512, form=tarfile.GNU_FORMAT) + END, 1536, "… a member of -512 bytes"),
        (A + member("b", b"x" * 70_000, type=tarfile.XHDTYPE) + END, 1536, "… a header of 70,144 bytes"),
        (A + member("b", size=-512, type=tarfile.XHDTYPE, form=tarfile.GNU_FORMAT), 1536, "… a header of -512 bytes"),
        *(
            (A + member("b" * 90, type=kind, linkname="/etc/passwd") + END, 1536, f"… {'b' * 80}… {NOT_REGULAR}")
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        ),
        (A + member("\udcff", form=tarfile.GNU_FORMAT) + END, 1536, NOT_TEXT),
        (A + member("b", pax_headers={"GNU.sparse.map": "0,1"}) + END, 1536, f"… b {NOT_REGULAR}"),
    ],
)
def test_damage_and_other_members_are_named(tmp_path: Path, data: bytes, place: int, problem: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    problem = problem.replace("… ", "not a usable tar header: ", 1)
    for name in (None, "s3://x.tar"):
        with refused(f"{name or path}: byte {place}: {problem}"):
            list(read_members(path, name))
