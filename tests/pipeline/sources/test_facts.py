"""Facts from a user's files, against a pandas merge."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openpyxl  # type: ignore[import-untyped]
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import DataError, open_shards
from pipeline.base.files import hash_file
from pipeline.images import Original
from pipeline.manifest import read_manifest, read_table
from pipeline.sources.facts import join_facts
from pipeline.sources.sets import load_tables, read_any_table
from tests.conftest import hashes, refused, run_pipeline
from tests.layouts import SETS, read_cases

RACES = ("White, non-Hispanic", "Black or African American", "Asian - Historical Conv", "Caucasian", "Patient Refused")
GROUPS = {"White": "White", "Black": "Black", "Asian": "Asian", "Caucasian": "Other", "Patient": None}


def demographics(patients: int = 20) -> pd.DataFrame:
    """As AIMI's CHEXPERT DEMO.xlsx has them, in random order."""
    numbers = np.random.default_rng(0).permutation(np.arange(1, patients + 1))
    return pd.DataFrame(
        {
            "PATIENT": [f"patient{number:05d}" for number in numbers],
            "AGE_AT_CXR": [int(number) % 7 + 40 for number in numbers],
            "PRIMARY_RACE": [RACES[number % 5] for number in numbers],
            "Zip code": [f"0{number}" for number in numbers],
        }
    )


def read_frame(out: Path) -> pd.DataFrame:
    tables = [read_table(out, split) for split in read_manifest(out).splits.values()]
    return pa.concat_tables(tables).to_pandas()


def make(chexpert: Path, out: Path, *arguments: object) -> str:
    options = ("--size", 32, "--dev", 0.3, "--samples-per-shard", 9)
    made = run_pipeline("shards", chexpert, out, *options, *arguments, code=None)
    return made.stdout if made.returncode == 0 else made.stderr


def test_a_workbook_is_joined_as_pandas_merges_it(chexpert: Path, tmp_path: Path) -> None:
    frame, book, out = demographics(17), tmp_path / "CHEXPERT DEMO.xlsx", tmp_path / "one"
    frame.to_excel(book, index=False)
    stdout = make(chexpert, out, "--facts", book, "--workers", 1)
    assert "CHEXPERT DEMO.xlsx: 3 of 20 patients have no row, such as patient00018\n" in stdout
    make(chexpert, tmp_path / "two", "--facts", book, "--workers", 2)
    assert hashes(out) == hashes(tmp_path / "two")
    manifest, table = read_manifest(out), read_frame(out)
    kinds = {"age_at_cxr": "int64", "primary_race": "string", "zip_code": "string", "race": "string"}
    assert manifest.facts == kinds | dict.fromkeys(Original._fields, "int64")
    assert manifest.sources["facts-1"] == hash_file(book)
    frame["race"] = frame["PRIMARY_RACE"].str.split(r"\W").str[0].map(GROUPS)
    merged = table[["key", "patient"]].merge(frame, "left", left_on="patient", right_on="PATIENT")
    for ours, name in zip(kinds, ("AGE_AT_CXR", "PRIMARY_RACE", "Zip code", "race"), strict=True):
        columns = [column.astype(object).fillna("").tolist() for column in (table[ours], merged[name])]
        assert columns[0] == columns[1], ours
    # A file with other bytes is noticed like another CSV.
    frame.iloc[::-1].to_excel(book, index=False)
    differs = "holds other shards: the file facts-1 differs; remove it, or name another folder"
    assert differs in make(chexpert, out, "--facts", book)
    book.write_bytes(book.read_bytes()[:500])
    assert f"{book}: not a readable XLSX: " in make(chexpert, tmp_path / "out", "--facts", book)


@pytest.mark.parametrize("cells", [("A1", "XFD1", "A1048576"), [f"A{row}" for row in range(1, 2600)]])
def test_a_workbook_of_empty_or_equal_cells_takes_no_memory(
    chexpert: Path, tmp_path: Path, cells: Sequence[str]
) -> None:
    book = openpyxl.Workbook()
    for cell in cells:
        book.active[cell] = "patient" if len(cells) == 3 else "x" * 32_000
    book.save(tmp_path / "bomb.xlsx")
    claim = r"bomb.xlsx: its \d+,\d+ bytes expand to \d\d,\d+,\d+ or more, as no table does"
    with pytest.raises(DataError, match=claim):
        load_tables([chexpert], None, "all", [tmp_path / "bomb.xlsx"])


