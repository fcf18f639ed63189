"""Six layouts of WebDataset tars that people have, written by webdataset and tarfile."""

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image

from pipeline import DataError
from pipeline.base.store import open_location
from pipeline.labels import LABELS
from pipeline.manifest import Manifest, read_manifest, read_table
from pipeline.sources.sets import find_source
from pipeline.sources.source import make_key
from pipeline.sources.table import parse_columns
from pipeline.sources.webdataset import SET
from tests.conftest import flip, run_pipeline

Layout = Callable[[Path], None]
SPLITS = {"train": "train", "valid": "val"}


def image(number: int, form: str = "PNG") -> bytes:
    """An image of 40×40 that the number decides."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def write(path: Path, *samples: tuple[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for key, members in samples:
            tar.write({"__key__": key, **members})
    return path


def jpg_and_cls(folder: Path) -> None:
    for split in ("train", "val"):  # as most do, each counts from 0
        samples = [(f"sample{i}", {"jpg": image(i, "JPEG"), "cls": b"%d" % (i % 2)}) for i in range(3)]
        write(folder / f"{split}-000000.tar", *samples)


def jpg_and_json(folder: Path) -> None:
    facts = ('{"mrn": 7, "Gender": "F", "findings": {"edema": true}}', '{"mrn": 8.0, "Gender": null, "findings": {}}')
    write(folder / "cxr.tar", *((f"{i}", {"jpg": image(i), "json": facts[i].encode()}) for i in range(2)))


def png_and_txt(folder: Path) -> None:
    texts = {"左": b"1\n", "右": b"-1.0"}
    write(folder / "shard.tar", *((key, {"png": image(0), "txt": text}) for key, text in texts.items()))


def nested_folders(folder: Path) -> None:
    """Packed by tar: folders are members, a sample's members need not be neighbors, and the labels are in a CSV."""
    (folder / "part").mkdir(parents=True)
    with tarfile.open(folder / "part" / "test.tar", "w") as tar:
        for name, data in (("a", b""), ("a/1.png", image(0)), ("a/2.PNG", image(1)), ("a/1.mask.png", b"x")):
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.REGTYPE if data else tarfile.DIRTYPE), len(data)
            tar.addfile(info, io.BytesIO(data))
    (folder / "labels.csv").write_text("image,mrn,edema\n1,P1,1\na/2,P2,\n3,P3,0\n")


def tars_without_numbers(folder: Path) -> None:
    for i, name in enumerate(("hospital_train", "hospital_test")):
        write(folder / f"{name}.tar", (f"{i}", {"png": image(i), "cls": b"1", "patient": b"x"}))


def counted(folder: Path) -> None:
    for i in range(2):
        document = f'{{"patient": "P{i}", "Edema": 0.0, "age": 50}}'.encode()
        write(folder / f"valid-{i:05}-of-00002.tar", (f"{i}", {"png": image(i), "json": document}))


# The split, key, patient and state of each row; the hashes are those of b2sum -l 32.
KEYS = {split: [make_key(f"{split}/{tar}-000000/sample{i}") for i in range(3)] for split, tar in SPLITS.items()}
LAYOUTS: tuple[tuple[Layout, str, str], ...] = (
    (
        jpg_and_cls,
        "patient=__key__,Edema=cls",
        "; ".join(f"{split} {key} {key} {i % 2}" for split, keys in KEYS.items() for i, key in enumerate(keys)),
    ),
    (jpg_and_json, "patient=mrn,sex=Gender,Edema=findings.edema", "train 0 7 1; train 1 8 None"),
    (png_and_txt, "patient=__key__,Edema=txt", "train _-77eef4fe _-77eef4fe -1; train _-ae59eb70 _-ae59eb70 1"),
    (nested_folders, "patient=mrn,Edema=edema,key=image", "test a_1-acf34a58 P1 1; test a_2-2f2c9317 P2 None"),
    (tars_without_numbers, "patient=__key__,Edema=cls", "test 1 1 1; train 0 0 1"),
    (counted, "patient=patient,age=age,Edema=Edema", "valid 0 P0 0; valid 1 P1 0"),
)


