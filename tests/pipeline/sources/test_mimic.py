"""MIMIC-CXR-JPG, in its own layout: a small folder of drawn films."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from pipeline.labels import LABELS
from tests.conftest import run_pipeline
from tests.layouts import MIMIC_IMAGES as IMAGES
from tests.layouts import shard, write_mimic

KEYS = [f"p{row['subject_id']}_s{row['study_id']}_{row['dicom_id']}" for row in IMAGES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mimic(tmp_path / "mimic-cxr-jpg")
    return tmp_path / "mimic-cxr-jpg"


def shard_splits(folder: Path, *options: object) -> dict[str, dict[str, Any]]:
    """Split → key → row of the shards."""
    splits: dict[str, dict[str, Any]] = {}
    for key, row in shard(folder, *options).items():
        splits.setdefault(row["split"], {})[key] = row
    return splits


def test_the_radiologist_s_labels_are_those_of_test(folder: Path) -> None:
    names = ["Airspace Opacity" if label == "Lung Opacity" else label for label in sorted(LABELS)]
    cells = ["1.0" if name == "Airspace Opacity" else "0.0" for name in names]
    text = f"study_id,{','.join(names)}\n50771383,{','.join(cells)}\n"
    (folder / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(text)
    rows = shard_splits(folder)
    assert (sorted(rows["test"]), sorted(rows["test_rest"])) == (KEYS[5:6], KEYS[6:7])
    assert [rows["test"][KEYS[5]][label] for label in ("Lung Opacity", "Edema", "Fracture")] == [1, 0, 0]


def test_ids_are_compared_as_ids_and_what_has_no_partner_is_counted(folder: Path) -> None:
    path = folder / "mimic-cxr-2.0.0-chexpert.csv.gz"
    head, first, *rest = gzip.decompress(path.read_bytes()).decode().splitlines()
    rest = [row.replace(",5", ",s5", 1).replace("57375967", "999.0") for row in rest]
    path.write_bytes(gzip.compress("\n".join([head, first.replace("50414267", "050414267.0"), *rest]).encode()))
    (folder / "more").mkdir()
    moved = folder / "files" / "p10" / "p10000032"
    target = folder / "more" / "files" / "p10"
    target.mkdir(parents=True)
    moved.rename(target / moved.name)
    rows = shard_splits(folder, "--root", folder / "more")  # where images of any patient may be
    assert (rows["train"][KEYS[0]]["No Finding"], rows["train"][KEYS[2]]["Edema"]) == (1, -1)
    assert {rows["valid"][KEYS[4]][label] for label in LABELS} == {-2}
    preview = run_pipeline("shards", folder, folder / "none", "--views", "all", "--dry-run").stdout
    assert f"{path.name}: 2 of 7 studies have no row, such as 53911762\n" in preview
    assert f"{path.name}: 1 of its studies are not in the data set, such as s999.0\n" in preview


def test_a_table_that_is_missing_is_named(folder: Path) -> None:
    (folder / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert failed.stderr == (
        f"Error: {folder}: missing beside mimic-cxr-2.0.0-split.csv.gz: mimic-cxr-2.0.0-metadata.csv\n"
    )
    failed = run_pipeline("stats", folder / "mimic-cxr-2.0.0-split.csv.gz")
    assert failed.stderr.endswith("one of several tables of MIMIC-CXR-JPG; name the folder that holds them\n")
