"""CheXpert Plus: df_chexpert_plus_240401.csv, CheXbert's labels, PNG/train/patient00001/study1/view1_frontal.png.

Without the PNGs, its DICOMs are read: DICOM/Uncompressed/train/patient00001/study1/view1_frontal.dcm.

Chambon et al., CheXpert Plus, arXiv:2405.19538: 223,462 radiographs of CheXpert's own patients, with reports, which are
not read. Labels are in separate files, of which the first that exists is read: LABEL_FILES, or else CheXpert's own
train.csv and valid.csv beside the table. An image without a line there is not annotated.
"""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from pipeline.base.csvs import demand
from pipeline.base.errors import DataError, quote
from pipeline.base.store import open_to_read
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS
from pipeline.sources import chexpert
from pipeline.sources.source import AGE, Column, DataSet, Source, divide, make_table, read_terms, take_states

LABEL_FILES = tuple(f"chexbert_labels/{part}_fixed.json" for part in ("report", "impression", "findings"))
SPLITS = ("train", "valid")


class Plus(DataSet):
    """CheXpert Plus has its labels in a separate file."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The table and the labels; None without the table. Raises DataError if there are no labels."""
        tables = super().find_tables(folder)
        if tables and len(tables) == 1:
            files = ", ".join(LABEL_FILES)
            raise DataError(f"{folder}: missing beside {self.tables['table'][0]}: any of {files}, train.csv")
        chosen = ("table", "labels") if tables and "labels" in tables else tuple(self.tables)
        return tables and {role: path for role, path in tables.items() if role in chosen}

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table."""
        fields, _ = self.read_fields(source.csvs["table"])
        is_frontal = pc.equal(pc.utf8_lower(fields["view"]), "frontal")
        fields["projection"] = pc.if_else(is_frontal, fields["projection"], None)
        files = [file for role, file in source.csvs.items() if role != "table"]
        own = (chexpert.SET.read_table(file).select(["path", *LABELS]) for file in files)
        labels = _read_json(files[0]) if "labels" in source.csvs else pa.concat_tables(own)
        names, by = labels["path"], partial(normalize_paths, parts=3)
        place = join(fields["path"], files[0], labels.select(LABELS), names, "images", note, by)
        table = make_table(fields, take_states(labels.combine_chunks(), place), self.facts)
        return divide(table, fields["split"], {split: split for split in SPLITS})


def _read_json(path: Path) -> pa.Table:
    """Paths and states from one JSON object a line."""
    schema = pa.schema({"path_to_image": pa.string()} | dict.fromkeys(LABELS, pa.float64()))
    options = pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        with open_to_read(path) as file:
            table = pajson.read_json(pa.BufferReader(file.read()), parse_options=options)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not readable as a JSON object a line: {quote(str(error), 200)}") from error
    states = {"path": table["path_to_image"]}
    for label in LABELS:
        known = pc.is_in(table[label], value_set=pa.array([1.0, 0.0, -1.0, None]))
        demand(path, label, table[label].cast(pa.string()), known, "is not a label: 1, 0, -1 or null")
        states[label] = table[label].combine_chunks().cast(pa.int8())
    return pa.table(states)


SET = Plus(
    read_terms("chexpert-plus"),
    tables={"table": ("df_chexpert_plus_240401.csv",), "labels": LABEL_FILES}
    | {f"labels_{split}": (f"{split}.csv",) for split in SPLITS},
    columns={
        "path_to_image": Column(
            rf"(?P<path>(?:train|valid)/{chexpert.IMAGE}\.(?i:jpg|jpeg|png|dcm))",
            "is not like train/patient00001/study1/view1_frontal.jpg",
        ),
        "frontal_lateral": chexpert.VIEW,
        "split": Column("(?P<split>train|valid)", "is none of train, valid"),
        "age": AGE._replace(optional=True),
        "ap_pa": chexpert.PROJECTION,
        "sex": chexpert.SEX,
    },
    templates=chexpert.KEY,
    facts=("race", "ethnicity", "interpreter_needed", "insurance_type"),
    # The table says .jpg all the same.
    places=(("PNG", ".png"), ("", ".png"), ("DICOM/Uncompressed", ".dcm")),
    is_joined=True,
)
