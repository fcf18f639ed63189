"""The Python interface to shards: `open_shards`, and what it returns.

Several folders of shards, local or at a URL, are read as one; their order decides the order of batches. The table of
a split then has a column `set`, the name of each image's data set. If the sets have different patient namespaces
(`Terms.patients`), the namespace precedes each name: `nih/patient00012`.
"""

import hashlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError, printable
from pipeline.base.files import hash_file
from pipeline.identity import NAMED, Ids, describe_repeats, find_shared, identify_images, identify_patients, spell_alike
from pipeline.labels import LABELS, VIEWS, count_rows, describe_unknown
from pipeline.manifest import NAME, Manifest, Split, concat_labels, read_manifest, read_table, renumber
from pipeline.policies import check_blank_policy, choose_policy, make_targets, parse_uncertain_policy
from pipeline.stream.batches import BatchStream, Labels, Size, Unusable, stream_batches
from pipeline.stream.cache import CACHE, CACHE_SIZE, Remote, find_shards, redact
from pipeline.stream.plan import Rows, Samples, plan_evaluation, plan_training, share_batch
from pipeline.stream.samples import OpenSplit, ShardFile, find_images, find_studies, open_split, select_rows

SAME = ("size", "square", "encoding")  # options that folders must share
Locations = str | Path | Sequence[str | Path]  # folders of shards, or their URLs: https://… or s3://…


def open_shards(shards: Locations, cache: str | Path = CACHE, cache_size: int = CACHE_SIZE) -> "Shards":
    """The splits of a folder of shards, or of several as one; warns of images that are in two splits of a folder.

    Shards at a URL are downloaded into the folder `cache` when they are read; it holds at most `cache_size` bytes.
    Raises DataError for a folder without a usable manifest, and for several that cannot be read as one.
    """
    opened = Shards(shards, Path(cache), cache_size)
    for text in opened.warnings:
        warnings.warn(text, stacklevel=2)
    return opened


class Folder(NamedTuple):
    """A folder of manifest and tables, and the `remote` that has its tars, if any; `name` is as the user gave it."""

    name: str
    path: Path
    remote: Remote | None
    manifest: Manifest

    @property
    def patients(self) -> str:
        """The namespace of its patients."""
        return self.manifest.dataset["patients"]


