"""VinDr-CXR 1.0.0: annotations/image_labels_{train,test}.csv, and DICOMs at {train,test}/<image_id>.dicom.

Nguyen et al., VinDr-CXR: an open dataset of chest X-rays with radiologist's annotations, Scientific Data 2022: 15,000
frontal images read by three radiologists each, and 3,000 for test by consensus of five. Its table of boxes from the
VinBigData competition (train.csv: image_id, class_name, rad_id, …) is read too; it has 14 of the findings. There are no
patient ids, so each image counts as a separate patient; and no sex or age.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, read_header, read_strings
from pipeline.identity import Note, ignore
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.source import Column, DataSet, find_files, list_images, make_table, read_cells, read_terms
from pipeline.sources.words import leave_open, read_findings

COLUMN, READER, CLASS = "image_id", "rad_id", "class_name"
SPLITS = ("train", "test")
BOXES = ("train.csv", "vinbigdata-train.csv")
FINDINGS = read_findings("vindr")
NO_FINDING = "No finding"
ABSENT = ("Edema", "Pneumonia", "Fracture")  # from the table of boxes


class Vindr(DataSet):
    """VinDr's labels are the votes of its readers."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The labels of train and test, or of one of them; else the competition's table, as train."""
        for home in (folder / "annotations", folder):
            if tables := find_files(home, {split: [f"image_labels_{split}.csv"] for split in SPLITS}):
                return tables
        boxes = find_files(folder, {name: [name] for name in BOXES}).values()
        table = next((path for path in boxes if READER in read_header(path)), None)
        return {"train": table} if table else None

    def locate(self, paths: Sequence[str], roots: Sequence[Path], note: Note = ignore) -> list[str]:
        """The file of each path, below the first root that holds it; images may have been converted to PNG."""
        files = {split: list_images(root / split for root in roots) for split in SPLITS}
        places = ((path, *path.partition(".")[0].split("/")) for path in paths)
        return [files[split].get(stem, f"{roots[0]}/{path}") for path, split, stem in places]

    def read_table(self, csv: Path) -> pa.Table:
        """The label table of one CSV."""
        text = read_strings(csv)
        demand_columns(csv, text.column_names, list(self.columns))
        cells = read_cells(csv, [(name, text[name], column) for name, column in self.columns.items()])
        image = readers = cells["key"]
        if READER in text.column_names:
            demand(csv, READER, text[READER], text[READER].is_valid(), "is no reader")
            readers = pc.binary_join_element_wise(image, text[READER].combine_chunks(), " by ")
        is_boxes = CLASS in text.column_names
        if not is_boxes:
            demand_unique(csv, readers)
        reading, images = readers.dictionary_encode(), image.dictionary_encode()
        marks = _mark_labels(csv, text, reading.indices.to_numpy(), is_boxes)
        image_of = np.empty(len(marks), np.int64)
        image_of[reading.indices.to_numpy()] = images.indices.to_numpy()
        votes = np.zeros((len(images.dictionary), len(LABELS)), np.int64)
        np.add.at(votes, image_of, marks)
        readers_of = np.bincount(image_of, minlength=len(votes))[:, None]
        states = np.where(votes * 2 > readers_of, 1, np.where(votes > 0, -1, 0)).astype(np.int8)
        annotated = FINDINGS.positive.any(axis=0) & ~(is_boxes & np.isin(LABELS, ABSENT))
        states[:, ~annotated] = NOT_ANNOTATED
        leave_open(states)
        fields = {"key": images.dictionary, "patient": images.dictionary}
        folder = "test/" if "test" in csv.name else "train/"
        fields["path"] = pc.binary_join_element_wise(folder, images.dictionary, ".dicom", "")
        fields["projection"] = pa.repeat("PA", len(states))
        return make_table(fields, {label: states[:, column] for column, label in enumerate(LABELS)})


def _mark_labels(csv: Path, text: pa.Table, reading: npt.NDArray[np.int64], is_boxes: bool) -> npt.NDArray[np.bool_]:
    """Which labels [M, 14] each reading of an image names, from rows [N] that each belong to a `reading`."""
    if is_boxes:
        known = pc.is_in(text[CLASS], value_set=pa.array(FINDINGS.names))
        demand(csv, CLASS, text[CLASS], known, "is not a finding of this set")
        columns = {name: np.asarray(pc.equal(text[CLASS], name)) for name in FINDINGS.names}
    else:
        wanted = [name for name, labels in zip(FINDINGS.names, FINDINGS.positive, strict=True) if labels.any()]
        demand_columns(csv, text.column_names, wanted)
        for name in wanted:
            valid = pc.match_substring_regex(text[name], r"^[01](\.0)?$")
            demand(csv, name, text[name], valid, "is neither 0 nor 1")
        names = [name for name in text.column_names if name not in (COLUMN, READER)]
        columns = {name: np.asarray(pc.fill_null(pc.starts_with(text[name], "1"), False)) for name in names}
    named = {name: np.bincount(reading, rows) > 0 for name, rows in columns.items()}
    clash = named[NO_FINDING] & np.any([rows for name, rows in named.items() if name != NO_FINDING], axis=0)
    complaint = "is read as No finding and as a finding: remove one of them"
    demand(csv, COLUMN, text[COLUMN], pa.chunked_array([~clash[reading]]), complaint)
    absent = np.zeros_like(clash)
    marks: npt.NDArray[np.bool_] = np.stack([named.get(name, absent) for name in FINDINGS.names], 1) @ FINDINGS.positive
    return marks


SET = Vindr(
    read_terms("vindr"),
    columns={COLUMN: Column("(?P<key>[0-9a-f]{32})", "is not 32 hexadecimal digits")},
    files="an annotations/image_labels_train.csv",
)