def test_a_missing_package_is_named(chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    book = tmp_path / "demo.xlsx"
    book.write_bytes(b"PK")
    with refused(f"{book}: openpyxl is missing: pip install 'chexpert-pipeline[xlsx]'"):
        load_tables([chexpert], None, "all", [book])


@pytest.mark.parametrize("key", ["key", "patient and study", "number"])
def test_rows_are_told_by_key_study_or_number(chexpert: Path, tmp_path: Path, key: str) -> None:
    studies = load_tables([chexpert], None, "all").select(["patient", "study"]).to_pandas().drop_duplicates()
    if key == "number":
        studies = studies.drop_duplicates("patient").drop(columns="study")
    studies["value"] = np.arange(len(studies))
    names, number = studies["patient"] + "_study", studies["patient"].str[-5:].astype(int)
    file = {
        "patient and study": lambda: studies.rename(columns={"patient": "Patient ID", "study": "Study"}),
        "key": lambda: studies[["value"]].assign(key=names + studies["study"].astype(str) + "_view1_frontal"),
        "number": lambda: studies[["value"]].assign(subject_id=number),
    }[key]()
    file.sample(frac=1, random_state=0).to_csv(tmp_path / "facts.csv", index=False)
    table = load_tables([chexpert], None, "frontal", [tmp_path / "facts.csv"]).to_pandas()
    assert table["value"].tolist() == table[["patient", "study"]].merge(studies, "left")["value"].tolist()


def test_a_study_s_number_is_a_key_if_no_two_patients_share_it(tmp_path: Path) -> None:
    SETS["mimic"](tmp_path / "mimic")
    (tmp_path / "facts.csv").write_text("study_id,ward,PRIMARY_RACE\ns50414267.0,A,1\n53189527,B,2\n")
    table = load_tables([tmp_path / "mimic"], None, "all", [tmp_path / "facts.csv"])
    assert (str(table["primary_race"].type), "race" in table.column_names) == ("int64", False)  # of codes
    wards = dict(zip(table["study"].to_pylist(), table["ward"].to_pylist(), strict=True))
    assert {study: ward for study, ward in wards.items() if ward} == {50414267: "A", 53189527: "B"}


@pytest.mark.parametrize(("content", "message"), read_cases("facts.txt"))
def test_files_that_cannot_be_joined(chexpert: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        load_tables([chexpert], None, "all", [path])
    assert str(caught.value).removesuffix("; rename or remove it") == f"{path}{message}"


def test_rows_that_agree_may_be_repeated_and_files_add_up(chexpert: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("patient,race,n\npatient00001,White,1.0\npatient00001,White,1.0\n,,\n")
    (tmp_path / "b.csv").write_text("patient,primary_race,insurance\npatient00002,Asian,\n")
    notes: list[str] = []
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    tables = join_facts({"all": read_any_table(chexpert / "train.csv")}, files, notes.append)
    rows = {row["patient"]: row for row in tables["all"].to_pylist()}
    facts = [[rows[f"patient0000{number}"][name] for name in ("race", "n", "primary_race")] for number in (1, 2)]
    assert facts == [["White", 1, None], [None, None, "Asian"]]
    assert tables["all"].schema.field("insurance").type == pa.string()
    assert [note.split(", such as ")[0] for note in notes] == [
        f"{name}: 15 of 16 patients have no row" for name in ("a.csv", "b.csv")
    ]
    with pytest.raises(DataError, match="column race: the data set's table has that name"):
        join_facts(tables, files[:1])


def test_numbers_given_here_are_no_key_and_csvs_named_alike_are_two_sets(chexpert: Path, tmp_path: Path) -> None:
    (tmp_path / "facts.csv").write_text("patient,study,ward\npatient00001,1,W\n")
    tables = {"all": read_any_table(chexpert / "train.csv")}
    with pytest.raises(DataError, match="column study cannot be a key: the data set's studies have no names"):
        join_facts(tables, [tmp_path / "facts.csv"], numbered=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.csv").write_bytes((chexpert / "train.csv").read_bytes())
    csvs = [tmp_path / name / "train.csv" for name in "ab"]
    both = load_tables(csvs, None, "all")
    assert both["set"].unique().to_pylist() == list(map(str, csvs))
    assert len(both["patient"].unique()) == 2 * len(tables["all"]["patient"].unique())


def test_facts_choose_and_group_images(chexpert: Path, tmp_path: Path) -> None:
    out, facts = tmp_path / "out", tmp_path / "facts.csv"
    demographics(21).to_csv(facts, index=False)
    make(chexpert, out, "--facts", facts, "--workers", 1)
    table = read_frame(out)
    note = "facts.csv: 1 of its patients are not in the data set, such as patient00021\n"
    for source, stderr in (((out,), ""), ((chexpert, "--facts", facts, "--views", "frontal"), note)):
        for by in ("race", "age_at_cxr"):
            counted = run_pipeline("stats", *source, "--by", by, "--format", "json")
            assert counted.stderr == stderr
            groups = json.loads(counted.stdout)["by"]["groups"]
            rows = {f"{name:.0f}" if by == "age_at_cxr" else name: rows for name, rows in table.groupby(by)}
            if table[by].isna().any():
                rows["unknown"] = table[table[by].isna()]
            assert list(groups) == list(rows)
            for name, group in groups.items():
                positive = (rows[name]["Edema"] == 1).sum()
                assert (group["images"], group["labels"]["Edema"]["positive"]) == (len(rows[name]), positive)
    stderr = run_pipeline("stats", out, "--by", "width", code=2).stderr
    known = "view, sex, age, projection, age_at_cxr, primary_race, zip_code, race"
    assert stderr.splitlines()[-1] == f"Error: --by width: these images can be grouped by {known}"
    train = open_shards(out)["train"]
    keys = train.where("race=Black", "age_at_cxr>=42").table["key"].to_pylist()
    rows = table[table["key"].isin(train.table["key"].to_pylist())]
    assert keys == rows.query("race == 'Black' and age_at_cxr >= 42")["key"].tolist()
