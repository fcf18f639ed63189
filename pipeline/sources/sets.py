"""The data sets that can be sharded: a module each, asked in turn whether a folder holds its set.

A module has the functions of `Adapter`. To add a set, write such a module and add a line to SETS.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from pipeline.base.csvs import read_header
from pipeline.base.errors import DataError
from pipeline.base.store import check_access, list_files, named_failures
from pipeline.identity import Note
from pipeline.sources import chexpert, mimic, nih, padchest, plus, table, vindr, webdataset
from pipeline.sources.source import Source, Terms


class Adapter(Protocol):
    """What a data set's module offers."""

    @property
    def TERMS(self) -> Terms:  # noqa: N802 - a constant of a module
        """The set's name, license and paper."""

    @property
    def LOOKED_FOR(self) -> str:  # noqa: N802
        """The files that tell the set, in words."""

    @property
    def COLUMN(self) -> str:  # noqa: N802
        """A column that only this set's table has."""

    def find_tables(self, folder: Path, /) -> dict[str, Path] | None:
        """The files that list the set's images, by split or by role; None if the folder does not hold the set.

        Raises DataError if it holds a part of them.
        """

    def read_table(self, csv: Path, /) -> pa.Table:
        """The label table of one CSV. Raises DataError, naming file, line and column."""

    def read_tables(self, source: Source, note: Note, /) -> dict[str, pa.Table]:
        """Split → label table (`pipeline.labels`), all with the same further columns, facts, if the set has some.

        `note` is told of rows that find no partner in another file. Raises DataError, naming file, line and column.
        """

    def find_roots(self, homes: Sequence[Path], /) -> list[Path]:
        """Folders that may hold images, beside the `homes`: those of the tables and those that the user named."""

    def locate(self, paths: Sequence[str], roots: Sequence[Path], /) -> list[str]:
        """The file, absolute path or URL, of each of the tables' paths."""

    def describe_moved(self, tables: Iterable[pa.Table], roots: Sequence[Path], /) -> str | None:
        """How many images are in another folder than their table says, in words; None for no image."""


# In the order in which they are asked: other sets have a train.csv, too, so CheXpert comes last.
SETS: dict[str, Adapter] = {
    "chexpert-plus": plus,
    "mimic": mimic,
    "nih": nih,
    "padchest": padchest,
    "padchest-all": padchest,
    "vindr": vindr,
    "chexpert": chexpert,
    "table": table,
    "webdataset": webdataset,
}
DRAWN_NOTE = "SYNTHETIC.txt"  # beside the tables that `pipeline sample` writes
# Those told by their files.
SHOWN = 4  # names of what is in a folder without a set
KNOWN = {adapter.TERMS.name: adapter for adapter in SETS.values() if adapter not in (table, webdataset)}


def find_source(
    folder: Path,
    splits: Mapping[str, Path],
    roots: Sequence[Path],
    name: str | None = None,
    columns: Sequence[tuple[str, str]] = (),
    facts: Sequence[Path] = (),
    called: str = "",
) -> Source:
    """The tables of `folder`, or the CSVs named in `splits`, and every folder that may hold images.

    `name` forces a set; otherwise each is asked in turn. `columns` are for the set `table`, `facts` are files to join,
    `called` is `Source.name`. Raises DataError for a folder or file that does not exist, and if no set is found.
    """
    for path in (folder, *splits.values(), *roots, *facts):
        check_access(path)
        if path is not folder and not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if splits and name == "webdataset":
        csvs = webdataset.find_tables(folder, splits) or {}
    else:
        name, csvs = (name or "chexpert", dict(splits)) if splits else find_set(folder, name)
    homes = [folder, *(csv.parent for csv in csvs.values()), *roots]
    more = SETS[name].find_roots(homes[1:])
    whole = tuple(dict.fromkeys(path.resolve() for path in (*homes, *more)))
    source = Source(csvs, whole, name, tuple(columns), tuple(facts), called)
    if name == "webdataset" and not columns:
        webdataset.read_tables(source)  # it says what to name: before the tars are hashed
    return source


def find_terms(source: Source) -> Terms:
    """Whose the images of a source are, and how they may be used."""
    if called := source.name:
        return Terms(called, called, called, "not stated", "")
    if source.set == "webdataset":
        return webdataset.find_terms(source)
    drawn = any((csv.parent / DRAWN_NOTE).exists() for csv in source.csvs.values())
    return chexpert.DRAWN if drawn and source.set == "chexpert" else SETS[source.set].TERMS


def numbers_studies(name: str, columns: Container[str]) -> bool:
    """Whether the studies of a set were numbered here, as its tables do not name them by numbers."""
    return name in ("vindr", "padchest", "padchest-all") or (
        name in ("table", "webdataset") and "study" not in columns
    )


def find_set(folder: Path, name: str | None = None) -> tuple[str, dict[str, Path]]:
    """The set that the folder holds, and its tables. Raises DataError if there is none."""
    asked = {name: SETS[name]} if name else KNOWN
    with named_failures(folder, "cannot be read"):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        for candidate, adapter in asked.items():
            tables = adapter.find_tables(folder)
            if tables is not None:
                return candidate, tables
        if (folder / "manifest.json").is_file():
            raise DataError(
                f"{folder}: holds shards, not a data set: name the data set first, then the folder of shards to write"
            )
        if name is None and (tables := webdataset.find_tables(folder)):
            return "webdataset", tables
    wanted = ", or ".join(f"{adapter.LOOKED_FOR} ({adapter.TERMS.title})" for adapter in asked.values())
    names = sorted(path.name for path in list_files(folder))
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    there = f"it holds {', '.join(names[:SHOWN])}{more}" if names else "it is empty"
    raise DataError(f"{folder}: neither it nor a folder in it holds {wanted}; {there}")


def read_any_table(csv: Path) -> pa.Table:
    """The label table of one CSV of any set, told by its columns. Raises DataError, naming file, line and column."""
    header = read_header(csv)
    adapter = next((adapter for adapter in KNOWN.values() if adapter.COLUMN in header), chexpert)
    return adapter.read_table(csv)
