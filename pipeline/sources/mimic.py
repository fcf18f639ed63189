"""MIMIC-CXR-JPG 2.x: the split, metadata and label tables, and images at files/p10/p10000032/s50414267/<dicom_id>.jpg.

Johnson et al., MIMIC-CXR-JPG, a large publicly available database of labeled chest radiographs, arXiv:1901.07042:
377,110 images of 227,835 studies, without sex and age. A study without a row of labels is not annotated. With the
radiologist's labels of version 2.1.0, `test` holds the studies that they cover, and `test_rest` the others.
"""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand_columns, demand_unique, read_strings
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS
from pipeline.sources.source import Column, DataSet, Source, divide, make_table, read_labels, read_terms, take_states

SPLITS = {"train": "train", "validate": "valid", "test": "test"}
RADIOLOGISTS_NAMES = {"Airspace Opacity": "Lung Opacity"}


class Mimic(DataSet):
    """MIMIC's views and labels are in separate tables."""

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table."""
        csvs = source.csvs
        fields, _ = self.read_fields(csvs["split"])
        demand_unique(csvs["split"], fields["dicom"])
        views = read_strings(csvs["metadata"], ("dicom_id", "ViewPosition"))
        place = join(fields["dicom"], csvs["metadata"], views, views["dicom_id"], "images", note, normalize_paths)
        fields["position"] = views["ViewPosition"].take(place)
        labels = read_strings(csvs["labels"], ("study_id", *LABELS))
        place = join(fields["study"], csvs["labels"], labels.select(LABELS), labels["study_id"], "studies", note)
        table = make_table(fields, take_states(read_labels(csvs["labels"], labels), place))
        tables = divide(table, fields["split"], SPLITS)
        if "radiologist" in csvs and "test" in tables:
            test, csv, text = tables.pop("test"), csvs["radiologist"], read_strings(csvs["radiologist"])
            text = text.rename_columns([RADIOLOGISTS_NAMES.get(name, name) for name in text.column_names])
            demand_columns(csv, text.column_names, ("study_id", *LABELS))
            place = join(test["study"].cast(pa.string()), csv, text.select(LABELS), text["study_id"], "studies", note)
            for label, states in read_labels(csv, text).items():
                chosen = pc.if_else(place.is_valid(), states.take(place), test[label])
                test = test.set_column(test.schema.get_field_index(label), label, chosen)
            tables |= divide(test, place.is_valid(), {True: "test", False: "test_rest"})
        return tables


SET = Mimic(
    read_terms("mimic"),
    tables={
        "split": ("mimic-cxr-2.0.0-split.csv",),
        "metadata": ("mimic-cxr-2.0.0-metadata.csv",),
        "labels": ("mimic-cxr-2.0.0-chexpert.csv", "mimic-cxr-2.0.0-negbio.csv"),
        "radiologist": ("mimic-cxr-2.1.0-test-set-labeled.csv",),
    },
    needed=("metadata", "labels"),
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
