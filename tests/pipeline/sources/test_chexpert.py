import gzip
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources.rows import read_splits
from pipeline.sources.sets import find_set, find_source
from tests.conftest import run_pipeline, write_chexpert

SELECTION: dict[str, Any] = {"views": "all", "dev": 0.0, "seed": 0}


def files_of(folder: Path, *roots: Path) -> dict[str, list[str]]:
    """Split → the files found for its rows, sorted; all of them exist."""
    tables, *_ = read_splits(find_source(folder, {}, roots), **SELECTION)
    files = {split: sorted(table["file"].to_pylist()) for split, table in tables.items()}
    assert all(Path(file).is_file() for split in files.values() for file in split)
    return files


def test_the_folder_its_parent_and_any_name(chexpert: Path, tmp_path: Path) -> None:
    expected = {split: sorted(str(path) for path in (chexpert / split).rglob("*.jpg")) for split in ("train", "valid")}
    assert files_of(chexpert) == files_of(tmp_path) == expected
    renamed = chexpert.rename(tmp_path / "my data")
    assert [len(files) for files in files_of(renamed).values()] == [48, 12]


def test_aimi_batches(chexpert: Path, tmp_path: Path) -> None:
    """CSVs and valid patients in batch 1, train patients spread over the others, without a split folder."""
    names = ("batch 1 (validate & csv)", "batch 2 (train 1)", "batch 3 (train 2)", "batch 4 (train 3)")
    first, *others = batches = [tmp_path / "aimi" / f"CheXpert-v1.0 {name}" for name in names]
    for batch in batches:
        batch.mkdir(parents=True)
    for path in (chexpert / "train.csv", chexpert / "valid.csv", *(chexpert / "valid").iterdir()):
        shutil.move(path, first)
    for number, patient in enumerate(sorted((chexpert / "train").iterdir())):
        shutil.move(patient, others[number % 3])
    train = sorted(str(path) for batch in others for path in batch.rglob("*.jpg"))
    expected = {"train": train, "valid": sorted(str(path) for path in first.rglob("*.jpg"))}
    assert files_of(tmp_path / "aimi") == files_of(first) == expected
    # Downloaded to different disks: the other folders are named.
    disks = [batch.rename(tmp_path / f"disk{number}") for number, batch in enumerate(others)]
    assert [len(files) for files in files_of(first, *disks).values()] == [48, 12]


def test_the_test_set_has_paths_and_labels_only(tmp_path: Path) -> None:
    for split, csv, patients in (("test", "test_labels.csv", range(50, 55)), ("val", "val_labels.csv", range(40, 43))):
        rows = write_chexpert(tmp_path, split, patients)
        frame = pd.DataFrame(rows)[["Path", *LABELS]]
        frame["Path"] = frame["Path"].str.removeprefix("CheXpert-v1.0-small/")
        frame.to_csv(tmp_path / csv, index=False)
        (tmp_path / f"{split}.csv").unlink()
    tables, *_ = read_splits(find_source(tmp_path, {}, []), **SELECTION)
    assert {split: table.num_rows for split, table in tables.items()} == {"valid": 9, "test": 15}
    table = tables["test"].to_pandas()
    assert (table["view"] == np.where(table["path"].str.contains("lateral"), "lateral", "frontal")).all()
    assert table[["sex", "age", "projection"]].isna().all(axis=None)
    run_pipeline("shards", tmp_path, tmp_path / "out", "--size", 48)
    assert run_pipeline("stats", tmp_path / "out", "--split", "test").stdout.startswith("10 images, 10 studies, 5 p")


def test_csvs_of_ones_own(chexpert: Path, tmp_path: Path) -> None:
    frame = pd.read_csv(chexpert / "train.csv")
    for name, half in (("mine", frame[:24]), ("holdout", frame[24:])):
        half.to_csv(tmp_path / f"{name}.csv", index=False)
    splits = {"train": tmp_path / "mine.csv", "holdout": tmp_path / "holdout.csv"}
    tables, *_ = read_splits(find_source(chexpert, splits, []), **SELECTION)
    assert {split: table.num_rows for split, table in tables.items()} == {"train": 24, "holdout": 24}
    with pytest.raises(DataError, match=r"none.csv: no such file or folder$"):
        find_source(chexpert, {"train": tmp_path / "none.csv"}, [])


