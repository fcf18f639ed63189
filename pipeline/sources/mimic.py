"""MIMIC-CXR-JPG 2.x: the split, metadata and label tables, and images at files/p10/p10000032/s50414267/<dicom_id>.jpg.

Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, arXiv:1901.07042:
377,110 images of 227,835 studies. Its labels are CheXpert's 14, by the CheXpert labeler (NegBio's, if only those are
there); a study without a row in them is blank. Sex and age are not in these tables.

The official splits: train (of which dev is held out), validate, which is valid here, and test. With the radiologist's
labels of version 2.1.0, `test` holds the studies that they cover, by these labels, and `test_rest` the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, line_of, read_strings
from pipeline.base.errors import DataError
from pipeline.labels import LABELS, parse_states
from pipeline.sources.source import Source, Terms, no_more_roots, nothing_moved

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
VIEWS = {"AP": "frontal", "PA": "frontal", "LATERAL": "lateral", "LL": "lateral", "RL": "lateral"}
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


def read_tables(source: Source) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError, naming file, line and column."""
    csvs = source.csvs
    csv = csvs["split"]
    images = read_strings(csv, ("dicom_id", "study_id", "subject_id", "split"))
    for name, pattern, complaint in (
        ("dicom_id", r"^[0-9a-f]{8}(-[0-9a-f]{8}){0,7}$", "is not dashed hexadecimal"),
        ("study_id", r"^\d{1,9}$", "is not a number of up to 9 digits"),
        ("subject_id", r"^\d{1,10}$", "is not a number of up to 10 digits"),
        ("split", f"^({'|'.join(SPLITS)})$", f"is none of {', '.join(SPLITS)}"),
    ):
        demand(csv, name, images[name], pc.match_substring_regex(images[name], pattern), complaint)
    demand_unique(csv, images["dicom_id"].combine_chunks())
    columns = _read_identity(images) | _read_views(csvs["metadata"], csv, images["dicom_id"])
    table = pa.table(columns | _read_labels(csvs["labels"], images["study_id"]))
    tables = {
        ours: table.filter(pc.equal(images["split"], theirs)).combine_chunks()
        for theirs, ours in SPLITS.items()
    }
    if "radiologist" in csvs:
        tables |= _read_radiologist(csvs["radiologist"], tables["test"])
    return {split: rows for split, rows in tables.items() if len(rows)}


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each image, below the first folder that holds `files`."""
    root = next((root for root in roots if (root / "files").is_dir()), roots[0])
    return [f"{root}/{path}" for path in paths]


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


def _read_views(csv: Path, images: Path, dicom: pa.ChunkedArray) -> dict[str, Any]:
    """View and projection of each image; `other` where ViewPosition names neither kind. Raises DataError."""
    table = read_strings(csv, ("dicom_id", "ViewPosition"))
    place = pc.index_in(dicom, value_set=table["dicom_id"].combine_chunks())
    if place.null_count:
        row = pc.index(pc.is_null(place), True).as_py()
        raise DataError(f"{images}, line {line_of(images, row)}: {dicom[row]} is not in {csv.name}")
    position = table["ViewPosition"].take(place)
    view = [VIEWS.get(name or "", "other") for name in position.to_pylist()]
    frontal = pc.is_in(position, value_set=pa.array(["AP", "PA"]))
    nothing = pa.nulls(len(view), pa.string())
    return {
        "view": pa.array(view),
        "sex": nothing,
        "age": pa.nulls(len(view), pa.int16()),
        "projection": pc.if_else(frontal, position, nothing),
    }


def _read_labels(csv: Path, study: pa.ChunkedArray) -> dict[str, pa.Array]:
    """The states of each image's study; blank for a study that the table lacks."""
    table = read_strings(csv, ("study_id", *LABELS))
    place = pc.index_in(study, value_set=table["study_id"].combine_chunks())
    return {label: parse_states(csv, label, table[label]).take(place) for label in LABELS}


def _read_radiologist(csv: Path, test: pa.Table) -> dict[str, pa.Table]:
    """Test divided into the studies that a radiologist labeled, with these labels, and the rest."""
    table = read_strings(csv)
    table = table.rename_columns([RADIOLOGISTS_NAMES.get(name, name) for name in table.column_names])
    demand_columns(csv, table.column_names, ("study_id", *LABELS))
    place = pc.index_in(test["study"].cast(pa.string()), value_set=table["study_id"].combine_chunks())
    read = test.filter(place.is_valid())
    for label in LABELS:
        states = parse_states(csv, label, table[label]).take(place.drop_null())
        read = read.set_column(read.schema.get_field_index(label), label, states)
    return {"test": read, "test_rest": test.filter(place.is_null())}
