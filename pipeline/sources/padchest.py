"""PadChest: PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv, and 16-bit PNGs at <ImageDir>/<ImageID>.

Bustos et al., PadChest: a large chest x-ray image dataset with multi-label annotated reports, Medical Image Analysis
2020 (arXiv:1901.07441): 160,861 images of 67,625 patients. Physicians labeled the reports of 39,053 images, a network
those of the others. `padchest` is the physicians' images alone; `padchest-all` is all of them, and makes other shards.
There are no official splits: all is train, of which dev is held out.

Labels are words of a tree, findings and diagnoses; findings.csv has them as CheXpert's labels. In the tree (Bustos et
al., appendix) a word includes those below it: laminar atelectasis is atelectasis, consolidation is an infiltrate. Which
words make a label follows the phrases of CheXpert's labeler (Irvin et al., 2019); where torchxrayvision maps a word
otherwise, docs/mappings.md says why. None of the words speaks of suspicion, so nothing is uncertain. Where a report
says `unchanged`, a finding that it does not name is not annotated, since the earlier report may name it; the same holds
for `exclude` and for images without a word about findings.

All films are MONOCHROME2, says the table. BitsStored_DICOM gives the bits of a PNG (10 or 12); a PNG with higher levels
has been scaled to 16.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_cells, demand_unique, read_strings
from pipeline.identity import Note, ignore
from pipeline.sources.findings import parse_findings, read_findings
from pipeline.sources.source import (
    DataSet,
    Source,
    find_train,
    locate_below,
    make_table,
    number_studies,
    read_terms,
)

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
COLUMN = "Labels"
OPTIONAL = ("PatientBirth", "PatientSex_DICOM", COLUMN)  # `nan` where unknown: pandas has written them
VIEWS = {"PA": "frontal", "AP": "frontal", "AP_horizontal": "frontal", "L": "lateral"}
PROJECTIONS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP"}
SEXES = {"M": "Male", "F": "Female", "O": "Other"}
CHECKS = {
    "ImageID": (r"^[0-9A-Za-z_-]{1,90}\.png$", "is not the name of a PNG"),
    "ImageDir": (r"^\d{1,4}$", "is not a number"),
    "StudyDate_DICOM": (r"^\d{8}$", "is not a date like 20140915"),
    "StudyID": (r"^\S{1,80}$", "is not a name of up to 80 characters"),
    "PatientID": (r"^[0-9A-Za-z_-]{1,80}$", "is not a name of up to 80 characters"),
    "PatientBirth": (r"^\d{4}(\.0)?$", "is not a year"),
    "PatientSex_DICOM": ("^[MFO]$", "is none of M, F, O"),
    "Projection": (
        f"^({'|'.join(VIEWS)}|COSTAL|EXCLUDE|UNK)$",
        "is none of PA, AP, AP_horizontal, L, COSTAL, EXCLUDE, UNK",
    ),
    "BitsStored_DICOM": (r"^([89]|1[0-6])$", "is not a number of bits from 8 to 16"),
    "MethodLabel": ("^(Physician|RNN_model)$", "is neither Physician nor RNN_model"),
}
FINDINGS = read_findings("PadChest")
_LIST = r"^\[('[^'\\]*'(, '[^'\\]*')*)?\]$"  # a Python list as text


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """The label table of the images that physicians labeled, or of all, as train."""
    table, is_physicians = _read(source.csvs["train"])
    return {"train": table if source.set == "padchest-all" else table.filter(is_physicians).combine_chunks()}


def read_table(csv: Path) -> pa.Table:
    """The label table of all images."""
    return _read(csv)[0]


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image, below the first root, or folder `images` in one, that has it."""
    return locate_below(paths, [(folder, "") for root in roots for folder in (root, root / "images")])


def _split(lists: pa.Array) -> pa.ListArray:
    return pc.split_pattern(pc.utf8_slice_codeunits(lists, 2, -2), "', '")


def _read(csv: Path) -> tuple[pa.Table, pa.ChunkedArray]:
    """The label table of all images, and which of them physicians labeled."""
    text = read_strings(csv, (*CHECKS, COLUMN))
    for name in OPTIONAL:
        cells = pc.if_else(pc.equal(text[name], "nan"), None, text[name])
        text = text.set_column(text.column_names.index(name), name, cells)
    demand_cells(csv, text, CHECKS, OPTIONAL)
    key = pc.utf8_slice_codeunits(text["ImageID"], 0, -4)
    demand_unique(csv, key.combine_chunks())
    labels = text[COLUMN]
    demand(csv, COLUMN, labels, pc.match_substring_regex(labels, _LIST), "is not a list of words", True)
    projection = text["Projection"].to_pylist()
    year, birth = (
        pc.utf8_slice_codeunits(text[name], 0, 4).cast(pa.int16())
        for name in ("StudyDate_DICOM", "PatientBirth")
    )
    table = make_table(
        parse_findings(csv, COLUMN, labels, _split, FINDINGS),
        path=pc.binary_join_element_wise(text["ImageDir"], text["ImageID"], "/"),
        key=key,
        patient=text["PatientID"],
        study=number_studies(text["PatientID"], text["StudyID"]),
        view=[VIEWS.get(name, "other") for name in projection],
        sex=[SEXES.get(sex) for sex in text["PatientSex_DICOM"].to_pylist()],
        age=pc.subtract(year, birth),
        projection=[PROJECTIONS.get(name) for name in projection],
        bits=text["BitsStored_DICOM"].cast(pa.int16()),
    )
    return table, pc.equal(text["MethodLabel"], "Physician")


SET = DataSet(
    read_terms("padchest"),
    files=f"a {TABLE}",
    find_tables=find_train(TABLE),
    read_tables=read_tables,
    read_table=read_table,
    column="ImageID",
    locate=locate,
    numbers_studies=True,
)
