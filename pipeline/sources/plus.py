"""CheXpert Plus: df_chexpert_plus_240401.csv, CheXbert's labels, PNG/train/patient00001/study1/view1_frontal.png.

Without the PNGs, its DICOMs are read: DICOM/Uncompressed/train/patient00001/study1/view1_frontal.dcm.

Chambon et al., CheXpert Plus, arXiv:2405.19538: 223,462 radiographs of CheXpert's own patients, with reports. Labels
are in files of their own, of which the first that is there is read: chexbert_labels/report_fixed.json, then
impression_fixed.json, then findings_fixed.json; without any, CheXpert's own train.csv and valid.csv beside the table.
To use a later one, move the earlier ones away. An image without a line there is not annotated. Reports are not read.
Race, ethnicity, insurance and the need of an interpreter are facts, as far as the table has them.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson

from pipeline.base.csvs import demand, demand_cells, demand_unique, read_header, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.base.store import open_to_read
from pipeline.identity import Note, ignore, join, normalize_paths
from pipeline.labels import LABELS, read_labels
from pipeline.sources.source import (
    DataSet,
    Source,
    first_file,
    locate_below,
    make_table,
    read_terms,
    take_states,
)

TABLE = "df_chexpert_plus_240401.csv"
LABEL_FILES = tuple(f"chexbert_labels/{part}_fixed.json" for part in ("report", "impression", "findings"))
CHECKS = {
    "frontal_lateral": ("^(?i:frontal|lateral)$", "is neither Frontal nor Lateral"),
    "split": ("^(train|valid)$", "is none of train, valid"),
    "age": (r"^\d{1,3}(\.0)?$", "is not a number of years"),
}
FACTS = ("race", "ethnicity", "interpreter_needed", "insurance_type")
SPLITS = ("train", "valid")
_PATH = (
    r"^(?:train|valid)/(?P<patient>patient\d{1,20})/study(?P<study>\d{1,6})/"
    r"(?P<view>view\d{1,4}_(?:frontal|lateral))\.(?i:jpg|jpeg|png|dcm)$"
)


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The table and the labels; None without the table. Raises DataError if there are no labels."""
    table = first_file(folder, [TABLE])
    if table is None:
        return None
    labels = next((folder / name for name in LABEL_FILES if (folder / name).is_file()), None)
    own = {f"labels_{split}": folder / f"{split}.csv" for split in SPLITS}
    files = {"labels": labels} if labels else {role: path for role, path in own.items() if path.is_file()}
    if not files:
        raise DataError(f"{folder}: {TABLE} is there, but none of {', '.join(LABEL_FILES)}, train.csv")
    return {"table": table, **files}


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table."""
    csv = source.csvs["table"]
    facts = [name for name in FACTS if name in read_header(csv)]
    text = read_strings(csv, ("path_to_image", *CHECKS, "ap_pa", "sex", *facts))
    path = text["path_to_image"]
    parts = pc.extract_regex(path, _PATH)
    complaint = "is not like train/patient00001/study1/view1_frontal.jpg"
    demand(csv, "path_to_image", path, parts.is_valid(), complaint)
    demand_cells(csv, text, CHECKS, ("age",))
    parts = parts.combine_chunks()
    patient, study, file = (parts.field(name) for name in ("patient", "study", "view"))
    key = pc.binary_join_element_wise(patient, pc.binary_join_element_wise("study", study, ""), file, "_")
    demand_unique(csv, key)
    view = pc.utf8_lower(text["frontal_lateral"])
    files = [file for role, file in source.csvs.items() if role != "table"]
    labels = _read_json(files[0]) if "labels" in source.csvs else pa.concat_tables(map(_read_own, files))
    names, by = labels["path"], partial(normalize_paths, parts=3)
    place = join(path, files[0], labels.select(LABELS), names, "images", note, by, lambda _, row: row + 1)
    table = make_table(
        {label: take_states(labels[label].combine_chunks(), place) for label in LABELS},
        path=path,
        key=key,
        patient=patient,
        study=study,
        view=view,
        sex=text["sex"],
        age=text["age"].cast(pa.float32()),
        projection=pc.if_else(pc.equal(view, "frontal"), text["ap_pa"], None),
        **{name: text[name] for name in facts},
    )
    splits = {split: table.filter(pc.equal(text["split"], split)).combine_chunks() for split in SPLITS}
    return {split: rows for split, rows in splits.items() if len(rows)}


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The PNG of each image, or its DICOM, below the first root that has it: the table says .jpg all the same."""
    places = [(folder, ".png") for root in roots for folder in (root / "PNG", root)]
    places += [(root / "DICOM" / "Uncompressed", ".dcm") for root in roots]
    return locate_below(paths, places)


def _read_own(csv: Path) -> pa.Table:
    """Paths and states from one of CheXpert's own CSVs."""
    return read_labels(csv).select(["path", *LABELS])


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
        column = table[label].combine_chunks()
        known = pc.fill_null(pc.is_in(column, value_set=pa.array([1.0, 0.0, -1.0])), False)
        row = pc.index(pc.or_(known, column.is_null()), False).as_py()
        if row >= 0:
            raise DataError(
                f"{path}, line {row + 1}, {label}: {column[row].as_py():g} is not a label: 1, 0, -1 or null"
            )
        states[label] = column.cast(pa.int8())
    return pa.table(states)


SET = DataSet(
    read_terms("chexpert-plus"),
    files=f"a {TABLE}",
    find_tables=find_tables,
    read_tables=read_tables,
    column="path_to_image",
    locate=locate,
)
