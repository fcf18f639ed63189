"""CheXpert Plus, in its own layout: a small folder of drawn films."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.images import Original
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import plus
from pipeline.sources.sets import find_source
from tests.conftest import run_pipeline

TABLE = "df_chexpert_plus_240401.csv"
HEADER = "path_to_image,frontal_lateral,ap_pa,deid_patient_id,report,age,sex,race,split"
FILMS = (
    "train/patient00001/study1/view1_frontal",
    "train/patient00001/study1/view2_lateral",
    "train/patient00002/study1/view1_frontal",
    "valid/patient64541/study1/view1_frontal",
)
ROWS = (
    f'{FILMS[0]}.jpg,Frontal,AP,patient00001,"No edema.\nHeart is large.",61.0,Female,White,train',
    f"{FILMS[1]}.jpg,Lateral,,patient00001,,61.0,Female,White,train",
    f"{FILMS[2]}.jpg,Frontal,PA,patient00002,Normal.,,Male,,train",
    f"{FILMS[3]}.jpg,Frontal,AP,patient64541,,70,Male,,valid",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "plus"
    (home / "chexbert_labels").mkdir(parents=True)
    (home / TABLE).write_text("\n".join([HEADER, *ROWS]) + "\n")
    states = [{"Edema": 0, "Cardiomegaly": 1}, {"Edema": 0, "Cardiomegaly": 1}, None, {"Edema": -1}]
    lines = [
        {"path_to_image": f"{film}.jpg"} | {label: of.get(label) for label in LABELS}
        for film, of in zip(FILMS, states, strict=True)
        if of is not None
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in reversed(lines))
    (home / "chexbert_labels" / "report_fixed.json").write_text(text)
    random = np.random.default_rng(0)
    for film in FILMS:
        path = home / "PNG" / f"{film}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
    return home


def test_a_folder_becomes_shards(folder: Path) -> None:
    out = folder.parent / "out"
    made = run_pipeline("shards", folder, out, "--size", 32, "--views", "all", "--dev", 0, "--workers", 1)
    assert made.returncode == 0, made.stderr
    manifest = read_manifest(out)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 3, "valid": 1}
    assert list(manifest.facts) == ["race", *Original._fields]  # the columns that this table has
    assert (manifest.dataset["name"], manifest.dataset["patients"]) == ("chexpert-plus", "chexpert")
    tables = [pa.ipc.open_file(out / split.table).read_all() for split in manifest.splits.values()]
    rows = {row["key"]: row for row in pa.concat_tables(tables).to_pylist()}
    assert sorted(row["race"] or "" for row in rows.values()) == ["", "", "White", "White"]
    facts = ("patient", "study", "view", "projection", "sex", "age", "Edema", "Cardiomegaly", "Fracture")
    assert {key: [row[name] for name in facts] for key, row in rows.items()} == {
        "patient00001_study1_view1_frontal": ["patient00001", 1, "frontal", "AP", "Female", 61, 0, 1, -2],
        "patient00001_study1_view2_lateral": ["patient00001", 1, "lateral", None, "Female", 61, 0, 1, -2],
        "patient00002_study1_view1_frontal": [
            "patient00002",
            1,
            "frontal",
            "PA",
            "Male",
            None,
            None,
            None,
            -2,
        ],
        "patient64541_study1_view1_frontal": ["patient64541", 1, "frontal", "AP", "Male", 70, -1, None, -2],
    }
    assert run_pipeline("stats", folder).stdout.startswith("4 images, 3 studies, 3 patients")
    assert not any(b"Heart" in path.read_bytes() for path in out.iterdir())  # no report


def test_dicoms_are_read_where_there_are_no_pngs(folder: Path) -> None:
    source = find_source(folder, {}, [])
    for film in FILMS:
        path = folder / "DICOM" / "Uncompressed" / f"{film}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = [f"{film}.jpg" for film in FILMS]
    assert plus.locate(paths, source.roots) == [f"{folder}/PNG/{film}.png" for film in FILMS]
    (folder / "PNG").rename(folder.parent / "PNG")
    assert plus.locate(paths, source.roots) == [f"{folder}/DICOM/Uncompressed/{film}.dcm" for film in FILMS]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            TABLE,
            (FILMS[2], FILMS[2].replace("patient", "person")),
            "line 5, column path_to_image: 'train/person00002/st",
        ),
        (TABLE, (",Male,,valid", ",Male,,test"), "line 6, column split: 'test' is none of train, valid"),
        (
            TABLE,
            ("frontal_lateral", "view"),
            "column frontal_lateral is missing; the table has path_to_image, frontal_",
        ),
        (
            "chexbert_labels/report_fixed.json",
            (": -1", ": -3"),
            "line 1, Edema: -3 is not a label: 1, 0, -1 or null",
        ),
        ("chexbert_labels/report_fixed.json", ("{", "["), "not readable as a JSON object a line"),
    ],
)
def test_bad_input_is_named(folder: Path, file: str, change: tuple[str, str], message: str) -> None:
    path = folder / file
    path.write_text(path.read_text().replace(*change, 1))
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert failed.returncode == 1
    assert message in failed.stderr.splitlines()[-1]


def test_labels_that_are_missing_are_named(folder: Path) -> None:
    (folder / "chexbert_labels" / "report_fixed.json").unlink()
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert f"{TABLE} is there, but none of chexbert_labels/report_fixed.json, " in failed.stderr
