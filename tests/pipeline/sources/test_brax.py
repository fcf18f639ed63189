"""BRAX, the example of a set to add, examples/sets/brax.py: registered and run on a small folder."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.etl import shards
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import sets
from tests.conftest import REPOSITORY, run_pipeline
from tests.layouts import draw

HEADER = "DicomPath,PngPath,PatientID,PatientSex,PatientAge,AccessionNumber,StudyDate,ViewPosition,Manufacturer"
# patient, sex, age, study, view, labels by name
ROWS = (
    ("p1", "M", "85 or more", "s1", "PA", {"Edema": "1.0"}),
    ("p1", "M", "85 or more", "s1", "LL", {"Edema": "1.0"}),
    ("p1", "M", "85 or more", "s2", "RLO", {"Edema": "-1.0"}),
    ("p2", "F", "40", "s3", "AP", {"No Finding": "1.0"}),
    ("p3", "O", "", "s4", "AP", {"Edema": "0.0"}),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder of BRAX, whose module has been registered."""
    spec = spec_from_file_location("pipeline.sources.brax", REPOSITORY / "examples" / "sets" / "brax.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sets.SETS, "brax", module.SET)
    monkeypatch.setitem(sets.KNOWN, "brax", module.SET)
    # Processes of their own would not know the set: what they do is done in this one.
    monkeypatch.setattr(shards, "run_alone", lambda function, task, _: function(task))
    monkeypatch.setattr(shards, "run_tasks", lambda function, tasks, *_: (function(task) for task in tasks))
    home = tmp_path / "brax"
    lines = [",".join([HEADER, *LABELS])]
    for number, (patient, sex, age, study, view, labels) in enumerate(ROWS):
        path = f"Anonymized_PNGs/id_{patient}/Study_{study}/Series_1.{number}/image-{number}.1.png"
        draw(home / path, number)
        cells = ["a.dcm", path, patient, sex, age, study, "20200101", view, "ACME"]
        lines.append(",".join([*cells, *(labels.get(label, "") for label in LABELS)]))
    (home / "master_spreadsheet_update.csv").write_text("\n".join(lines) + "\n")
    return home


def test_the_example_makes_shards(folder: Path) -> None:
    out = folder.parent / "out"
    made = run_pipeline("shards", folder, out, "--size", 32, "--views", "all", "--dev", 0, "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert read_manifest(out).dataset["title"] == "BRAX"
    rows = {row["key"][42:51]: row for row in pa.ipc.open_file(out / "train.arrow").read_all().to_pylist()}
    facts = ("patient", "study", "view", "sex", "age", "projection", "Edema", "No Finding", "Fracture")
    assert {key: tuple(row[name] for name in facts) for key, row in rows.items()} == {
        "image-0_1": ("p1", 1, "frontal", "Male", 85, "PA", 1, None, None),
        "image-1_1": ("p1", 1, "lateral", "Male", 85, None, 1, None, None),
        "image-2_1": ("p1", 2, "other", "Male", 85, None, -1, None, None),
        "image-3_1": ("p2", 1, "frontal", "Female", 40, "AP", None, 1, None),
        "image-4_1": ("p3", 1, "frontal", "Other", None, "AP", 0, None, None),
    }
    assert run_pipeline("verify", out, "--deep").returncode == 0


def test_a_path_that_leads_out_is_named(folder: Path) -> None:
    table = folder / "master_spreadsheet_update.csv"
    table.write_text(table.read_text().replace("Anonymized_PNGs/id_p2", "Anonymized_PNGs/../id_p2"))
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert failed.stderr.splitlines()[-1] == (
        f"Error: {table}, line 5, column PngPath: 'Anonymized_PNGs/../id_p2/Study_s3/Series_1.3/image-3.1.png' "
        "is not a path below SOURCE to a PNG"
    )