@pytest.mark.parametrize(("layout", "columns", "rows"), LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_tars_become_shards(tmp_path: Path, layout: Layout, columns: str, rows: str) -> None:
    folder, out = tmp_path / "tars", tmp_path / "out"
    folder.mkdir()
    layout(folder)
    command = run_pipeline("shards", folder, out, code=1).stderr.splitlines()[-1]  # of the first error
    assert command.replace("LABEL", "Edema") == f"pipeline shards {folder} OUT --set webdataset --columns {columns}"
    words = ("--set", "webdataset", "--columns", columns, "--dev", 0, "--encoding", "png", "--workers", 1)
    run_pipeline("shards", folder, out, *words)
    tables = {split: read_table(out, entry).to_pylist() for split, entry in read_manifest(out).splits.items()}
    lines = [
        f"{split} {row['key']} {row['patient']} {row['Edema']}" for split, table in tables.items() for row in table
    ]
    assert sorted(lines) == sorted(rows.split("; "))
    run_pipeline("verify", out, "--deep")


def test_our_own_shards_become_the_same_again(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = shards
    names = ("patient", "study", "view", "sex", "age", "projection")
    columns = ",".join([*(f"{name}={name}" for name in names), *(f"{label}=labels.{label}" for label in LABELS)])
    words = ("--set", "webdataset", "--columns", columns, "--size", "original", "--dev", 0.3)
    run_pipeline("shards", folder, tmp_path / "out", *words, "--samples-per-shard", 7, "--workers", 1)
    again = read_manifest(tmp_path / "out")
    assert again.dataset == manifest.dataset
    for name, split in manifest.splits.items():
        assert again.splits[name].shards == split.shards  # the same bytes


def read(folder: Path, columns: str, **splits: Path) -> dict[str, pa.Table]:
    return SET.read(find_source(folder, splits, [], "webdataset", parse_columns(columns)))


def test_folders_count_if_they_hold_files_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", *((f"{folder}/1", {"jpg": image(0)}) for folder in "ab"))
    columns = "patient=mrn,Edema=edema,key=image"
    (tmp_path / "labels.csv").write_text("image,mrn,edema\nx/a/1.png,P1,1\nx/b/1.png,P2,0\n")
    table = read(tmp_path, columns)["train"]
    assert [table[name].to_pylist() for name in ("patient", "Edema")] == [["P1", "P2"], [1, 0]]
    (tmp_path / "labels.csv").write_text("image,mrn,mrn,edema\nx/a/1.png,P1,P2,1\n")
    with pytest.raises(DataError, match=r"labels\.csv: column mrn appears 2 times$"):
        read(tmp_path, columns)


def test_each_split_may_have_tars(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name / "0.tar", (name, {"jpg": image(0), "cls": b"1"})) for name in "ab")
    tables = read(tmp_path, "patient=__key__,Edema=cls", train=first, test=second.parent)
    assert {split: table["key"].to_pylist() for split, table in tables.items()} == {"train": ["a"], "test": ["b"]}
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"^`split` train=.*/none: a folder without tars$"):
        read(tmp_path, "patient=__key__,Edema=cls", train=tmp_path / "none")


def test_all_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    two = ((key, {"npy": b"x", "cls": b"1"}) for key in "01")
    path = write(tmp_path / "train-1-of-3.tar", *two, ("2", {"jpg": image(0), "png": image(0)}))
    damaged, csv = Path(shutil.copy(path, tmp_path / "z.tar")), tmp_path / "labels.csv"
    flip(damaged, 2048)  # in the third header
    csv.write_text("id,mrn,cls\n0,A,1\n1,B,0\n")

    def list_problems(*words: object) -> list[str]:
        return run_pipeline(*words, code=1).stderr.splitlines()

    options = ("shards", tmp_path, tmp_path / "out", "--set", "webdataset", "--columns")
    assert {f"  {csv}: no column ID; it has id, mrn, cls", "  no label is named"} < {*list_problems(*options, "key=ID")}
    first = f"Error: {tmp_path}: 3 samples of .cls, .npy, .jpg, .png"
    assert list_problems("stats", tmp_path)[0] == first
    assert list_problems(*options, "key=id,sex=Sex,age=cls") == [
        first,
        f"  {tmp_path / 'train-*-of-3.tar'}: 1 files of 3",
        f"  {damaged}: byte 2048: neither a tar header nor the end of the tar",
        f"  2 samples need one image and have .cls, .npy: {path}: sample 0",
        f"  1 samples need one image and have .jpg, .png: {path}: sample 2",
        f"  {csv}: the samples have a field cls as well: rename the column",
        f"  {csv}: 1 samples have no row, such as 2",
        "  no sample has the field Sex",
        "  no patient is named",
        "  no label is named",
        f"fields: cls, __key__; of {csv}, with key=COLUMN: id, mrn, cls",
        "LABEL is one of CheXpert's 14",
        f"pipeline shards {tmp_path} OUT --set webdataset --columns patient=mrn,key=id,age=cls,LABEL=cls",
    ]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("cls", b"7", ", column cls: '7' is not a label state; the column holds '7' (1)"),
        ("json", b"{", ": .json: damaged: not JSON: Expecting property name enclosed in double quotes: "),
        (
            "json",
            rb'{"mrn": "\ud800 x", "x\ud800": 1}',
            ", column mrn: '? x' is not a name without spaces, of up to 64 ",
        ),
        ("json", b" " * (2**20 + 1), ": .json has 1,048,577 bytes, too many"),
        ("meta.json", b'{"mrn": "N"}', ": .meta.json has another value of mrn than the members before it"),
        ("JPG", b"x", ": two members .jpg"),
    ],
)
def test_a_bad_sample_is_named(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    members = {"jpg": image(0), "cls": b"1", "json": b'{"mrn": "M"}', suffix: content}
    path = write(tmp_path / "x.tar", ("a/b", members))
    with pytest.raises(DataError) as caught:
        read(tmp_path, "patient=mrn,Edema=cls")
    assert f"{path}: sample a/b{message}" in str(caught.value)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.zst"])
def test_tars_that_are_compressed_or_in_a_store_are_named(tmp_path: Path, name: str) -> None:
    far = open_location(f"memory://{name}/tars")
    assert SET.find_tables(far) is None
    (far / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=rf"^{far}: other programs' tars are read from a folder; copy them to one$"):
        SET.find_tables(far)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"^{tmp_path}: its tars are compressed; decompress them to \.tar$"):
        find_source(tmp_path, {}, [])


def test_a_compressed_table_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "reads.tsv.gz").write_bytes(gzip.compress(b"file\tmrn\tedema\na.png\t1\tyes\n"))
    with pytest.raises(DataError, match=r"For a table of your own: .*path=file,patient=mrn,Edema=edema"):
        find_source(tmp_path, {}, [])
