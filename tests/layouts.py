"""Small data sets of synthetic images, each in its true layout: its files, its columns, and its quirks.

A function a set, which writes it into a folder that does not exist yet. The tables lie in tests/tables: NIH's list
without a last line break, CheXpert Plus's report with one, MIMIC's studies in three orders, one without labels,
PadChest's `nan` for what is missing, VinDr's three readers in train and one consensus in test. Facts: docs/data.md.
"""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.labels import LABELS
from pipeline.manifest import read_manifest, read_table
from pipeline.sources.rows import read_splits
from pipeline.sources.sets import find_source
from pipeline.synthetic.sample import write_sample
from tests.conftest import REPOSITORY, run_pipeline
from tests.dicoms import make_dicom

TABLES = REPOSITORY / "tests" / "tables"


def read_cases(name: str) -> list[list[str]]:
    """The cells of each line but the first of a table of cases, in which \\n is a line break."""
    lines = (TABLES / name).read_text().splitlines()[1:]
    return [[cell.strip(" ").replace("\\n", "\n") for cell in line.split(" | ")] for line in lines]


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of one of the tables, or of a CSV elsewhere."""
    with (TABLES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def read_mapping(name: str, state: str = "positive") -> dict[str, list[str]]:
    """Label → the findings of a set that have this state for it in findings.csv."""
    findings: dict[str, list[str]] = {}
    for row in read_rows(str(REPOSITORY / "pipeline" / "sources" / "findings.csv")):
        if (row["set"], row["state"]) == (name, state):
            findings.setdefault(row["label"], []).append(row["finding"])
    return findings


PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
PLUS_TABLE = "df_chexpert_plus_240401.csv"
NIH_ROWS = read_rows("nih/Data_Entry_2017_v2020.csv")
NIH_TEST = 2  # the last rows are in the test list
MIMIC_IMAGES = read_rows("mimic/mimic-cxr-2.0.0-split.csv")
PADCHEST_ROWS = read_rows(f"padchest/{PADCHEST}")
PLUS_FILMS = [row["path_to_image"].removesuffix(".jpg") for row in read_rows(f"chexpert-plus/{PLUS_TABLE}")]


def draw(path: Path, number: int, *, bits: int = 8, kind: str | None = None, mode: str = "L") -> None:
    """A film of 64×64 smooth noise, of 8 bits, or of some of 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6), dtype=np.uint8)
    film = Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)
    deep = np.asarray(film).astype(np.uint16) << (bits - 8)
    if kind == "DICOM":
        path.write_bytes(make_dicom(deep, BitsStored=bits, HighBit=bits - 1))
    else:
        (Image.fromarray(deep) if bits > 8 else film.convert(mode)).save(path, kind)


def shard(folder: Path, *options: object) -> dict[str, dict[str, Any]]:
    """Key → row, with its split, of the shards of all views in `out` beside a folder."""
    out = folder.parent / "out"
    run_pipeline("shards", folder, out, "--size", 32, "--views", "all", "--dev", 0, "--workers", 1, *options)
    run_pipeline("verify", out, "--deep")
    tables = {name: read_table(out, split) for name, split in read_manifest(out).splits.items()}
    return {row["key"]: row | {"split": name} for name, table in tables.items() for row in table.to_pylist()}


def list_rows(home: Path) -> list[str]:
    """A line for each image of a set's folder, as in tests/tables/rows.txt."""
    splits, *_ = read_splits(find_source(home, {}, []), views="all", dev=0, seed=0)
    lines = []
    for split, table in splits.items():
        for row in table.drop_columns(["path", "file"]).to_pylist():
            states = "".join({1: "+", 0: "-", -1: "?", None: ".", -2: "x"}[row.pop(label)] for label in LABELS)
            facts = list(map(str, row.values()))
            lines.append(" ".join([split, *facts[:7], states, *facts[7:]]))
    return sorted(lines)


def copy_tables(name: str, home: Path, *, packed: bool = False) -> None:
    """The set's tables, as they are or gzipped."""
    for table in (path for path in (TABLES / name).rglob("*") if path.is_file()):
        path, content = home / table.relative_to(TABLES / name), table.read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(content) if packed else content)


def write_chexpert(home: Path) -> None:
    """CheXpert: train.csv and valid.csv, JPEGs by patient, study and view."""
    write_sample(home, images=24, workers=1)
    for note in home.rglob("SYNTHETIC.txt"):  # by which shards of drawn films are told
        note.unlink()


def write_nih(home: Path) -> None:
    """NIH ChestX-ray14: images in two of twelve folders, one of them in color."""
    copy_tables("nih", home)
    for number, row in enumerate(NIH_ROWS):
        folder = home / f"images_{1 + number % 2:03d}" / "images"
        draw(folder / row["Image Index"], number, mode="RGBA" if number == 0 else "L")


def write_mimic(home: Path) -> None:
    """MIMIC-CXR-JPG: gzipped tables, images by patient and study."""
    copy_tables("mimic", home, packed=True)
    for number, row in enumerate(MIMIC_IMAGES):
        folder = home / "files" / f"p{row['subject_id']}"[:3] / f"p{row['subject_id']}" / f"s{row['study_id']}"
        draw(folder / f"{row['dicom_id']}.jpg", number, kind="JPEG")


def write_plus(home: Path) -> None:
    """CheXpert Plus: PNGs that the table calls .jpg, labels as JSON lines."""
    copy_tables("chexpert-plus", home)
    for number, film in enumerate(PLUS_FILMS):
        draw(home / "PNG" / f"{film}.png", number)


def write_padchest(home: Path) -> None:
    """PadChest: a gzipped table, PNGs of 10 or 12 bits of 16."""
    copy_tables("padchest", home, packed=True)
    for number, row in enumerate(PADCHEST_ROWS):
        draw(home / row["ImageDir"] / row["ImageID"], number, bits=int(row["BitsStored_DICOM"]))


def write_vindr(home: Path) -> None:
    """VinDr-CXR: DICOMs of 12 bits, named by their number."""
    copy_tables("vindr", home)
    for split in ("train", "test"):
        for name in {row["image_id"] for row in read_rows(f"vindr/annotations/image_labels_{split}.csv")}:
            draw(home / split / f"{name}.dicom", int(name, 16), bits=12, kind="DICOM")


SETS = {"chexpert": write_chexpert, "chexpert-plus": write_plus, "mimic": write_mimic, "nih": write_nih}
SETS |= {"padchest": write_padchest, "vindr": write_vindr}
