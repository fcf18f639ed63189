"""CheXpert Plus, in its own layout: a small folder of drawn films."""

from pathlib import Path

import pytest

from pipeline import DataError
from pipeline.images import Original
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import plus
from pipeline.sources.sets import find_source
from tests.conftest import run_pipeline
from tests.layouts import PLUS_FILMS as FILMS
from tests.layouts import PLUS_TABLE as TABLE
from tests.layouts import shard, write_plus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_plus(tmp_path / "plus")
    return tmp_path / "plus"


def test_facts_are_kept_and_reports_are_not(folder: Path) -> None:
    shard(folder)
    manifest = read_manifest(folder.parent / "out")
    assert list(manifest.facts) == [*plus.SET.facts, *Original._fields]
    assert (manifest.dataset["name"], manifest.dataset["patients"]) == ("chexpert-plus", "chexpert")
    assert not any(b"Heart" in path.read_bytes() for path in (folder.parent / "out").iterdir())


def test_labels_are_joined_whatever_folder_stands_before_a_path(folder: Path) -> None:
    path = folder / "chexbert_labels" / "report_fixed.json"
    text = path.read_text()
    path.write_text(text.replace('"train/', '"CheXpert-v1.0/train/').replace(".jpg", ".PNG"))
    notes: list[str] = []
    tables = plus.SET.read(find_source(folder, {}, []), notes.append)
    assert tables["train"]["Edema"].to_pylist() == [0, 0, -2, 1, 0]
    assert notes == [f"{path.name}: 1 of 6 images have no row, such as {FILMS[2]}.jpg"]
    path.write_text(text.replace("/patient", "/person"))
    with pytest.raises(
        DataError, match=r"report_fixed\.json: no row of these 6 images: its first is '(train|valid)/person"
    ):
        plus.SET.read(find_source(folder, {}, []))


def test_dicoms_are_read_where_there_are_no_pngs(folder: Path) -> None:
    source = find_source(folder, {}, [])
    for film in FILMS:
        path = folder / "DICOM" / "Uncompressed" / f"{film}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = [f"{film}.jpg" for film in FILMS]
    assert plus.SET.locate(paths, source.roots) == [f"{folder}/PNG/{film}.png" for film in FILMS]
    (folder / "PNG").rename(folder.parent / "PNG")
    assert plus.SET.locate(paths, source.roots) == [f"{folder}/DICOM/Uncompressed/{film}.dcm" for film in FILMS]


def test_labels_that_are_missing_are_named(folder: Path) -> None:
    (folder / "chexbert_labels" / "report_fixed.json").unlink()
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert f": missing beside {TABLE}: any of chexbert_labels/report_fixed.json, " in failed.stderr


def test_chexpert_s_own_labels_are_read_without_chexbert_s(folder: Path) -> None:
    (folder / "chexbert_labels" / "report_fixed.json").unlink()
    head = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS))
    cells = ",".join("1.0" if label == "Fracture" else "" for label in LABELS)
    (folder / "train.csv").write_text(f"{head}\nCheXpert-v1.0/{FILMS[2]}.jpg,Male,50,Frontal,PA,{cells}\n")
    assert {key: row["Fracture"] for key, row in shard(folder).items() if row["Fracture"] != -2} == {
        "patient00002_study1_view1_frontal": 1
    }
