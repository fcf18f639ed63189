"""A dataset's folder and options → the rows of each shard, as `<split>.plan` (Arrow, one record batch per shard).

Or, without writing anything, a preview of them.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.base.options import option
from pipeline.etl.cluster import PACKAGES
from pipeline.images import ENCODINGS, SQUARES, ImageError, ImageOptions, prepare
from pipeline.labels import VIEWS
from pipeline.policies import find_one_class
from pipeline.sources.rows import Splits, divide_rows, find_missing, read_images, read_splits
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
        None, "How many bits of a 16-bit PNG hold the picture.", low=8, high=16,
        shown="as the file says, else by its levels",
    )  # fmt: skip

    @property
    def image(self) -> ImageOptions:
        """The options of a single image."""
        return ImageOptions(self.size, self.square, self.encoding, self.quality, self.max_pixels, self.bits)

    def read_splits(self, source: Source) -> Splits:
        """The rows that the options choose."""
        return read_splits(source, views=self.views, dev=self.dev, seed=self.seed, limit=self.limit)


@dataclass(frozen=True)
class Request:
    """The shards to write into `out`; `sources` are the hashes of the tables. It is pickled for worker processes."""

    out: Path
    source: Source
    options: Options
    policies: Mapping[str, str]
    sources: Mapping[str, str]
    strict: bool  # with these policies, every label of train must have both classes

    @property
    def partial(self) -> Path:
        """The folder of plans and records."""
        return self.out / PARTIAL

    @property
    def wanted(self) -> dict[str, dict[str, object]]:
        """What is known of the manifest before shards are written: options, policies, sources."""
        options = asdict(self.options) | self.source.stated
        if self.source.set != SETS[self.source.set].terms.name:  # other rows of the same table
            options["set"] = self.source.set
        return {"options": options, "policies": {**self.policies}, "sources": {**self.sources}}

    @property
    def started(self) -> dict[str, dict[str, object]]:
        """What must not change until the run is finished: the versions decide its bytes, too."""
        return self.wanted | {"versions": {name: version(name) for name in (*PACKAGES, "chexpert-pipeline")}}


def write_plan(request: Request) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Write the plan of every split; returns the number of rows of each shard, per split, and notes of `read_splits`.

    Raises DataError as `read_splits` does, and for anything that `strict` rejects.
    """
    options, rows = request.options, dict[str, list[int]]()
    tables, _, notes = options.read_splits(request.source)
    if request.strict and "train" in tables and (one_class := find_one_class(tables["train"], request.policies)):
        raise DataError(f"`strict`: {'; '.join(one_class)}; choose other policies")
    for split, table in tables.items():
        parts = list(divide_rows(table.combine_chunks(), options.samples_per_shard, options.views))
        rows[split] = [part.num_rows for part in parts]
        with atomic_file(request.partial / f"{split}.plan") as file, pa.ipc.new_file(file, table.schema) as writer:
            for part in parts:
                writer.write_table(part)
    return rows, notes


def read_planned(folder: Path, split: str, number: int) -> pa.RecordBatch:
    """The rows of one shard. They are read, not mapped: a memory map would stay resident. Raises DataError."""
    path = folder / f"{split}.plan"
    try:
        with path.open("rb") as file:
            return pa.ipc.open_file(file).get_batch(number)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}; the same command writes it again") from error


def preview_split(table: pa.Table, source: Source, options: Options) -> tuple[list[str], int, int]:
    """The files of a split's rows that do not exist, and how many shards and bytes may be written."""
    files, sizes = table["file"].to_pylist(), list[int]()
    # The bytes of a sample are estimated by usable images spread evenly over the split.
    spread = np.linspace(0, len(files) - 1, min(24, len(files)), dtype=int)
    for content in read_images([files[position] for position in spread], source.roots):
        with suppress(ImageError):
            if isinstance(content, bytes):  # beside the image: two headers, the JSON and half a block of padding
                sizes.append(len(prepare(content, options.image).data) + 2304)
    shards = len(list(divide_rows(table, options.samples_per_shard, options.views)))
    size = round(sum(sizes) / max(1, len(sizes)) * table.num_rows) + shards * 1024
    return find_missing(files, source.roots), shards, size
