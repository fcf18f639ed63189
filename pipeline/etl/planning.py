"""A dataset's folder and options → the rows of each shard, as `<split>.plan` (Arrow, one record batch per shard).

Or, without writing anything, a preview of its shards.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.base.options import option
from pipeline.images import ENCODINGS, SQUARES, ImageError, ImageOptions, prepare
from pipeline.labels import VIEWS
from pipeline.measure.counts import Statistics, count_labels, describe_views
from pipeline.policies import find_one_class
from pipeline.sources.rows import Omitted, Splits, divide_rows, find_missing, read_images, read_splits
from pipeline.sources.source import Source

PARTIAL = ".partial"  # inside the output folder, until the run is finished
SAMPLED = 24  # images per split that are prepared to estimate the bytes
OVERHEAD = 2304  # bytes per sample beside the image: two headers, the JSON and half a block of padding


def parse_size(text: str) -> int | None:
    """A number of pixels; None for `original`."""
    if text == "original":
        return None
    if not text.isdecimal() or int(text) < 16:
        raise DataError(f"'{text}' is neither a number of pixels, 16 or more, nor original")
    return int(text)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards."""

    size: int | None = option(
        320, "Shorter side, never enlarged; original keeps it.", parse=parse_size, metavar="PIXELS|original"
    )
    square: str = option("no", "How an image becomes SIZE×SIZE.", choices=SQUARES)
    encoding: str = option("jpeg", "raw: for slow CPUs, 5 times as large.", choices=ENCODINGS)
    quality: int = option(95, "JPEG quality of resized images.", low=1, high=100)
    max_pixels: int = option(50_000_000, "Reject larger images.", low=1)
    views: str = option("frontal", "By the column Frontal/Lateral.", choices=VIEWS)
    dev: float = option(0.05, "Fraction of training patients held out as dev.", low=0, high=1)
    seed: int = option(0, "Decides the dev patients and the order.", low=0)
    limit: int | None = option(None, "Most images per split; whole patients, at least one.", low=1)
    samples_per_shard: int = option(1000, low=1)
    bits: int | None = option(
        None,
        "How many bits of a 16-bit PNG hold the picture.",
        low=8,
        high=16,
        shown="as the file says, else by its levels",
    )

    @property
    def image(self) -> ImageOptions:
        """The options of a single image."""
        return ImageOptions(self.size, self.square, self.encoding, self.quality, self.max_pixels, self.bits)

    def read_splits(self, source: Source) -> Splits:
        """The rows that the options choose."""
        return read_splits(source, views=self.views, dev=self.dev, seed=self.seed, limit=self.limit)


class PlanTask(NamedTuple):
    """What to plan, into `folder`."""

    folder: Path
    source: Source
    options: Options
    strict: Mapping[str, str] | None = None  # policies that must leave every label of train with both classes


class Plan(NamedTuple):
    """Rows per split, and notes of `read_splits`."""

    rows: dict[str, int]
    notes: tuple[str, ...]


def write_plan(task: PlanTask) -> Plan:
    """Write the plan of every split. Raises DataError as `read_splits` does, and for anything that `strict` rejects."""
    options = task.options
    tables, _, notes = options.read_splits(task.source)
    if task.strict and "train" in tables and (one_class := find_one_class(tables["train"], task.strict)):
        raise DataError(f"`strict`: {'; '.join(one_class)}; choose other policies")
    for split, table in tables.items():
        with atomic_file(_plan_path(task.folder, split)) as file, pa.ipc.new_file(file, table.schema) as writer:
            for rows in divide_rows(table.combine_chunks(), options.samples_per_shard, options.views):
                writer.write_table(rows)
    return Plan({split: table.num_rows for split, table in tables.items()}, notes)


def count_planned(folder: Path, split: str) -> int:
    """The number of shards that are planned for a split."""
    with _plan_path(folder, split).open("rb") as file:
        return int(pa.ipc.open_file(file).num_record_batches)


def read_planned(folder: Path, split: str, number: int) -> pa.RecordBatch:
    """The rows of one shard. They are read, not mapped: a memory map would stay resident. Raises DataError."""
    path = _plan_path(folder, split)
    try:
        with path.open("rb") as file:
            return pa.ipc.open_file(file).get_batch(number)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}; the same command writes it again") from error


def _plan_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.plan"


class SplitPreview(NamedTuple):
    """One split: rows of the CSV, rows kept and dropped, files that do not exist, expected shards and bytes."""

    rows: int
    kept: int
    dropped: Omitted
    missing: list[str]
    shards: int
    bytes: int


class Preview(NamedTuple):
    """All splits, label counts, how many studies have which views, and notes of `read_splits`."""

    splits: dict[str, SplitPreview]
    statistics: Statistics
    views: str
    notes: tuple[str, ...]


def preview_shards(source: Source, options: Options) -> Preview:
    """A preview of `write_shards`. Raises DataError as `read_splits` does."""
    tables, dropped, notes = options.read_splits(source)
    splits = {}
    for split, table in tables.items():
        files = table["file"].to_pylist()
        shards = len(list(divide_rows(table, options.samples_per_shard, options.views)))
        splits[split] = SplitPreview(
            table.num_rows + sum(dropped[split]),
            table.num_rows,
            dropped[split],
            find_missing(files, source.roots),
            shards,
            round(_mean_bytes(files, source, options) * table.num_rows) + shards * 1024,
        )
    kept = pa.concat_tables(list(tables.values()))
    return Preview(splits, count_labels(kept), describe_views(kept), notes)


def _mean_bytes(files: Sequence[str], source: Source, options: Options) -> float:
    """Bytes per sample, from usable images spread evenly over the split."""
    sizes = []
    spread = np.linspace(0, len(files) - 1, min(SAMPLED, len(files)), dtype=int)
    for content in read_images([files[position] for position in spread], source.roots):
        with suppress(ImageError):
            if isinstance(content, bytes):
                sizes.append(len(prepare(content, options.image).data) + OVERHEAD)
    return sum(sizes) / len(sizes) if sizes else 0.0
