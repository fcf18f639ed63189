import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from scipy.stats import kstest

from pipeline import DataError
from pipeline.labels import LABELS, hash_fraction, select_views, split_patients
from pipeline.policies import (
    BEST_POLICY,
    UNCERTAIN_POLICIES,
    check_blank_policy,
    choose_policy,
    describe_one_class,
    divide_cells,
    evaluation_targets,
    find_one_class,
    make_targets,
    parse_uncertain_policy,
)
from pipeline.sources.sets import read_any_table
from tests.conftest import refused


@pytest.fixture(scope="module")
def real_frame(real_csv: Path) -> pd.DataFrame:
    return pd.read_csv(real_csv)


def test_real_table_equals_pandas(real_table: Any, real_frame: pd.DataFrame) -> None:
    assert real_table["path"].to_pylist() == real_frame["Path"].to_list()
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


@pytest.fixture(scope="module")
def teacher(real_table: Any) -> Any:
    """A score for every cell of the real table."""
    return np.random.default_rng(0).random((real_table.num_rows, len(LABELS)), np.float32)


# What each policy makes of a column of raw states, in pandas; smoothing is compared by its bounds.
BY_PANDAS: dict[str, Callable[[Any, Any], Any]] = {
    "zeros": lambda raw, scores: raw.replace(-1, 0),
    "ones": lambda raw, scores: raw.replace(-1, 1),
    "ignore": lambda raw, scores: raw.replace(-1, 0),
    "multiclass": lambda raw, scores: raw,
    "selftrained": lambda raw, scores: raw.mask(raw == -1, scores),
}
BOUNDS = {"smooth-zeros": (0, 0.3), "smooth-ones": (0.55, 0.85)}
MIXED = "best,Edema=multiclass,Cardiomegaly=selftrained,Pneumonia=ignore,Fracture=smooth-zeros"


@pytest.mark.parametrize("policy", ["best", *UNCERTAIN_POLICIES, MIXED])
@pytest.mark.parametrize("blank", ["zeros", "ignore"])
def test_policies_equal_pandas_on_all_real_rows(
    real_table: Any, real_frame: pd.DataFrame, teacher: Any, policy: str, blank: str
) -> None:
    default, *overrides = policy.split(",")
    policies = BEST_POLICY if default == "best" else dict.fromkeys(LABELS, default)
    policies = policies | dict(override.split("=") for override in overrides)
    target, mask = make_targets(real_table, parse_uncertain_policy(policy), blank, seed=0, teacher=teacher)
    for column, (label, ours) in enumerate(zip(LABELS, target.T, strict=True)):
        raw = real_frame[label].fillna(0)
        if policies[label] in BOUNDS:
            certain = raw != -1
            np.testing.assert_array_equal(ours[certain], raw[certain])
            assert pd.Series(ours[~certain]).between(*BOUNDS[policies[label]]).all()
        else:
            expected = BY_PANDAS[policies[label]](raw.astype(np.float32), teacher[:, column])
            np.testing.assert_array_equal(ours, expected)
        masked = (real_frame[label] == -1) & (policies[label] == "ignore")
        masked |= real_frame[label].isna() & (blank == "ignore")
        np.testing.assert_array_equal(mask[:, column], ~masked)