def test_folders_without_a_set_are_named(chexpert: Path, tmp_path: Path) -> None:
    half = shutil.copytree(chexpert, tmp_path / "half" / ".CheXpert-v1.0-small.tmp")  # of a killed `sample`
    four = "patient00001, patient00002, patient00003, patient00004"
    for folder, message in (
        (chexpert / "train", rf" with a df_chexp.* \(CheXpert\); it holds {four} and"),
        (tmp_path / "nothing", "nothing: no such folder$"),
        (half.parent, rf"^{half.parent}: no dataset with .*; it holds {re.escape(half.name)}\n"),
    ):
        with pytest.raises(DataError, match=message):
            find_set(folder)
    chexpert.rename(half.parent / "mine")
    assert files_of(half.parent).keys() == {"train", "valid"}
    shutil.copytree(half, half.parent / "second")
    with pytest.raises(DataError, match=r"CSVs in several folders \(mine, second\); name one of them"):
        find_set(half.parent)


def test_folders_that_may_not_be_read_are_passed_over(
    chexpert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files_of(chexpert)
    (tmp_path / "lost+found").mkdir()
    (chexpert / "lost+found").mkdir()

    def refuse(look: Any, path: Any) -> Any:
        if "lost+found" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    is_file, scandir = Path.is_file, os.scandir
    monkeypatch.setattr(Path, "is_file", lambda path: refuse(is_file, path))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(scandir, path))
    assert files_of(tmp_path) == files_of(chexpert) == expected


def test_dry_run_counts_and_writes_nothing(chexpert: Path, tmp_path: Path) -> None:
    missing = chexpert / "train/patient00002/study1/view1_frontal.jpg"
    missing.unlink()
    words = ("shards", chexpert, tmp_path / "out", "--size", 48, "--dry-run", "--dev", 0)
    lines = run_pipeline(*words, "--limit", 10).stdout.splitlines()
    dropped = "dropped: 16 by --views, 22 by --limit; 1 shards, about 0.0 MB"
    assert lines[0].startswith(f"train        48 rows, 10 kept, {dropped}")
    assert lines[-1] == "dry run: nothing was written"
    lines = run_pipeline(*words, code=1).stdout.splitlines()
    assert f"       1 images are missing, for example {missing}" in lines
    assert not (tmp_path / "out").exists()


def move_images(chexpert: Path, tmp_path: Path, layout: str) -> tuple[Path, str]:
    """Rearrange the folder; returns what is given as SOURCE, and the Path that the CSVs have for a split's folder."""
    (data := tmp_path / "data").mkdir()
    root = chexpert.rename(data / chexpert.name)
    if layout.startswith("beside"):
        for csv in [*root.glob("*.csv")]:
            csv.rename(data / csv.name)
        return (root if layout == "beside, folder given" else data), f"{root.name}/{{split}}/"
    if layout == "patients in the folder with a dot":
        for path in [*root.glob("*/patient*")]:
            path.rename(root / path.name)
        return root, "CheXpert-v1.0/"
    return root, "" if layout == "no folder in the CSV" else f"{root.name}/{{split}}/"


LAYOUTS = ("beside, parent given", "beside, folder given", "patients in the folder with a dot", "no folder in the CSV")


@pytest.mark.parametrize("layout", [*LAYOUTS, "JPG", "gzipped"])
def test_layouts_that_people_have(chexpert: Path, tmp_path: Path, layout: str) -> None:
    given, above = move_images(chexpert, tmp_path, layout)
    suffix = "JPG" if layout == "JPG" else "jpg"
    for path in [*tmp_path.rglob("view*.jpg")]:
        path.rename(path.with_suffix(f".{suffix}"))
    for csv in [*tmp_path.rglob("*.csv")]:
        text = csv.read_text().replace(f"CheXpert-v1.0-small/{csv.stem}/", above.format(split=csv.stem))
        csv.write_text(text.replace(".jpg", f".{suffix}"))
        if layout == "gzipped":
            csv.with_suffix(".csv.gz").write_bytes(gzip.compress(csv.read_bytes()))
            csv.unlink()
    assert [len(files) for files in files_of(given).values()] == [48, 12]
    *_, notes = read_splits(find_source(given, {}, []), **SELECTION)
    assert bool(notes) == (layout == "no folder in the CSV")


