"""Input that was made to do harm: it does none, and is named."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.base.files import write_table
from pipeline.etl.verify import verify_shards
from pipeline.images import decode_stored
from pipeline.manifest import Manifest, read_manifest, read_table, write_manifest
from pipeline.stream.samples import open_split
from tests.conftest import default_options, make_shards, run_pipeline
from tests.pipeline.etl.test_verify import change, edit_table
from tests.pipeline.test_images import SECRET, add_metadata, encode


class Payload:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch unpickled",)


def member(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, link
    info.pax_headers = pax
    return info, data


WORDS = ("--set", "webdataset", "--columns", "patient=__key__,Edema=labels.Edema", "--workers", 1)
LABEL = json.dumps({"labels": {"Edema": 1}}).encode()


@pytest.mark.parametrize(
    "members",
    [
        [member("/etc/cron.d/x.jpg")],
        [member("../../x.jpg")],
        [member("a.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")],
        [member("a.jpg", kind=tarfile.LNKTYPE, link="/etc/passwd")],
        [member("a.jpg", kind=tarfile.CHRTYPE)],
        [member("a.jpg", kind=tarfile.FIFOTYPE)],
        [member("a.pyd", pickle.dumps(Payload())), member("a.json", LABEL)],
        [member("a.jpg", pickle.dumps(Payload())), member("a.json", LABEL)],
        [member("a.jpg.gz", b"\x1f\x8b"), member("a.json", LABEL)],
        [member("a.json", b"[" * 100_000)],
        [member("a.jpg", comment="x" * 70_000)],
        [member("a/" * 3000 + "x.jpg")],
        [member("a.json", b'{"labels": {"Edema": 1e999}}')],
    ],
)
def test_hostile_tars_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    run = run_pipeline("shards", tmp_path, tmp_path / "out", *WORDS)
    assert run.returncode == 1
    assert "\nError: " in f"\n{run.stderr}"
    assert str(tmp_path) in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train-000000.tar"]
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.soak
def test_a_million_members_are_read_in_little_memory(tmp_path: Path) -> None:
    """A tenth of a million here; memory is that of their names alone."""
    info, data = member("a.txt", b"")
    block = info.tobuf() + data
    (tmp_path / "train-000000.tar").write_bytes(block * 100_000 + bytes(1024))
    run = run_pipeline("shards", tmp_path, tmp_path / "out", *WORDS)
    assert run.returncode == 1
    assert "train-000000.tar" in run.stderr


ASTRAY = [("offset", -1), ("offset", 2**62), ("length", 2**31 - 1), ("length", -1), ("crc", 0)]


@pytest.mark.parametrize(("column", "value"), [*ASTRAY, ("shard", 99), ("shard", -1)])
def test_an_index_that_leads_astray_is_named(shards: tuple[Path, Manifest], column: str, value: int) -> None:
    folder, manifest = shards

    def read() -> None:
        list(open_shards(folder)["train"].batches(8, 32, epoch=None))

    key = read_table(folder, manifest.split("train"))["key"][0].as_py()
    edit_table(folder, manifest, column, value)
    with pytest.raises(DataError, match=rf"train.*: sample {key}[: ]"):
        read()


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
@pytest.mark.parametrize("size", [None, 48])
def test_no_metadata_reaches_a_shard(chexpert: Path, tmp_path: Path, encoding: str, size: int | None) -> None:
    for path in chexpert.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
        path.write_bytes(add_metadata(image, "JPEG"))
        assert SECRET in path.read_bytes()
    out = tmp_path / "out"
    make_shards(chexpert, out, default_options(encoding=encoding, size=size))
    for path in out.rglob("*"):
        assert SECRET not in path.read_bytes()
        for marker in (b"Exif", b"ICC_PROFILE", b"Photoshop", b"http://ns.adobe.com"):
            assert marker not in path.read_bytes()


def test_facts_of_patients_are_in_no_output(chexpert: Path, tmp_path: Path) -> None:
    """Ages of 1 to 90 are in any output by chance; none of these films is of somebody of 107."""
    csv = chexpert / "train.csv"
    csv.write_text("".join(line.replace(",Female,", ",Femaleness,", 1) for line in csv.read_text().splitlines(True)))
    for words in (["shards", chexpert, tmp_path / "out", "--size", 48], ["verify", tmp_path / "out"]):
        run = run_pipeline(*words)
        assert run.returncode == 0, run.stderr
        assert "Femaleness" not in run.stdout + run.stderr
    assert "Femaleness" in pa.ipc.open_file(tmp_path / "out" / "train.arrow").read_all()["sex"].to_pylist()


def accept_table(folder: Path, manifest: Manifest, data: bytes) -> None:
    """Make the bytes train's table, as far as the manifest knows."""
    split = manifest.split("train")
    (folder / split.table).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    write_manifest(folder, change(manifest, replace(split, table_sha256=digest)))


def test_arrow_tables_that_are_none_are_named(shards: tuple[Path, Manifest]) -> None:
    """Their hashes are as the manifest says: somebody made them so. What is read of them is sound."""
    folder, manifest = shards
    path = folder / manifest.split("train").table
    whole = path.read_bytes()
    refused = []
    for place in range(0, len(whole), 23):
        accept_table(folder, manifest, whole[:place] + b"\xff\xff\xff\x7f" + whole[place + 4 :])
        try:
            table = open_split(folder, read_manifest(folder), "train").table
        except DataError as error:
            refused.append(str(error))
        else:
            table.validate(full=True)
    assert len(refused) > 50
    assert all(str(path) in message for message in refused)
    accept_table(folder, manifest, whole)
    table = read_table(folder, read_manifest(folder).split("train"))
    number = table.column_names.index("crc")
    crc = table["crc"]
    for other, message in (
        (table.set_column(number, "crc", pa.nulls(len(crc), crc.type)), "has empty cells"),
        (table.set_column(number, "crc", crc.cast(pa.int64())), "is missing, duplicated, or not uint32"),
        (table.append_column("crc", crc), "is missing, duplicated, or not uint32"),
    ):
        digest = write_table(path, other)
        split = replace(manifest.split("train"), table_sha256=digest)
        with pytest.raises(DataError, match=rf"^{path}: column crc {message}$"):
            read_table(folder, split)


def test_an_unknown_encoding_is_named(shards: tuple[Path, Manifest]) -> None:
    folder, manifest = shards
    write_manifest(folder, replace(manifest, options={"encoding": []}))
    with pytest.raises(DataError, match=r"manifest.json: encoding '\[\]' is unknown$"):
        verify_shards(folder, deep=False, workers=1)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
def test_a_stored_image_without_pixels_is_damaged(shape: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match=r"^an image without pixels$"):
        decode_stored(file.getvalue(), "raw")


def test_a_stored_image_cannot_claim_any_memory() -> None:
    jpeg = bytearray(encode(Image.new("L", (16, 16))))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    with pytest.raises(ValueError, match=r"^65500×65500 is more than 268,435,456 pixels$"):
        decode_stored(bytes(jpeg), "jpeg")
    png = encode(Image.new("L", (16, 16)), format="PNG")
    claimed = b"IHDR" + (60_000).to_bytes(4) * 2 + png[24:29]
    with pytest.raises(ValueError, match=r"^60000×60000 is more than 268,435,456 pixels$"):
        decode_stored(png[:12] + claimed + zlib.crc32(claimed).to_bytes(4) + png[33:], "png")
