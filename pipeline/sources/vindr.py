"""VinDr-CXR 1.0.0: annotations/image_labels_{train,test}.csv, and DICOMs at {train,test}/<image_id>.dicom.

Nguyen et al., VinDr-CXR: an open dataset of chest X-rays with radiologist's annotations, Scientific Data 2022: 15,000
frontal films read by three radiologists each, and 3,000 for test by consensus of five. Its table of boxes from the
VinBigData competition (train.csv: image_id, class_name, rad_id, …) is read too; it has 14 of the findings.

A finding that most readers of a film name is positive; one that fewer name is uncertain. There are no patients' names,
so each film is a patient of its own; and no sex or age. What maps to which label is in `FINDINGS`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, read_header, read_strings
from pipeline.base.errors import DataError
from pipeline.identity import Note, ignore
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.source import Source, Terms, leave_open, list_images, no_more_roots, nothing_moved

TERMS = Terms(
    name="vindr",
    title="VinDr-CXR",
    patients="vindr",
    license="PhysioNet Credentialed Health Data License",
    paper="Nguyen et al., Scientific Data 2022",
)
LOOKED_FOR = "an annotations/image_labels_train.csv"
COLUMN = "image_id"
READER = "rad_id"
SPLITS = ("train", "test")
BOXES = ("train.csv", "train.csv.gz", "vinbigdata-train.csv", "vinbigdata-train.csv.gz")
FINDINGS = {
    "No Finding": ("No finding",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Lung Opacity": ("Lung Opacity", "Infiltration"),
    "Lung Lesion": ("Nodule/Mass", "Lung tumor"),
    "Edema": ("Edema",),
    "Consolidation": ("Consolidation",),
    "Pneumonia": ("Pneumonia",),
    "Atelectasis": ("Atelectasis",),
    "Pneumothorax": ("Pneumothorax",),
    "Pleural Effusion": ("Pleural effusion",),
    "Pleural Other": ("Pleural thickening",),
    "Fracture": ("Clavicle fracture", "Rib fracture"),
}
ABSENT = ("Edema", "Pneumonia", "Fracture")  # from the table of boxes
UNMAPPED = (
    "Aortic enlargement",
    "Calcification",
    "ILD",
    "Other lesion",
    "Pulmonary fibrosis",
)  # of those there
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The labels of train and test, or of one of them; else the competition's table, as train; None without any."""
    for home in (folder / "annotations", folder):
        found = {split: home / f"image_labels_{split}.csv" for split in SPLITS}
        found = {split: path for split, path in found.items() if path.is_file()}
        if found:
            return found
    boxes = (folder / name for name in BOXES)
    table = next((path for path in boxes if path.is_file() and READER in read_header(path)), None)
    return None if table is None else {"train": table}


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError, naming file, line and column."""
    return {split: _read(csv, split) for split, csv in source.csvs.items()}


def read_table(csv: Path) -> pa.Table:
    """The label table of one CSV. Raises DataError, naming file, line and column."""
    return _read(csv, "test" if "test" in csv.name else "train")


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each path, below the first root that holds it; images may have been converted to PNG."""
    files = {split: list_images(root / split for root in roots) for split in SPLITS}
    places = ((path, *path.partition(".")[0].split("/")) for path in paths)
    return [files[split].get(stem, f"{roots[0]}/{path}") for path, split, stem in places]


def _read(csv: Path, split: str) -> pa.Table:
    text = read_strings(csv)
    image = text["image_id"] if "image_id" in text.column_names else None
    if image is None:
        raise DataError(f"{csv}: column image_id is missing; the table has {', '.join(text.column_names)}")
    demand(
        csv,
        "image_id",
        image,
        pc.match_substring_regex(image, "^[0-9a-f]{32}$"),
        "is not 32 hexadecimal digits",
    )
    readers = image
    if READER in text.column_names:
        demand(csv, READER, text[READER], text[READER].is_valid(), "is no reader")
        readers = pc.binary_join_element_wise(image, text[READER], " by ")
    is_boxes = "class_name" in text.column_names
    number = _number(readers) if is_boxes else np.arange(len(text))
    if not is_boxes:
        demand_unique(csv, readers.combine_chunks())
    said = np.zeros((number.max(initial=-1) + 1, len(LABELS)), np.bool_)
    for label, names in FINDINGS.items():
        rows = _rows_of_class(csv, text, names) if is_boxes else _marked_rows(csv, text, names)
        said[number[rows], LABELS.index(label)] = True
    names_of = pc.unique(image)
    film = np.empty(len(said), np.int64)
    film[number] = _number(image)
    votes = np.zeros((len(names_of), len(LABELS)), np.int64)
    np.add.at(votes, film, said)
    of_film = np.bincount(film, minlength=len(names_of))[:, None]
    states = np.where(votes * 2 > of_film, 1, np.where(votes > 0, -1, 0)).astype(np.int8)
    absent = [label for label in LABELS if label not in FINDINGS or (is_boxes and label in ABSENT)]
    states[:, [LABELS.index(label) for label in absent]] = NOT_ANNOTATED
    leave_open(states)
    nothing = pa.nulls(len(names_of), pa.string())
    facts = {
        "path": pc.binary_join_element_wise(split, pc.binary_join_element_wise(names_of, "dicom", "."), "/"),
        "key": names_of,
        "patient": names_of,
        "study": pa.array(np.ones(len(names_of), np.int32)),
        "view": pa.array(["frontal"] * len(names_of)),
        "sex": nothing,
        "age": nothing.cast(pa.int16()),
        "projection": pa.array(["PA"] * len(names_of)),
    }
    return pa.table(facts | {label: states[:, column] for column, label in enumerate(LABELS)})


def _rows_of_class(csv: Path, text: pa.Table, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Rows [N] of boxes of the classes. Raises DataError for a class of another set."""
    classes = text["class_name"]
    known = pa.array([*(name for of in FINDINGS.values() for name in of), *UNMAPPED])
    demand(csv, "class_name", classes, pc.is_in(classes, value_set=known), "is not a finding of this set")
    return np.asarray(pc.is_in(classes, value_set=pa.array(names)))


def _marked_rows(csv: Path, text: pa.Table, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Rows [N] with a 1 in one of the columns. Raises DataError for a missing column, and cells but 0 and 1."""
    marked = np.zeros(len(text), np.bool_)
    demand_columns(csv, text.column_names, names)
    for name in names:
        valid = pc.match_substring_regex(text[name], r"^[01](\.0)?$")
        demand(csv, name, text[name], valid, "is neither 0 nor 1")
        marked |= np.asarray(pc.starts_with(text[name], "1"))
    return marked


def _number(names: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The number [N] of each name, from 0 in the order of first occurrence."""
    numbers: npt.NDArray[np.int64] = names.combine_chunks().dictionary_encode().indices.to_numpy()
    return numbers
