import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch

from model.losses import positive_weights
from pipeline.base.pages import Panel
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.look.label_report import draw_cooccurrence, draw_states
from pipeline.measure.counts import count_cooccurrence, count_groups, count_labels
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.sources.sets import load_tables, read_any_table
from tests.conftest import Shards, run_pipeline


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_pipeline("stats", *arguments, code=code)


def report(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--format", "json").stdout)


def count_by_hand(frame: pd.DataFrame, label: str) -> dict[str, int]:
    codes = {"positive": 1, "uncertain": -1, "negative": 0}
    return {state: (frame[label] == code).sum() for state, code in codes.items()} | {"blank": frame[label].isna().sum()}


def test_the_counts_of_the_real_table_equal_pandas(real_csv: Path) -> None:
    document, frame = report(real_csv), pd.read_csv(real_csv)
    for label, counts in document["labels"].items():
        expected = count_by_hand(frame, label)
        assert {state: counts[state] for state in expected} == expected
    # As published.
    totals = {unit: document[unit] for unit in ("images", "studies", "patients")}
    assert totals == {"images": 223_414, "studies": 187_641, "patients": 64_540}
    assert document["labels"]["Edema"]["positive"] == 52_246


def test_sources_agree(chexpert: Path, shards: Shards) -> None:
    """A CheXpert folder, its parent's only set, and the shards made from it have the same frontal labels."""
    folder = run(chexpert, "--views", "frontal", "--format", "json")
    assert run(shards[0], "--format", "json").stdout == folder.stdout
    frame = pd.concat([pd.read_csv(chexpert / name) for name in ("train.csv", "valid.csv")])
    frame = frame[frame["Frontal/Lateral"] == "Frontal"]
    document = json.loads(folder.stdout)
    assert document["images"] == len(frame)
    share = round((frame["Edema"] == 1).mean(), 4)
    assert document["labels"]["Edema"] == count_by_hand(frame, "Edema") | {"share_positive": share}
    for source, images in ((chexpert, 12), (shards[0], 8)):
        assert report(source, "--split", "valid")["images"] == images
    wrong = run(chexpert, "--split", "test", code=1)
    assert wrong.stderr == f"Error: split 'test' does not exist; {chexpert} holds train, valid\n"


@pytest.mark.parametrize("variable", ["view", "sex", "age", "projection"])
def test_groups_equal_pandas(real_csv: Path, variable: str) -> None:
    frame, bands = pd.read_csv(real_csv), ["0-17", "18-39", "40-59", "60-79", "80+"]
    names = {
        "view": frame["Frontal/Lateral"].str.lower(),
        "sex": frame["Sex"],
        "age": pd.cut(frame["Age"], [-1, 17, 39, 59, 79, 200], labels=bands).astype(str),
        "projection": frame["AP/PA"].fillna("none"),
    }[variable]
    counts = count_groups(load_tables([real_csv], None, "all"), variable)
    assert (counts["variable"], set(counts["groups"])) == (variable, set(names))
    for name, group in counts["groups"].items():
        rows = frame[names == name]
        assert group["images"] == len(rows)
        positives = {label: row["positive"] for label, row in group["labels"].items()}
        assert positives == (rows[list(LABELS)] == 1).sum().to_dict()


@pytest.mark.parametrize("policy", ["best", "ignore,blank=ignore", "smooth-zeros,Edema=ones", "multiclass"])
def test_policy_counts_are_those_of_the_targets(chexpert: Path, policy: str) -> None:
    document = report(chexpert / "train.csv", "--policy", policy)["policy"]
    uncertain, ignored, _ = policy.partition(",blank=ignore")
    blank = "ignore" if ignored else "zeros"
    table = read_any_table(chexpert / "train.csv")
    target, mask = make_targets(table, parse_uncertain_policy(uncertain), blank, seed=0)
    assert document["blank"] == blank
    for column, label in enumerate(LABELS):
        used = target[mask[:, column], column]
        counts = document["labels"][label]
        assert counts["positives"] == (used >= 0.5).sum()
        assert counts["negatives"] == ((used >= 0) & (used < 0.5)).sum()
        assert counts["open"] == (used == -1).sum()
        assert counts["masked"] == len(target) - len(used)
        assert counts["mean_target"] == pytest.approx(used[used >= 0].mean(), abs=0.05)
    if policy != "multiclass":  # as training weighs positives
        weights = positive_weights(*map(torch.from_numpy, (target, mask))).tolist()
        for label, weight in zip(LABELS, weights, strict=True):
            expected = document["labels"][label]["pos_weight"]
            assert expected is None or weight == pytest.approx(min(expected, 20), rel=0.1)


def test_a_label_left_with_one_class_is_named(real_csv: Path) -> None:
    done = run(real_csv, "--policy", "best,blank=ignore")
    warning = "Warning: No Finding is left with one class: 22,381 positives and 0 negatives"
    assert done.stderr == f"{warning}\nnext: pipeline audit {real_csv}\n"
    taught = report(real_csv, "--policy", "selftrained")["policy"]["labels"]["Edema"]
    assert (taught["positives"], taught["open"], taught["masked"]) == (52_246, 12_984, 0)


def test_bars_show_the_numbers_and_hatch_what_is_not_annotated(chexpert: Path) -> None:
    table = read_any_table(chexpert / "train.csv")
    column = table.schema.get_field_index("Fracture")
    table = table.set_column(column, "Fracture", pa.array([NOT_ANNOTATED] * len(table), pa.int8()))
    statistics, axes = count_labels(table), Panel((4, 4)).axes
    draw_states(statistics, axes)
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    for state, row in zip(("positive", "uncertain", "negative", "blank"), widths[:4], strict=True):
        assert row == pytest.approx([100 * counts[state] / 48 for counts in statistics["labels"].values()])
    assert widths[4] == [100.0 if label == "Fracture" else 0.0 for label in LABELS]
    bars = axes.containers[-1]
    assert (bars.get_label(), bars[0].get_hatch()) == ("not annotated", "////")


def test_heat_map_shows_the_share_of_the_row(chexpert: Path) -> None:
    table = read_any_table(chexpert / "train.csv")
    frame = (table.to_pandas()[list(LABELS)] == 1).astype(int)
    shares = 100 * (frame.T @ frame).div(frame.sum(), axis=0)
    axes = Panel((4, 4)).axes
    draw_cooccurrence(count_cooccurrence(table), axes)
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    pairs = ((x, y) for x in range(len(LABELS)) for y in range(len(LABELS)) if x != y)
    assert shown == {(x, y): f"{shares.iloc[y, x]:.0f}" for x, y in pairs}


def test_facts_that_are_missing_are_groups_of_their_own(chexpert: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(chexpert / "valid.csv")
    path = tmp_path / "test_labels.csv"
    frame[["Path", *LABELS]].to_csv(path, index=False)  # as the test set has them
    for variable, name in (("sex", "Unknown"), ("age", "unknown"), ("projection", "none")):
        groups = count_groups(read_any_table(path), variable)["groups"]
        assert {group: counts["images"] for group, counts in groups.items()} == {name: 12}
    frame.loc[0, "Sex"] = "Unknown"
    frame["Age"] = [0, 17, 18, 39, 40, 59, 60, 79, 80, 99, 20, 20]
    frame.to_csv(path, index=False)
    assert list(count_groups(read_any_table(path), "sex")["groups"]) == ["Female", "Male", "Unknown"]
    bands = count_groups(read_any_table(path), "age")["groups"]
    sizes = {"0-17": 2, "18-39": 4, "40-59": 2, "60-79": 2, "80+": 2}
    assert {band: group["images"] for band, group in bands.items()} == sizes


def test_names_of_groups_are_text(chexpert: Path, tmp_path: Path) -> None:
    """No markup of rich, no formula of matplotlib, no command to the terminal."""
    frame = pd.read_csv(chexpert / "train.csv")
    frame["Sex"] = ["[/x]", "$a_{$", "\x1b[31mF"] * 16
    frame.to_csv(tmp_path / "train.csv", index=False)
    printed = run(tmp_path / "train.csv", "--by", "sex", "--html", tmp_path / "labels.html").stdout
    assert all(f"{name} (n = 16)" in printed for name in ("[/x]", "$a_{$", "\\x1b[31mF"))


def test_the_table_and_the_csv_are_those_of_the_json(chexpert: Path) -> None:
    frame = pd.read_csv(io.StringIO(run(chexpert, "--format", "csv").stdout), index_col="label")
    labels, printed = report(chexpert)["labels"], run(chexpert).stdout
    assert frame.drop(columns="not_annotated").to_dict() == pd.DataFrame(labels).T.to_dict()
    assert printed.startswith("60 images, 40 studies, 20 patients")
    cells = [cell.strip() for line in printed.splitlines() if "Edema" in line for cell in line.split("│")]
    assert cells[2:6] == [str(labels["Edema"][state]) for state in ("positive", "uncertain", "negative", "blank")]
    frame = pd.read_csv(io.StringIO(run(chexpert, "--by", "sex", "--format", "csv").stdout))
    for group, counts in report(chexpert, "--by", "sex")["by"]["groups"].items():
        chosen = frame[frame.group == group].set_index("label")
        assert chosen.positive.to_dict() == {label: row["positive"] for label, row in counts["labels"].items()}
