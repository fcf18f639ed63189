"""What is sharded, and on what terms: facts that the modules of all data sets share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa


class Terms(NamedTuple):
    """Who made a data set, and how it may be used. Sets with the same `patients` share the names of patients.

    `paper` is empty if there is none.
    """

    name: str
    title: str
    patients: str
    license: str
    paper: str


class Source(NamedTuple):
    """A data set as somebody has it.

    `csvs` are its tables, by split or by role; `roots` are the folders that images may be read from; `set` is its name
    in `sources.sets.SETS`. `columns` are what a table of no known set calls ours: ("path", "Image"), …; `facts` are
    files of further columns (`sources.joined`). `name` is what the user calls a set that has the layout of another one,
    but patients of its own.
    """

    csvs: dict[str, Path]
    roots: tuple[Path, ...]
    set: str = "chexpert"
    columns: tuple[tuple[str, str], ...] = ()
    facts: tuple[Path, ...] = ()
    name: str = ""


def no_more_roots(homes: Sequence[Path]) -> list[Path]:
    """For a set whose images lie in its own folder: no other folder may hold some."""
    return []


def nothing_moved(tables: Iterable[pa.Table], roots: Sequence[Path]) -> None:
    """For a set with one layout: no image can be elsewhere."""
