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
from tests.conftest import refused, run_pipeline
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
    pytest.importorskip("openpyxl")
    frame, book = demographics(17), tmp_path / "CHEXPERT DEMO.xlsx"
    frame.to_excel(book, index=False)
    said = make(chexpert, tmp_path / "one", "--facts", book, "--workers", 1)
    assert "CHEXPERT DEMO.xlsx: 3 of 20 patients have no row, such as patient00018\n" in said
    make(chexpert, tmp_path / "two", "--facts", book, "--workers", 2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

    manifest = read_manifest(tmp_path / "one")
    assert manifest.facts == {
        "age_at_cxr": "int64",
        "primary_race": "string",
        "zip_code": "string",
        "race": "string",
    } | dict.fromkeys(Original._fields, "int64")
    assert manifest.sources["facts-1"] == hash_file(book)
    found = read_frame(tmp_path / "one")
    frame["race"] = frame["PRIMARY_RACE"].str.split(r"\W").str[0].map(GROUPS)
    merged = found[["key", "patient"]].merge(frame, "left", left_on="patient", right_on="PATIENT")
    for ours, theirs in zip(manifest.facts, ("AGE_AT_CXR", "PRIMARY_RACE", "Zip code", "race"), strict=False):
        expected = merged[theirs].astype(object).where(merged[theirs].notna(), None)
        assert found[ours].astype(object).where(found[ours].notna(), None).tolist() == expected.tolist(), ours

    # A file with other bytes is noticed like another CSV.
    frame.iloc[::-1].to_excel(book, index=False)
    assert "holds other shards: the file facts-1 differs; remove it, or name another folder" in make(
        chexpert, tmp_path / "one", "--facts", book
    )
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
    with pytest.raises(
        DataError, match=r"bomb.xlsx: its \d+,\d+ bytes expand to \d\d,\d+,\d+ or more, as no table does"
    ):
        load_tables([chexpert], None, "all", [tmp_path / "bomb.xlsx"])


def test_a_missing_package_is_named(chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    book = tmp_path / "demo.xlsx"
    book.write_bytes(b"PK")
    with refused(f"{book}: openpyxl is missing: pip install 'chexpert-pipeline[xlsx]'"):
        load_tables([chexpert], None, "all", [book])


@pytest.mark.parametrize("key", ["key", "patient and study", "number"])
def test_rows_are_told_by_key_study_or_number(chexpert: Path, tmp_path: Path, key: str) -> None:
    whole = load_tables([chexpert], None, "all").select(["patient", "study"]).to_pandas().drop_duplicates()
    whole["value"] = np.arange(len(whole))
    by = ["patient", "study"]
    theirs = whole.rename(columns={"patient": "Patient ID", "study": "Study"})
    if key == "key":
        theirs = whole.assign(key=whole["patient"] + "_study" + whole["study"].astype(str) + "_view1_frontal")[
            ["key", "value"]
        ]
    elif key == "number":
        by, whole = ["patient"], whole.drop_duplicates("patient")
        theirs = whole.assign(subject_id=whole["patient"].str[-5:].astype(int))[["subject_id", "value"]]
    theirs.sample(frac=1, random_state=0).to_csv(tmp_path / "facts.csv", index=False)
    found = load_tables([chexpert], None, "frontal", [tmp_path / "facts.csv"]).to_pandas()
    expected = found[["patient", "study"]].merge(whole, "left", on=by)
    assert found["value"].tolist() == expected["value"].tolist()


def test_a_study_s_number_is_a_key_if_no_two_patients_share_it(tmp_path: Path) -> None:
    SETS["mimic"](tmp_path / "mimic")
    (tmp_path / "facts.csv").write_text("study_id,ward\ns50414267.0,A\n53189527,B\n")
    table = load_tables([tmp_path / "mimic"], None, "all", [tmp_path / "facts.csv"])
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
    tables = join_facts(
        {"all": read_any_table(chexpert / "train.csv")}, [tmp_path / "a.csv", tmp_path / "b.csv"], notes.append
    )
    first = {row["patient"]: row for row in tables["all"].to_pylist()}
    assert [first["patient00001"][name] for name in ("race", "n", "primary_race")] == ["White", 1, None]
    assert [first["patient00002"][name] for name in ("race", "n", "primary_race")] == [None, None, "Asian"]
    assert tables["all"].schema.field("insurance").type == pa.string()
    assert [note.split(", such as ")[0] for note in notes] == [
        "a.csv: 15 of 16 patients have no row",
        "b.csv: 15 of 16 patients have no row",
    ]
    with pytest.raises(DataError, match="column race: the data set's table has that name"):
        join_facts(tables, [tmp_path / "a.csv"])


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
    demographics(21).to_csv(tmp_path / "facts.csv", index=False)
    make(chexpert, tmp_path / "out", "--facts", tmp_path / "facts.csv", "--workers", 1)
    found = read_frame(tmp_path / "out")
    for source in ((tmp_path / "out",), (chexpert, "--facts", tmp_path / "facts.csv", "--views", "frontal")):
        for by in ("race", "age_at_cxr"):
            counted = run_pipeline("stats", *source, "--by", by, "--format", "json")
            noted = "facts.csv: 1 of its patients are not in the data set, such as patient00021\n"
            assert counted.stderr == (noted if "--facts" in source else "")
            groups = json.loads(counted.stdout)["by"]["groups"]
            expected = found[by].value_counts()
            names = [f"{value:.0f}" if by == "age_at_cxr" else value for value in sorted(expected.index)]
            blank = found[by].isna().sum()
            assert list(groups) == names + ["unknown"] * bool(blank)
            assert [group["images"] for group in groups.values()][: len(names)] == expected.sort_index().tolist()
            for name, rows in found.groupby(by):
                key = f"{name:.0f}" if by == "age_at_cxr" else name
                assert groups[key]["labels"]["Edema"]["positive"] == (rows["Edema"] == 1).sum()
    refused = run_pipeline("stats", tmp_path / "out", "--by", "width", code=2)
    assert refused.stderr.splitlines()[-1] == (
        "Error: --by width: these images can be grouped by view, sex, age, projection, age_at_cxr, primary_race, "
        "zip_code, race"
    )
    selected = open_shards(tmp_path / "out")["train"].where("race=Black", "age_at_cxr>=42").table
    train = found[found["key"].isin(open_shards(tmp_path / "out")["train"].table["key"].to_pylist())]
    assert selected["key"].to_pylist() == train.query("race == 'Black' and age_at_cxr >= 42")["key"].tolist()
