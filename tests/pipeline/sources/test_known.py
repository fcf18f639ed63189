"""The known sets in their own layouts: real tables where they are, and small folders of synthetic images."""

import ast
import gzip
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline import DataError, open_shards
from pipeline.images import Original
from pipeline.labels import LABELS
from pipeline.manifest import read_manifest
from pipeline.sources import nih, plus, vindr
from pipeline.sources.sets import find_source
from pipeline.sources.words import EVERY, read_findings
from tests import layouts
from tests.conftest import run_pipeline, shipped_table
from tests.layouts import PADCHEST, PLUS_FILMS, read_cases, read_mapping, shard

MIMIC_KEYS = [f"p{row['subject_id']}_s{row['study_id']}_{row['dicom_id']}" for row in layouts.MIMIC_IMAGES]
PNG = ("--size", 320, "--encoding", "png")


def write(name: str, tmp_path: Path) -> Path:
    """A small folder of the set."""
    layouts.SETS[name](tmp_path / name)
    return tmp_path / name


def refuse(folder: Path, *options: object) -> str:
    """What sharding the folder says when it fails."""
    failed = run_pipeline("shards", folder, folder.parent / "out", *options, code=None)
    assert failed.returncode
    return failed.stderr


def count(table: Path, *options: object) -> dict[str, Any]:
    """What `stats` counts."""
    report: dict[str, Any] = json.loads(run_pipeline("stats", table, "--format", "json", *options).stdout)
    return report


