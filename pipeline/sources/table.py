"""A CSV of one's own, whose columns the user names: a hospital's images with labels of any of the 14.

    pipeline shards films out --set table --columns path=Image,patient=MRN,Edema=edema

`path`, the image's file relative to SOURCE, and `patient` are needed. `study` (a number), `view` (frontal, lateral
or other; frontal by default), `sex`, `age` and `projection` (AP, PA, LL or RL) may be named. Labels are 1, 0, -1 or
blank; those that no column is named for are not annotated. All rows are train, of which dev is held out; `--split`
gives each split a CSV.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.identity import Note, ignore, normalize_ids
from pipeline.labels import CELLS, LABELS, NOT_ANNOTATED, find_label, parse_states
from pipeline.sources.source import DataSet, Source, make_key, make_table, number_studies, read_terms

NEEDED = ("path", "patient")
FACTS = (*NEEDED, "study", "view", "sex", "age", "projection")
_SUFFIX = r"\.(?i:jpg|jpeg|png|dcm|dicom)$"
# DICOM files often have no suffix, or are named by a UID.
_PATH = rf"^(?:[^/\\]+/)*(?:[^/\\]+{_SUFFIX}|[^/\\.]+$|[^/\\]+\.\d+$)"
_CHECKS = {
    "patient": (r"^\S{1,64}$", "is not a name without spaces, of up to 64 characters"),
    "study": (r"^\d{1,9}$", "is not a number of up to 9 digits"),
    "view": ("^(?i:frontal|lateral|other)$", "is none of frontal, lateral, other"),
    "age": (r"^\d{1,3}(\.0)?$", "is not a number of years"),
    "projection": ("^(AP|PA|LL|RL)$", "is none of AP, PA, LL, RL"),
}
_OPTIONAL = ("age", "projection", "sex")  # whose cells may be blank


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The only CSV of the folder, as train; None if there is no CSV or several."""
    csvs = [path for path in list_files(folder) if path.name.endswith((".csv", ".csv.gz"))]
    return {"train": csvs[0]} if len(csvs) == 1 else None


def parse_columns(text: str, known: Sequence[str] = (*FACTS, "key", *LABELS)) -> tuple[tuple[str, str], ...]:
    """Our names, of those `known`, and the table's, from `path=Image,patient=MRN`.

    Spaces and double quotes around a name do not count. Raises DataError, naming all that is wrong; which columns are
    needed, the set knows.
    """
    pairs: list[tuple[str, str]] = []
    wrong = []
    for part in text.split(","):
        name, column = (word.strip().strip('"') for word in part.partition("=")[::2])
        ours = find_label(name) or name
        if ours not in known:
            wrong.append(f"'{ours}' is none of {', '.join(known)}")
        elif not column:
            wrong.append(f"{ours} has no column")
        elif ours in dict(pairs):
            wrong.append(f"{ours} is given twice")
        pairs.append((ours, column))
    if wrong:
        raise DataError("; ".join(wrong))
    return tuple(pairs)


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table."""
    columns = dict(source.columns)
    wrong = [f"{name} must be named" for name in NEEDED if name not in columns]
    wrong += [] if any(name in LABELS for name in columns) else ["no label is named"]
    wrong += ["key is for `set` webdataset"] if "key" in columns else []
    if wrong:
        raise DataError(f"`set` table, `columns`: {'; '.join(wrong)}")
    return {split: _read(csv, columns) for split, csv in source.csvs.items()}


def _read(csv: Path, columns: Mapping[str, str]) -> pa.Table:
    text = read_strings(csv)
    demand_columns(csv, text.column_names, list(columns.values()))
    path, name = text[columns["path"]], columns["path"]
    is_image = pc.match_substring_regex(path, _PATH)
    demand(csv, name, path, is_image, "is not a path below SOURCE to a JPEG, PNG or DICOM")
    outside = pc.match_substring_regex(path, r"(^|/)\.\.?(/|$)")
    demand(csv, name, path, pc.invert(outside), "leads out of SOURCE")
    keys = pa.array([make_key(re.sub(_SUFFIX, "", name)) for name in path.to_pylist()])
    demand_unique(csv, keys)
    return read_cells(csv, columns, {ours: text[column] for ours, column in columns.items()}, keys)


def read_cells(
    csv: Path | list[str], columns: Mapping[str, str], cells: Mapping[str, pa.ChunkedArray], key: pa.Array
) -> pa.Table:
    """The label table of cells by our names; `csv`, or what each row is called, and `columns` are for errors.

    Raises DataError for the first cell that is not what its column holds.
    """
    cells = dict(cells)
    if "study" in cells:
        cells["study"] = pa.chunked_array([normalize_ids(cells["study"])])
    for ours, (pattern, complaint) in _CHECKS.items():
        if ours in cells:
            valid = pc.match_substring_regex(cells[ours], pattern)
            demand(csv, columns[ours], cells[ours], valid, complaint, ours in _OPTIONAL)
    if "view" in cells:
        cells["view"] = pc.utf8_lower(cells["view"])
    if "age" in cells:
        cells["age"] = cells["age"].cast(pa.float32())
    if "study" not in cells:  # each image has one of its own
        cells["study"] = number_studies(cells["patient"], key)
    states = CELLS | {NOT_ANNOTATED: NOT_ANNOTATED}  # as our own shards have it
    absent = pa.repeat(pa.scalar(NOT_ANNOTATED, pa.int8()), len(key))
    labels = {
        label: parse_states(csv, columns[label], cells.pop(label), states) if label in cells else absent
        for label in LABELS
    }
    return make_table(labels, key=key, **cells)


SET = DataSet(
    read_terms("table"),
    files="a single CSV",
    find_tables=find_tables,
    read_tables=read_tables,
    numbers_studies=True,
)
