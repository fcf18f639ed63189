"""A user's CSV, whose columns the user names: a hospital's images with labels of any of the 14.

    pipeline shards images out --set table --columns path=Image,patient=MRN,Edema=edema

docs/data.md has the columns. Words are understood as words.csv has them, and as `values` say.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import SUFFIXES, demand_columns, demand_unique, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.identity import IMAGE_SUFFIX, Note, ignore
from pipeline.labels import LABELS, describe_unknown, find_label, suggest
from pipeline.sources import words
from pipeline.sources.source import AGE, Column, DataSet, Source, make_key, make_table, read_cells, read_terms

_PART = r"(?:[^/\\.]|\.[^/\\.]|\.\.[^/\\])[^/\\]*"  # a folder but . and ..
NEEDED = ("path", "patient")
FIELDS = {
    # DICOM files often have no suffix, or are named by a UID.
    "path": Column(
        rf"(?P<path>(?:{_PART}/)*(?:[^/\\]+{IMAGE_SUFFIX}|[^/\\.]+|[^/\\]+\.\d+))",
        "is not a path below SOURCE to a JPEG, PNG or DICOM",
    ),
    "patient": Column(r"(?P<patient>\S{1,64})", "is not a name without spaces, of up to 64 characters"),
    "study": Column("(?P<study_name>.+)", "is not the name of a study"),
    "age": AGE._replace(optional=True),
}
COLUMNS = (*FIELDS, "view", "sex", "projection", "key", *LABELS)
_NUMBER = r"^(?i:study|s)?[_-]?0*(?P<study>\d{1,9})(?:\.0+)?$"


def parse_columns(text: str, known: Sequence[str] = COLUMNS) -> tuple[tuple[str, str], ...]:
    """Our names, of those `known`, and the table's, from `path=Image,patient="MRN"`. Raises DataError for any other."""
    pairs: list[tuple[str, str]] = []
    wrong = []
    for part in text.split(","):
        name, column = (word.strip().strip('"') for word in part.partition("=")[::2])
        field = find_label(name) or name
        if field not in known:
            others = "" if suggest(field, known) else "; keep a column that is none of these by --facts"
            wrong.append(describe_unknown(field, known) + others)
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
        return {"train": csv} if (csv := find_csv(folder)) else None

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → its label table."""
        columns = dict(source.columns)
        wrong = [f"{name} must be named" for name in NEEDED if name not in columns]
        wrong += ["no label is named"] if columns.keys().isdisjoint(LABELS) else []
        wrong += ["key is for `set` webdataset"] if "key" in columns else []
        if wrong:
            raise DataError(f"`set` table, `columns`: {'; '.join(wrong)}")
        tables = {}
        for split, csv in source.csvs.items():
            text = read_strings(csv)
            demand_columns(csv, text.column_names, list(columns.values()))
            tables[split] = read_named(source, csv, {field: text[column] for field, column in columns.items()}, note)
            demand_unique(csv, tables[split]["key"])
        return tables


def find_csv(folder: Path) -> Path | None:
    """The only CSV of a folder; None if there is no CSV or several."""
    csvs = [path for path in list_files(folder) if path.name.endswith(SUFFIXES)]
    return csvs[0] if len(csvs) == 1 else None


def read_named(
    source: Source, csv: Path | list[str], cells: Mapping[str, pa.ChunkedArray], note: Note = ignore
) -> pa.Table:
    """The label table of cells [N] by our names; `csv` is as for `name_row`. `note` gets words without a meaning."""
    columns = dict(source.columns)
    named = [(columns[field], cells[field], column) for field, column in FIELDS.items() if field in columns]
    fields = {**cells, **read_cells(csv, named)}
    if "key" not in fields:
        fields["key"] = pa.array(map(make_key, fields["path"].to_pylist()))
    if "study_name" in fields:
        numbers = pc.struct_field(pc.extract_regex(fields["study_name"], _NUMBER), "study")
        if numbers.null_count:
            del fields["study"]
            note(f"column {columns['study']}: not all are numbers, so studies are numbered within each patient")
        else:
            fields["study"] = numbers
    for name, other in (("sex", ""), ("view", "projection"), ("projection", "view")):  # a column may hold both of these
        if used := [column for column in (name, other) if column in cells]:
            fields[name] = pc.coalesce(*(words.translate(cells[column], name) for column in used))
            unknown = cells[used[0]].filter(fields[name].is_null())
            if name != "projection" and (unknown.null_count < len(unknown) or (name == "view" and len(unknown))):
                note(f"column {columns[used[0]]}: no {name} is known for {words.count_words(unknown)}")
    if "view" in fields:
        fields["view"] = pc.fill_null(fields["view"], "other")
    return make_table(fields, words.read_states(csv, columns, cells, source.values))


def guess_command(source: Path) -> str:
    """The command that makes shards of a table, or a folder's only one, its columns guessed, for people to check."""
    csv = source if source.is_file() else find_csv(source)
    if csv is None:
        return f"pipeline shards {shlex.quote(str(source / 'TABLE.csv'))} `guess`"
    text = read_strings(csv)
    columns = guess_columns(text.column_names)
    demand_columns(csv, text.column_names, [*columns.values()])
    unknown = {label: words.find_states(text[name], label)[1] for label, name in columns.items() if label in LABELS}
    # A column of very many words is no label's.
    columns = {ours: name for ours, name in columns.items() if len(unknown.get(ours, ())) <= words.SHOWN}
    asked = [word for label in unknown if label in columns for word in unknown[label]]
    needed = dict.fromkeys((*NEEDED, "LABEL"), "COLUMN")
    return spell_command(source, "table", columns, needed) + words.ask_values(asked)


def guess_columns(names: Sequence[str]) -> dict[str, str]:
    """Our name → the column, or field of a sample, that is called so or nearly so; for people to check."""
    folded = {words.fold(name.rpartition(".")[2]): name for name in reversed(names)}
    guessed: dict[str, str] = {}
    for word, ours in words.read_words("column").items():
        if word in folded:
            guessed.setdefault(ours, folded[word])
    guessed |= {label: folded[words.fold(label)] for label in LABELS if words.fold(label) in folded}
    for word, name in reversed(folded.items()):
        if (label := suggest(word, LABELS)) and name not in guessed.values():
            guessed.setdefault(label, name)
    return guessed


def spell_command(source: Path, kind: str, columns: Mapping[str, str], needed: Mapping[str, str]) -> str:
    """The command that makes shards; what is needed and not among the columns is added, LABEL for any label."""
    missing = {name: column for name, column in needed.items() if name not in columns}
    if not columns.keys().isdisjoint(LABELS):
        missing.pop("LABEL", None)
    named = ",".join(f"{name}={column}" for name, column in (dict(columns) | missing).items())
    return f"pipeline shards {shlex.quote(str(source))} OUT `set` {kind} `columns` {shlex.quote(named)}"


SET = OwnTable(read_terms("table"), files="a single CSV (of several, name one as SOURCE)")
