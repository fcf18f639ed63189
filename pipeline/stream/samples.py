"""A folder of shards → a split ready to read, the rows that meet conditions, and the samples made of their images.

A sample is one image or, for networks that fuse views, a study. In shards made with --views all, a study's images are
adjacent. If they are not, the result is the same, but a batch needs many shards at once.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import labels
from pipeline.base.errors import DataError
from pipeline.labels import LABELS, MOST_VIEWS, PROJECTIONS, STATES
from pipeline.manifest import PLACES, Manifest, Shard, read_table
from pipeline.stream.cache import Remote
from pipeline.stream.plan import Rows, Samples

OPERATORS = {"=": pc.equal, "!=": pc.not_equal}
OPERATORS |= {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_CONDITION = re.compile(r"\s*([^\s=!<>][^=!<>]*?)\s*(!=|<=|>=|=|<|>)\s*([^\s=!<>][^=!<>]*?)\s*")


class NothingSelectedError(DataError):
    """The conditions leave no row of a table."""


class ShardFile(NamedTuple):
    """A shard, in a folder or at a URL, whose manifest and tables the folder mirrors."""

    shard: Shard
    folder: Path
    remote: Remote | None
    place: int = 0  # of its folder in the `Shards`

    def path(self, stop: Event | None = None) -> Path:
        """The local file, downloaded if need be, as in `Remote.path`."""
        return self.remote.path(self.shard, stop) if self.remote else self.folder / self.shard.file


@dataclass(eq=False, repr=False)
class OpenSplit:
    """A split ready to be read: its table, the shards that column `shard` counts, and columns as arrays [N]."""

    name: str
    encoding: str
    table: pa.Table
    shards: tuple[ShardFile, ...]

    def __post_init__(self) -> None:
        self.shard, self.offset, self.length, self.crc = (self.table[name].to_numpy() for name in PLACES.names)
        # The place of each image's projection in PROJECTIONS.
        names = pc.if_else(pc.equal(self.table["view"], "lateral"), "lateral", self.table["projection"])
        codes = pc.index_in(names, value_set=pa.array(PROJECTIONS))
        self.projection = pc.fill_null(codes, PROJECTIONS.index("other")).to_numpy().astype(np.int8)

    @property
    def folder(self) -> Rows:
        """The place of each image's folder in the `Shards`."""
        places: Rows = np.array([file.place for file in self.shards])[self.shard]
        return places


def open_split(
    folder: Path, manifest: Manifest, name: str, remote: Remote | None = None, table: pa.Table | None = None
) -> OpenSplit:
    """Check the table, and the sizes of local shards, against the manifest. Raises DataError naming the file.

    With a `remote`, `folder` is its mirror. `table` is the split's table, if already read.
    """
    split = manifest.split(name)
    table = read_table(folder, split) if table is None else table
    if table.num_rows != split.samples or sum(shard.samples for shard in split.shards) != split.samples:
        raise DataError(f"{folder / split.table}: {table.num_rows} rows, the manifest says {split.samples}")
    for entry in () if remote else split.shards:
        path = folder / entry.file
        if not path.is_file():
            raise DataError(f"{path}: the shard is missing")
        if path.stat().st_size != entry.bytes:
            raise DataError(f"{path}: damaged: {path.stat().st_size} bytes, not {entry.bytes} as in the manifest")
    files = tuple(ShardFile(entry, folder, remote) for entry in split.shards)
    opened = OpenSplit(name, str(manifest.options["encoding"]), table, files)
    shard, offset, length = opened.shard, opened.offset, opened.length
    sizes = np.array([entry.bytes for entry in split.shards], np.int64)
    astray = (shard < 0) | (shard >= len(sizes)) | (offset < 0) | (length < 0)
    astray |= offset > sizes[np.where(astray, 0, shard)] - length if len(sizes) else False
    if astray.any():
        key = table["key"][int(np.argmax(astray))].as_py()
        raise DataError(f"{folder / split.table}: sample {key} lies outside of its shard; it is damaged")
    return opened