class Shards(Mapping[str, "Selection"]):
    """The splits of folders of shards that are read as one, by their names: shards["train"]."""

    def __init__(self, shards: Locations, cache: Path = CACHE, cache_size: int = CACHE_SIZE) -> None:
        """As `open_shards`, but the warnings are left to the caller."""
        self.folders: list[Folder] = []
        for name in [shards] if isinstance(shards, str | Path) else shards:
            path, remote = find_shards(name, cache, cache_size)
            self.folders.append(Folder(redact(str(name)), path, remote, read_manifest(path)))
        for first, other in combinations(self.folders, 2):
            if first.path.resolve() == other.path.resolve():
                raise DataError(f"{first.name}: given twice")
            for option in SAME:
                mine, others = first.manifest.options[option], other.manifest.options[option]
                if mine != others:
                    how = "shard one of them again as the other"
                    raise DataError(f"{first.name} and {other.name} differ in {option}: {mine} and {others}; {how}")
        # The namespace of all patients; NAMED if each name includes its namespace.
        namespaces = {folder.patients for folder in self.folders}
        self.namespace = namespaces.pop() if len(namespaces) == 1 else NAMED
        self.warnings, self._tables = list[str](), dict[tuple[int, str], pa.Table]()
        for number, folder in enumerate(self.folders):
            manifest = folder.manifest
            tables = {name: read_table(folder.path, split) for name, split in manifest.splits.items()}
            self.warnings += [f"{folder.name}: {printable(text)}" for text in describe_repeats(tables)]
            for name, table in tables.items():
                if len(self.folders) > 1:
                    table = renumber(table, manifest.columns, number)
                    table = table.append_column("set", pa.array([manifest.dataset["name"]] * len(table), pa.string()))
                    if self.namespace == NAMED:
                        patients = pc.binary_join_element_wise(folder.patients, table["patient"], "/")
                        table = table.set_column(table.schema.get_field_index("patient"), "patient", patients)
                self._tables[number, name] = table
        if len(self.folders) > 1:
            self._refuse_shared()

    def __str__(self) -> str:
        return ", ".join(folder.name for folder in self.folders)

    def __repr__(self) -> str:
        counts = (f"{name} {split.samples:,}" for name, split in self.manifest.splits.items())
        return f"<Shards {self}: {', '.join(counts)} images>"

    def __getitem__(self, name: str) -> "Selection":
        split = self.open(name)
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

    @cached_property
    def digest(self) -> str:
        """sha256 that identifies all of the data: the manifest's or, of several, that of their digests in order."""
        digests = [hash_file(folder.path / NAME) for folder in self.folders]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; of several folders, their common options, and sums. A policy on which they differ is empty."""
        first, *others = manifests = [folder.manifest for folder in self.folders]
        if not others:
            return first
        splits = {}
        for name in dict.fromkeys(chain.from_iterable(m.splits for m in manifests)):
            tables = {number: table for (number, split), table in self._tables.items() if split == name}
            counts = count_rows(concat_labels([*spell_alike(tables, self.namespace).values()]))
            shards = chain.from_iterable(m.splits[name].shards for m in manifests if name in m.splits)
            splits[name] = Split(**counts, table="", table_sha256="", shards=tuple(shards))
        # Mean and deviation of the gray levels are those of all of train.
        measured = [m.splits.get("train", next(iter(m.splits.values()))).samples for m in manifests]
        mean, std = (np.array([m.pixels[key] for m in manifests]) for key in ("mean", "std"))
        overall = float(np.average(mean, weights=measured))
        spread = float(np.average(std**2 + mean**2, weights=measured)) - overall**2
        pixels = {"mean": round(overall, 4), "std": round(spread**0.5, 4)}
        given = {key: {m.policies[key] for m in manifests} for key in ("uncertain", "blank")}
        policies = {key: chosen.pop() if len(chosen) == 1 else "" for key, chosen in given.items()}
        keys = dict.fromkeys(chain.from_iterable(m.dataset for m in manifests))
        terms = {key: dict.fromkeys(m.dataset[key] for m in manifests if m.dataset.get(key)) for key in keys}
        dataset = {key: "; ".join(texts) for key, texts in terms.items()}
        unannotated = tuple(label for label in LABELS if all(label in m.not_annotated for m in manifests))
        return Manifest(first.options, policies, {}, pixels, splits, dataset, not_annotated=unannotated)

    def open(self, name: str) -> OpenSplit:
        """A split over all folders that have it. Raises DataError as `open_split` does."""
        self.manifest.split(name)
        tables, shards = {}, list[ShardFile]()
        for place, folder in enumerate(self.folders):
            if name in folder.manifest.splits:
                split = open_split(folder.path, folder.manifest, name, folder.remote, self._tables[place, name])
                if len(self.folders) == 1:
                    return split
                numbers = pa.array(split.shard + np.int32(len(shards)))
                column = split.table.schema.get_field_index("shard")
                tables[place] = split.table.set_column(column, "shard", numbers)
                shards += [file._replace(place=place) for file in split.shards]
        table = concat_labels([*spell_alike(tables, self.namespace).values()])
        return OpenSplit(name, split.encoding, table, tuple(shards))

    def _refuse_shared(self) -> None:
        """Raise DataError for a patient in two splits of two folders, and an image in two folders."""
        patients = {side: identify_patients(table, self.namespace) for side, table in self._tables.items()}
        called = {(number, split): f"{split} of {self.folders[number].name}" for number, split in self._tables}
        for side, other, (name, *_) in find_shared(patients):
            if side[0] != other[0] and side[1] != other[1]:
                how = "if these are two people, shard one of the folders with a `name` of its own"
                places = f"in {called[side]} and in {called[other]}; splits must not share patients"
                raise DataError(f"{name} is {places} ({how})")
        # By name too: the content of an image changes if it is resized or encoded differently.
        names = {
            side: Ids(pc.binary_join_element_wise(self.folders[side[0]].patients, table["key"], "/"), table["key"])
            for side, table in self._tables.items()
        }
        contents = {side: identify_images(table) for side, table in self._tables.items()}
        for side, other, (name, *more) in chain(find_shared(names), find_shared(contents)):
            if side[0] != other[0]:
                others = f" and {len(more):,} others are" if more else " is"
                places = f"in {called[other]} and, maybe under another name, in {called[side]}"
                how = "an image may be in one folder only: take it out of one's table, and shard that again"
                raise DataError(f"{name}{others} {places}; {how}")


class StreamOptions(NamedTuple):
    """How batches are read; their size is that of all ranks together, each of which gets an equal share."""

    threads: int = 2  # that decode
    max_bad: int = 0  # damaged images that are allowed
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True, repr=False, eq=False)
class Selection:
    """Samples of a split: the images that meet all conditions, or their studies; `where` and `studies` commute."""

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
        return find_studies(self.split, self.rows)[0] if self.by_study else find_images(self.split, self.rows)

    @property
    def table(self) -> pa.Table:
        """A row per sample, that of its first image: key, patient, study, view, …, and the 14 raw labels."""
        return self.split.table.take(self.samples.rows[:, 0])

    def where(self, *conditions: str, views: str = "all") -> "Selection":
        """Those whose images meet all conditions, such as "age>=60". Raises DataError if none does."""
        if views not in VIEWS:
            raise DataError(f"views '{views}' is unknown; choose from {', '.join(VIEWS)}")
        return replace(self, rows=self.rows[select_rows(self.split.table.take(self.rows), conditions, views)])

    def studies(self) -> "Selection":
        """The same images grouped by study: samples of up to three views."""
        return replace(self, by_study=True)

    def batches(
        self,
        batch_size: int,
        size: Size,
        *,
        epoch: int | None,
        labels: Sequence[str] = LABELS,
        seed: int = 0,
        uncertain: str | None = None,
        blank: str | None = None,
        **options: int,
    ) -> BatchStream:
        """Batches of images, with target and mask [batch_size, labels] by the policies.

        The order is determined by `seed` and `epoch`, and the last partial batch is dropped; with epoch None, every
        sample once in table order. Policies of None are the shards' defaults. `options` are fields of StreamOptions.
        Raises DataError for an unknown value and, while iterating, for more than `max_bad` damaged images.
        """
        how = StreamOptions(**options)
        share, samples = share_batch(batch_size, how.rank, how.ranks), self.samples
        if epoch is not None and batch_size > len(samples.rows):
            raise DataError(f"`batch_size` {batch_size} is more than the {len(samples.rows):,} samples of {self!r}")
        side = size if isinstance(size, int) else min(size)
        for name, value, least in (("epoch", epoch or 0, 0), ("size", side, 1), ("threads", how.threads, 1)):
            if value < least:
                raise DataError(f"`{name}` {value} is less than {least}")
        for label in labels:
            if label not in LABELS:
                raise DataError(f"label {describe_unknown(label, LABELS)}")
        policy = parse_uncertain_policy(choose_policy("uncertain", uncertain, self.policies))
        blank = check_blank_policy(choose_policy("blank", blank, self.policies))
        columns = [LABELS.index(label) for label in labels]
        target, mask = make_targets(self.split.table, policy, blank, seed)
        cells = Labels(target.take(columns, axis=1), mask.take(columns, axis=1))
        if epoch is None:
            plan = partial(plan_evaluation, samples, share, rank=how.rank, ranks=how.ranks)
        else:
            plan = partial(plan_training, samples, batch_size, seed, epoch, rank=how.rank, ranks=how.ranks)
        stream = stream_batches(self.split, cells, plan, size, how.threads, Unusable(how.max_bad))
        if "torch.utils.data" not in sys.modules:
            return stream
        from pipeline.stream.loader import LoaderStream  # which torch's DataLoader takes

        return LoaderStream(plan, *stream.stages)
