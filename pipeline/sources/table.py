"""A user's CSV, whose columns the user names: a hospital's images with labels of any of the 14.

    pipeline shards images out --set table --columns path=Image,patient=MRN,Edema=edema

`path`, the image's file relative to SOURCE, and `patient` are needed. `study` (a number), `view` (frontal, lateral
or other; frontal by default), `sex`, `age` and `projection` (AP, PA, LL or RL) may be named. Labels are 1, 0, -1 or
blank; labels without a column are not annotated. All rows are train, of which dev is held out; `--split`
gives each split a CSV.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.base.csvs import SUFFIXES, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.identity import Note, ignore
from pipeline.labels import CELLS, LABELS, NOT_ANNOTATED, find_label, parse_states
from pipeline.sources.source import (
    AGE,
    SEX,
    SUFFIX,
    Column,
    DataSet,
    Source,
    make_key,
    make_table,
    read_cells,
    read_terms,
)

_PART = r"(?:[^/\\.]|\.[^/\\.]|\.\.[^/\\])[^/\\]*"  # a folder but . and ..
NEEDED = ("path", "patient")
FIELDS = {
    # DICOM files often have no suffix, or are named by a UID.
    "path": Column(
        rf"(?P<path>(?:{_PART}/)*(?:[^/\\]+{SUFFIX}|[^/\\.]+|[^/\\]+\.\d+))",
        "is not a path below SOURCE to a JPEG, PNG or DICOM",
    ),
    "patient": Column(r"(?P<patient>\S{1,64})", "is not a name without spaces, of up to 64 characters"),
    "study": Column(r"(?i:study|s)?[_-]?0*(?P<study>\d{1,9})(?:\.0+)?", "is not a number of up to 9 digits"),
    "view": Column("(?P<view>(?i:frontal|lateral|other))", "is none of frontal, lateral, other"),
    "sex": SEX,
    "age": AGE._replace(optional=True),
    "projection": Column("(?P<projection>AP|PA|LL|RL)", "is none of AP, PA, LL, RL", optional=True),
}


def parse_columns(text: str, known: Sequence[str] = (*FIELDS, "key", *LABELS)) -> tuple[tuple[str, str], ...]:
    """Our names, of those `known`, and the table's, from `path=Image,patient=MRN`.

    Spaces and double quotes around a name do not count. Raises DataError, naming all problems; the set
    checks which columns are needed.
    """
    pairs: list[tuple[str, str]] = []
    wrong = []
    for part in text.split(","):
        name, column = (word.strip().strip('"') for word in part.partition("=")[::2])
        field = find_label(name) or name
        if field not in known:
            wrong.append(f"'{field}' is none of {', '.join(known)}")
        elif not column:
            wrong.append(f"{field} has no column")
        elif field in dict(pairs):
            wrong.append(f"{field} is given twice")
        pairs.append((field, column))
    if wrong:
        raise DataError("; ".join(wrong))
    return tuple(pairs)


class OwnTable(DataSet):
    """A table whose columns the user names."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The only CSV of the folder, as train; None if there is no CSV or several."""
        csvs = [path for path in list_files(folder) if path.name.endswith(SUFFIXES)]
        return {"train": csvs[0]} if len(csvs) == 1 else None

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table."""
        columns = dict(source.columns)
        wrong = [f"{name} must be named" for name in NEEDED if name not in columns]
        wrong += [] if any(name in LABELS for name in columns) else ["no label is named"]
        wrong += ["key is for `set` webdataset"] if "key" in columns else []
        if wrong:
            raise DataError(f"`set` table, `columns`: {'; '.join(wrong)}")
        tables = {}
        for split, csv in source.csvs.items():
            text = read_strings(csv)
            demand_columns(csv, text.column_names, list(columns.values()))
            cells = {field: text[column] for field, column in columns.items()}
            tables[split] = read_named(csv, columns, cells)
            demand_unique(csv, tables[split]["key"])
        return tables


def read_named(csv: Path | list[str], columns: Mapping[str, str], cells: Mapping[str, pa.ChunkedArray]) -> pa.Table:
    """The label table of cells by our names; `csv`, or the name of each row, and `columns` are for errors."""
    named = [(columns[field], cells[field], column) for field, column in FIELDS.items() if field in columns]
    states = CELLS | {NOT_ANNOTATED: NOT_ANNOTATED}  # as in our own shards
    fields = {**cells, **read_cells(csv, named)}
    if "key" not in fields:
        fields["key"] = pa.array(map(make_key, fields["path"].to_pylist()))
    absent = pa.repeat(pa.scalar(NOT_ANNOTATED, pa.int8()), len(fields["key"]))
    labels = {
        label: parse_states(csv, columns[label], cells[label], states) if label in cells else absent for label in LABELS
    }
    return make_table(fields, labels)


SET = OwnTable(read_terms("table"), files="a single CSV", numbers_studies=True)
