import csv
import io
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from tests.conftest import run_pipeline

# shared by everyone who has the set: positive/uncertain/negative/blank, all rows and frontal rows
GOLDEN = {
    "No Finding": ("22381/0/0/201033", "16974/0/0/174053"),
    "Enlarged Cardiomediastinum": ("10798/12403/21638/178575", "9187/10286/15345/156209"),
    "Cardiomegaly": ("27000/8087/11116/177211", "23385/6707/7869/153066"),
    "Lung Opacity": ("105581/5598/6599/105636", "94211/4431/5051/87334"),
    "Lung Lesion": ("9186/1488/1270/211470", "7040/1108/776/182103"),
    "Edema": ("52246/12984/20726/137458", "49675/11818/15915/113619"),
    "Consolidation": ("14783/27742/28097/152792", "12983/24381/19608/134055"),
    "Pneumonia": ("6039/18770/2799/195806", "4675/15981/1875/168496"),
    "Atelectasis": ("33376/33739/1328/154971", "29720/29863/1025/130419"),
    "Pneumothorax": ("19448/3145/56341/144480", "17693/2708/47823/122803"),
    "Pleural Effusion": ("86187/11628/35396/90203", "76899/9578/25299/79251"),
    "Pleural Other": ("3523/2653/316/216922", "2505/1812/209/186501"),
    "Fracture": ("9040/642/2512/211220", "7436/499/1993/181099"),
    "Support Devices": ("116001/1079/6137/100197", "107170/915/5340/77602"),
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_pipeline("stats", *arguments)


@pytest.mark.parametrize(("views", "column"), [("all", 0), ("frontal", 1)])
def test_golden_counts_of_the_real_table(real_csv: Path, views: str, column: int) -> None:
    document = json.loads(run(real_csv, "--views", views, "--format", "json").stdout)
    found = {
        label: "/".join(str(counts[state]) for state in ("positive", "uncertain", "negative", "blank"))
        for label, counts in document["labels"].items()
    }
    assert found == {label: golden[column] for label, golden in GOLDEN.items()}
    totals = {unit: document[unit] for unit in ("images", "studies", "patients")}
    if views == "all":
        assert totals == {"images": 223_414, "studies": 187_641, "patients": 64_540}
    assert totals["images"] == (223_414, 191_027)[column]


def test_sources_agree(chexpert: Path, shards: tuple[Path, Manifest]) -> None:
    """A CheXpert folder, its parent's only set, and the shards made from it have the same frontal labels."""
    folder = run(chexpert, "--views", "frontal", "--format", "json")
    assert folder.returncode == 0
    assert run(shards[0], "--format", "json").stdout == folder.stdout
    frame = pd.concat([pd.read_csv(chexpert / name) for name in ("train.csv", "valid.csv")])
    frame = frame[frame["Frontal/Lateral"] == "Frontal"]
    document = json.loads(folder.stdout)
    assert document["images"] == len(frame)
    assert document["labels"]["Edema"] == {
        "positive": (frame["Edema"] == 1).sum(),
        "uncertain": (frame["Edema"] == -1).sum(),
        "negative": (frame["Edema"] == 0).sum(),
        "blank": frame["Edema"].isna().sum(),
        "share_positive": round((frame["Edema"] == 1).mean(), 4),
    }


def test_one_split(chexpert: Path, shards: tuple[Path, Manifest]) -> None:
    assert json.loads(run(chexpert, "--split", "valid", "--format", "json").stdout)["images"] == 12
    assert json.loads(run(shards[0], "--split", "valid", "--format", "json").stdout)["images"] == 8
    wrong = run(chexpert, "--split", "test")
    assert (wrong.returncode, wrong.stderr) == (
        1,
        f"Error: split 'test' does not exist; {chexpert} holds train, valid\n",
    )


def test_csv_and_table_show_the_json(chexpert: Path) -> None:
    document = json.loads(run(chexpert, "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(run(chexpert, "--format", "csv").stdout)))
    assert [row.pop("label") for row in rows] == list(LABELS)
    assert [{name: float(value) for name, value in row.items()} for row in rows] == list(
        document["labels"].values()
    )
    table = run(chexpert).stdout
    assert table.startswith("60 images, 40 studies, 20 patients")
    counts = document["labels"]["Edema"]
    cells = [cell.strip() for line in table.splitlines() if "Edema" in line for cell in line.split("│")]
    assert cells[2:6] == [str(counts[state]) for state in ("positive", "uncertain", "negative", "blank")]
