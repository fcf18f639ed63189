"""A CSV of one's own, whose columns the user names: a hospital's images with labels of any of the 14.

    pipeline shards films out --set table --columns path=Image,patient=MRN,Edema=edema

`path`, the image's file relative to SOURCE, and `patient` are needed. `study` (a number), `view` (frontal or lateral;
frontal by default), `sex`, `age` and `projection` (AP or PA) may be named. Labels are 1, 0, -1 or blank; those that no
column is named for are not annotated. All rows are train, of which dev is held out; `--split` gives each split a CSV.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.labels import LABELS, NOT_ANNOTATED, find_label, parse_states
from pipeline.sources.source import Source, Terms, no_more_roots, nothing_moved

TERMS = Terms(name="table", title="a table of your own", patients="table", license="not stated", paper="")
LOOKED_FOR = "a single CSV"
COLUMN = ""  # it is not told by its columns
NEEDED = ("path", "patient")
FACTS = (*NEEDED, "study", "view", "sex", "age", "projection")
_PATH = r"^(?:[^/\\]+/)*[^/\\]+\.(?i:jpg|jpeg|png|dcm|dicom)$"
_CHECKS = {
    "path": (_PATH, "is not a path below SOURCE to a JPEG, PNG or DICOM"),
    "patient": (r"^\S{1,64}$", "is not a name without spaces, of up to 64 characters"),
    "study": (r"^\d{1,9}$", "is not a number of up to 9 digits"),
    "view": ("^(?i:frontal|lateral)$", "is neither frontal nor lateral"),
    "age": (r"^\d{1,3}(\.0)?$", "is not a number of years"),
    "projection": ("^(AP|PA)$", "is neither AP nor PA"),
}
_OPTIONAL = ("age", "projection", "sex")  # whose cells may be blank
find_roots, describe_moved = no_more_roots, nothing_moved


def find_tables(folder: Path) -> dict[str, Path] | None:
    """The only CSV of the folder, as train; None if there is no CSV or several."""
    csvs = [path for path in list_files(folder) if path.name.endswith((".csv", ".csv.gz"))]
    return {"train": csvs[0]} if len(csvs) == 1 else None


def parse_columns(text: str) -> tuple[tuple[str, str], ...]:
    """Our names and the table's, from `path=Image,patient=MRN`. Raises DataError, naming all that is wrong."""
    pairs: list[tuple[str, str]] = []
    wrong = []
    known = (*FACTS, *LABELS)
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
    missing = [name for name in NEEDED if name not in dict(pairs)]
    wrong += [f"{' and '.join(missing)} must be named"] if missing else []
    wrong += [] if any(ours in LABELS for ours, _ in pairs) else ["no label is named"]
    if wrong:
        raise DataError("; ".join(wrong))
    return tuple(pairs)


def read_table(csv: Path) -> pa.Table:
    """It cannot be read without names of columns: raises DataError."""
    raise DataError(
        f"{csv}: not the table of a known set; `pipeline shards` takes it with `set` table and `columns`"
    )


def read_tables(source: Source) -> dict[str, pa.Table]:
    """Split → its label table. Raises DataError, naming file, line and column."""
    if not source.columns:
        raise DataError("`set` table: say what its columns are called by `columns`")
    return {split: _read(csv, dict(source.columns)) for split, csv in source.csvs.items()}


def locate(paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The file of each path, below the first root that has it."""
    if len(roots) == 1:  # no need to look
        return [f"{roots[0]}/{path}" for path in paths]
    found = (next((root for root in roots if (root / path).is_file()), roots[0]) for path in paths)
    return [f"{root}/{path}" for root, path in zip(found, paths, strict=True)]


def _read(csv: Path, columns: Mapping[str, str]) -> pa.Table:
    text = read_strings(csv)
    missing = [theirs for theirs in columns.values() if theirs not in text.column_names]
    if missing:
        raise DataError(f"{csv}: no column {', '.join(missing)}; it has {', '.join(text.column_names)}")
    rows = len(text)
    found = {ours: text[theirs] for ours, theirs in columns.items()}
    for ours, (pattern, complaint) in _CHECKS.items():
        if ours in found:
            valid = pc.match_substring_regex(found[ours], pattern)
            demand(csv, columns[ours], found[ours], valid, complaint, ours in _OPTIONAL)
    outside = pc.match_substring_regex(found["path"], r"(^|/)\.\.?(/|$)")
    demand(csv, columns["path"], found["path"], pc.invert(outside), "leads out of SOURCE")
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", path.rpartition(".")[0]) for path in found["path"].to_pylist()]
    demand_unique(csv, pa.array(names))
    facts = {
        "path": found["path"],
        "key": pa.array(names),
        "patient": found["patient"],
        "study": found["study"].cast(pa.int32()) if "study" in found else _number_within(found["patient"]),
        "view": pc.utf8_lower(found["view"]) if "view" in found else pa.array(["frontal"] * rows),
        "sex": found.get("sex", pa.nulls(rows, pa.string())),
        "age": found["age"].cast(pa.float32()).cast(pa.int16())
        if "age" in found
        else pa.nulls(rows, pa.int16()),
        "projection": found.get("projection", pa.nulls(rows, pa.string())),
    }
    absent = pa.array(np.full(rows, NOT_ANNOTATED, np.int8))
    states = {
        label: parse_states(csv, columns[label], found[label]) if label in found else absent
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
