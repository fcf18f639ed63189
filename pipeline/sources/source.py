"""`DataSet`, the description of a dataset; and what the modules of all datasets share."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_unique, read_data, read_header, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.identity import IMAGE_SUFFIX, Note, ignore, normalize_ids
from pipeline.labels import LABELS, NOT_ANNOTATED
from pipeline.sources.words import look_up, parse_findings, parse_number, translate

RANKS = {"dcm": 0, "dicom": 0, "png": 1, "jpg": 2, "jpeg": 2}  # of two files of one image, the lower is the original
_IN_TAR = re.compile(r"(.+\.tar)@(\d+)\+(\d+)#.*", re.DOTALL)


class Terms(NamedTuple):
    """Who made a data set, and how it may be used, by terms.csv. Sets with the same `patients` share their names."""

    name: str
    title: str
    patients: str
    license: str
    paper: str


@cache
def read_terms(name: str) -> Terms:
    """The terms of a data set that terms.csv has."""
    return next(Terms(**row) for row in read_data(Path(__file__).parent, "terms.csv") if row["name"] == name)


class Source(NamedTuple):
    """A data set on the user's disk.

    `csvs` are its tables, by split or by role; `roots` are the folders that images may be read from. `columns` map our
    columns to those of a user's table, and `values` its words to states; `facts` are files of further columns. `name`
    is the user's name for a set with the layout of another one, but other patients. Of such a set and of a table,
    `annotated` are the labels that were looked for, and `blanks` is what an empty cell means, blank or not-annotated;
    empty if the user chose neither.
    """

    csvs: dict[str, Path]
    roots: tuple[Path, ...]
    set: str = "chexpert"
    columns: tuple[tuple[str, str], ...] = ()
    facts: tuple[Path, ...] = ()
    name: str = ""
    annotated: tuple[str, ...] = ()
    blanks: str = ""
    values: tuple[tuple[str, int | None], ...] = ()

    @property
    def stated(self) -> dict[str, object]:
        """The user's statements about the set that affect the contents of the shards."""
        given: dict[str, object] = {"name": self.name, "annotated": [*self.annotated], "blanks": self.blanks}
        given |= {"columns": dict(self.columns), "values": dict(self.values)}
        return {name: value for name, value in given.items() if value}


class Column(NamedTuple):
    """The rule for a column's cells: a pattern for the full cell, and the error for any other cell.

    The pattern's named groups are fields of an image (`make_table`). `optional` cells may be blank, or pandas' `nan`.
    """

    pattern: str
    complaint: str
    optional: bool = False


# As DICOM's 058Y, and for the oldest 90+ or `85 or more`.
AGE = Column(
    r"(?P<age>\d{1,3})(?:[.,]\d+)?(?i: ?(?:y|yrs?|years?|years? old|j|jahre|or more)|\+)?", "is not a number of years"
)


