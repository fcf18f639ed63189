"""MIMIC-CXR-JPG 2.x: the split, metadata and label tables, and images at files/p10/p10000032/s50414267/<dicom_id>.jpg.

Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, arXiv:1901.07042:
377,110 images of 227,835 studies. Its labels are CheXpert's 14, by the CheXpert labeler (NegBio's, if only those are
there); a study without a row in them is not annotated. Sex and age are not in these tables.

The official splits: train (of which dev is held out), validate, which is valid here, and test. With the radiologist's
labels of version 2.1.0, `test` holds the studies that they cover, by these labels, and `test_rest` the others.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand_cells, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.identity import Note, ignore, join, normalize_ids, normalize_paths
from pipeline.labels import LABELS, parse_states
from pipeline.sources.source import (
    DataSet,
    Source,
    first_file,
    make_table,
    read_terms,
    take_states,
)

TABLES = {
    "split": ("mimic-cxr-2.0.0-split.csv",),
    "metadata": ("mimic-cxr-2.0.0-metadata.csv",),
    "labels": ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv"),
    "radiologist": ("mimic-cxr-2.1.0-test-set-labeled.csv",),
}
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
CHECKS = {
    "dicom_id": (r"^[0-9a-f]{8}(-[0-9a-f]{8}){0,7}$", "is not dashed hexadecimal"),
    "study_id": (r"^\d{1,9}$", "is not a number of up to 9 digits"),
    "subject_id": (r"^\d{1,10}$", "is not a number of up to 10 digits"),
    "split": (f"^({'|'.join(SPLITS)})$", f"is none of {', '.join(SPLITS)}"),
}
RADIOLOGISTS_NAMES = {"Airspace Opacity": "Lung Opacity"}
VIEWS = {"AP": "frontal", "PA": "frontal", "LATERAL": "lateral", "LL": "lateral", "RL": "lateral"}


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The tables, plain or gzipped; None without the split's. Raises DataError if another one is missing."""
    files = {role: first_file(folder, names) for role, names in TABLES.items()}
    tables = {role: path for role, path in files.items() if path}
    if "split" not in tables:
        return None
    missing = [TABLES[role][0] for role in ("metadata", "labels") if role not in tables]
    if missing:
        raise DataError(f"{folder}: {tables['split'].name} is there, but not {' and '.join(missing)}")
    return tables


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table."""
    csvs = source.csvs
    images = read_strings(csvs["split"], tuple(CHECKS))
    for name in ("study_id", "subject_id"):
        images = images.set_column(images.column_names.index(name), name, normalize_ids(images[name]))
    demand_cells(csvs["split"], images, CHECKS)
    dicom, study_id = images["dicom_id"].combine_chunks(), images["study_id"]
    demand_unique(csvs["split"], dicom)
    patient = pc.binary_join_element_wise("p", images["subject_id"], "")
    study = pc.binary_join_element_wise("s", study_id, "")
    folder = pc.binary_join_element_wise(
        "files", pc.utf8_slice_codeunits(patient, 0, 3), patient, study, dicom, "/"
    )
    views = read_strings(csvs["metadata"], ("dicom_id", "ViewPosition"))
    place = join(dicom, csvs["metadata"], views, views["dicom_id"], "images", note, normalize_paths)
    position = views["ViewPosition"].take(place)
    frontal = pc.is_in(position, value_set=pa.array(["AP", "PA"]))
    labels = read_strings(csvs["labels"], ("study_id", *LABELS))
    place = join(study_id, csvs["labels"], labels.select(LABELS), labels["study_id"], "studies", note)
    table = make_table(
        {label: take_states(parse_states(csvs["labels"], label, labels[label]), place) for label in LABELS},
        path=pc.binary_join_element_wise(folder, "jpg", "."),
        key=pc.binary_join_element_wise(patient, study, dicom, "_"),
        patient=patient,
        study=study_id,
        # `other` where ViewPosition names neither kind, or there is no row.
        view=[VIEWS.get(name or "", "other") for name in position.to_pylist()],
        projection=pc.if_else(frontal, position, None),
    )
    tables = {ours: table.filter(pc.equal(images["split"], name)) for name, ours in SPLITS.items()}
    if "radiologist" in csvs:
        tables |= _read_radiologist(csvs["radiologist"], tables["test"], note)
    return {split: rows.combine_chunks() for split, rows in tables.items() if len(rows)}


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


SET = DataSet(
    read_terms("mimic"),
    files=f"a {TABLES['split'][0]}",
    find_tables=find_tables,
    read_tables=read_tables,
    column="subject_id",
)
