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

from pipeline.base.csvs import demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS, parse_states
from pipeline.sources.source import Column, DataSet, Source, find_files, make_table, read_terms, take_states

TABLES = {
    "split": ("mimic-cxr-2.0.0-split.csv",),
    "metadata": ("mimic-cxr-2.0.0-metadata.csv",),
    "labels": ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv"),
    "radiologist": ("mimic-cxr-2.1.0-test-set-labeled.csv",),
}
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
RADIOLOGISTS_NAMES = {"Airspace Opacity": "Lung Opacity"}


class Mimic(DataSet):
    """MIMIC's views and labels are in separate tables."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The tables; None without the split's. Raises DataError if another one is missing."""
        tables = find_files(folder, TABLES)
        if "split" not in tables:
            return None
        missing = [TABLES[role][0] for role in ("metadata", "labels") if role not in tables]
        if missing:
            raise DataError(f"{folder}: {tables['split'].name} is there, but not {' and '.join(missing)}")
        return tables

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table."""
        csvs = source.csvs
        fields = self.read_fields(csvs["split"], self.read_text(csvs["split"]))
        demand_unique(csvs["split"], fields["dicom"])
        views = read_strings(csvs["metadata"], ("dicom_id", "ViewPosition"))
        place = join(fields["dicom"], csvs["metadata"], views, views["dicom_id"], "images", note, normalize_paths)
        fields["position"] = views["ViewPosition"].take(place)
        labels = read_strings(csvs["labels"], ("study_id", *LABELS))
        place = join(fields["study"], csvs["labels"], labels.select(LABELS), labels["study_id"], "studies", note)
        states = {label: parse_states(csvs["labels"], label, labels[label]) for label in LABELS}
        table = make_table(fields, {label: take_states(column, place) for label, column in states.items()})
        tables = {split: table.filter(pc.equal(fields["split"], name)) for name, split in SPLITS.items()}
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


SET = Mimic(
    read_terms("mimic"),
    names=TABLES["split"],
    columns={
        "subject_id": Column(
            r"(?i:subject|p)?0*(?P<subject>(?P<group>\d{1,2})\d{0,8})(?:\.0+)?", "is not a number of up to 10 digits"
        ),
        "study_id": Column(r"(?i:study|s)?0*(?P<study>\d{1,9})(?:\.0+)?", "is not a number of up to 9 digits"),
        "dicom_id": Column("(?P<dicom>[0-9a-f]{8}(?:-[0-9a-f]{8}){0,7})", "is not dashed hexadecimal"),
        "split": Column(f"(?P<split>{'|'.join(SPLITS)})", f"is none of {', '.join(SPLITS)}"),
    },
    templates={
        "patient": "p{subject}",
        "key": "p{subject}_s{study}_{dicom}",
        "path": "files/p{group}/p{subject}/s{study}/{dicom}.jpg",
    },
    is_joined=True,
)
