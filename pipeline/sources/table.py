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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.identity import Note, ignore, normalize_ids
from pipeline.labels import CELLS, LABELS, NOT_ANNOTATED, find_label, parse_states
from pipeline.sources.source import Source, Terms, locate_below, make_key, no_more_roots, nothing_moved

TERMS = Terms(name="table", title="a table of your own", patients="table", license="not stated", paper="")
LOOKED_FOR = "a single CSV"
COLUMN = ""  # it is not told by its columns
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
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The only CSV of the folder, as train; None if there is no CSV or several."""
    csvs = [path for path in list_files(folder) if path.name.endswith((".csv", ".csv.gz"))]
    return {"train": csvs[0]} if len(csvs) == 1 else None


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """Our names and the table's, from `path=Image,patient=MRN`. Raises DataError, naming all that is wrong.

    Which of them are needed, the set knows.
    """
    pairs: list[tuple[str, str]] = []
    wrong = []
    known = (*FACTS, "key", *LABELS)
    for part in text.split(","):
        name, _, theirs = part.partition("=")
        ours = find_label(name) or name
        if ours not in known:
            wrong.append(f"'{ours}' is none of {', '.join(known)}")
        elif not theirs:
            wrong.append(f"{ours} has no column")
        elif ours in dict(pairs):
            wrong.append(f"{ours} is there twice")
        pairs.append((ours, theirs))
    if wrong:
        raise DataError("; ".join(wrong))
    return tuple(pairs)


def read_table(csv: Path) -> pa.Table:
    """It cannot be read without names of columns: raises DataError."""
    raise DataError(
        f"{csv}: not the table of a known set; `pipeline shards` takes it with `set` table and `columns`"
    )


def read_tables(source: Source, note: Note = ignore) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError, naming file, line and column."""
    columns = dict(source.columns)
    wrong = [f"{name} must be named" for name in NEEDED if name not in columns]
    wrong += [] if any(name in LABELS for name in columns) else ["no label is named"]
    wrong += ["key is for `set` webdataset"] if "key" in columns else []
    if wrong:
        raise DataError(f"`set` table, `columns`: {'; '.join(wrong)}")
    return {split: _read(csv, dict(source.columns)) for split, csv in source.csvs.items()}


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each path, below the first root that has it."""
    return locate_below(paths, [(root, "") for root in roots])


def _read(csv: Path, columns: Mapping[str, str]) -> pa.Table:
    text = read_strings(csv)
    demand_columns(csv, text.column_names, list(columns.values()))
    cells = {ours: text[theirs] for ours, theirs in columns.items()}
    path = cells.pop("path")
    is_image = pc.match_substring_regex(path, _PATH)
    demand(csv, columns["path"], path, is_image, "is not a path below SOURCE to a JPEG, PNG or DICOM")
    outside = pc.match_substring_regex(path, r"(^|/)\.\.?(/|$)")
    demand(csv, columns["path"], path, pc.invert(outside), "leads out of SOURCE")
    keys = pa.array([make_key(re.sub(_SUFFIX, "", name)) for name in path.to_pylist()])
    demand_unique(csv, keys)
    return make_table(csv, columns, cells, path, keys)


def make_table(
    csv: Path | list[str],
    columns: Mapping[str, str],
    found: Mapping[str, pa.ChunkedArray],
    path: pa.ChunkedArray,
    key: pa.Array,
) -> pa.Table:
    """The label table of cells by our names; `csv`, or what each row is called, and their names are for errors.

    Raises DataError for the first cell that is not what its column holds.
    """
    rows = len(key)
    if "study" in found:
        found = {**found, "study": pa.chunked_array([normalize_ids(found["study"])])}
    for ours, (pattern, complaint) in _CHECKS.items():
        if ours in found:
            valid = pc.match_substring_regex(found[ours], pattern)
            demand(csv, columns[ours], found[ours], valid, complaint, ours in _OPTIONAL)
    facts = {
        "path": path,
        "key": key,
        "patient": found["patient"],
        "study": found["study"].cast(pa.int32()) if "study" in found else _number_within(found["patient"]),
        "view": pc.utf8_lower(found["view"]) if "view" in found else pa.array(["frontal"] * rows),
        "sex": found.get("sex", pa.nulls(rows, pa.string())),
        "age": found["age"].cast(pa.float32()).cast(pa.int16())
        if "age" in found
        else pa.nulls(rows, pa.int16()),
        "projection": found.get("projection", pa.nulls(rows, pa.string())),
    }
    cells = CELLS | {NOT_ANNOTATED: NOT_ANNOTATED}  # as our own shards have it
    absent = pa.array(np.full(rows, NOT_ANNOTATED, np.int8))
    states = {
        label: parse_states(csv, columns[label], found[label], cells) if label in found else absent
        for label in LABELS
    }
    return pa.table(facts | states).combine_chunks()


def _number_within(patient: pa.ChunkedArray) -> pa.Array:
    """A study of its own for each image: numbers from 1 within a patient."""
    seen: dict[str, int] = {}
    numbers = []
    for name in patient.to_pylist():
        seen[name] = seen.get(name, 0) + 1
        numbers.append(seen[name])
    return pa.array(numbers, pa.int32())