@dataclass(frozen=True)
class DataSet:
    """A kind of dataset: its terms, the table that lists its images, and what the columns of that table hold.

    A set with more than one table, or other labels, is a subclass that overrides methods. They raise DataError, naming
    file, line and column.
    """

    terms: Terms
    # Role → names of its table, plain or gzipped; the first lists the images, and those `needed` must be beside it.
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    needed: tuple[str, ...] = ()
    columns: dict[str, Column] = field(default_factory=dict)  # the first is one that no other set has
    # Further fields, made of those of the columns: "key": "{patient}_study{study}".
    templates: Mapping[str, str] = field(default_factory=dict)
    # The column that lists findings, with the names of findings.csv, and their separator.
    findings: tuple[str, str] = ("", "")
    facts: tuple[str, ...] = ()  # columns that are kept as they are, if the table has them
    # Folders below a root that may hold the images, and the suffix of the images in them.
    places: tuple[tuple[str, str], ...] = (("", ""),)
    files: str = ""  # by which a folder is recognized, in words, if not by the first table
    is_joined: bool = False  # from several tables

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """The tables by split or role; None without the first. Raises DataError if a needed one is missing."""
        tables = find_files(folder, self.tables)
        first = next(iter(self.tables))
        missing = [self.tables[role][0] for role in self.needed if role not in tables]
        if first in tables and missing:
            raise DataError(f"{folder}: missing beside {tables[first].name}: {', '.join(missing)}")
        return tables if first in tables else None

    def find_roots(self, homes: Sequence[Path]) -> list[Path]:
        """Folders that may hold images, beside those of the tables and those that the user named."""
        return []

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → label table, all with the same facts. `note` gets a sentence for unmatched rows."""
        return {split: self.read_table(csv) for split, csv in source.csvs.items()}

    def read_table(self, csv: Path) -> pa.Table:
        """The label table of one CSV."""
        if self.is_joined:
            raise DataError(f"{csv}: one of several tables of {self.terms.title}; name the folder that holds them")
        fields, text = self.read_fields(csv)
        column, separator = self.findings
        if column:
            states = parse_findings(csv, column, fields["findings"], separator, self.terms.name)
        else:
            states = read_labels(csv, text)
        table = make_table(fields, states, self.facts)
        return table.filter(pc.not_equal(fields["used"], "")) if "used" in fields else table

    def read_text(self, csv: Path) -> pa.Table:
        """The columns needed, as text."""
        labels = () if self.findings[0] or self.is_joined else LABELS
        header = read_header(csv) if self.facts else []
        return read_strings(csv, (*self.columns, *labels, *(name for name in self.facts if name in header)))

    def read_fields(self, csv: Path) -> tuple[dict[str, pa.Array], pa.Table]:
        """The fields of each image, with its facts; and the text that they are read from."""
        text = self.read_text(csv)
        cells = ((name, text[name], column) for name, column in self.columns.items() if name in text.column_names)
        fields = read_cells(csv, cells) | {name: text[name] for name in self.facts if name in text.column_names}
        for name, template in self.templates.items():
            words = re.split(r"\{(\w+)\}", template)  # texts and names of fields in turn
            fields[name] = pc.binary_join_element_wise(
                *(fields[word] if number % 2 else word for number, word in enumerate(words)), ""
            )
        if "key" not in fields:
            fields["key"] = pa.array(map(make_key, fields["path"].to_pylist()))
        demand_unique(csv, fields["key"])
        return fields, text

    def locate(self, paths: Sequence[str], roots: Sequence[Path], note: Note = ignore) -> list[str]:
        """The file, absolute path or URL, of each path: in the first of the `places` that has it."""
        places = [(root / folder, suffix) for folder, suffix in self.places for root in roots]
        heads = {path.partition("/")[0] for path in paths}
        holding = [place for place in places if not heads.isdisjoint(path.name for path in list_files(place[0]))]
        files = []
        for path in paths:
            stem = path.rpartition(".")[0]
            choices = [(folder, f"{stem}{suffix}" if suffix else path) for folder, suffix in holding or places[:1]]
            having = (pair for pair in choices if len(choices) == 1 or (pair[0] / pair[1]).is_file())
            folder, name = next(having, choices[0])
            files.append(f"{folder}/{name}")
        return files


def read_cells(csv: Path | list[str], cells: Iterable[tuple[str, pa.ChunkedArray, Column]]) -> dict[str, pa.Array]:
    """Field → texts [N], of cells [N] by the name of their column. `csv` may also be the name of each row."""
    fields: dict[str, pa.Array] = {}
    for name, texts, column in cells:
        given = pc.if_else(pc.equal(texts, "nan"), None, texts) if column.optional else texts
        parts = pc.extract_regex(given.combine_chunks(), f"(?s)^(?:{column.pattern})$")
        valid = pc.or_(parts.is_valid(), given.is_null()) if column.optional else parts.is_valid()
        demand(csv, name, texts, valid, column.complaint)
        fields |= zip((part.name for part in parts.type), parts.flatten(), strict=True)
    return fields


def find_files(folder: Path, roles: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Role → the first of its files that the folder holds, plain or gzipped, if any."""
    tables: dict[str, Path] = {}
    for role, names in roles.items():
        for path in (folder / f"{name}{end}" for name in names for end in ("", ".gz")):
            if role not in tables and path.is_file():
                tables[role] = path
    return tables


def make_table(fields: Mapping[str, pa.Array], states: Mapping[str, Any], facts: Sequence[str] = ()) -> pa.Table:
    """A label table of states [N] of the 14 labels, and of fields [N].

    Needed: path, key, patient. `study` is a number, `study_name` is numbered by us within the patient; without either,
    each image is a separate study. `position` stands for view and projection, `letter` for the sex, `year` and
    `birth` for the age. Without a view, it is that of the file's `side`, or frontal. Of the other fields, only `bits`
    and those of `facts` are kept.
    """
    blank = pa.nulls(len(fields["key"]), pa.string())
    view = fields.get("view", fields.get("side", pa.repeat("frontal", len(blank))))
    projection = fields.get("projection", blank)
    if "position" in fields:
        view = pc.fill_null(translate(fields["position"], "view"), "other")
        projection = translate(fields["position"], "projection")
        projection = pc.if_else(pc.equal(view, "frontal"), projection, None)
    sex, age = fields.get("sex", blank), fields.get("age", blank).cast(pa.int16())
    if "letter" in fields:
        sex = translate(fields["letter"], "sex")
    if "birth" in fields:
        age = pc.subtract(*(fields[name].cast(pa.int16()) for name in ("year", "birth")))
    study = fields.get("study")
    if study is None:
        names = (normalize_ids(fields["patient"]), fields.get("study_name", fields["key"]))
        numbers = defaultdict[str, dict[str, int]](dict)  # from 1, in the order of the table
        pairs = zip(*(column.to_pylist() for column in names), strict=True)
        study = pa.array([numbers[patient].setdefault(name, len(numbers[patient]) + 1) for patient, name in pairs])
    table = {name: fields[name] for name in ("path", "key", "patient")}
    table |= {"study": study.cast(pa.int32()), "view": pc.utf8_lower(view), "sex": sex, "age": age}
    table |= {"projection": projection, **states}
    if "bits" in fields:
        table["bits"] = fields["bits"].cast(pa.int16())
    return pa.table(table | {name: fields[name] for name in facts if name in fields}).combine_chunks()


