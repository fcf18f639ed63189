"""Shards in a user's own code: `open_shards`, and what it returns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.manifest import Manifest
from pipeline.policies import check_blank_policy, choose_policy, make_targets, parse_uncertain_policy
from pipeline.stream.batches import BatchStream, Labels, stream_batches
from pipeline.stream.cache import CACHE, CACHE_SIZE
from pipeline.stream.collection import Collection, open_collection
from pipeline.stream.plan import Samples, plan_evaluation, plan_training
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
    return Shards(open_collection(shards, Path(cache), cache_size))


class Shards(Mapping[str, "Selection"]):
    """The splits by their names: shards["train"]."""

    def __init__(self, collection: Collection) -> None:
        self.manifest: Manifest = collection.manifest
        self._collection = collection

    def __getitem__(self, name: str) -> "Selection":
        split = self._collection.open(name)
        return Selection(split, self.manifest.policies, find_images(split))

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.splits)

    def __len__(self) -> int:
        return len(self.manifest.splits)


@dataclass(frozen=True)
class Selection:
    """Samples of a split: its images, those that a condition leaves, or its studies."""

    split: OpenSplit
    policies: Mapping[str, str]  # that `pipeline shards` was given, for uncertain and blank labels
    samples: Samples

    @property
    def table(self) -> pa.Table:
        """A row per sample, that of its first image: key, patient, study, view, …, and the 14 raw labels.

        Its `to_pandas()` is a DataFrame.
        """
        return self.split.table.take(self.samples.rows[:, 0])

    def where(self, *conditions: str, views: str = "all") -> "Selection":
        """The images of these views for which all conditions hold, as `where("sex=Female", "age>=60")`.

        Raises DataError for a condition that cannot be understood, and where none is left.
        """
        rows = select_rows(self.split.table, conditions, views)
        return replace(self, samples=find_images(self.split, rows))

    def studies(self) -> "Selection":
        """The same images, as samples of up to three views each: those of a study."""
        rows = self.samples.images
        return replace(self, samples=find_studies(self.split, rows)[0])

    def batches(
        self,
        batch_size: int,
        size: int,
        *,
        epoch: int | None,
        seed: int = 0,
        uncertain: str | None = None,
        blank: str | None = None,
        threads: int = 2,
        max_bad: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> BatchStream:
        """Batches of images `size` pixels square, with targets and masks by the policies (None: the shards' own).

        In an order that `seed` and `epoch` determine, without the samples that do not fill a batch; with epoch None
        in the table's order, every sample once. Rank `rank` of `ranks` gets its share of every batch, or of the
        batches where epoch is None. Raises DataError for an unknown policy and, while iterating, for more than
        `max_bad` damaged images.
        """
        policy = parse_uncertain_policy(choose_policy("uncertain", uncertain, self.policies))
        blank = check_blank_policy(choose_policy("blank", blank, self.policies))
        labels = Labels(*make_targets(self.split.table, policy, blank, seed))
        if epoch is None:
            plan = partial(plan_evaluation, self.samples, batch_size, rank=rank, ranks=ranks)
        else:
            plan = partial(plan_training, self.samples, batch_size, seed, epoch, rank=rank, ranks=ranks)
        return stream_batches(self.split, labels, plan, size=size, threads=threads, max_bad=max_bad)
