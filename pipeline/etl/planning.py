"""A set's folder and options → the rows of each shard, as `<split>.plan` (Arrow, one record batch per shard)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.base.options import option
from pipeline.images import ENCODINGS, SQUARES, ImageOptions
from pipeline.labels import VIEWS
from pipeline.policies import find_one_class
from pipeline.sources.rows import divide_rows, read_splits
from pipeline.sources.sets import SETS
from pipeline.sources.source import Source

PARTIAL = ".partial"  # inside the output folder, until the run is finished


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

    @property
    def selection(self) -> dict[str, Any]:
        """The options that choose rows, as `read_splits` takes them."""
        return {name: getattr(self, name) for name in ("views", "dev", "seed", "limit")}


class PlanTask(NamedTuple):
    """What to plan, into `folder`."""

    folder: Path
    source: Source
    options: Options
    strict: Mapping[str, str] | None = None  # policies that must leave every label of train with both classes


class Plan(NamedTuple):
    """Rows per split, what `describe_moved` says of images in other folders, and what `join_facts` notes."""

    rows: dict[str, int]
    moved: str | None
    notes: tuple[str, ...]


def write_plan(task: PlanTask) -> Plan:
    """Write the plan of every split. Raises DataError as `read_splits` does, and for what `strict` refuses."""
    options = task.options
    tables, _, notes = read_splits(task.source, **options.selection)
    if task.strict and "train" in tables and (found := find_one_class(tables["train"], task.strict)):
        raise DataError(f"`strict`: {'; '.join(found)}; choose other policies")
    for split, table in tables.items():
        with (
            atomic_file(_plan_path(task.folder, split)) as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            for rows in divide_rows(table.combine_chunks(), options.samples_per_shard, options.views):
                writer.write_table(rows)
    rows_of = {split: table.num_rows for split, table in tables.items()}
    return Plan(rows_of, SETS[task.source.set].describe_moved(tables.values(), task.source.roots), notes)


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
