"""VinDr-CXR: the competition's real table, and a small folder in PhysioNet's layout."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipeline import DataError
from pipeline.labels import LABELS
from pipeline.sources import vindr
from tests.conftest import run_pipeline, shipped_table
from tests.layouts import read_mapping, write_vindr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vindr(tmp_path / "vindr-cxr")
    return tmp_path / "vindr-cxr"


def test_the_competition_s_table_agrees_with_a_count_of_its_votes(tmp_path: Path) -> None:
    table = shipped_table("vinbigdata-train.csv.gz")
    report = json.loads(run_pipeline("stats", table, "--format", "json").stdout)
    assert (report["images"], report["patients"]) == (15_000, 15_000)
    rows = pd.read_csv(table, usecols=["image_id", "class_name", "rad_id"])
    assert rows.groupby("image_id")["rad_id"].nunique().eq(3).all()
    votes = {}
    for label, names in read_mapping("vindr").items():
        said = rows[rows["class_name"].isin(names)].drop_duplicates(["image_id", "rad_id"])
        votes[label] = said.groupby("image_id").size().reindex(rows["image_id"].unique(), fill_value=0)
    frame = pd.DataFrame(votes)
    kinds = frame[["Lung Lesion", "Consolidation", "Atelectasis"]].gt(0).any(axis=1)
    for label in set(LABELS) - {"Edema", "Pneumonia", "Fracture", "Enlarged Cardiomediastinum", "Support Devices"}:
        counts = report["labels"][label]
        wanted = (frame[label].ge(2).sum(), frame[label].eq(1).sum())
        assert (counts["positive"], counts["uncertain"]) == wanted, label
        open_if = {"Lung Opacity": kinds, "Consolidation": frame["Lung Opacity"].gt(0)}.get(label, False)
        opened = (open_if & frame[label].eq(0)).sum()
        assert counts["not_annotated"] == opened
    for label in ("Edema", "Pneumonia", "Fracture", "Enlarged Cardiomediastinum", "Support Devices"):
        assert report["labels"][label]["not_annotated"] == 15_000
    home = tmp_path / "vinbigdata"
    home.mkdir()
    rows.head(9).to_csv(home / "train.csv", index=False)  # a name that CheXpert has, too
    assert run_pipeline("stats", home).stdout.startswith(f"{rows.head(9)['image_id'].nunique()} images, ")


def test_an_image_is_taken_before_what_lies_beside_it(folder: Path) -> None:
    """Of the same name: the DICOM before a mask, a PNG before a JPEG, and none before two of a kind."""
    film = folder / "train" / f"{0:032x}.dicom"
    paths, roots = [f"train/{film.name}"], [folder]
    for suffix in (".png", ".jpg", ".npz"):
        film.with_suffix(suffix).touch()
    assert vindr.SET.locate(paths, roots) == [str(film)]
    film.unlink()
    assert vindr.SET.locate(paths, roots) == [str(film.with_suffix(".png"))]
    film.with_suffix(".PNG").touch()
    with pytest.raises(DataError, match=r"0\.PNG and 0+\.png: which of them is the image\? Move one away$"):
        vindr.SET.locate(paths, roots)


def test_three_readers_agree_on_a_tumor(folder: Path) -> None:
    path = folder / "annotations" / "image_labels_train.csv"
    rows = pd.read_csv(path, dtype=str)
    rows.loc[rows["image_id"] == f"{3:032x}", ["Lung tumor", "No finding"]] = ["1", "0"]
    rows.to_csv(path, index=False)
    film = vindr.SET.read_table(path).to_pylist()[3]
    assert {label: film[label] for label in LABELS if film[label] != 0} == {
        **dict.fromkeys(("Enlarged Cardiomediastinum", "Lung Opacity", "Support Devices"), -2),
        "Lung Lesion": 1,
    }


def test_a_class_of_another_set_is_named(tmp_path: Path) -> None:
    table = tmp_path / "train.csv"
    table.write_text(f"image_id,class_name,rad_id\n{1:032x},Hernia,R1\n")
    failed = run_pipeline("stats", table)
    assert failed.stderr == f"Error: {table}, line 2, column class_name: 'Hernia' is not a finding of this set\n"