def test_images_in_another_folder_than_the_csv_says_are_counted(chexpert: Path, tmp_path: Path) -> None:
    train, old = chexpert / "train", chexpert / "old"
    expected = files_of(chexpert)
    shutil.copytree(train, old)
    assert files_of(chexpert) == expected
    (train / "patient00003").rename(tmp_path / "gone")
    (train / "patient00004/study1/view1_frontal.jpg").unlink()
    moved = [f"{old}/patient00003/study{study}" for study in ("1/view1_frontal", "1/view2_lateral", "2/view1_frontal")]
    moved.append(f"{old}/patient00004/study1/view1_frontal")
    assert [file for file in files_of(chexpert)["train"] if "/old/" in file] == [f"{name}.jpg" for name in moved]
    note = re.compile(
        rf"3 images are in another folder than the CSV says, for example {re.escape(str(old))}/(patient0000[34]\S+) "
        r"for CheXpert-v1\.0-small/train/\1"
    )
    for more in (["--dry-run"], []):
        run = run_pipeline("shards", chexpert, tmp_path / "out", "--size", 48, *more)
        assert len([line for line in run.stdout.splitlines() if note.fullmatch(line)]) == 1


def test_what_is_nowhere_is_missing_where_the_csv_says(chexpert: Path) -> None:
    shutil.rmtree(chexpert / "train/patient00003")
    (chexpert / "old/patient00003").mkdir(parents=True)
    tables, _, notes = read_splits(find_source(chexpert, {}, []), **SELECTION)
    missing = [file for file in tables["train"]["file"].to_pylist() if not Path(file).exists()]
    films = ("1/view1_frontal", "1/view2_lateral", "2/view1_frontal")
    assert sorted(missing) == [str(chexpert / f"train/patient00003/study{film}.jpg") for film in films]
    assert notes == ()


def test_the_bits_of_16_bit_images_are_seen(chexpert: Path, tmp_path: Path) -> None:
    """Films of 12 bits in PNGs of 16, among JPEGs."""
    csv = chexpert / "train.csv"
    frame = pd.read_csv(csv)
    for path in [*(chexpert / "train").rglob("*.jpg")][:4]:
        levels = np.asarray(Image.open(path)).astype(np.uint16)
        levels[0, 0] = 255
        Image.fromarray(levels * 16 + levels // 16).save(path.with_suffix(".png"))
        path.unlink()
        name = str(path.relative_to(chexpert))
        frame["Path"] = frame["Path"].str.replace(name, name.replace(".jpg", ".png"))
    frame.to_csv(csv, index=False)
    command = ("shards", chexpert, tmp_path / "out", "--size", 48, "--views", "all")
    note = "4 of the images: a 16-bit PNG read as 12 bits, by its highest level (--bits)"
    assert note in run_pipeline(*command).stdout
    assert "bits is None, not 12" in run_pipeline(*command, "--bits", 12, code=1).stderr


def test_what_blanks_mean_is_said_by_the_owner_of_a_set(chexpert: Path, tmp_path: Path) -> None:
    for name in ("train.csv", "valid.csv"):
        pd.read_csv(chexpert / name, dtype=str).assign(Fracture="").to_csv(chexpert / name, index=False)
    out, rest = tmp_path / "out", [label for label in LABELS if label != "Fracture"]

    def shard(*options: object, code: int = 0) -> str:
        shutil.rmtree(out, ignore_errors=True)
        return run_pipeline("shards", chexpert, out, "--size", 32, "--workers", 1, *options, code=code).stderr

    def count() -> dict[str, dict[str, Any]]:
        counts: dict[str, dict[str, Any]] = json.loads(run_pipeline("stats", out, "--format", "json").stdout)["labels"]
        return counts

    shard()
    assert read_manifest(out).not_annotated == ()  # CheXpert's labeler looked for all 14
    stderr = shard("--name", "ours", code=1)
    assert stderr.startswith("Error: Fracture: blank in every row. ")
    assert stderr.endswith(f' such as: --annotated "{",".join(rest)}" --blanks not-annotated\n')
    assert "--annotated: No Finding, " in shard("--name", "ours", "--annotated", "edema", code=1)
    assert "'Oedema' is none of No Finding, " in shard("--annotated", "Oedema", code=2)
    shard("--name", "ours", "--annotated", ",".join(rest).lower())
    manifest, counts = read_manifest(out), count()
    assert (manifest.not_annotated, manifest.options["annotated"]) == (("Fracture",), rest)
    assert counts["Fracture"]["not_annotated"] == sum(split.samples for split in manifest.splits.values())
    assert (counts["Fracture"]["share_positive"], counts["Edema"]["not_annotated"]) == (None, 0)
    assert counts["Edema"]["blank"] > 0
    shard("--name", "ours", "--blanks", "not-annotated")
    assert {label: entry["blank"] for label, entry in count().items()} == dict.fromkeys(LABELS, 0)
