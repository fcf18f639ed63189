"""manifest.json and its tables: what is written comes back, and other contents are refused by name."""

import hashlib
import json
import re
import zlib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from pipeline import DataError, manifest
from pipeline.base.files import hash_file, write_table
from pipeline.etl.writing import Options
from pipeline.manifest import FACTS, PLACES, Manifest, Shard, Split, read_manifest, read_table
from tests.conftest import refused
from tests.layouts import TABLES

SCHEMA = pa.schema([*FACTS, *PLACES])
CELLS: dict[str, list[Any]] = {"key": ["a", "b", "c"], "patient": ["p", "p", "q"], "study": [1, 2, 1]}
CELLS |= {"view": ["frontal"] * 3} | {name: [0, 0, 1] for name in PLACES.names}
TABLE = pa.table({name: CELLS.get(name, [None] * 3) for name in SCHEMA.names}, SCHEMA)
TABLE = TABLE.append_column("ward", pa.array(["W", None, "V"]))


def write(folder: Path, table: pa.Table = TABLE) -> Manifest:
    """A folder of shards, without its tars."""
    shards = (Shard("train-000000.tar", 2, 10240, "ab" * 32), Shard("train-000001.tar", 1, 2**63 - 1, "cd" * 32))
    written = Manifest(
        asdict(Options(encoding="png")) | {"columns": {"path": "Image"}},
        {"uncertain": "best", "blank": "ignore"},
        {"train": "csv"},
        {"mean": 128.5, "std": 64.0},
        {"train": Split(3, 3, 0, "train.arrow", write_table(folder / "train.arrow", table), shards)},
        {"name": "s", "patients": "s", "title": "A set", "license": "free", "paper": "P, 2020"},
        ({"split": "train", "key": "d", "reason": "empty"},),
        ("Fracture",),
        {"ward": "string"},
    )
    manifest.write_manifest(folder, written)
    return written


def test_a_folder_comes_back(tmp_path: Path) -> None:
    written = write(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text())
    assert document == json.loads(json.dumps({"format": "chexpert-shards", "version": 1, **asdict(written)}))
    assert read_manifest(tmp_path) == written
    assert read_table(tmp_path, written.split("train")).equals(TABLE)
    files = {name: hash_file(tmp_path / name) for name in ("train.arrow", "croissant.json")}
    assert written.files() == files | {"train-000000.tar": "ab" * 32, "train-000001.tar": "cd" * 32}
    assert [manifest.find_blank(place) for place in (tmp_path, tmp_path / "none")] == ["ignore", "zeros"]
    with refused("split 'dev' does not exist; these shards hold train, valid"):
        replace(written, splits=dict(written.splits, valid=written.split("train"))).split("dev")


@pytest.mark.parametrize("case", (TABLES / "manifests.txt").read_text().splitlines()[1:])
def test_other_values_are_refused_by_name(tmp_path: Path, case: str) -> None:
    place, value, problem = re.fullmatch(r"(\S+) =(.*) > ?(.*)", case).groups()  # type: ignore[union-attr]
    *above, last = json.loads(f'"{place}"').split(".")
    write(tmp_path)
    path = tmp_path / "manifest.json"
    document: Any = json.loads(path.read_text())
    inner = document
    for name in above:
        inner = inner[int(name) if name == "0" else name]
    if value:
        literal, _, times = value.partition(" × ")
        inner |= {last: json.loads(literal) * int(times) if times else json.loads(literal)}
    else:
        del inner[last]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError) if problem else nullcontext() as caught:
        read_manifest(tmp_path)
    message = str(caught.value) if caught else f"{path}: "
    assert re.fullmatch(re.escape(f"{path}: {problem}").replace("…", ".*"), message)
    assert message.isprintable()
    assert len(message) <= len(f"{path}: damaged: ") + 200


def test_croissant_describes_every_file_and_no_row(tmp_path: Path) -> None:
    """tests/tables/croissant.json is written by hand; mlcroissant reads such files in test_examples."""
    written, expected = write(tmp_path), (TABLES / "croissant.json").read_text()
    expected = expected.replace("SHA256", written.splits["train"].table_sha256)
    described = json.loads((tmp_path / "croissant.json").read_bytes())
    assert described.pop("@context").keys() > {"sc", "cr", "recordSet"}
    assert described == json.loads(expected)
    terms = {name: text for name, text in written.dataset.items() if name != "title"}
    jpeg = json.loads(manifest.format_croissant(replace(written, options={"encoding": "jpeg"}, dataset=terms)))
    for png, jpg in (("image/png", "image/jpeg"), (".png", ".jpg"), ("A set", "Chest X-rays")):
        expected = expected.replace(png, jpg)
    assert {**jpeg, "@context": None} == json.loads(expected) | {"@context": None}
    raw = json.loads(manifest.format_croissant(replace(written, options={"encoding": "raw"})))
    assert [entry["@id"] for entry in raw["recordSet"]] == ["train-labels"]


