"""VinDr-CXR 1.0.0: annotations/image_labels_{train,test}.csv, and DICOMs at {train,test}/<image_id>.dicom.

Nguyen et al., VinDr-CXR: an open dataset of chest X-rays with radiologist's annotations, Scientific Data 2022: 15,000
frontal films read by three radiologists each, and 3,000 for test by consensus of five. Its table of boxes from the
VinBigData competition (train.csv: image_id, class_name, rad_id, …) is read too; it has 14 of the findings.

A finding that most readers of a film name is positive; one that fewer name is uncertain. There are no patients' names,
so each film is a patient of its own; and no sex or age. findings.csv has the findings as CheXpert's labels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_cells, demand_columns, demand_unique, read_header, read_strings
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.findings import leave_open, read_findings
from pipeline.sources.source import DataSet, first_file, list_images, make_table, read_terms

COLUMN, READER = "image_id", "rad_id"
SPLITS = ("train", "test")
BOXES = ("train.csv", "train.csv.gz", "vinbigdata-train.csv", "vinbigdata-train.csv.gz")
FINDINGS = read_findings("VinDr")
ABSENT = ("Edema", "Pneumonia", "Fracture")  # from the table of boxes


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The labels of train and test, or of one of them; else the competition's table, as train; None without any."""
    for home in (folder / "annotations", folder):
        files = {split: first_file(home, [f"image_labels_{split}.csv"]) for split in SPLITS}
        if tables := {split: path for split, path in files.items() if path}:
            return tables
    boxes = (folder / name for name in BOXES)
    table = next((path for path in boxes if path.is_file() and READER in read_header(path)), None)
    return {"train": table} if table else None


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each path, below the first root that holds it; images may have been converted to PNG."""
    files = {split: list_images(root / split for root in roots) for split in SPLITS}
    places = ((path, *path.partition(".")[0].split("/")) for path in paths)
    return [files[split].get(stem, f"{roots[0]}/{path}") for path, split, stem in places]


def read_table(csv: Path) -> pa.Table:
    """The label table of one CSV."""
    split = "test" if "test" in csv.name else "train"
    text = read_strings(csv)
    demand_columns(csv, text.column_names, [COLUMN])
    demand_cells(csv, text, {COLUMN: ("^[0-9a-f]{32}$", "is not 32 hexadecimal digits")})
    image = readers = text[COLUMN]
    if READER in text.column_names:
        demand(csv, READER, text[READER], text[READER].is_valid(), "is no reader")
        readers = pc.binary_join_element_wise(image, text[READER], " by ")
    is_boxes = "class_name" in text.column_names
    number = _number(readers) if is_boxes else np.arange(len(text))
    if not is_boxes:
        demand_unique(csv, readers.combine_chunks())
    marks = np.zeros((number.max(initial=-1) + 1, len(LABELS)), np.bool_)  # by reader and film
    for label, names in FINDINGS.positive.items():
        rows = _rows_of_class(csv, text, names) if is_boxes else _marked_rows(csv, text, names)
        marks[number[rows], LABELS.index(label)] = True
    films = pc.unique(image)
    film = np.empty(len(marks), np.int64)
    film[number] = _number(image)
    votes = np.zeros((len(films), len(LABELS)), np.int64)
    np.add.at(votes, film, marks)
    readers_of = np.bincount(film, minlength=len(films))[:, None]
    states = np.where(votes * 2 > readers_of, 1, np.where(votes > 0, -1, 0)).astype(np.int8)
    absent = [label for label in LABELS if label not in FINDINGS.positive or (is_boxes and label in ABSENT)]
    states[:, [LABELS.index(label) for label in absent]] = NOT_ANNOTATED
    leave_open(states)
    return make_table(
        {label: states[:, column] for column, label in enumerate(LABELS)},
        path=pc.binary_join_element_wise(split, pc.binary_join_element_wise(films, "dicom", "."), "/"),
        key=films,
        patient=films,
        study=pa.array(np.ones(len(films), np.int32)),
        projection="PA",
    )


def _rows_of_class(csv: Path, text: pa.Table, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Rows [N] of boxes of the classes. Raises DataError for a class of another set."""
    classes = text["class_name"]
    known = pc.is_in(classes, value_set=pa.array(FINDINGS.known))
    demand(csv, "class_name", classes, known, "is not a finding of this set")
    return np.asarray(pc.is_in(classes, value_set=pa.array(names)))


def _marked_rows(csv: Path, text: pa.Table, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Rows [N] with a 1 in one of the columns. Raises DataError for a missing column, and cells but 0 and 1."""
    demand_columns(csv, text.column_names, names)
    demand_cells(csv, text, dict.fromkeys(names, (r"^[01](\.0)?$", "is neither 0 nor 1")))
    marked: npt.NDArray[np.bool_] = np.any([np.asarray(pc.starts_with(text[name], "1")) for name in names], 0)
    return marked


def _number(names: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """The number [N] of each name, from 0 in the order of first occurrence."""
    numbers: npt.NDArray[np.int64] = names.combine_chunks().dictionary_encode().indices.to_numpy()
    return numbers


SET = DataSet(
    read_terms("vindr"),
    files="an annotations/image_labels_train.csv",
    find_tables=find_tables,
    read_table=read_table,
    column=COLUMN,
    locate=locate,
    numbers_studies=True,
)
