"""A hospital's own CSV, whose columns are named."""

import io
import re
import shlex
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from pipeline import DataError
from pipeline.manifest import read_manifest
from pipeline.sources.table import guess_command
from pipeline.sources.words import parse_values
from tests.conftest import run_pipeline
from tests.layouts import draw, read_cases

COLUMNS = "path=Image,patient=MRN,sex=Gender,age=Years,Edema=edema,pleural effusion=fluid"
ROWS = (
    ("Image, MRN,Gender ,Years,edema,fluid,note"),  # spaces around names and cells do not count
    ("a/1.png , M-01,F,61,1,0,first"),
    ('a/2.png,M-01,F,62,,1.0,"two\nlines"'),
    ("b/3.v2.jpg,M-02,,,-1,,"),
)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    for number, name in enumerate(("a/1.png", "a/2.png", "b/3.v2.jpg")):
        draw(folder / name, number)
    (folder / "labels.csv").write_text("\n".join(ROWS) + "\n")
    return folder


def shard(films: Path, columns: str = COLUMNS, *options: object) -> tuple[int, str]:
    words = ("--set", "table", "--columns", columns, "--size", 32, "--dev", 0, "--workers", 1, *options)
    made = run_pipeline("shards", films, films.parent / "out", *words, code=None)
    return made.returncode, made.stderr.splitlines()[-1]


def test_a_table_of_one_s_own_becomes_shards(films: Path) -> None:
    assert shard(films)[0] == 0
    out = films.parent / "out"
    manifest = read_manifest(out)
    assert len(manifest.not_annotated) == 12
    assert manifest.columns["path"] == "Image"
    rows = {row["key"]: row for row in pa.ipc.open_file(out / "train.arrow").read_all().to_pylist()}
    facts = ("patient", "study", "view", "sex", "age", "projection", "Edema", "Pleural Effusion", "Fracture")
    assert {key: [row[name] for name in facts] for key, row in rows.items()} == {  # printf a/1 | b2sum -l 32
        "a_1-acf34a58": ["M-01", 1, "frontal", "Female", 61, None, 1, 0, -2],
        "a_2-2f2c9317": ["M-01", 2, "frontal", "Female", 62, None, None, 1, -2],
        "b_3_v2-d81e5529": ["M-02", 1, "frontal", None, None, None, -1, None, -2],
    }
    run_pipeline("verify", out, "--deep")


@pytest.mark.parametrize("kind", ["semicolons.csv", "tabs.tsv", "workbook.xlsx"])
def test_a_table_may_have_other_delimiters_or_be_a_workbook(films: Path, kind: str) -> None:
    text = (films / "labels.csv").read_text()
    (films / "labels.csv").unlink()
    if kind == "workbook.xlsx":
        pd.read_csv(io.StringIO(text), skipinitialspace=True).to_excel(films / kind, index=False)
    else:
        (films / kind).write_text(text.replace(",", ";" if kind == "semicolons.csv" else "\t"))
    options = ("--set", "table", "--columns", COLUMNS, "--dry-run", "--dev", 0)
    shown = run_pipeline("shards", films, films.parent / "out", *options)
    assert shown.stdout.startswith("train         3 rows, 3 kept"), shown.stderr


