"""What a data set is to this program, `DataSet`; and what the modules of all sets share."""

import csv
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.base.store import list_files
from pipeline.base.tar import Member
from pipeline.identity import Note, ignore
from pipeline.labels import LABELS, NOT_ANNOTATED

# Of two files of one image, the earlier is the original.
RANKS = (("dcm", "dicom"), ("png",), ("jpg", "jpeg"))
BLANKS = ("blank", "not-annotated")
_IN_TAR = re.compile(r"(.+\.tar)@(\d+)\+(\d+)#.*", re.DOTALL)


class UnsaidBlanksError(DataError):
    """Nobody has said what the blanks of a set mean; `annotated` are its labels that have states."""

    def __init__(self, text: str, annotated: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.annotated = annotated


class Terms(NamedTuple):
    """Who made a data set, and how it may be used: a row of terms.csv; `paper` is empty if there is none.

    Sets with the same `patients` share the names of patients.
    """

    name: str
    title: str
    patients: str
    license: str
    paper: str


@cache
def read_terms(name: str) -> Terms:
    """The terms of a data set that terms.csv has."""
    with Path(__file__).with_name("terms.csv").open(newline="") as file:
        return next(Terms(**row) for row in csv.DictReader(file) if row["name"] == name)


class Source(NamedTuple):
    """A data set on the user's disk.

    `csvs` are its tables, by split or by role; `roots` are the folders that images may be read from; `set` is its name
    in `sources.sets.SETS`. `columns` are what a table of no known set calls ours: ("path", "Image"), …; `facts` are
    files of further columns (`sources.joined`). `name` is what the user calls a set that has the layout of another one,
    but patients of its own. Of such a set and of a table, `annotated` are the labels that were looked for, and `blanks`
    is what an empty cell means, one of BLANKS; empty if the user says neither.
    """

    csvs: dict[str, Path]
    roots: tuple[Path, ...]
    set: str = "chexpert"
    columns: tuple[tuple[str, str], ...] = ()
    facts: tuple[Path, ...] = ()
    name: str = ""
    annotated: tuple[str, ...] = ()
    blanks: str = ""

    @property
    def stated(self) -> dict[str, Any]:
        """What the user states about the set, as far as it decides what is in the shards."""
        given = {name: getattr(self, name) for name in ("name", "annotated", "blanks")}
        given["columns"] = dict(self.columns)
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value
        }


def locate_below(paths: Sequence[str], places: Sequence[tuple[Path, str]]) -> list[str]:
    """The file of each path in the first place, a folder and a suffix, that has it; else where it should be."""
    heads = {path.partition("/")[0] for path in paths}
    holding = [place for place in places if not heads.isdisjoint(path.name for path in list_files(place[0]))]
    places = holding or places[:1]

    def choose(path: str) -> str:
        stem = path.rpartition(".")[0]
        choices = [(folder, f"{stem}{suffix}" if suffix else path) for folder, suffix in places]
        having = (pair for pair in choices if len(choices) == 1 or (pair[0] / pair[1]).is_file())
        folder, name = next(having, choices[0])
        return f"{folder}/{name}"

    return [choose(path) for path in paths]


@dataclass(frozen=True)
class DataSet:
    """A kind of data set: its terms, how a folder that holds it is recognized, and how it is read.

    Functions raise DataError, naming file, line and column.
    """

    terms: Terms
    files: str  # that tell the set, in words
    # The files that list the images, by split or role; None if the folder does not hold the set.
    find_tables: Callable[[Path], dict[str, Path] | None]
    # The label table (`pipeline.labels`) of one CSV, the one of a split; None if that takes several files.
    read_table: Callable[[Path], pa.Table] | None = None
    # Split → label table, all with the same facts, if the set has some; None if each has a CSV.
    read_tables: Callable[[Source, Note], dict[str, pa.Table]] | None = None
    column: str = ""  # that only this set's table has
    # The file, absolute path or URL, of each of the tables' paths.
    locate: Callable[[Sequence[str], Sequence[Path]], list[str]] = lambda paths, roots: locate_below(
        paths, [(root, "") for root in roots]
    )
    # Folders that may hold images, beside those of the tables and those that the user named.
    find_roots: Callable[[Sequence[Path]], list[Path]] = lambda homes: []
    # How many images are in another folder than their table says, in words; None for no image.
    describe_moved: Callable[[Iterable[pa.Table], Sequence[Path]], str | None] = lambda tables, roots: None
    numbers_studies: bool = False  # here, as its tables do not

    def read(self, source: Source, note: Note = ignore) -> dict[str, pa.Table]:
        """Split → label table. `note` is told of rows that find no partner in another file."""
        if self.read_tables:
            return self.read_tables(source, note)
        assert self.read_table is not None, self  # noqa: S101 - one of the two is given
        return {split: self.read_table(csv) for split, csv in source.csvs.items()}


def find_train(*names: str) -> Callable[[Path], dict[str, Path] | None]:
    """`DataSet.find_tables` of a set whose only table, of one of these names, is train."""

    def find_tables(folder: Path) -> dict[str, Path] | None:
        table = first_file(folder, names)
        return {"train": table} if table else None

    return find_tables