@pytest.mark.parametrize(("file", "old", "new", "message"), read_cases("bad_cells.txt"))
def test_a_bad_cell_or_a_missing_table_is_named(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    name, _, table = file.partition(" ")
    home = write(name, tmp_path)
    path = home / table
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert old in content.decode()
    changed = content.decode().replace(old, new, 1).encode()
    path.write_bytes(gzip.compress(changed) if path.suffix == ".gz" else changed)
    if not old:
        path.unlink()
    stderr = refuse(home)
    assert message in stderr.splitlines()[-1]
    is_named = path.name.removesuffix(".gz") in stderr
    assert is_named or "splits must not" in message or "_list.txt" in message or "both" in message


# MIMIC-CXR-JPG


def test_the_radiologist_s_labels_are_those_of_test(tmp_path: Path) -> None:
    folder = write("mimic", tmp_path)
    cells = dict.fromkeys(sorted({*LABELS, "Airspace Opacity"} - {"Lung Opacity"}), "0.0") | {"Airspace Opacity": "1.0"}
    text = f"study_id,{','.join(cells)}\n50771383,{','.join(cells.values())}\n"
    (folder / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text(text)
    rows = shard(folder)
    assert [rows[key]["split"] for key in MIMIC_KEYS[5:7]] == ["test", "test_rest"]
    assert [rows[MIMIC_KEYS[5]][label] for label in ("Lung Opacity", "Edema", "Fracture")] == [1, 0, 0]


def test_ids_are_compared_as_ids_and_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    folder = write("mimic", tmp_path)
    path = folder / "mimic-cxr-2.0.0-chexpert.csv.gz"
    head, first, *rest = gzip.decompress(path.read_bytes()).decode().splitlines()
    rest = [row.replace(",5", ",s5", 1).replace("57375967", "999.0") for row in rest]
    path.write_bytes(gzip.compress("\n".join([head, first.replace("50414267", "050414267.0"), *rest]).encode()))
    (target := folder / "more" / "files" / "p10" / "p10000032").parent.mkdir(parents=True)
    (folder / "files" / "p10" / "p10000032").rename(target)
    rows = shard(folder, "--root", folder / "more")  # where images of any patient may be
    assert (rows[MIMIC_KEYS[0]]["No Finding"], rows[MIMIC_KEYS[2]]["Edema"]) == (1, -1)
    assert {rows[MIMIC_KEYS[4]][label] for label in LABELS} == {-2}
    preview = run_pipeline("shards", folder, folder / "none", "--views", "all", "--dry-run", code=1).stdout
    assert f"{path.name}: 2 of 7 studies have no row, such as 53911762\n" in preview
    assert f"{path.name}: 1 of its studies are not in the data set, such as s999.0\n" in preview


def test_a_table_of_several_is_named(tmp_path: Path) -> None:
    failed = run_pipeline("stats", write("mimic", tmp_path) / "mimic-cxr-2.0.0-split.csv.gz", code=1)
    assert failed.stderr.endswith("one of several tables of MIMIC-CXR-JPG; name the folder that holds them\n")


# NIH ChestX-ray14


def test_nih_s_real_table_has_the_published_counts() -> None:
    path = shipped_table("Data_Entry_2017_v2020.csv.gz")
    report = count(path, "--by", "projection")
    assert (report["images"], report["patients"]) == (112_120, 30_805)
    findings = pd.read_csv(path)["Finding Labels"].str.get_dummies("|").astype(bool)
    for label, names in read_mapping("nih").items():
        assert report["labels"][label]["positive"] == findings[list(names)].any(axis=1).sum(), label
    opened = (findings["Pneumonia"] | findings["Infiltration"]) & ~findings["Consolidation"]
    unannotated = {label: counts["not_annotated"] for label, counts in report["labels"].items()}
    expected = dict.fromkeys(("Enlarged Cardiomediastinum", "Fracture", "Support Devices"), 112_120)
    expected |= {"Lung Opacity": 19_632, "Consolidation": opened.sum()}
    assert {label: number for label, number in unannotated.items() if number} == expected
    assert report["labels"]["Lung Opacity"]["share_positive"] == round(19_894 / (112_120 - 19_632), 4)
    assert {name: group["images"] for name, group in report["by"]["groups"].items()} == {"AP": 44_810, "PA": 67_310}


def test_what_is_not_annotated_is_masked_under_every_policy(tmp_path: Path) -> None:
    folder = write("nih", tmp_path)
    shard(folder)
    for blank in ("zeros", "ignore"):
        (batch,) = open_shards(tmp_path / "out")["test"].batches(layouts.NIH_TEST, 32, blank=blank, epoch=None)
        masked = {label for column, label in enumerate(LABELS) if not batch.mask[:, column].any()}
        assert masked == {"Enlarged Cardiomediastinum", "Fracture", "Support Devices"}
        assert batch.mask[:, LABELS.index("Lung Opacity")].sum() == 1  # not of the image with Pneumonia alone
        assert set(batch.target[~batch.mask]) == {0.0}


def test_a_folder_of_another_set_is_named(tmp_path: Path) -> None:
    folder = write("nih", tmp_path)
    wanted = "no dataset with a train.csv, valid.csv or test_labels.csv (CheXpert)"
    content = "it holds Data_Entry_2017_v2020.csv, images_001, images_002, test_list.txt and 1 more"
    assert refuse(folder, "--set", "chexpert") == f"Error: {folder}: {wanted}; {content}\n"


def test_a_patient_in_both_lists_is_refused(tmp_path: Path) -> None:
    folder = write("nih", tmp_path)
    train, test = (folder / nih.LISTS[split] for split in ("train", "test"))
    train.write_text(train.read_text().replace("00000001_001.png\n", ""))
    test.write_text(test.read_text() + "00000001_001.png\n")
    assert refuse(folder) == "Error: 00000001 is in train and test; splits must not share patients\n"


def test_kaggle_s_copy_without_lists_is_train(tmp_path: Path) -> None:
    folder = write("nih", tmp_path)
    for name in nih.LISTS.values():
        (folder / name).unlink()
    (folder / nih.TABLES[0]).rename(folder / "Data_Entry_2017.csv")
    image = next(folder.glob("images_*/images/00000002_000.png"))
    image.rename(image.with_suffix(".PNG"))
    assert [row["split"] for row in shard(folder).values()] == ["train"] * 6


# PadChest


@pytest.mark.soak
def test_padchest_s_real_table_agrees_with_a_count_of_its_words() -> None:
    path = shipped_table(f"{PADCHEST}.gz")
    report = count(path, "--by", "projection")
    assert (report["images"], report["patients"]) == (160_861, 67_625)
    groups = {name: group["images"] for name, group in report["by"]["groups"].items()}
    assert groups == {"AP": 14_346 + 4_559, "PA": 91_728, "none": 49_579 + 630 + 11 + 8}
    rows = pd.read_csv(path, usecols=["Labels"])["Labels"].fillna("[]").value_counts()
    lists = [{word.strip() for word in ast.literal_eval(text)} - {"", "suboptimal study"} for text in rows.index]

    def having(names: Iterable[str]) -> "pd.Series[bool]":
        wanted = set(names)
        return pd.Series([not wanted.isdisjoint(words) for words in lists], rows.index)

    positive = pd.DataFrame({label: having(names) for label, names in read_mapping("padchest").items()})
    ill = positive.drop(columns=["No Finding", "Support Devices"]).any(axis=1)
    positive["No Finding"] &= ~ill
    opened = {label: having(names) for label, names in read_mapping("padchest", "not annotated").items()}
    opened["Lung Opacity"] = positive[["Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"]].any(axis=1)
    opened["Enlarged Cardiomediastinum"] = positive["Cardiomegaly"]
    opened["Consolidation"] = positive["Pneumonia"] | positive["Lung Opacity"]
    silent = opened.pop(EVERY) | pd.Series([not words for words in lists], rows.index)
    for label in LABELS:
        unsaid = silent | opened.get(label, False)
        unsaid &= ~positive[label] & ~(ill if label == "No Finding" else False)
        counts = report["labels"][label]
        assert (counts["positive"], counts["not_annotated"]) == (rows[positive[label]].sum(), rows[unsaid].sum()), label


def test_the_mapping_has_torchxrayvision_s_words_but_for_named_differences() -> None:
    """Its PC_Dataset looks for substrings: these words it counts, and we do not, or the other way round."""
    words, mapping = read_findings("padchest").names, read_mapping("padchest")
    infiltration = "infiltrat|interstitial pattern|ground glass pattern|alveolar pattern|consolidation".split("|")
    parts = {
        "Lung Opacity": (*infiltration, "air bronchogram"),
        "Pleural Other": ("pleural_thickening", "pleural thickening"),
        "Consolidation": ("consolidation", "air bronchogram"),
        "Support Devices": ("device", "pacemaker"),
        "Lung Lesion": ("nodule", "mass"),
        "Pleural Effusion": ("effusion",),
    }
    same = ("Edema", "Cardiomegaly", "Pneumonia", "Atelectasis", "Pneumothorax", "Fracture")
    parts |= {label: (label.lower(),) for label in same}
    masses = {f"{place} mass" for place in ("mediastinal", "pleural", "breast", "soft tissue")}
    different = {"Lung Lesion": {"pseudonodule", "mass"} | masses, "Pleural Effusion": {"pericardial effusion"}}
    for label in parts:
        named = {word for word in words if any(part in word for part in parts[label])}
        assert named - {*mapping[label]} == different.get(label, set()), label


def test_all_rows_make_other_shards(tmp_path: Path) -> None:
    folder = write("padchest", tmp_path)
    rows = shard(folder, *PNG, "--set", "padchest-all")
    assert len(rows) == len(layouts.PADCHEST_ROWS)
    annotated = {label: rows["34_a"][label] for label in LABELS if rows["34_a"][label] != -2}
    assert annotated == {"No Finding": 0, "Lung Lesion": 1}
    assert {rows["35_a"][label] for label in LABELS} == {-2}
    again = refuse(folder, "--encoding", "png", "--views", "all", "--dev", 0)
    assert again.startswith(f"Error: {tmp_path / 'out'} holds other shards: set ")


def test_the_table_says_how_many_bits_a_png_uses(tmp_path: Path) -> None:
    folder = write("padchest", tmp_path)
    levels = np.array([[0, 1023], [512, 256]], np.uint16)
    Image.fromarray(levels << 6).save(folder / "0" / "2053_k6ga29.png")  # 12 bits, it says; scaled to 16
    Image.fromarray(levels).save(folder / "0" / "31_km0qf9.png")  # of 10 bits
    shard(folder, *PNG)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        for name in ("2053_k6ga29.png", "31_km0qf9.png"):
            tar.extract(name, tmp_path)
            assert np.array(Image.open(tmp_path / name)).tolist() == [[0, 255], [128, 64]]


# CheXpert Plus


def test_facts_are_kept_and_reports_are_not(tmp_path: Path) -> None:
    shard(write("chexpert-plus", tmp_path))
    manifest = read_manifest(tmp_path / "out")
    assert list(manifest.facts) == [*plus.SET.facts, *Original._fields]
    assert (manifest.dataset["name"], manifest.dataset["patients"]) == ("chexpert-plus", "chexpert")
    assert not any(b"Heart" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_labels_are_joined_whatever_folder_stands_before_a_path(tmp_path: Path) -> None:
    folder = write("chexpert-plus", tmp_path)
    path = folder / "chexbert_labels" / "report_fixed.json"
    text = path.read_text()
    path.write_text(text.replace('"train/', '"CheXpert-v1.0/train/').replace(".jpg", ".PNG"))
    notes: list[str] = []
    tables = plus.SET.read(find_source(folder, {}, []), notes.append)
    assert tables["train"]["Edema"].to_pylist() == [0, 0, -2, 1, 0]
    assert notes == [f"{path.name}: 1 of 6 images have no row, such as {PLUS_FILMS[2]}.jpg"]
    path.write_text(text.replace("/patient", "/person"))
    with pytest.raises(DataError, match=r"report_fixed\.json: no row of these 6 images: its first is '\w+/person"):
        plus.SET.read(find_source(folder, {}, []))


def test_dicoms_are_read_where_there_are_no_pngs(tmp_path: Path) -> None:
    folder = write("chexpert-plus", tmp_path)
    source = find_source(folder, {}, [])
    for name in PLUS_FILMS:
        path = folder / "DICOM" / "Uncompressed" / f"{name}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    paths = [f"{name}.jpg" for name in PLUS_FILMS]
    assert plus.SET.locate(paths, source.roots) == [f"{folder}/PNG/{name}.png" for name in PLUS_FILMS]
    (folder / "PNG").rename(tmp_path / "PNG")
    assert plus.SET.locate(paths, source.roots) == [f"{folder}/DICOM/Uncompressed/{name}.dcm" for name in PLUS_FILMS]


def test_chexpert_s_own_labels_are_read_without_chexbert_s(tmp_path: Path) -> None:
    folder = write("chexpert-plus", tmp_path)
    (folder / plus.LABEL_FILES[0]).unlink()
    head = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS))
    cells = ",".join("1.0" if label == "Fracture" else "" for label in LABELS)
    (folder / "train.csv").write_text(f"{head}\nCheXpert-v1.0/{PLUS_FILMS[2]}.jpg,Male,50,Frontal,PA,{cells}\n")
    fractures = {key: row["Fracture"] for key, row in shard(folder).items() if row["Fracture"] != -2}
    assert fractures == {"patient00002_study1_view1_frontal": 1}


# VinDr-CXR


def test_vinbigdata_s_table_agrees_with_a_count_of_its_votes(tmp_path: Path) -> None:
    table = shipped_table("vinbigdata-train.csv.gz")
    report = count(table)
    assert (report["images"], report["patients"]) == (15_000, 15_000)
    rows = pd.read_csv(table, usecols=["image_id", "class_name", "rad_id"])
    assert rows.groupby("image_id")["rad_id"].nunique().eq(3).all()
    votes = {}
    for label, names in read_mapping("vindr").items():
        named = rows[rows["class_name"].isin(names)].drop_duplicates(["image_id", "rad_id"])
        votes[label] = named.groupby("image_id").size().reindex(rows["image_id"].unique(), fill_value=0)
    frame = pd.DataFrame(votes)
    kinds = frame[["Lung Lesion", "Consolidation", "Atelectasis"]].gt(0).any(axis=1)
    absent = {"Edema", "Pneumonia", "Fracture", "Enlarged Cardiomediastinum", "Support Devices"}
    for label in set(LABELS) - absent:
        counts = report["labels"][label]
        wanted = (frame[label].ge(2).sum(), frame[label].eq(1).sum())
        assert (counts["positive"], counts["uncertain"]) == wanted, label
        open_if = {"Lung Opacity": kinds, "Consolidation": frame["Lung Opacity"].gt(0)}.get(label, False)
        assert counts["not_annotated"] == (open_if & frame[label].eq(0)).sum()
    assert {report["labels"][label]["not_annotated"] for label in absent} == {15_000}
    home = tmp_path / "vinbigdata"
    home.mkdir()
    rows.head(9).to_csv(home / "train.csv", index=False)  # a name that CheXpert has, too
    assert run_pipeline("stats", home).stdout.startswith(f"{rows.head(9)['image_id'].nunique()} images, ")
    (home / "train.csv").write_text(f"image_id,class_name,rad_id\n{1:032x},Hernia,R1\n")
    failed = run_pipeline("stats", home / "train.csv", code=1).stderr
    assert failed.endswith("/train.csv, line 2, column class_name: 'Hernia' is not a finding of this set\n")


def test_an_image_is_taken_before_what_lies_beside_it(tmp_path: Path) -> None:
    """Of the same name: the DICOM before a mask, a PNG before a JPEG, and none before two of a kind."""
    folder = write("vindr", tmp_path)
    image = folder / "train" / f"{0:032x}.dicom"
    paths, roots = [f"train/{image.name}"], [folder]
    for suffix in (".png", ".jpg", ".npz"):
        image.with_suffix(suffix).touch()
    assert vindr.SET.locate(paths, roots) == [str(image)]
    image.unlink()
    assert vindr.SET.locate(paths, roots) == [str(image.with_suffix(".png"))]
    image.with_suffix(".PNG").touch()
    with pytest.raises(DataError, match=r"0\.PNG and 0+\.png: which of them is the image\? Move one away$"):
        vindr.SET.locate(paths, roots)
