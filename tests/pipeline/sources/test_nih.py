"""NIH ChestX-ray14, in its own layout: the real table, and a small folder of drawn films."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import nih
from tests.conftest import run_pipeline, shipped_table
from tests.layouts import NIH_TEST as TEST
from tests.layouts import read_mapping, write_nih


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_nih(tmp_path / "ChestX-ray14")
    return tmp_path / "ChestX-ray14"


def shard(folder: Path, *options: object) -> Path:
    out = folder.parent / "out"
    made = run_pipeline("shards", folder, out, "--size", 32, "--dev", 0.5, "--seed", 1, "--workers", 1, *options)
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="module")
def real_table() -> Path:
    """NIH's whole table."""
    return shipped_table("Data_Entry_2017_v2020.csv.gz")


def test_the_real_table_has_the_published_counts(real_table: Path) -> None:
    report = json.loads(run_pipeline("stats", real_table, "--format", "json").stdout)
    assert (report["images"], report["patients"]) == (112_120, 30_805)
    frame = pd.read_csv(real_table)
    findings = frame["Finding Labels"].str.get_dummies("|").astype(bool)
    for label, names in read_mapping("nih").items():
        assert report["labels"][label]["positive"] == findings[list(names)].any(axis=1).sum(), label
    opened = (findings["Pneumonia"] | findings["Infiltration"]) & ~findings["Consolidation"]
    unannotated = {label: counts["not_annotated"] for label, counts in report["labels"].items()}
    assert {label: count for label, count in unannotated.items() if count} == {
        "Enlarged Cardiomediastinum": 112_120,
        "Fracture": 112_120,
        "Support Devices": 112_120,
        "Lung Opacity": 19_632,
        "Consolidation": opened.sum(),
    }
    assert report["labels"]["Lung Opacity"]["share_positive"] == round(19_894 / (112_120 - 19_632), 4)
    groups = json.loads(run_pipeline("stats", real_table, "--by", "projection", "--format", "json").stdout)["by"][
        "groups"
    ]
    assert {name: group["images"] for name, group in groups.items()} == {"AP": 44_810, "PA": 67_310}


@pytest.mark.parametrize("blank", ["zeros", "ignore"])
def test_what_is_not_annotated_is_masked_under_every_policy(folder: Path, blank: str) -> None:
    (batch,) = open_shards(shard(folder))["test"].batches(TEST, 32, blank=blank, epoch=None)
    masked = {label for column, label in enumerate(LABELS) if not batch.mask[:, column].any()}
    assert masked == {"Enlarged Cardiomediastinum", "Fracture", "Support Devices"}
    opacity = LABELS.index("Lung Opacity")
    assert batch.mask[:, opacity].sum() == 1  # not of the film with Pneumonia alone
    assert set(batch.target[~batch.mask]) == {0.0}


def test_a_folder_without_its_lists_or_of_another_set_is_named(folder: Path) -> None:
    (folder / "test_list.txt").unlink()
    with pytest.raises(DataError, match=r": test_list.txt is missing: NIH's official splits are two lists, or none"):
        nih.SET.find_tables(folder)
    failed = run_pipeline("shards", folder, folder.parent / "out", "--set", "chexpert")
    assert failed.stderr == (
        f"Error: {folder}: no dataset with a train.csv, valid.csv or test_labels.csv (CheXpert); "
        "it holds Data_Entry_2017_v2020.csv, images_001, images_002, train_val_list.txt\n"
    )
    failed = run_pipeline("shards", folder, folder.parent / "out", "--set", "pad")
    assert "'pad' is not one of 'chexpert-plus', 'mimic', 'nih', 'padchest', 'padchest-all'" in failed.stderr


def test_a_patient_in_both_lists_is_refused(folder: Path) -> None:
    train, test = (folder / nih.LISTS[split] for split in ("train", "test"))
    train.write_text(train.read_text().replace("00000001_001.png\n", ""))
    test.write_text(test.read_text() + "00000001_001.png\n")
    failed = run_pipeline("shards", folder, folder.parent / "out")
    assert failed.stderr == "Error: 00000001 is in train and test; splits must not share patients\n"


def test_kaggle_s_copy_without_lists_is_train(folder: Path) -> None:
    for name in nih.LISTS.values():
        (folder / name).unlink()
    (folder / nih.TABLES[0]).rename(folder / "Data_Entry_2017.csv")
    film = next(folder.glob("images_*/images/00000002_000.png"))
    film.rename(film.with_suffix(".PNG"))
    out = folder.parent / "out"
    made = run_pipeline("shards", folder, out, "--size", 32, "--dev", 0, "--workers", 1)
    assert made.returncode == 0, made.stderr
    assert {name: split.samples for name, split in read_manifest(out).splits.items()} == {"train": 6}
    film.with_suffix(".png").touch()
    failed = run_pipeline("shards", folder, out, "--dry-run")
    assert failed.stderr == (
        f"Error: {film.with_suffix('.PNG')} and {film.name}: which of them is the image? Move one away\n"
    )


def test_what_blanks_mean_is_said_by_the_owner_of_a_set(chexpert: Path, tmp_path: Path) -> None:
    for name in ("train.csv", "valid.csv"):
        frame = pd.read_csv(chexpert / name, dtype=str)
        frame.assign(Fracture="").to_csv(chexpert / name, index=False)
    out = tmp_path / "out"
    words = ("shards", str(chexpert), str(out), "--size", "32", "--workers", "1")
    assert run_pipeline(*words).returncode == 0
    assert read_manifest(out).not_annotated == ()  # CheXpert's labeler looked for all 14
    shutil.rmtree(out)
    refused = run_pipeline(*words, "--name", "ours")
    rest = [label for label in LABELS if label != "Fracture"]
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: Fracture: blank in every row. ")
    assert refused.stderr.endswith(f' such as: --annotated "{",".join(rest)}" --blanks not-annotated\n')
    wrong = run_pipeline(*words, "--name", "ours", "--annotated", "edema")
    assert "--annotated: No Finding, " in wrong.stderr
    assert wrong.returncode == 1
    assert "'Oedema' is none of No Finding, " in run_pipeline(*words, "--annotated", "Oedema").stderr
    made = run_pipeline(*words, "--name", "ours", "--annotated", ",".join(rest).lower())
    assert made.returncode == 0, made.stderr
    assert read_manifest(out).not_annotated == ("Fracture",)
    assert read_manifest(out).options["annotated"] == rest
    counts = json.loads(run_pipeline("stats", out, "--format", "json").stdout)["labels"]
    assert counts["Fracture"]["not_annotated"] == sum(split.samples for split in read_manifest(out).splits.values())
    assert counts["Fracture"]["share_positive"] is None
    assert counts["Edema"]["not_annotated"] == 0
    assert counts["Edema"]["blank"] > 0
    shutil.rmtree(out)
    assert run_pipeline(*words, "--name", "ours", "--blanks", "not-annotated").returncode == 0
    counts = json.loads(run_pipeline("stats", out, "--format", "json").stdout)["labels"]
    assert {label: entry["blank"] for label, entry in counts.items()} == dict.fromkeys(LABELS, 0)
