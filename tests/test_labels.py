from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest

from pipeline import DataError
from pipeline.labels import (
    BEST_POLICY,
    LABELS,
    evaluation_targets,
    find_csvs,
    make_targets,
    parse_uncertain_policy,
    read_labels,
    select_views,
    split_patients,
)


@pytest.fixture(scope="module")
def real_table(real_csv: Path) -> Any:
    return read_labels(real_csv)


@pytest.fixture(scope="module")
def real_frame(real_csv: Path) -> pd.DataFrame:
    return pd.read_csv(real_csv)


def test_real_table_equals_pandas(real_table: Any, real_frame: pd.DataFrame) -> None:
    assert real_table.num_rows == 223_414
    for label in LABELS:
        ours = real_table[label].cast("float64").to_numpy()
        np.testing.assert_array_equal(ours, real_frame[label].to_numpy(float))
    parts = real_frame["Path"].str.extract(r"(patient\d+)/study(\d+)/(view\d+_(?:frontal|lateral))\.jpg$")
    assert real_table["patient"].to_pylist() == parts[0].to_list()
    assert real_table["study"].to_pylist() == parts[1].astype(int).to_list()
    assert real_table["key"].to_pylist() == (parts[0] + "_study" + parts[1] + "_" + parts[2]).to_list()
    assert real_table["view"].to_pylist() == real_frame["Frontal/Lateral"].str.lower().to_list()
    assert real_table["age"].to_pylist() == real_frame["Age"].to_list()
    assert pc.count_distinct(real_table["key"]).as_py() == 223_414


def test_views_are_chosen_by_frontal_lateral(real_table: Any) -> None:
    frontal = select_views(real_table, "frontal")
    assert frontal.num_rows == 191_027
    # 17 rows whose AP/PA says LL or RL are frontal all the same
    assert pc.sum(pc.is_in(frontal["projection"], value_set=pc.cast(["LL", "RL"], "string"))).as_py() == 17


@pytest.mark.parametrize("policy", ["zeros", "ones", "ignore", "best"])
@pytest.mark.parametrize("blank", ["zeros", "ignore"])
def test_policies_equal_pandas_on_all_real_rows(
    real_table: Any, real_frame: pd.DataFrame, policy: str, blank: str
) -> None:
    target, mask = make_targets(real_table, parse_uncertain_policy(policy), blank, seed=0)
    for column, label in enumerate(LABELS):
        raw = real_frame[label]
        of_label = BEST_POLICY[label] if policy == "best" else policy
        if of_label != "smooth-ones":  # its draws are tested below
            expected = raw.fillna(0).replace(-1, {"zeros": 0, "ones": 1, "ignore": 0}[of_label])
            np.testing.assert_array_equal(target[:, column], expected)
        used = pd.Series(True, raw.index)
        if of_label == "ignore":
            used &= raw != -1
        if blank == "ignore":
            used &= raw.notna()
        np.testing.assert_array_equal(mask[:, column], used)


@pytest.mark.parametrize(("policy", "low", "high"), [("smooth-zeros", 0, 0.3), ("smooth-ones", 0.55, 0.85)])
def test_smoothing_is_uniform_and_a_function_of_seed_and_key(
    real_table: Any, policy: str, low: float, high: float
) -> None:
    column = LABELS.index("Edema")
    uncertain = pc.equal(real_table["Edema"], -1)
    rows = real_table.filter(uncertain)
    target, mask = make_targets(rows, parse_uncertain_policy(policy), "zeros", seed=1)
    draws = target[:, column]
    assert mask.all()
    assert len(draws) == 12_984
    assert low <= draws.min() < low + 0.01
    assert high - 0.01 < draws.max() < high
    assert draws.mean() == pytest.approx((low + high) / 2, abs=0.01)
    # reversed rows give reversed draws; another seed gives others
    backwards = rows.take(np.arange(rows.num_rows)[::-1])
    np.testing.assert_array_equal(
        make_targets(backwards, parse_uncertain_policy(policy), "zeros", 1)[0][::-1, column], draws
    )
    assert (
        make_targets(rows, parse_uncertain_policy(policy), "zeros", 2)[0][:, column] != draws
    ).mean() > 0.99


def test_evaluation_leaves_uncertain_cells_out(real_table: Any, real_frame: pd.DataFrame) -> None:
    target, mask = evaluation_targets(real_table, "zeros")
    np.testing.assert_array_equal(mask, (real_frame[list(LABELS)] != -1).to_numpy())
    assert set(np.unique(target[mask])) == {0, 1}


