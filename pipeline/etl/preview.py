"""A source and options → what sharding it would give, without writing anything."""

from contextlib import suppress
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.etl.planning import Options
from pipeline.images import ImageError, prepare
from pipeline.measure.counts import Statistics, count_labels, describe_views
from pipeline.sources.rows import Omitted, divide_rows, find_missing, read_images, read_splits
from pipeline.sources.sets import SETS
from pipeline.sources.source import Source

SAMPLED = 24  # images per split that are prepared to estimate the bytes
OVERHEAD = 2304  # bytes per sample beside the image: two headers, the JSON and half a block of padding


class SplitPreview(NamedTuple):
    """One split: rows of the CSV, rows kept and dropped, files that do not exist, expected shards and bytes."""

    rows: int
    kept: int
    dropped: Omitted
    missing: list[str]
    shards: int
    bytes: int


class Preview(NamedTuple):
    """All splits, label counts, how many studies have which views, what `describe_moved` says, and notes on facts."""

    splits: dict[str, SplitPreview]
    statistics: Statistics
    views: str
    moved: str | None
    notes: tuple[str, ...]


def preview_shards(source: Source, options: Options) -> Preview:
    """What `write_shards` would do. Raises DataError as `read_splits` does."""
    tables, dropped, notes = read_splits(source, **options.selection)
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
    return Preview(
        splits,
        count_labels(kept),
        describe_views(kept),
        SETS[source.set].describe_moved(tables.values(), source.roots),
        notes,
    )


def _mean_bytes(files: list[str], source: Source, options: Options) -> float:
    """Bytes per sample, from usable images spread evenly over the split."""
    sizes = []
    spread = np.linspace(0, len(files) - 1, min(SAMPLED, len(files)), dtype=int)
    for content in read_images([files[position] for position in spread], source.roots):
        with suppress(ImageError):
            if isinstance(content, bytes):
                sizes.append(len(prepare(content, options.image).data) + OVERHEAD)
    return sum(sizes) / len(sizes) if sizes else 0.0
