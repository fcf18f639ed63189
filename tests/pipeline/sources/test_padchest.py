"""PadChest, in its own layout: the real table, and a small folder of films of 10 and 12 bits."""

import ast
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.labels import LABELS
from pipeline.sources import padchest
from pipeline.sources.findings import EVERY, read_findings
from tests.conftest import run_pipeline, shipped_table
from tests.layouts import PADCHEST_ROWS, read_mapping, shard, write_padchest

TABLE = f"{padchest.SET.tables['train'][0]}.gz"


PNG = ("--size", 320, "--encoding", "png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_padchest(tmp_path / "PadChest")
    return tmp_path / "PadChest"


@pytest.mark.soak
def test_the_real_table_agrees_with_a_count_of_its_words() -> None:
    path = shipped_table(TABLE)
    report = json.loads(run_pipeline("stats", path, "--by", "projection", "--format", "json").stdout)
    assert (report["images"], report["patients"]) == (160_861, 67_625)
    groups = {name: group["images"] for name, group in report["by"]["groups"].items()}
    assert groups == {"AP": 14_346 + 4_559, "PA": 91_728, "none": 49_579 + 630 + 11 + 8}
    rows = pd.read_csv(path, usecols=["Labels"])["Labels"].fillna("[]").value_counts()
    lists = [{word.strip() for word in ast.literal_eval(text)} - {"", "suboptimal study"} for text in rows.index]

    def having(names: Iterable[str]) -> "pd.Series[bool]":
        wanted = set(names)
        return pd.Series([not wanted.isdisjoint(words) for words in lists], rows.index)

    positive = pd.DataFrame({label: having(names) for label, names in read_mapping("padchest").items()})
    positive["No Finding"] &= ~positive.drop(columns=["No Finding", "Support Devices"]).any(axis=1)
    opened = {label: having(names) for label, names in read_mapping("padchest", "not annotated").items()}
    opened["Lung Opacity"] = positive[["Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"]].any(axis=1)
    opened["Enlarged Cardiomediastinum"] = positive["Cardiomegaly"]
    opened["Consolidation"] = positive["Pneumonia"] | positive["Lung Opacity"]
    silent = opened.pop(EVERY) | pd.Series([not words for words in lists], rows.index)
    found = positive.drop(columns=["No Finding", "Support Devices"]).any(axis=1)
    for label in LABELS:
        unsaid = silent | opened.get(label, False)
        unsaid &= ~positive[label] & ~(found if label == "No Finding" else False)
        counts = report["labels"][label]
        assert (counts["positive"], counts["not_annotated"]) == (rows[positive[label]].sum(), rows[unsaid].sum()), label


def test_the_mapping_has_torchxrayvision_s_words_but_for_named_differences() -> None:
    """Its PC_Dataset looks for substrings: these words it counts, and we do not, or the other way round."""
    words = read_findings("padchest").names
    infiltration = "infiltrat|interstitial pattern|ground glass pattern|alveolar pattern|consolidation".split("|")
    theirs = {
        "Lung Opacity": (*infiltration, "air bronchogram"),
        "Pleural Other": ("pleural_thickening", "pleural thickening"),
        "Consolidation": ("consolidation", "air bronchogram"),
        "Support Devices": ("device", "pacemaker"),
        "Lung Lesion": ("nodule", "mass"),
        "Pleural Effusion": ("effusion",),
    }
    same = ("Edema", "Cardiomegaly", "Pneumonia", "Atelectasis", "Pneumothorax", "Fracture")
    theirs |= {label: (label.lower(),) for label in same}
    extra = {
        label: {word for word in words if any(part in word for part in parts)} - set(read_mapping("padchest")[label])
        for label, parts in theirs.items()
    }
    assert {label: found for label, found in extra.items() if found} == {
        "Lung Lesion": {"pseudonodule", "mass"}
        | {f"{place} mass" for place in ("mediastinal", "pleural", "breast", "soft tissue")},
        "Pleural Effusion": {"pericardial effusion"},
    }


def test_all_rows_make_other_shards(folder: Path) -> None:
    rows = shard(folder, *PNG, "--set", "padchest-all")
    assert len(rows) == len(PADCHEST_ROWS)
    assert {label: rows["34_a"][label] for label in LABELS if rows["34_a"][label] != -2} == {
        "No Finding": 0,
        "Lung Lesion": 1,
    }
    assert {rows["35_a"][label] for label in LABELS} == {-2}
    out = folder.parent / "out"
    again = run_pipeline("shards", folder, out, "--encoding", "png", "--views", "all", "--dev", 0)
    assert again.returncode == 1
    assert again.stderr.startswith(f"Error: {out} holds other shards: set ")


def test_the_table_says_how_many_bits_a_png_uses(folder: Path) -> None:
    levels = np.array([[0, 1023], [512, 256]], np.uint16)
    Image.fromarray(levels << 6).save(folder / "0" / "2053_k6ga29.png")  # 12 bits, it says; scaled to 16
    Image.fromarray(levels).save(folder / "0" / "31_km0qf9.png")  # of 10 bits
    shard(folder, *PNG)
    with tarfile.open(folder.parent / "out" / "train-000000.tar") as tar:
        for name in ("2053_k6ga29.png", "31_km0qf9.png"):
            file = tar.extractfile(name)
            assert file is not None
            assert np.array(Image.open(file)).tolist() == [[0, 255], [128, 64]]