def test_policy_overrides_and_errors() -> None:
    assert parse_uncertain_policy("best,Edema=zeros") == BEST_POLICY | {"Edema": "zeros"}
    with pytest.raises(
        DataError, match=r"^uncertain policy 'maybe' is unknown; choose from best, zeros, ones, "
    ):
        parse_uncertain_policy("maybe")
    with pytest.raises(DataError, match=r"'Oedema' is not a label; write LABEL=POLICY$"):
        parse_uncertain_policy("best,Oedema=ones")


def test_patient_split_does_not_leak_and_ignores_row_order(real_table: Any) -> None:
    train, dev = split_patients(real_table, 0.05, seed=0)
    train_patients, dev_patients = set(train["patient"].to_pylist()), set(dev["patient"].to_pylist())
    assert not train_patients & dev_patients
    assert train.num_rows + dev.num_rows == 223_414
    assert len(dev_patients) / 64_540 == pytest.approx(0.05, abs=0.003)
    # patient ids drift through the set: a fair split has about the same share from each half
    assert np.mean([patient > "patient32270" for patient in dev_patients]) == pytest.approx(0.5, abs=0.03)
    backwards = real_table.take(np.arange(real_table.num_rows)[::-1])
    assert set(split_patients(backwards, 0.05, seed=0)[1]["patient"].to_pylist()) == dev_patients
    assert set(split_patients(real_table, 0.05, seed=1)[1]["patient"].to_pylist()) != dev_patients


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Edema", "Oedema", "column Edema is missing; a CheXpert table has Path, Sex, "),
        (",Female,21,Frontal,AP,", ",Female,21,Oblique,AP,", "line 2, column Frontal/Lateral: 'Oblique' is "),
        (",Female,21,", ",Female,young,", "line 2, column Age: 'young' is not a number of years"),
        (
            "small/train/patient00002/study1/view1_frontal.jpg",
            "../../etc/passwd",
            "line 5, column Path: 'CheX",
        ),
        (
            "patient00001/study2/view1",
            "patient00001/study1/view1",
            "lines 2 and 4: the same image patient00001",
        ),
    ],
)
def test_bad_csv_is_named(
    chexpert: Path, edit_csv: Callable[[str, str], None], old: str, new: str, message: str
) -> None:
    edit_csv(old, new)
    with pytest.raises(DataError) as caught:
        read_labels(chexpert / "train.csv")
    assert str(caught.value).startswith(f"{chexpert / 'train.csv'}")
    assert message in str(caught.value)


def test_unknown_label_value_names_line_and_column(chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    lines = csv.read_text().splitlines()
    cells = lines[3].split(",")
    cells[5 + LABELS.index("Edema")] = "2.0"
    lines[3] = ",".join(cells)
    csv.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        read_labels(csv)
    assert str(caught.value) == (
        f"{csv}, line 4, column Edema: '2.0' is not a label: 1.0, 0.0, -1.0 or blank"
    )


def test_ragged_and_empty_csv(tmp_path: Path, chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    csv.write_text(csv.read_text() + "CheXpert-v1.0-small/train/patient1\n")
    with pytest.raises(DataError, match=r"not a readable CSV: .*Row #50: Expected 19 columns, got 1"):
        read_labels(csv)
    csv.write_text("")
    with pytest.raises(DataError, match=r"not a readable CSV: Empty CSV file"):
        read_labels(csv)
    csv.write_text((chexpert / "valid.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"train.csv: no rows below the header$"):
        read_labels(csv)
    with pytest.raises(DataError, match=r"missing.csv: no such file$"):
        read_labels(tmp_path / "missing.csv")


def test_underscores_in_headers_and_other_column_order(chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    expected = read_labels(csv)
    frame = pd.read_csv(csv, dtype=str)
    frame = frame[frame.columns[::-1]].rename(columns=lambda name: name.replace(" ", "_"))
    frame.to_csv(csv, index=False)
    assert read_labels(csv).equals(expected)


def test_find_csvs_in_the_folder_or_its_parent(chexpert: Path, tmp_path: Path) -> None:
    expected = {"train": chexpert / "train.csv", "valid": chexpert / "valid.csv"}
    assert find_csvs(chexpert) == expected
    assert find_csvs(tmp_path) == expected
    with pytest.raises(DataError, match=r"neither it nor a folder in it holds a train.csv or valid.csv$"):
        find_csvs(chexpert / "train")
    with pytest.raises(DataError, match=r"nothing: no such folder$"):
        find_csvs(tmp_path / "nothing")
