"""Input that was made to do harm, or that nobody has thought of: it is sound, or is named and does nothing."""

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.etl.verify import verify_shards
from pipeline.labels import COLUMNS
from pipeline.manifest import read_table, write_manifest
from pipeline.sources.sets import read_any_table
from tests.conftest import Shards, default_options, make_shards, run_pipeline
from tests.fuzz import TARGETS, feed, make_example, make_target
from tests.pipeline.etl.test_verify import edit_table
from tests.pipeline.test_images import SECRET, add_metadata


class Payload:
    """What unpickling it would do."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch unpickled",)


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data) if kind == tarfile.REGTYPE else 0, kind, link
    return info, data


WORDS = ("--set", "webdataset", "--columns", "patient=__key__,Edema=labels.Edema", "--workers", 1)
LABEL = member("a.json", json.dumps({"labels": {"Edema": 1}}).encode())


@pytest.mark.parametrize(
    "members",
    [
        [member("/etc/cron.d/x.jpg")],
        [member("../../x.jpg")],
        [member("a.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")],
        [member("a.jpg", kind=tarfile.LNKTYPE, link="/etc/passwd")],
        [member("a.pyd", pickle.dumps(Payload())), LABEL],
        [member("a.jpg", pickle.dumps(Payload())), LABEL],
        [member("a.jpg.gz", b"\x1f\x8b"), LABEL],
        [member("a.json", b"[" * 100_000)],
        [member("a/" * 3000 + "x.jpg")],
        [member("a.json", b'{"labels": {"Edema": 1e999}}')],
    ],
)
def test_hostile_tars_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[Member]) -> None:
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    run = run_pipeline("shards", tmp_path, tmp_path / "out", *WORDS, code=1)
    assert "\nError: " in f"\n{run.stderr}"
    assert str(tmp_path) in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train-000000.tar"]
    assert not (tmp_path / "out" / "manifest.json").exists()


ASTRAY = {"offset": (-1, 2**62), "length": (2**31 - 1, -1), "crc": (0,), "shard": (99, -1)}


@pytest.mark.parametrize(("column", "value"), [(column, value) for column in ASTRAY for value in ASTRAY[column]])
def test_an_index_that_leads_astray_is_named(shards: Shards, column: str, value: int) -> None:
    folder, manifest = shards
    key = read_table(folder, manifest.split("train"))["key"][0].as_py()
    edit_table(folder, manifest, column, value)
    with pytest.raises(DataError, match=rf"train.*: sample {key}[: ]"):
        list(open_shards(folder)["train"].batches(8, 32, epoch=None))


@pytest.mark.parametrize(("encoding", "size"), [("jpeg", None), ("png", 48)])
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
        assert "Femaleness" not in run.stdout + run.stderr
    assert "Femaleness" in pa.ipc.open_file(tmp_path / "out" / "train.arrow").read_all()["sex"].to_pylist()


def test_an_unknown_encoding_is_named(shards: Shards) -> None:
    write_manifest(shards[0], replace(shards[1], options={**shards[1].options, "encoding": []}))
    with pytest.raises(DataError, match=r"manifest.json: encoding '\[\]' is unknown$"):
        verify_shards(shards[0], deep=False, workers=1)


ROUNDS = range(100)
ROW = "CheXpert-v1.0-small/train/patient{}/study1/view1_frontal.jpg,Female,60,Frontal,AP" + ",1.0,,0.0,-1.0,,,,,,,,,,"
CSV = "\n".join([",".join(COLUMNS), *(ROW.format(f"{number:05d}") for number in range(1, 6))]) + "\n"
# Bytes that matter to parsers.
TOKENS = 'é|NaN|inf|1e0| 1.0|-1|2.0|=1+1|../|/etc/passwd|patient|study|",|,|\n|\r\n|\0|\\|\ufeff'.encode().split(b"|")
TOKENS += [b"\xff", b"9" * 120, b"x" * 70_000]


def damage(data: bytes, seed: int) -> bytes:
    """The data with one to four places cut out or replaced, by a token or by any bytes."""
    random = Random(seed)
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(data))
        end = random.randint(start, min(len(data), start + 40))
        token = random.choice(TOKENS) if random.random() < 0.5 else random.randbytes(random.randint(0, 8))
        data = data[:start] + token + data[end:]
    return data


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, beside which are the other sound files that inputs are bred from."""
    return make_example(tmp_path_factory.mktemp("example"))


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "dicom"])
def test_a_damaged_file_is_sound_or_refused(name: str, example: Path, tmp_path: Path) -> None:
    target = make_target(name, tmp_path, example)
    files = [path.read_bytes() for path in sorted(example.glob(TARGETS[name].seeds))]
    for seed in ROUNDS:
        message = feed(target, damage(files[seed % len(files)], seed))
        assert message.startswith(str(tmp_path) if message else ""), message


# What a program writes in place of a part of CSV, and what the reader then complains of: nothing, or in line 2 a label.
WRITTEN = [("Path", "\ufeffPath"), ("\n", "\r\n"), ("Female", '"Female"'), (",1.0,", ',"1.0",'), (",1.0,", ",1,")]
WRITTEN += [(",1.0,", ",1e0,"), (",1.0,", ", 1.0,")]
NOT_A_LABEL = ", line 2, column No Finding: '{}' is not a label: 1.0, 0.0, -1.0 or blank"
REFUSED = [
    (",1.0,", ",NaN,", NOT_A_LABEL.format("NaN")),
    (",1.0,", ",inf,", NOT_A_LABEL.format("inf")),
    ("patient00002", "pätient00002", ", line 3, column Path: "),
    ("00002", "2" * 100, ", line 3, column Path: "),
    ("Female", "F" * 10_000_000, ": not a readable CSV: "),
    ("Female", "F\udce9male", ": not a readable CSV: "),
    ("Path", "\udcff\udcfeP\0a\0t\0h\0", ": not a readable CSV: "),  # as UTF-16 begins
]


@pytest.mark.parametrize(("old", "new", "complaint"), [*((*pair, "") for pair in WRITTEN), *REFUSED])
def test_tables_as_programs_write_them(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(CSV.replace(old, new, 1 if len(new) > 1000 else -1).encode(errors="surrogateescape"))
    if complaint:
        with pytest.raises(DataError, match=f"^{re.escape(f'{path}{complaint}')}"):
            read_any_table(path)
    else:
        assert read_any_table(path)["No Finding"].to_pylist() == [1] * 5