def select_rows(table: pa.Table, conditions: Sequence[str], views: str = "all", limit: int | None = None) -> Rows:
    """Row numbers [n], ascending, of the images of these views (see VIEWS) for which every condition holds.

    A condition is COLUMN OPERATOR VALUE:

        number columns   = != < <= > >= with whole numbers
        text columns     = and !=, letter by letter
        the 14 labels    = and != with positive, negative, uncertain, blank, or 1, 0, -1
        every column     = and != with `blank`, an empty cell, which is neither equal to a value nor less or greater

    `limit` keeps the first patient, and more in the order of a hash (ids would select by date) up to so many images.
    Raises DataError for a wrong condition, and for the first one that leaves no row.
    """
    parsed = [_parse_condition(text, table.schema) for text in conditions]
    needed = dict.fromkeys(["patient", "view", *(column for column, _ in parsed)])
    rows = pa.array(np.arange(table.num_rows, dtype=np.int64))
    chosen = labels.select_views(table.select(list(needed)).append_column("row", rows), views)
    if chosen.num_rows == 0:
        raise NothingSelectedError(f"no {views} images among the {table.num_rows:,}")
    for text, (column, holds) in zip(conditions, parsed, strict=True):
        before, chosen = chosen, chosen.filter(holds(chosen[column]))
        if chosen.num_rows == 0:
            values = before[column].unique().drop_null().sort().to_pylist()
            contents = f"whose values go from {values[0]} to {values[-1]}" if values else "all of whose cells are blank"
            if 0 < len(values) <= 5:
                contents = f"whose values are {', '.join(map(str, values))}"
            raise NothingSelectedError(f"condition '{text}' leaves none of {before.num_rows:,} images, {contents}")
    if limit is not None:
        chosen = labels.limit_patients(chosen, limit, seed=0)
    selected: Rows = chosen["row"].to_numpy()
    return selected


def _parse_condition(text: str, schema: pa.Schema) -> tuple[str, Callable[[pa.ChunkedArray], pa.ChunkedArray]]:
    """The column of a condition, and a function of its cells [N]: whether it holds [N], never null."""
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise DataError(f"condition '{text}': write COLUMN=VALUE, or != < <= > >= (an empty cell is blank)")
    name, operator, value = match.groups()
    column = {name.casefold(): name for name in schema.names}.get(name.casefold())
    if column is None:
        raise DataError(f"condition '{text}': no column '{name}'; there are {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"condition '{text}': {column} is {kind}; only texts and whole numbers are compared")
    is_number = pa.types.is_integer(kind) and column not in LABELS
    if operator not in ("=", "!=") and (value == "blank" or not is_number):
        raise DataError(f"condition '{text}': {'blank' if is_number else column} has no order; compare it by = or !=")
    if value == "blank":
        return column, pc.is_null if operator == "=" else pc.is_valid
    wanted: str | int | None = value
    if column in LABELS:
        states = STATES | {"1": 1, "0": 0, "-1": -1}
        if value not in states:
            raise DataError(f"condition '{text}': '{value}' is no state; a label is one of {', '.join(states)}")
        wanted = states[value]
    elif is_number:
        if not re.fullmatch(r"[+-]?\d{1,18}", value, re.ASCII):
            raise DataError(f"condition '{text}': '{value}' is not a whole number, as {column} is")
        wanted = int(value)
    return column, lambda cells: pc.fill_null(OPERATORS[operator](cells, wanted), operator == "!=")


def find_images(split: OpenSplit, rows: Rows | None = None) -> Samples:
    """One sample per image: of the table's `rows`, ascending; of all if None."""
    rows = np.arange(split.table.num_rows, dtype=np.int64) if rows is None else rows
    sizes = np.bincount(split.shard[rows], minlength=len(split.shards))
    return Samples(rows[:, None], sizes.tolist())


def find_studies(split: OpenSplit, rows: Rows | None = None) -> tuple[Samples, int]:
    """The studies with an image among `rows` (ascending; all if None), and how many images are left out.

    Of a study, the first MOST_VIEWS images are taken. Raises DataError, naming both, if two differ in a label.
    """
    table = split.table if rows is None else split.table.take(rows)
    rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
    study = labels.number_studies(table)
    order = np.argsort(study, kind="stable")
    counts = np.bincount(study)
    starts = np.cumsum(counts) - counts
    states, blank = labels.label_states(table)
    states[blank] = 2
    first = np.repeat(order[starts], counts)  # of each image's study
    for position, column in np.argwhere(states[order] != states[first])[:1].tolist():
        keys = [table["key"][int(row)].as_py() for row in (first[position], order[position])]
        raise DataError(
            f"{split.name}: {keys[0]} and {keys[1]} are of one study but differ in {LABELS[column]}; "
            "a study has one label, so read these shards by image"
        )
    place = np.arange(len(order)) - np.repeat(starts, counts)
    kept = place < MOST_VIEWS
    study_rows = np.full((len(counts), 1 + int(place[kept].max(initial=0))), -1, np.int64)
    study_rows[study[order][kept], place[kept]] = rows[order[kept]]
    # Shards in which no study begins are not listed: the order of batches depends on this, and must not change.
    sizes = np.unique(split.shard[study_rows[:, 0]], return_counts=True)[1]
    return Samples(study_rows, sizes.tolist()), int((~kept).sum())


def find_places(split: OpenSplit, table: pa.Table) -> Rows:
    """The rows [n] of a split, ascending, that a table was taken from, matched by their place in the shards."""
    places = split.shard.astype(np.int64) << 40 | split.offset
    wanted = table["shard"].to_numpy().astype(np.int64) << 40 | table["offset"].to_numpy()
    return np.flatnonzero(np.isin(places, wanted))