def first_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of these files that the folder holds, plain or gzipped; None if it holds none."""
    paths = (folder / f"{name}{end}" for name in names for end in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def make_table(
    states: Mapping[str, Any],
    *,
    view: Any = "frontal",
    sex: Any = None,
    age: Any = None,
    projection: Any = None,
    **columns: Any,
) -> pa.Table:
    """A label table of states [N] of the 14 labels, and columns [N]: path, key, patient, study, and those of the set.

    A text or None stands for a column of it.
    """
    rows = len(columns["key"])
    facts = {"view": view, "sex": sex, "age": age, "projection": projection}
    kinds = {name: pa.int16() if name == "age" else pa.string() for name in facts}
    whole = {
        name: pa.repeat(pa.scalar(value, kinds[name]), rows)
        if value is None or isinstance(value, str)
        else pa.array(value, kinds[name])
        if isinstance(value, list)
        else value.cast(kinds[name])
        for name, value in facts.items()
    }
    first = {name: columns.pop(name) for name in ("path", "key", "patient", "study")}
    first["study"] = first["study"].cast(pa.int32())
    return pa.table(first | whole | dict(states) | columns).combine_chunks()


def make_key(name: str) -> str:
    """The key of an image of that name: up to 90 letters, digits, _ and -.

    Other characters become _; a hash keeps a name with such, or a longer one, apart from others.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if len(plain) <= 90 and plain == name:
        return plain
    return f"{plain[:80]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def place_in_tar(tar: Path, member: Member) -> str:
    """The file of an image that is a member of a tar."""
    return f"{tar}@{member.offset}+{member.size}#{member.name}"


def find_place(file: str) -> tuple[str, int, int | None]:
    """Path, offset and size in bytes of an image; its size is None if it is a file of its own."""
    match = _IN_TAR.fullmatch(file)
    return (match[1], int(match[2]), int(match[3])) if match else (file, 0, None)


def settle_blanks(source: Source, tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The tables, with every cell as not annotated that nobody looked at.

    CheXpert's labeler and those of the sets known here looked for all that they label, so their blanks are blanks. Of
    another hospital's set and of a table, only its owner knows. Raises UnsaidBlanksError if the owner has to say it,
    and DataError for labels that were not looked for, yet have states.
    """
    is_foreign = bool(source.name) or source.set in ("table", "webdataset")
    if (source.annotated or source.blanks) and not is_foreign and source.set != "chexpert":
        raise DataError(
            f"`annotated`, `blanks`: {source.set} says itself what its blanks are; leave these out"
        )
    silent = [label for label in LABELS if all(not _has_states(table[label]) for table in tables.values())]
    blank = [label for label in silent if any(table[label].null_count for table in tables.values())]
    if is_foreign and blank and not (source.annotated or source.blanks):
        raise UnsaidBlanksError(
            f"{', '.join(blank)}: blank in every row. Did nobody look for these, or was none of them ever mentioned? "
            "Say which labels were looked for, and what a blank cell means",
            tuple(label for label in LABELS if label not in silent),
        )
    if missing := [label for label in silent if label in source.annotated and label not in blank]:
        raise DataError(
            f"`annotated`: no column is named for {', '.join(missing)}; name it in `columns`, too"
        )
    absent = [label for label in LABELS if source.annotated and label not in source.annotated]
    if labeled := [label for label in absent if label not in silent]:
        raise DataError(f"`annotated`: {', '.join(labeled)} has states, so it was looked for; name it too")
    changed = absent if source.blanks != "not-annotated" else LABELS
    return {split: _fill_blanks(table, changed) for split, table in tables.items()}


def _fill_blanks(table: pa.Table, labels: Iterable[str]) -> pa.Table:
    for label in labels:
        column = pc.fill_null(table[label], pa.scalar(NOT_ANNOTATED, pa.int8()))
        table = table.set_column(table.schema.get_field_index(label), label, column)
    return table


def _has_states(column: pa.ChunkedArray) -> bool:
    return bool(pc.any(pc.not_equal(column, NOT_ANNOTATED), min_count=0).as_py())


def list_images(folders: Iterable[Path]) -> dict[str, str]:
    """The file of each image by its name without suffix: in the first folder that has it, and there by RANKS.

    Other files are ignored. Raises DataError for two files of one image and rank.
    """
    images: dict[str, str] = {}
    for folder in folders:
        ranked: dict[str, tuple[int, Path]] = {}
        for path in sorted(list_files(folder), key=lambda path: path.name):
            stem, _, suffix = path.name.rpartition(".")
            rank = next((rank for rank, names in enumerate(RANKS) if suffix.lower() in names), len(RANKS))
            best, other = ranked.get(stem, (len(RANKS), path))
            if rank < best:
                ranked[stem] = rank, path
            elif rank == best < len(RANKS):
                raise DataError(f"{other} and {path.name}: which of them is the image? Move one away")
        images = {stem: str(path) for stem, (_, path) in ranked.items()} | images
    return images


def take_states(states: pa.Array, place: pa.Array) -> pa.Array:
    """The states of the rows [N] that `place` names; an image without one is not annotated, which is not blank."""
    return pc.if_else(place.is_null(), pa.scalar(NOT_ANNOTATED, pa.int8()), states.take(place))


def number_studies(patients: pa.ChunkedArray, studies: pa.ChunkedArray) -> pa.Array:
    """The number [N] of each image's study within its patient, from 1 in the order of the table."""
    known: dict[str, dict[str, int]] = {}
    numbers = []
    for patient, study in zip(patients.to_pylist(), studies.to_pylist(), strict=True):
        studies_of_patient = known.setdefault(patient, {})
        numbers.append(studies_of_patient.setdefault(study, len(studies_of_patient) + 1))
    return pa.array(numbers, pa.int32())
