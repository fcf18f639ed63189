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

from pipeline import DataError, policies
from pipeline.labels import LABELS, hash_fraction, select_views, split_patients
from pipeline.policies import BEST_POLICY, UNCERTAIN_POLICIES, make_targets, parse_uncertain_policy
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
    chosen = BEST_POLICY if default == "best" else dict.fromkeys(LABELS, default)
    chosen = chosen | dict(override.split("=") for override in overrides)
    target, mask = make_targets(real_table, parse_uncertain_policy(policy), blank, seed=0, teacher=teacher)
    for column, (label, ours) in enumerate(zip(LABELS, target.T, strict=True)):
        raw = real_frame[label].fillna(0)
        if chosen[label] in BOUNDS:
            certain = raw != -1
            np.testing.assert_array_equal(ours[certain], raw[certain])
            assert pd.Series(ours[~certain]).between(*BOUNDS[chosen[label]]).all()
        else:
            expected = BY_PANDAS[chosen[label]](raw.astype(np.float32), teacher[:, column])
            np.testing.assert_array_equal(ours, expected)
        masked = (real_frame[label] == -1) & (chosen[label] == "ignore")
        masked |= real_frame[label].isna() & (blank == "ignore")
        np.testing.assert_array_equal(mask[:, column], ~masked)
    if policy == "ignore":
        for ours, same in zip(policies.evaluation_targets(real_table, blank), (target, mask), strict=True):
            np.testing.assert_array_equal(ours, same)


@pytest.mark.soak  # importing torchxrayvision takes ten seconds
def test_ignoring_both_equals_torchxrayvision(real_table: Any, real_csv: Path, tmp_path: Path) -> None:
    # In a process of its own, because its import puts a package `model` in front of ours.
    program = (
        "import sys, numpy; from torchxrayvision.datasets import CheX_Dataset\n"
        "data = CheX_Dataset('', csvpath=sys.argv[1], views=['PA', 'AP'], unique_patients=False)\n"
        "numpy.savez(sys.argv[2], labels=data.labels, pathologies=data.pathologies)"
    )
    file = tmp_path / "labels.npz"
    subprocess.run([sys.executable, "-I", "-c", program, real_csv, file], check=True, capture_output=True)
    xrv = np.load(file)
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
    assert [*policies.describe_one_class(target, mask)] == (["No Finding"] if blank == "ignore" else [])
    # The first nine patients have too few images for all labels to have both.
    few = (real_frame["Path"] < "CheXpert-v1.0-small/train/patient00010").to_numpy()
    texts = policies.describe_one_class(target[few], mask[few])
    ours = pd.DataFrame(np.where(mask, target, np.nan)[few], columns=LABELS)
    positives, negatives = (ours >= 0.5).sum(), ((ours >= 0) & (ours < 0.5)).sum()
    assert texts
    assert texts == {
        label: f"label {label} has {positives[label]} positives and {negatives[label]} negatives in train"
        for label in LABELS
        if not (positives[label] and negatives[label])
    }
    # What a teacher will fill is not known yet, and no policy helps a label that nobody looked for.
    rows, sure = real_table.filter(few), parse_uncertain_policy(policy.replace("selftrained", "ignore"))
    expected = policies.describe_one_class(*make_targets(rows, sure, blank, 0))
    rows = rows.set_column(rows.column_names.index("Fracture"), "Fracture", pa.array([-2] * len(rows), pa.int8()))
    target, mask = make_targets(rows, sure, blank, 0)
    assert not np.concatenate([target, mask])[:, LABELS.index("Fracture")].any()
    expected.pop("Fracture", None)
    assert policies.find_one_class(rows, {"uncertain": policy, "blank": blank}) == [*expected.values()]


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


