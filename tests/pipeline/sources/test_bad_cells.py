"""What is wrong in a set's tables is named: each case of tests/tables/bad_cells.txt."""

import gzip
from pathlib import Path

import pytest

from tests.conftest import run_pipeline
from tests.layouts import PLUS_TABLE, SETS, TABLES

FILES = {
    "chexpert": ("chexpert", "CheXpert-v1.0-small/train.csv"),
    "chexpert valid": ("chexpert", "CheXpert-v1.0-small/valid.csv"),
    "nih": ("nih", "Data_Entry_2017_v2020.csv"),
    "nih train": ("nih", "train_val_list.txt"),
    "nih test": ("nih", "test_list.txt"),
    "mimic": ("mimic", "mimic-cxr-2.0.0-split.csv.gz"),
    "mimic views": ("mimic", "mimic-cxr-2.0.0-metadata.csv.gz"),
    "mimic labels": ("mimic", "mimic-cxr-2.0.0-chexpert.csv.gz"),
    "plus": ("chexpert-plus", PLUS_TABLE),
    "plus labels": ("chexpert-plus", "chexbert_labels/report_fixed.json"),
    "padchest": ("padchest", "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"),
    "vindr": ("vindr", "annotations/image_labels_train.csv"),
    "vindr test": ("vindr", "annotations/image_labels_test.csv"),
}


@pytest.mark.parametrize("case", (TABLES / "bad_cells.txt").read_text().splitlines()[1:])
def test_a_bad_cell_is_named(case: str, tmp_path: Path) -> None:
    file, old, new, message = (cell.strip(" ").replace("\\n", "\n") for cell in case.split(" | "))
    name, table = FILES[file]
    SETS[name](tmp_path / "home")
    path = tmp_path / "home" / table
    packed = path.suffix == ".gz"
    text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    assert old in text
    changed = text.replace(old, new, 1).encode()
    path.write_bytes(gzip.compress(changed) if packed else changed)
    failed = run_pipeline("shards", tmp_path / "home", tmp_path / "out")
    assert failed.returncode == 1
    assert message in failed.stderr.splitlines()[-1]
    assert path.name in failed.stderr or "splits must not" in message or "_list.txt" in message or "both" in message
