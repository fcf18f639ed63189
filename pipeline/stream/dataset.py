"""The Python interface to shards: `open_shards`, and what it returns."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.labels import LABELS, VIEWS
from pipeline.manifest import Manifest
from pipeline.policies import check_blank_policy, choose_policy, make_targets, parse_uncertain_policy
from pipeline.stream.batches import BatchStream, Labels, Unusable, stream_batches
from pipeline.stream.cache import CACHE, CACHE_SIZE
from pipeline.stream.collection import Collection, open_collection
from pipeline.stream.plan import Rows, Samples, plan_evaluation, plan_training, share_batch
from pipeline.stream.samples import OpenSplit, find_images, find_studies
from pipeline.stream.select import select_rows


def open_shards(
    shards: str | Path | Sequence[str | Path], cache: str | Path = CACHE, cache_size: int = CACHE_SIZE
) -> "Shards":
    """The splits of a folder of shards, of its URL (https://… or s3://…), or of several as one.

    Shards at a URL are downloaded into the folder `cache` when they are read, and the least recently used ones are
    evicted above `cache_size` bytes. Raises DataError naming the file for a folder that holds no usable manifest, and
    for several that cannot be read as one.
    """
    collection = open_collection(shards, Path(cache), cache_size)
    for text in collection.warnings:
        warnings.warn(text, stacklevel=2)
    return Shards(collection)


class Shards(Mapping[str, "Selection"]):
    """The splits by their names: shards["train"]."""

    def __init__(self, collection: Collection) -> None:
        self.manifest: Manifest = collection.manifest
        self._collection = collection

    def __repr__(self) -> str:
        counts = (f"{name} {split.samples:,}" for name, split in self.manifest.splits.items())
        return f"<Shards {self._collection}: {', '.join(counts)} images>"

    def __getitem__(self, name: str) -> "Selection":
        split = self._collection.open(name)
        return Selection(split, self.manifest.policies, np.arange(split.table.num_rows))

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.splits

    def get(self, name: str, default: Any = None) -> Any:
        """The split, or the default if there is none of that name."""
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.splits)

    def __len__(self) -> int:
        return len(self.manifest.splits)


@dataclass(frozen=True)
class StreamOptions:
    """How batches are read: decoding threads, the most damaged images allowed, and the rank out of `ranks`.

    The size of a batch is that of all ranks together: each rank gets its share of every batch or, in table order,
    batches of the size of that share.
    """

    threads: int = 2
    max_bad: int = 0
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True, repr=False, eq=False)
class Selection:
    """Samples of a split: the images that meet all conditions, or their studies.

    Each selection adds a condition: `where` and `studies` commute.
    """

    split: OpenSplit
    policies: Mapping[str, str]  # for uncertain and blank labels, as given to `pipeline shards`
    rows: Rows  # of the selected images, ascending
    by_study: bool = False

    def __repr__(self) -> str:
        units = f"{len(self.samples.rows):,} studies of " if self.by_study else ""
        return f"<{self.split.name}: {units}{len(self.rows):,} of {self.split.table.num_rows:,} images>"

    @cached_property
    def samples(self) -> Samples:
        """The images, or studies of up to MOST_VIEWS images. Raises DataError as `find_studies`."""
        if self.by_study:
            return find_studies(self.split, self.rows)[0]
        return find_images(self.split, self.rows)

    @property
    def table(self) -> pa.Table:
        """A row per sample, that of its first image: key, patient, study, view, …, and the 14 raw labels.

        Its `to_pandas()` is a DataFrame.
        """
        return self.split.table.take(self.samples.rows[:, 0])

    def where(self, *conditions: str, views: str = "all") -> "Selection":
        """The images of these views for which all conditions hold, too, as `where("sex=Female", "age>=60")`.

        Of studies, the studies of these images. Raises DataError for a condition that cannot be parsed, and if no
        image meets all.
        """
        if views not in VIEWS:
            raise DataError(f"views '{views}' is unknown; choose from {', '.join(VIEWS)}")
        table = self.split.table.take(self.rows)
        return replace(self, rows=self.rows[select_rows(table, conditions, views)])

    def studies(self) -> "Selection":
        """The same images grouped by study: samples of up to three views."""
        return replace(self, by_study=True)

    def batches(
        self,
        batch_size: int,
        size: int | tuple[int, int],
        *,
        epoch: int | None,
        labels: Sequence[str] = LABELS,
        seed: int = 0,
        uncertain: str | None = None,
        blank: str | None = None,
        **options: int,
    ) -> BatchStream:
        """Batches of images, with target and mask [batch_size, labels] by the policies.

        Images are `size` pixels square, or of a height and width. The order is determined by `seed` and `epoch`, and
        the last partial batch is dropped; with epoch None, every sample once in table order. Policies of None are the
        shards' defaults. `options` are fields of StreamOptions. Raises DataError for an unknown label or policy, a
        number out of range and, while iterating, for more than `max_bad` damaged images.
        """
        how = StreamOptions(**options)
        share, samples = share_batch(batch_size, how.rank, how.ranks), len(self.samples.rows)
        if epoch is not None and batch_size > samples:
            raise DataError(f"`batch_size` {batch_size} is more than the {samples:,} samples of {self!r}")
        side = size if isinstance(size, int) else min(size)
        for name, value, least in (("epoch", epoch, 0), ("size", side, 1), ("threads", how.threads, 1)):
            if value is not None and value < least:
                raise DataError(f"`{name}` {value} is less than {least}")
        for label in labels:
            if label not in LABELS:
                raise DataError(f"label '{label}' is unknown; choose from {', '.join(LABELS)}")
        policy = parse_uncertain_policy(choose_policy("uncertain", uncertain, self.policies))
        blank = check_blank_policy(choose_policy("blank", blank, self.policies))
        columns = [LABELS.index(label) for label in labels]
        target, mask = make_targets(self.split.table, policy, blank, seed)
        cells = Labels(target.take(columns, axis=1), mask.take(columns, axis=1))
        if epoch is None:
            plan = partial(plan_evaluation, self.samples, share)
        else:
            plan = partial(plan_training, self.samples, batch_size, seed, epoch)
        plan = partial(plan, rank=how.rank, ranks=how.ranks)
        bad, kind = Unusable(how.max_bad), BatchStream
        if "torch.utils.data" in sys.modules:  # whose DataLoader then takes the stream
            from pipeline.stream.loader import LoaderStream

            kind = LoaderStream
        return stream_batches(self.split, cells, plan, size=size, threads=how.threads, bad=bad, kind=kind)
