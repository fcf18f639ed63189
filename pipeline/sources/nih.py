"""NIH ChestX-ray14: Data_Entry_2017_v2020.csv, the official lists, and images in one folder or in twelve.

Wang et al., ChestX-ray8: hospital-scale chest X-ray database and benchmarks, CVPR 2017: 112,120 frontal radiographs of
30,805 patients, 14 findings by text mining. Its findings, as CheXpert's labels, are in `FINDINGS`; Emphysema, Fibrosis
and Hernia have no counterpart. Enlarged Cardiomediastinum, Fracture and Support Devices are not annotated.

The official lists keep patients apart: train_val_list.txt is train (of which dev is held out), test_list.txt is test.
Without them, as in Kaggle's copy, all is train.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_unique, line_of, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.base.store import list_folders, open_to_read
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.source import Source, Terms, leave_open, list_images, no_more_roots, nothing_moved

TERMS = Terms(
    name="nih",
    title="NIH ChestX-ray14",
    patients="nih",
    license="no restrictions, with acknowledgment of the NIH Clinical Center",
    paper="Wang et al., CVPR 2017",
)
LOOKED_FOR = "a Data_Entry_2017_v2020.csv"
COLUMN = "Finding Labels"
TABLES = tuple(f"Data_Entry_2017{end}.csv{packed}" for end in ("_v2020", "") for packed in ("", ".gz"))
LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
COLUMNS = ("Image Index", COLUMN, "Follow-up #", "Patient Age", "Patient Gender", "View Position")
FINDINGS = {
    "No Finding": ("No Finding",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": ("Infiltration",),
    "Lung Lesion": ("Mass", "Nodule"),
    "Edema": ("Edema",),
    "Consolidation": ("Consolidation",),
    "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Atelectasis",),
    "Pneumothorax": ("Pneumothorax",),
    "Pleural Effusion": ("Effusion",),
    "Pleural Other": ("Pleural_Thickening",),
}
UNMAPPED = ("Emphysema", "Fibrosis", "Hernia")
SEXES = {"M": "Male", "F": "Female"}
_IMAGE = r"^(?P<key>(?P<patient>\d{8})_\d{3})\.png$"
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The table and the official lists, if any; None without a table. Raises DataError if one list is missing."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        return None
    lists = {split: folder / name for split, name in LISTS.items()}
    missing = [path.name for path in lists.values() if not path.is_file()]
    if len(missing) == 1:
        raise DataError(f"{folder}: {missing[0]} is missing: NIH's official splits are two lists, or none")
    return {"table": table} if missing else {"table": table, **lists}


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """The label tables of train and test, by the official lists; all as train without them.

    Raises DataError for an image that is in both lists or in none.
    """
    csvs = source.csvs
    table = read_table(csvs["table"])
    if "train" not in csvs:
        return {"train": table}
    listed = {split: _read_list(csvs[split]) for split in LISTS}
    both = set(listed["train"]).intersection(listed["test"])
    if both:
        raise DataError(
            f"{csvs['test']}: {min(both)} is in {csvs['train'].name} too; splits must not share images"
        )
    names = pa.array([name for names in listed.values() for name in names], pa.string())
    splits = pa.array([split for split, names in listed.items() for _ in names], pa.string())
    both_lists = csvs["train"].with_name(" and ".join(LISTS.values()))
    place = join(
        table["path"], both_lists, pa.table({"split": splits}), names, "images", note, normalize_paths
    )
    row = pc.index(place.is_null(), True).as_py()
    if row >= 0:
        raise DataError(
            f"{csvs['table']}, line {line_of(csvs['table'], row)}: {table['path'][row]} is in neither "
            f"{' nor '.join(LISTS.values())}"
        )
    return {split: table.filter(pc.equal(splits.take(place), split)) for split in LISTS}


def read_table(csv: Path) -> pa.Table:
    """The label table of all images. Raises DataError, naming file, line and column."""
    text = read_strings(csv, COLUMNS)
    index = text["Image Index"]
    parts = pc.extract_regex(index, _IMAGE)
    demand(csv, "Image Index", index, parts.is_valid(), "is not like 00000001_000.png")
    parts = parts.combine_chunks()
    demand_unique(csv, parts.field("key"))
    for name, pattern, complaint in (
        ("Follow-up #", r"^\d{1,6}$", "is not a number"),
        ("Patient Age", r"^\d{1,3}$", "is not a number of years"),
        ("Patient Gender", "^[MF]$", "is neither M nor F"),
        ("View Position", "^(AP|PA)$", "is neither AP nor PA"),
    ):
        demand(csv, name, text[name], pc.match_substring_regex(text[name], pattern), complaint)
    columns: dict[str, Any] = {
        "path": index,
        "key": parts.field("key"),
        "patient": parts.field("patient"),
        "study": text["Follow-up #"].cast(pa.int32()),
        "view": pa.array(["frontal"] * len(text)),
        "sex": pa.array([SEXES[sex] for sex in text["Patient Gender"].to_pylist()]),
        "age": text["Patient Age"].cast(pa.int16()),
        "projection": text["View Position"],
    }
    return pa.table(columns | _read_states(csv, text[COLUMN])).combine_chunks()


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image: in `images`, in `images_001/images` to `images_012/images`, or beside the table."""
    folders = []
    for root in roots:
        names = [name for name in list_folders(root) if re.fullmatch(r"images(_\d{3})?", name)]
        folders += [root, *(root / name for name in names), *(root / name / "images" for name in names)]
    files = list_images(folders)
    return [files.get(path.rpartition(".")[0], f"{roots[0]}/images/{path}") for path in paths]


def _read_list(path: Path) -> list[str]:
    with open_to_read(path) as file:
        return file.read().decode(errors="replace").split()


def _read_states(csv: Path, found: pa.ChunkedArray) -> dict[str, npt.NDArray[np.int8]]:
    """The states of the 14 labels: what is not listed is negative, where the set annotates it."""
    encoded = found.combine_chunks().dictionary_encode()
    texts = [text or "" for text in encoded.dictionary.to_pylist()]
    known = {name for names in FINDINGS.values() for name in names}.union(UNMAPPED)
    states = np.full((len(texts), len(LABELS)), NOT_ANNOTATED, np.int8)
    for number, text in enumerate(texts):
        findings = set(text.split("|"))
        if not findings <= known:
            row = pc.index(found, text).as_py()
            unknown = quote(min(findings - known), 80)
            where = f"{csv}, line {line_of(csv, row)}, column {COLUMN}"
            raise DataError(f"{where}: '{unknown}' is not a finding of this set")
        for label, names in FINDINGS.items():
            states[number, LABELS.index(label)] = not findings.isdisjoint(names)
    leave_open(states)
    of_rows = states[encoded.indices.to_numpy()]
    return {label: of_rows[:, column] for column, label in enumerate(LABELS)}