@pytest.fixture(scope="module")
def xrv(real_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pathologies` and `labels` of torchxrayvision's CheXpert, all AP and PA rows of it."""
    # In a process of its own, because its import puts a package `model` in front of ours.
    file = tmp_path_factory.mktemp("xrv") / "labels.npz"
    program = (
        "import sys, numpy; from torchxrayvision.datasets import CheX_Dataset\n"
        "data = CheX_Dataset('', csvpath=sys.argv[1], views=['PA', 'AP'], unique_patients=False)\n"
        "numpy.savez(sys.argv[2], labels=data.labels, pathologies=data.pathologies)"
    )
    subprocess.run([sys.executable, "-I", "-c", program, real_csv, file], check=True, capture_output=True)
    return np.load(file)


@pytest.mark.soak  # importing torchxrayvision takes ten seconds
def test_ignoring_both_equals_torchxrayvision(real_table: Any, xrv: Any) -> None:
    # It drops the frontals whose AP/PA is LL or RL.
    rows = real_table.filter(pc.is_in(real_table["projection"], value_set=pc.cast(["AP", "PA"], "string")))
    target, mask = make_targets(rows, parse_uncertain_policy("ignore"), "ignore", seed=0)
    assert xrv["labels"].shape == (191_010, 13)
    healthy = pc.fill_null(pc.equal(rows["No Finding"], 1), False).to_numpy()
    for name, labels in zip(xrv["pathologies"], xrv["labels"].T, strict=True):
        column = LABELS.index("Pleural Effusion" if name == "Effusion" else name)
        ours = np.where(mask[:, column], target[:, column], np.nan)
        # By its definition "No Finding" makes the other labels negative, but for support devices.
        same = ~healthy if name != "Support Devices" else np.full_like(healthy, True)
        np.testing.assert_array_equal(ours[same], labels[same])
        assert (labels[~same] == 0).all()


@pytest.mark.parametrize("policy", ["best", "ignore", "multiclass", "selftrained"])
@pytest.mark.parametrize("blank", ["zeros", "ignore"])
def test_labels_with_one_class_equal_pandas(
    real_table: Any, real_frame: pd.DataFrame, teacher: Any, policy: str, blank: str
) -> None:
    target, mask = make_targets(real_table, parse_uncertain_policy(policy), blank, 0, teacher)
    assert [*describe_one_class(target, mask)] == (["No Finding"] if blank == "ignore" else [])
    # The first nine patients have too few images for all labels to have both.
    few = (real_frame["Path"] < "CheXpert-v1.0-small/train/patient00010").to_numpy()
    found = {
        label: [*map(int, re.findall(r"\d+", text))]
        for label, text in describe_one_class(target[few], mask[few]).items()
    }
    ours = pd.DataFrame(np.where(mask, target, np.nan)[few], columns=LABELS)
    assert found == {
        label: [(cells >= 0.5).sum(), cells.between(0, 0.5, inclusive="left").sum()]
        for label, cells in ours.items()
        if not ((cells >= 0.5).any() and cells.between(0, 0.5, inclusive="left").any())
    }
    assert found
    # What a teacher will fill is not known yet, and no policy helps a label that nobody looked for.
    rows, sure = real_table.filter(few), parse_uncertain_policy(policy.replace("selftrained", "ignore"))
    expected = describe_one_class(*make_targets(rows, sure, blank, 0))
    place = rows.column_names.index("Fracture")
    rows = rows.set_column(place, "Fracture", pa.array([-2] * rows.num_rows, pa.int8()))
    target, mask = make_targets(rows, sure, blank, 0)
    column = LABELS.index("Fracture")
    assert [target[:, column].any(), mask[:, column].any()] == [False, False]
    sides = divide_cells(np.array([-1, 0, 0.5], np.float32), np.array([True] * 3))
    assert [side.tolist() for side in sides] == [[False, False, True], [False, True, False]]
    texts = [text for label, text in expected.items() if label != "Fracture"]
    assert find_one_class(rows, {"uncertain": policy, "blank": blank}) == texts


@pytest.mark.parametrize(("policy", "low", "high"), [("smooth-zeros", 0, 0.3), ("smooth-ones", 0.55, 0.85)])
def test_smoothing_is_uniform_and_a_function_of_seed_and_key(
    real_table: Any, policy: str, low: float, high: float
) -> None:
    rows = real_table.filter(pc.equal(real_table["Edema"], -1))
    target, mask = make_targets(rows, parse_uncertain_policy(policy), "zeros", seed=1)
    draws = np.array([hash_fraction("smooth", 1, key, "Edema") for key in rows["key"].to_pylist()])
    np.testing.assert_array_equal(target[:, LABELS.index("Edema")], np.float32(low + (high - low) * draws))
    assert mask.sum() == mask.size == 12_984 * len(LABELS)
    assert kstest(draws, "uniform").pvalue > 0.01


def test_evaluation_leaves_uncertain_cells_out(real_table: Any, real_frame: pd.DataFrame) -> None:
    for blank, empty in (("zeros", 0), ("ignore", -1)):
        target, mask = evaluation_targets(real_table, blank)
        np.testing.assert_array_equal(mask, real_frame[list(LABELS)].fillna(empty).isin([0, 1]))
        assert set(np.unique(target[mask])) == {0, 1}


def test_policy_overrides_and_errors(real_table: Any) -> None:
    assert parse_uncertain_policy("best,edema=zeros") == parse_uncertain_policy(" best , Edema=zeros")
    assert parse_uncertain_policy("best,Edema=zeros") == BEST_POLICY | {"Edema": "zeros"}
    assert [choose_policy("blank", given, {"blank": "ignore"}) for given in (None, "zeros")] == ["ignore", "zeros"]
    assert check_blank_policy("ignore") == "ignore"
    known = "zeros, ones, smooth-zeros, smooth-ones, ignore, multiclass, selftrained"
    oedema = f"uncertain policy 'Oedema=ones': 'Oedema' is none of {', '.join(LABELS)}; did you mean Edema?"
    for call, message in (
        (partial(parse_uncertain_policy, "maybe"), f"uncertain policy 'maybe' is unknown; choose from best, {known}"),
        (partial(parse_uncertain_policy, "ones,Oedema=ones"), oedema),
        (partial(parse_uncertain_policy, "best,Edema=no=2"), f"uncertain policy 'Edema=no=2': choose from {known}"),
        (partial(check_blank_policy, "ones"), "blank policy 'ones' is unknown; choose from zeros, ignore"),
        (
            partial(choose_policy, "blank", None, {"blank": "", "uncertain": "best"}),
            "`blank`: the folders of shards have different policies; give one",
        ),
        (
            partial(make_targets, real_table, parse_uncertain_policy("best,Edema=selftrained"), "zeros", 0),
            "label Edema is selftrained: it needs a `teacher`, a run that was scored on train",
        ),
    ):
        with refused(message):
            call()


def test_the_split_of_the_real_patients_is_fair(real_table: Any) -> None:
    dev = {*split_patients(real_table, 0.05, seed=0)[1]["patient"].to_pylist()}
    assert len(dev) / 64_540 == pytest.approx(0.05, abs=0.003)
    # patient ids drift through the set: a fair split has about the same share from each half
    assert np.mean([patient > "patient32270" for patient in dev]) == pytest.approx(0.5, abs=0.03)


def test_empty_and_missing_csv(tmp_path: Path, chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    csv.write_text("")
    with pytest.raises(DataError, match=r"not a readable CSV: Empty CSV file"):
        read_any_table(csv)
    csv.write_text((chexpert / "valid.csv").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match=r"train.csv: no rows below the header$"):
        read_any_table(csv)
    with pytest.raises(DataError, match=r"missing.csv: no such file$"):
        read_any_table(tmp_path / "missing.csv")


def test_underscores_in_headers_and_other_column_order(chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    expected = read_any_table(csv)
    frame = pd.read_csv(csv, dtype=str)
    frame = frame[frame.columns[::-1]].rename(columns=lambda name: name.replace(" ", "_"))
    frame.to_csv(csv, index=False)
    assert read_any_table(csv).equals(expected)


def test_a_damaged_gz_is_named(tmp_path: Path, real_csv: Path) -> None:
    path = tmp_path / "train.csv.gz"
    path.write_bytes(real_csv.read_bytes()[:5000])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: not a readable CSV: "):
        read_any_table(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_line_breaks_in_cells_are_read_at_any_size(chexpert: Path, tmp_path: Path, suffix: str) -> None:
    frame = pd.concat([pd.read_csv(chexpert / "train.csv", dtype=str)] * 200, ignore_index=True)
    numbers = frame.index.astype(str).str.zfill(6).to_series(index=frame.index)
    frame["Path"] = "x/train/patient" + numbers + "/study1/view1_frontal.jpg"
    frame["note"] = "one\ntwo, " + numbers + "\r\n\nthree"
    path = tmp_path / f"train.csv{suffix}"
    frame.to_csv(path, index=False)
    assert len(frame.to_csv(index=False)) > 2**20
    table = read_any_table(path)
    assert table["path"].to_pylist() == frame["Path"].to_list()
    assert table["age"].to_pylist() == frame["Age"].astype(int).to_list()
    np.testing.assert_array_equal(table["Edema"].cast("float64").to_numpy(), frame["Edema"].astype(float))


def test_errors_name_the_line_of_the_file(chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    header, *rows = csv.read_text().splitlines()
    # The header's line, a blank one, and a row of three lines: the next row is on line 6.
    start = [f"{header},note", "", f'{rows[0]},"a\nb\n"']

    def message(*more: str, ending: str = "\n", encoding: str = "utf-8") -> str:
        csv.write_bytes(ending.join([*start, *more, ""]).encode(encoding))
        with pytest.raises(DataError) as caught:
            read_any_table(csv)
        return str(caught.value).removeprefix(str(csv))

    assert message(f"{rows[1]},", f"{rows[1]},") == (
        ", lines 6 and 7: the same image patient00001_study1_view2_lateral twice"
    )
    bad = rows[1].replace("Lateral", "Oblique")
    oblique = "column Frontal/Lateral: 'Oblique' is neither Frontal nor Lateral"
    assert message("", f"{bad},") == f", line 7, {oblique}"
    assert message(f"{bad},", ending="\r\n", encoding="utf-8-sig") == f", line 6, {oblique}"
    unreadable = ": not a readable CSV: line"
    assert message("", rows[1], f"{rows[2]},") == f"{unreadable} 7: 19 cells, but the header has 20"
    assert message(f"{rows[1]},", f'{rows[2]},a"b,c', f"{rows[3]},") == (
        f"{unreadable} 7: 21 cells, but the header has 20"
    )
    assert message(f"{rows[1]},", f"{rows[2]},\xe9", encoding="latin-1") == (
        f"{unreadable} 7: not UTF-8; save the file as UTF-8"
    )
    assert message(f"{rows[1].replace('Female', chr(34) + 'Female')},", f"{rows[2]},") == (
        f"{unreadable} 6: 2 cells, but the header has 20; it is the last row: is a quote left open, or the file cut "
        "off?"
    )
    start[:] = [f"{header},\xe9", f"{rows[0]},"]
    assert message(encoding="latin-1") == ": not a readable CSV: its header is not UTF-8"
