"""MIMIC-CXR-JPG 2.x: the split, metadata and label tables, and images at files/p10/p10000032/s50414267/<dicom_id>.jpg.

Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, arXiv:1901.07042:
377,110 images of 227,835 studies. Its labels are CheXpert's 14, by the CheXpert labeler (NegBio's, if only those are
there); a study without a row in them is not annotated. Sex and age are not in these tables.

The official splits: train (of which dev is held out), validate, which is valid here, and test. With the radiologist's
labels of version 2.1.0, `test` holds the studies that they cover, by these labels, and `test_rest` the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.identity import Note, ignore, join, normalize_ids, normalize_paths
from pipeline.labels import LABELS, POSITIONS, parse_states
from pipeline.sources.source import Source, Terms, locate_below, no_more_roots, nothing_moved, take_states

TERMS = Terms(
    name="mimic",
    title="MIMIC-CXR-JPG",
    patients="mimic",
    license="PhysioNet Credentialed Health Data License",
    paper="Johnson et al., arXiv:1901.07042",
)
LOOKED_FOR = "a mimic-cxr-2.0.0-split.csv"
COLUMN = "subject_id"
TABLES = {
    "split": ("mimic-cxr-2.0.0-split.csv",),
    "metadata": ("mimic-cxr-2.0.0-metadata.csv",),
    "labels": ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv"),
    "radiologist": ("mimic-cxr-2.1.0-test-set-labeled.csv",),
}
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
RADIOLOGISTS_NAMES = {"Airspace Opacity": "Lung Opacity"}
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The tables, plain or gzipped; None without the split's. Raises DataError if another one is missing."""
    found = {}
    for role, names in TABLES.items():
        files = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
        path = next((file for file in files if file.is_file()), None)
        if path is not None:
            found[role] = path
    if "split" not in found:
        return None
    missing = [TABLES[role][0] for role in ("metadata", "labels") if role not in found]
    if missing:
        raise DataError(f"{folder}: {found['split'].name} is there, but not {' and '.join(missing)}")
    return found


def read_table(csv: Path) -> pa.Table:
    """One of its tables alone does not make a label table: raises DataError."""
    raise DataError(f"{csv}: one of several tables of {TERMS.title}; name the folder that holds them")


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError, naming file, line and column."""
    csvs = source.csvs
    csv = csvs["split"]
    images = read_strings(csv, ("dicom_id", "study_id", "subject_id", "split"))
    for name in ("study_id", "subject_id"):
        images = images.set_column(images.column_names.index(name), name, normalize_ids(images[name]))
    for name, pattern, complaint in (
        ("dicom_id", r"^[0-9a-f]{8}(-[0-9a-f]{8}){0,7}$", "is not dashed hexadecimal"),
        ("study_id", r"^\d{1,9}$", "is not a number of up to 9 digits"),
        ("subject_id", r"^\d{1,10}$", "is not a number of up to 10 digits"),
        ("split", f"^({'|'.join(SPLITS)})$", f"is none of {', '.join(SPLITS)}"),
    ):
        demand(csv, name, images[name], pc.match_substring_regex(images[name], pattern), complaint)
    demand_unique(csv, images["dicom_id"].combine_chunks())
    columns = _read_identity(images) | _read_views(csvs["metadata"], images["dicom_id"], note)
    table = pa.table(columns | _read_labels(csvs["labels"], images["study_id"], note))
    tables = {
        ours: table.filter(pc.equal(images["split"], theirs)).combine_chunks()
        for theirs, ours in SPLITS.items()
    }
    if "radiologist" in csvs:
        tables |= _read_radiologist(csvs["radiologist"], tables["test"], note)
    return {split: rows for split, rows in tables.items() if len(rows)}


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image, below the first folder that holds it in `files`."""
    return locate_below(
        paths, [(root, "") for root in roots if (root / "files").is_dir()] or [(roots[0], "")]
    )


def _read_identity(images: pa.Table) -> dict[str, Any]:
    patient = pc.binary_join_element_wise("p", images["subject_id"], "")
    study = pc.binary_join_element_wise("s", images["study_id"], "")
    group = pc.utf8_slice_codeunits(patient, 0, 3)
    folder = pc.binary_join_element_wise("files", group, patient, study, images["dicom_id"], "/")
    return {
        "path": pc.binary_join_element_wise(folder, "jpg", "."),
        "key": pc.binary_join_element_wise(patient, study, images["dicom_id"], "_"),
        "patient": patient,
        "study": images["study_id"].cast(pa.int32()),
    }


def _read_views(csv: Path, dicom: pa.ChunkedArray, note: Note) -> dict[str, Any]:
    """View and projection of each image; `other` where ViewPosition names neither kind, or there is no row."""
    table = read_strings(csv, ("dicom_id", "ViewPosition"))
    place = join(dicom, csv, table, table["dicom_id"], "images", note, normalize_paths)
    position = table["ViewPosition"].take(place)
    view = [POSITIONS.get(name or "", "other") for name in position.to_pylist()]
    frontal = pc.is_in(position, value_set=pa.array(["AP", "PA"]))
    nothing = pa.nulls(len(view), pa.string())
    return {
        "view": pa.array(view),
        "sex": nothing,
        "age": pa.nulls(len(view), pa.int16()),
        "projection": pc.if_else(frontal, position, nothing),
    }


def _read_labels(csv: Path, study: pa.ChunkedArray, note: Note) -> dict[str, pa.Array]:
    """The states of each image's study; not annotated for a study that the table lacks."""
    table = read_strings(csv, ("study_id", *LABELS))
    place = join(study, csv, table.select(LABELS), table["study_id"], "studies", note)
    return {label: take_states(parse_states(csv, label, table[label]), place) for label in LABELS}


def _read_radiologist(csv: Path, test: pa.Table, note: Note) -> dict[str, pa.Table]:
    """Test divided into the studies that a radiologist labeled, with these labels, and the rest."""
    table = read_strings(csv)
    table = table.rename_columns([RADIOLOGISTS_NAMES.get(name, name) for name in table.column_names])
    demand_columns(csv, table.column_names, ("study_id", *LABELS))
    studies = test["study"].cast(pa.string())
    place = join(studies, csv, table.select(LABELS), table["study_id"], "studies", note)
    read = test.filter(place.is_valid())
    for label in LABELS:
        states = parse_states(csv, label, table[label]).take(place.drop_null())
        read = read.set_column(read.schema.get_field_index(label), label, states)
    return {"test": read, "test_rest": test.filter(place.is_null())}