def test_policy_overrides_and_errors(real_table: Any) -> None:
    choose, check = partial(policies.choose_policy, "blank"), policies.check_blank_policy
    assert parse_uncertain_policy("best,edema=zeros") == parse_uncertain_policy(" best , Edema=zeros")
    assert parse_uncertain_policy("best,Edema=zeros") == BEST_POLICY | {"Edema": "zeros"}
    assert [choose(None, {"blank": "ignore"}), choose("zeros", {"blank": "ignore"})] == ["ignore", "zeros"]
    assert check("ignore") == "ignore"
    known = "zeros, ones, smooth-zeros, smooth-ones, ignore, multiclass, selftrained"
    oedema = f"'Oedema' is none of {', '.join(LABELS)}; did you mean Edema?"
    teacher = "label Edema is selftrained: it needs a `teacher`, a run that was scored on train"
    selftrained = partial(parse_uncertain_policy, "best,Edema=selftrained")
    for call, message in (
        (partial(parse_uncertain_policy, "maybe"), f"uncertain policy 'maybe' is unknown; choose from best, {known}"),
        (partial(parse_uncertain_policy, "ones,Oedema=ones"), f"uncertain policy 'Oedema=ones': {oedema}"),
        (partial(parse_uncertain_policy, "best,Edema=no=2"), f"uncertain policy 'Edema=no=2': choose from {known}"),
        (partial(check, "ones"), "blank policy 'ones' is unknown; choose from zeros, ignore"),
        (partial(choose, None, {"blank": ""}), "`blank`: the folders of shards have different policies; give one"),
        (partial(make_targets, real_table, selftrained(), "zeros", 0), teacher),
    ):
        with refused(message):
            call()


def test_the_split_of_the_real_patients_is_fair(real_table: Any) -> None:
    dev = {*split_patients(real_table, 0.05, seed=0)[1]["patient"].to_pylist()}
    assert len(dev) / 64_540 == pytest.approx(0.05, abs=0.003)
    # patient ids drift through the set: a fair split has about the same share from each half
    assert np.mean([patient > "patient32270" for patient in dev]) == pytest.approx(0.5, abs=0.03)


def test_files_that_are_no_tables_are_named(tmp_path: Path, chexpert: Path, real_csv: Path) -> None:
    header = (chexpert / "valid.csv").read_bytes().splitlines()[0]
    for name, content, message in (
        ("empty.csv", b"", "not a readable CSV: Empty CSV file"),
        ("bare.csv", header + b"\n", "no rows below the header$"),
        ("cut.csv.gz", real_csv.read_bytes()[:5000], "not a readable CSV: "),
        ("none.csv", None, "no such file$"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / name))}: {message}"):
            read_any_table(tmp_path / name)


def test_underscores_in_headers_and_other_column_order(chexpert: Path) -> None:
    csv = chexpert / "train.csv"
    expected = read_any_table(csv)
    frame = pd.read_csv(csv, dtype=str)
    frame = frame[frame.columns[::-1]].rename(columns=lambda name: name.replace(" ", "_"))
    frame.to_csv(csv, index=False)
    assert read_any_table(csv).equals(expected)


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
    header, first, second, third, fourth, *_ = csv.read_text().splitlines()
    # The header's line, a blank one, and a row of three lines: the next row is on line 6.
    start = f'{header},note\n\n{first},"a\nb\n"\n'
    bad, quoted = second.replace("Lateral", "Oblique"), second.replace("Female", '"Female')
    oblique = "column Frontal/Lateral: 'Oblique' is neither Frontal nor Lateral"
    twice = "the same image patient00001_study1_view2_lateral twice"
    open_quote = "it is the last row: is a quote left open, or the file cut off?"
    broken = ": not a readable CSV:"
    for text, encoding, message in (
        (f"{start}{second},\n{second},\n", "utf-8", f", lines 6 and 7: {twice}"),
        (f"{start}\n{bad},\n", "utf-8", f", line 7, {oblique}"),
        (f"{start}{bad},\n".replace("\n", "\r\n"), "utf-8-sig", f", line 6, {oblique}"),
        (f"{start}\n{second}\n{third},\n", "utf-8", f"{broken} line 7: 19 cells, but the header has 20"),
        (f'{start}{second},\n{third},a"b,c\n{fourth},', "utf-8", f"{broken} line 7: 21 cells, but the header has 20"),
        (f"{start}{second},\n{third},\xe9\n", "latin-1", f"{broken} line 7: not UTF-8; save the file as UTF-8"),
        (f"{start}{quoted},\n{third},", "utf-8", f"{broken} line 6: 2 cells, but the header has 20; {open_quote}"),
        (f"{header},\xe9\n{first},\n", "latin-1", f"{broken} its header is not UTF-8"),
    ):
        csv.write_bytes(text.encode(encoding))
        with refused(f"{csv}{message}"):
            read_any_table(csv)
