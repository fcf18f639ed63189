"""A folder of shards → a split ready to read, and the samples made of its images.

A sample is one image or, for networks that fuse views, a study: one examination, whose images CheXpert labels
together. In shards made with --views all, a study's images are adjacent. If they are not, the result is the same,
but a batch needs many shards at once, and shards at a URL need a cache that holds all of them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.labels import LABELS, MOST_VIEWS, PROJECTIONS, label_states, number_studies
from pipeline.manifest import PLACES, Manifest, Shard, read_table
from pipeline.stream.cache import Remote
from pipeline.stream.plan import Rows, Samples


class ShardFile(NamedTuple):
    """A shard, in a folder or at a URL, whose manifest and tables the folder mirrors.

    `place` is that of its folder in the `Shards`.
    """

    shard: Shard
    folder: Path
    remote: Remote | None
    place: int = 0

    def path(self, stop: Event | None = None) -> Path:
        """The local file, downloaded if need be, as in `Remote.path`."""
        return self.remote.path(self.shard, stop) if self.remote else self.folder / self.shard.file


@dataclass(eq=False, repr=False)
class OpenSplit:
    """A split ready to be read: its table, the shards that column `shard` counts, and columns as arrays [N].

    `projection` [N] is the place of each image's projection in PROJECTIONS.
    """

    name: str
    encoding: str
    table: pa.Table
    shards: tuple[ShardFile, ...]
    shard: npt.NDArray[np.int32] = field(init=False)
    offset: npt.NDArray[np.int64] = field(init=False)
    length: npt.NDArray[np.int32] = field(init=False)
    crc: npt.NDArray[np.uint32] = field(init=False)
    projection: npt.NDArray[np.int8] = field(init=False)

    def __post_init__(self) -> None:
        for column in PLACES.names:
            setattr(self, column, self.table[column].to_numpy())
        names = pc.if_else(pc.equal(self.table["view"], "lateral"), "lateral", self.table["projection"])
        codes = pc.index_in(names, value_set=pa.array(PROJECTIONS))
        self.projection = pc.fill_null(codes, PROJECTIONS.index("other")).to_numpy().astype(np.int8)

    @property
    def folder(self) -> Rows:
        """The place of each image's folder in the `Shards`."""
        return np.array([file.place for file in self.shards])[self.shard]


def open_split(
    folder: Path, manifest: Manifest, name: str, remote: Remote | None = None, table: pa.Table | None = None
) -> OpenSplit:
    """Check the table, and the sizes of local shards, against the manifest. Raises DataError naming the file.

    With a `remote`, `folder` is its mirror of manifest and tables, and shards are downloaded when needed. `table` is
    the split's table, if already read.
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
    opened = OpenSplit(
        name,
        str(manifest.options["encoding"]),
        table,
        tuple(ShardFile(entry, folder, remote) for entry in split.shards),
    )
    shard, offset, length = opened.shard, opened.offset, opened.length
    sizes = np.array([entry.bytes for entry in split.shards], np.int64)
    astray = (shard < 0) | (shard >= len(sizes)) | (offset < 0) | (length < 0)
    astray |= offset > sizes[np.where(astray, 0, shard)] - length if len(sizes) else False
    if astray.any():
        key = table["key"][int(np.argmax(astray))].as_py()
        raise DataError(f"{folder / split.table}: sample {key} lies outside of its shard; it is damaged")
    return opened


def find_images(split: OpenSplit, rows: Rows | None = None) -> Samples:
    """One sample per image: of the table's `rows`, ascending; of all if None."""
    rows = np.arange(split.table.num_rows, dtype=np.int64) if rows is None else rows
    sizes = np.bincount(split.shard[rows], minlength=len(split.shards))
    return Samples(rows[:, None], sizes.tolist())


def find_studies(split: OpenSplit, rows: Rows | None = None) -> tuple[Samples, int]:
    """The studies with an image among `rows` (ascending; all if None), and how many images are left out.

    A study has at most MOST_VIEWS views: the first images of the table are taken. Raises DataError if images of
    a study differ in a label, naming both.
    """
    table = split.table if rows is None else split.table.take(rows)
    rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
    study = number_studies(table)
    order = np.argsort(study, kind="stable")
    counts = np.bincount(study)
    starts = np.cumsum(counts) - counts
    _refuse_differences(split.name, table, order, np.repeat(order[starts], counts))
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


def _refuse_differences(name: str, table: pa.Table, order: Rows, first: Rows) -> None:
    """Raise DataError for an image whose raw states are not those of its study's first image."""
    states, blank = label_states(table)
    states[blank] = 2
    differs = states[order] != states[first]
    for position, column in np.argwhere(differs)[:1].tolist():
        keys = [table["key"][int(rows[position])].as_py() for rows in (first, order)]
        raise DataError(
            f"{name}: {keys[0]} and {keys[1]} are of one study but differ in {LABELS[column]}; "
            "a study has one label, so read these shards by image"
        )