def test_a_missing_manifest_is_named_with_one_that_is_near(tmp_path: Path) -> None:
    (folder := tmp_path / "shards").mkdir()
    message = "not a folder of shards (no manifest.json); write one with `pipeline shards`"
    for other in (folder.parent, folder.parent / "other"):
        for near in ("", f", or did you mean {folder}?"):
            with refused(f"{other}: {message}{near}"):
                read_manifest(other)
            write(folder)
        (folder / "manifest.json").unlink()


def test_other_tables_are_refused(tmp_path: Path) -> None:
    def retyped(name: str, kind: pa.DataType, value: object = None) -> pa.Table:
        return TABLE.set_column(TABLE.column_names.index(name), name, pa.array([value] * 3, kind))

    wrong, fact = "is missing, duplicated, or not", "ward is duplicated, or neither string nor int64"
    cases = [
        (TABLE.drop_columns(["Edema"]), f"Edema {wrong} int8"),
        (TABLE.drop_columns(["key"]), f"key {wrong} string"),
        (TABLE.append_column("crc", TABLE["crc"]), f"crc {wrong} uint32"),
        (retyped("offset", pa.int32()), f"offset {wrong} int64"),
        *((retyped(name, SCHEMA.field(name).type), f"{name} has empty cells") for name in CELLS),
        (TABLE.append_column("ward", TABLE["ward"]), fact),
        (retyped("ward", pa.float64(), 0.5), fact),
        (TABLE.append_column("note", TABLE["study"]), "note is not string"),
    ]
    path = tmp_path / "train.arrow"
    for table, problem in cases:
        with refused(f"{path}: column {problem}"):
            read_table(tmp_path, write(tmp_path, table).split("train"))
    for column, kind in (("note", pa.string()), ("score", pa.int64())):
        table = TABLE.append_column(column, pa.nulls(3, kind))
        assert read_table(tmp_path, write(tmp_path, table).split("train")).equals(table)
    numbers = retyped("ward", pa.int64(), 7)
    assert manifest.concat_labels([TABLE, numbers])["ward"].to_pylist() == [*TABLE["ward"].to_pylist(), *"777"]
    split = write(tmp_path).split("train")
    path.write_bytes(b"x")
    with refused(f"{path}: not an Arrow table: its end is missing"):
        read_table(tmp_path, replace(split, table_sha256=hashlib.sha256(b"x").hexdigest()))
    with refused(f"{path}: its sha256 is not the manifest's; it is damaged or belongs to other shards"):
        read_table(tmp_path, split)
    path.unlink()
    reason = f"[Errno 2] Failed to open local file '{path}'. Detail: [errno 2] No such file or directory"
    with refused(f"{path}: cannot be read: {reason}"):
        read_table(tmp_path, split)


def test_tables_are_joined_as_by_pandas() -> None:
    frames = [
        pd.DataFrame({"key": ["a"], "ward": ["W"], "score": [1], "years": [7]}),
        pd.DataFrame({"key": ["b", "c"], "score": ["x", "y"], "years": [8, 9]}),
    ]
    tables = [pa.table(frame.to_dict("list")) for frame in (*frames, frames[0][["key"]])]
    assert manifest.name_facts(tables[0]) == {"ward": "string", "score": "int64", "years": "int64"}
    expected = pd.concat([frames[0].astype({"score": str}), frames[1], frames[0][["key"]]])
    joined = manifest.concat_labels(tables).to_pandas()
    pd.testing.assert_frame_equal(joined.astype(str), expected.astype(str).reset_index(drop=True))
    noted = pa.table({"key": ["a", "b", "c"], "note": [None, "dark; small", "dark"]})
    assert manifest.find_notes([noted, TABLE, noted.slice(0, 2)]) == {"dark": ["b", "c", "b"], "small": ["b", "b"]}
    renumbered = manifest.renumber(TABLE, {"path": "Image"}, 2)
    assert (renumbered["study"].to_pylist(), renumbered.schema) == ([200_001, 200_002, 200_001], TABLE.schema)
    assert all(manifest.renumber(TABLE, columns, 2).equals(TABLE) for columns in ({"study": "Study"}, {}))
    sums = [manifest.checksum(b"image", form) for form in ("jpeg", "raw", "png")]
    assert sums == [zlib.crc32(b"image"), zlib.crc32(b"image"), zlib.adler32(b"image")]