def make_key(path: str) -> str:
    """The key of an image of that name or path: up to 90 letters, digits, _ and -; a hash replaces all else."""
    name = re.sub(f"{IMAGE_SUFFIX}$", "", path)
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if len(plain) <= 90 and plain == name:
        return plain
    return f"{plain[:80]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def find_place(file: str) -> tuple[str, int, int | None]:
    """Path, offset and size in bytes of an image; its size is None if it is a separate file."""
    match = _IN_TAR.fullmatch(file)
    return (match[1], int(match[2]), int(match[3])) if match else (file, 0, None)


def settle_blanks(source: Source, tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables, with every cell that nobody looked at marked as not annotated.

    The labelers of known sets look for all labels, so blanks are blanks; of another hospital's set, only the owner
    knows. Raises DataError if the owner must state it, and for labels that have states, but were not looked for.
    """
    is_foreign = bool(source.name or source.columns)
    is_stated = bool(source.annotated or source.blanks)
    if is_stated and not is_foreign and source.set != "chexpert":
        raise DataError(f"`annotated`, `blanks`: {source.set} defines its blanks; leave these out")
    cells = pa.concat_tables(table.select(LABELS) for table in tables.values())
    known = {label: pc.any(pc.not_equal(cells[label], NOT_ANNOTATED), min_count=0).as_py() for label in LABELS}
    blank = [label for label in LABELS if not known[label] and cells[label].null_count]
    if is_foreign and blank and not is_stated:
        others = ",".join(label for label in LABELS if known[label])
        how = (f'`annotated` "{others}" ' if others else "") + "`blanks` not-annotated"
        raise DataError(
            f"{', '.join(blank)}: blank in every row. Did nobody look for these, or was none of them ever mentioned? "
            f"Say which labels were looked for, and what a blank cell means, such as: {how}"
        )
    if missing := [label for label in LABELS if label in source.annotated and not known[label] and label not in blank]:
        raise DataError(f"`annotated`: no column is named for {', '.join(missing)}; name it in `columns`, too")
    absent = [label for label in LABELS if source.annotated and label not in source.annotated]
    if labeled := [label for label in absent if known[label]]:
        raise DataError(f"`annotated`: {', '.join(labeled)} has states, so it was looked for; name it too")
    changed = absent if source.blanks != "not-annotated" else LABELS
    settled = {}
    for split, table in tables.items():
        for label in changed:
            states = pc.fill_null(table[label], pa.scalar(NOT_ANNOTATED, pa.int8()))
            table = table.set_column(table.schema.get_field_index(label), label, states)
        settled[split] = table
    return settled


def list_images(folders: Iterable[Path]) -> dict[str, str]:
    """Name without suffix → the image's file in the first folder that has it. Raises DataError for two of one rank."""
    images: dict[str, str] = {}
    for folder in folders:
        ranked: dict[str, tuple[int, Path]] = {}
        for path in sorted(list_files(folder), key=lambda path: path.name):
            stem, _, suffix = path.name.rpartition(".")
            rank = RANKS.get(suffix.lower(), len(RANKS))
            best, other = ranked.get(stem, (len(RANKS), path))
            if rank < best:
                ranked[stem] = rank, path
            elif rank == best < len(RANKS):
                raise DataError(f"{other} and {path.name}: which of them is the image? Move one away")
        images = {stem: str(path) for stem, (_, path) in ranked.items()} | images
    return images


def read_labels(csv: Path, text: pa.Table) -> dict[str, pa.Array]:
    """The states [N] of the 14 labels, from a table's columns of text."""
    states = {}
    for label in LABELS:
        states[label], unknown = look_up(text[label], parse_number, pa.int8())
        valid = pc.invert(pc.is_in(text[label], value_set=pa.array(unknown, pa.string())))
        demand(csv, label, text[label], valid, "is not a label: 1.0, 0.0, -1.0 or blank")
    return states


def take_states(states: Mapping[str, pa.Array], place: pa.Array) -> dict[str, pa.Array]:
    """The states of the rows [N] that `place` names; an image without one is not annotated, which is not blank."""
    absent = pa.scalar(NOT_ANNOTATED, pa.int8())
    return {label: pc.if_else(place.is_null(), absent, states[label].take(place)) for label in LABELS}


def divide(table: pa.Table, names: pa.Array, splits: Mapping[str, str] | Mapping[bool, str]) -> dict[str, pa.Table]:
    """Split → the rows whose name [N] stands for it, without empty splits."""
    parts = {split: table.filter(pc.equal(names, name)).combine_chunks() for name, split in splits.items()}
    return {split: part for split, part in parts.items() if len(part)}