HOSPITAL = """\
file;mrn;StudyDate;Gender;PatientAge;ViewPosition;AP/PA;edema;Effusion;reader
1;007;2019-03-04;w;058Y;POSTERO-ANTERIOR;;yes;ja;x
2;007;2020-01-02;W;58 years;AP_SUPINE;;No;0.0;x
3;7.0;2020-01-02;f;45,5;LL;;maybe;Absent;x
4;B;04.03.2019;M;90+;;portable;;no?;y
5;B;04.03.2019;?;;LATERAL;;TRUE;maybe;y
6;B;04.03.2019;männlich;7;SWIM;;n;n;y
"""


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A table with spellings of its own."""
    for number in range(1, 7):
        draw(tmp_path / "films" / f"{number}.png", number)
    path = tmp_path / "films" / "reads.csv"
    path.write_text(re.sub(r"(?m)^(\d);", r"\1.png;", HOSPITAL))
    return path


def test_a_hospital_s_table_becomes_shards_by_the_command_that_is_guessed(hospital: Path) -> None:
    out = hospital.parent.parent / "out"
    guessed = run_pipeline("shards", hospital, "--guess")
    columns = "path=file,patient=mrn,study=StudyDate,view=ViewPosition,projection=AP/PA,sex=Gender,age=PatientAge,"
    columns += "Pleural Effusion=Effusion,Edema=edema"
    command = f"--set table --columns '{columns}' --values 'no?=?,maybe=?'"
    assert guessed.stdout == f"pipeline shards {hospital} OUT {command}\n"
    assert run_pipeline("shards", hospital.parent, out, code=1).stderr.endswith(
        f"\nFor a table of your own: pipeline shards {hospital.parent} OUT {command}\n"
    )
    words = [*shlex.split(guessed.stdout)[1:-2], "--dev", 0, "--views", "all", "--workers", 1]
    words[2] = out
    edema, effusion = "'yes' (1), 'No' (1), 'maybe' (1), blank (1), 'TRUE' (1), 'n' (1)", "'ja' (1), '0.0' (1), "
    effusion += "'Absent' (1), 'no?' (1), 'maybe' (1), 'n' (1)"
    holds = "is not a label state; the column holds"
    assert run_pipeline(*words, code=1).stderr.splitlines() == [
        f"Error: {hospital}, line 4, column edema: 'maybe' {holds} {edema}",
        f"{hospital}, line 5, column Effusion: 'no?' {holds} {effusion}",
        "say what they mean (1, 0, -1, blank or not-annotated): --values 'maybe=?,no?=?'",
    ]
    made = run_pipeline(*words, "--values", "maybe=-1, Edema:Maybe=0,no?=not-annotated", "--facts", hospital)
    assert "column StudyDate: not all are numbers, so studies are numbered within each patient" in made.stdout
    assert "column Gender: no sex is known for '?' (1)" in made.stdout
    assert "column ViewPosition: no view is known for 'SWIM' (1)" in made.stdout
    names = ("study", "sex", "age", "view", "projection", "Edema", "Pleural Effusion", "reader")
    rows = pa.ipc.open_file(out / "train.arrow").read_all().sort_by("key").to_pylist()
    assert [[row[name] for name in names] for row in rows] == [
        [1, "Female", 58, "frontal", "PA", 1, 1, "x"],
        [2, "Female", 58, "frontal", "AP", 0, 0, "x"],
        [2, "Female", 45, "lateral", "LL", 0, 0, "x"],
        [1, "Male", 90, "frontal", "AP", None, -2, "y"],
        [1, None, None, "lateral", None, 1, -1, "y"],
        [1, "Male", 7, "other", None, 0, 0, "y"],
    ]
    assert read_manifest(out).options["values"] == {"maybe": -1, "Edema:Maybe": 0, "no?": -2}


def test_a_label_s_own_name_is_guessed_before_another_word_for_it(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("file,mrn,oedema,Edema\n1.png,7,1,0\n")
    assert guess_command(table).endswith("`columns` path=file,patient=mrn,Edema=Edema")
    table.write_text("file,mrn,Edema,Edema\n1.png,7,1,0\n")
    with pytest.raises(DataError, match=r"^\S+table.csv: column Edema appears 2 times$"):
        guess_command(table)


@pytest.mark.parametrize("text", ["maybe", "maybe=2", "=1", "Edema:=x", "a=1,a=1"])
def test_values_are_words_and_states(text: str) -> None:
    with pytest.raises(DataError, match=" is not like maybe=-1 or Edema:maybe=-1, each word once; states are 1, 0, "):
        parse_values(text)
    with pytest.raises(DataError, match=r"^'Effusion' is none of .*; did you mean Pleural Effusion\?$"):
        parse_values("Effusion:yes=1")
    assert parse_values('"yes, mild"=yes,edema: no =0') == (("yes, mild", 1), ("Edema:no", 0))


def test_studies_without_a_column_are_no_key_whatever_the_set_is_called(films: Path) -> None:
    assert shard(films, COLUMNS, "--name", "ours", "--blanks", "blank")[0] == 0
    (films / "facts.csv").write_text("patient,study,ward\nM-01,1,W\n")
    failed = run_pipeline("stats", films.parent / "out", "--facts", films / "facts.csv", code=1)
    assert "facts.csv: column study cannot be a key: the data set's studies have no names" in failed.stderr


def divide(films: Path, train: str, valid: str) -> list[str]:
    """The options that give each split a CSV of its own, with these rows."""
    for name, rows in (("train", train), ("valid", valid)):
        (films.parent / f"{name}.csv").write_text(f"{ROWS[0]}\n{rows}\n")
    return [word for name in ("train", "valid") for word in ("--split", f"{name}={films.parent / name}.csv")]


def test_each_split_may_have_a_csv(films: Path) -> None:
    assert shard(films, COLUMNS, *divide(films, "\n".join(ROWS[1:3]), ROWS[3]))[0] == 0
    samples = {name: split.samples for name, split in read_manifest(films.parent / "out").splits.items()}
    assert samples == {"train": 2, "valid": 1}


@pytest.mark.parametrize(("old", "new", "message"), read_cases("own_table.txt"))
def test_bad_input_is_named(films: Path, old: str, new: str, message: str) -> None:
    path = films / "labels.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    assert shard(films) == (1, f"Error: {path}{', ' if message.startswith('line') else ': '}{message}")


def test_names_that_only_look_alike_are_apart_and_any_root_and_text_is_safe(tmp_path: Path) -> None:
    names = ("a/b.png", "a_b.png", "左.png", f"{'d' * 80}/{'e' * 80}.png", "\x1b[31mred.png")
    lines = ["Image,MRN,edema", *(f"{name},{number},1" for number, name in enumerate(names))]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    for number, name in enumerate(names[:-1]):
        draw(tmp_path / name, number)
    words = ("--set", "table", "--columns", "path=Image,patient=MRN,Edema=edema", "--root", "/", "--dev", 0)
    dry = run_pipeline("shards", tmp_path, tmp_path / "out", *words, "--dry-run", "--max-bad", 1)
    assert f"1 images are missing, for example {tmp_path}/\\x1b[31mred.png" in dry.stdout
    assert "\x1b" not in dry.stdout + dry.stderr
    run_pipeline("shards", tmp_path, tmp_path / "out", *words, "--max-bad", 1, "--workers", 1)
    assert read_manifest(tmp_path / "out").splits["train"].samples == 4
    assert len(read_manifest(tmp_path / "out").rejects) == 1


@pytest.mark.parametrize("other", ["7", "7.0", "patient7", "P-007"])
def test_a_patient_s_spelling_does_not_hide_it(films: Path, other: str) -> None:
    splits = divide(films, ROWS[1].replace("M-01", "007"), ROWS[2].replace("M-01", other))
    shared = "line 2: 007 is in train.csv too; splits must not share patients"
    assert shard(films, COLUMNS, *splits) == (1, f"Error: {films.parent / 'valid.csv'}, {shared}")


def test_columns_that_are_missing_are_guessed(films: Path) -> None:
    failed = run_pipeline("shards", films, films.parent / "out", "--set", "table", code=2)
    command = f"pipeline shards {films} OUT --set table --columns {COLUMNS.rpartition(',')[0]}"
    assert failed.stderr.splitlines()[-1] == f"Error: --set table needs --columns, such as: {command}"
    (films / "second.csv").write_text("Image\n")
    assert shard(films) == (1, f"For a table of your own: pipeline shards {films}/TABLE.csv --guess")
