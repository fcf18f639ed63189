"""The Python interface to shards: `open_shards`, and what it returns.

Several folders of shards are read as one. To grow a data set, or add another hospital, shard the new images into
another folder. The plan depends on shards and rows alone, so the batches of several folders are as reproducible and as
resumable as those of one. Folders may be local or at a URL. Their order decides the order of batches.

Of several folders, the table of a split has a column `set`, the name of each image's data set. If the sets have
different patient namespaces (`Terms.patients`), the namespace precedes each name: `nih/patient00012`.
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
from pipeline.identity import NAMED, Ids, describe_repeats, find_shared, identify_images, identify_patients, spell_alike
from pipeline.labels import LABELS, VIEWS, count_rows, describe_unknown
from pipeline.manifest import Manifest, Split, concat_labels, manifest_digest, read_manifest, read_table, renumber
from pipeline.policies import check_blank_policy, choose_policy, make_targets, parse_uncertain_policy
from pipeline.stream.batches import BatchStream, Labels, Unusable, stream_batches
from pipeline.stream.cache import CACHE, CACHE_SIZE, Remote, find_shards, redact
from pipeline.stream.plan import Rows, Samples, plan_evaluation, plan_training, share_batch
from pipeline.stream.samples import OpenSplit, ShardFile, find_images, find_studies, open_split
from pipeline.stream.select import select_rows

SAME = ("size", "square", "encoding")  # options that folders must share


def open_shards(
    shards: str | Path | Sequence[str | Path], cache: str | Path = CACHE, cache_size: int = CACHE_SIZE
) -> "Shards":
    """The splits of a folder of shards, of its URL (https://… or s3://…), or of several as one.

    Shards at a URL are downloaded into the folder `cache` when they are read, and the least recently used ones are
    evicted above `cache_size` bytes. Raises DataError naming the file for a folder that holds no usable manifest, and
    for several that cannot be read as one.
    """
    opened = read_shards(shards, Path(cache), cache_size)
    for text in opened.warnings:
        warnings.warn(text, stacklevel=2)
    return opened


def read_shards(
    shards: str | Path | Sequence[str | Path], cache: Path = CACHE, cache_size: int = CACHE_SIZE
) -> "Shards":
    """As `open_shards`, but the warnings are left to the caller."""
    folders = []
    for name in [shards] if isinstance(shards, (str, Path)) else shards:
        path, remote = find_shards(name, cache, cache_size)
        folders.append(Folder(redact(str(name)), path, remote, read_manifest(path)))
    return Shards(folders)


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

    def __init__(self, folders: Sequence[Folder]) -> None:
        """Raises DataError, naming both folders, if they differ in an option that all must share."""
        self.folders = tuple(folders)
        for first, other in combinations(self.folders, 2):
            if first.path.resolve() == other.path.resolve():
                raise DataError(f"{first.name}: given twice")
            for option in SAME:
                values = [folder.manifest.options[option] for folder in (first, other)]
                if values[0] != values[1]:
                    raise DataError(
                        f"{first.name} and {other.name} differ in {option}: {values[0]} and {values[1]}; shard one of "
                        "them again as the other"
                    )
        self._tables = {
            (number, split): self._name_rows(number, folder, read_table(folder.path, entry))
            for number, folder in enumerate(self.folders)
            for split, entry in folder.manifest.splits.items()
        }
        if len(self.folders) > 1:
            self._refuse_shared()
        self.warnings = [
            f"{folder.name}: {printable(text)}"
            for number, folder in enumerate(self.folders)
            for text in describe_repeats({split: self._tables[number, split] for split in folder.manifest.splits})
        ]

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
        digests = [manifest_digest(folder.path) for folder in self.folders]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def namespace(self) -> str:
        """The namespace of all patients; NAMED if each name includes its namespace."""
        namespaces = {folder.patients for folder in self.folders}
        return namespaces.pop() if len(namespaces) == 1 else NAMED

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; of several folders, their common options, and sums.

        A policy on which they differ is empty. Mean and deviation of gray levels are those of all of train, each
        folder weighted by its images.
        """
        manifests = [folder.manifest for folder in self.folders]
        if len(manifests) == 1:
            return manifests[0]
        splits = {}
        for name in dict.fromkeys(name for manifest in manifests for name in manifest.splits):
            tables = {number: table for (number, split), table in self._tables.items() if split == name}
            counts = count_rows(concat_labels([*spell_alike(tables, self.namespace).values()]))
            shards = [shard for m in manifests if name in m.splits for shard in m.splits[name].shards]
            splits[name] = Split(**counts, table="", table_sha256="", shards=tuple(shards))
        policies = {key: {m.policies[key] for m in manifests} for key in ("uncertain", "blank")}
        measured = [m.splits.get("train", next(iter(m.splits.values()))).samples for m in manifests]
        mean, std = (np.array([m.pixels[key] for m in manifests]) for key in ("mean", "std"))
        overall = float(np.average(mean, weights=measured))
        spread = float(np.average(std**2 + mean**2, weights=measured)) - overall**2
        keys = dict.fromkeys(chain.from_iterable(m.dataset for m in manifests))
        terms = {key: [m.dataset[key] for m in manifests if m.dataset.get(key)] for key in keys}
        return Manifest(
            options=manifests[0].options,
            policies={key: chosen.pop() if len(chosen) == 1 else "" for key, chosen in policies.items()},
            sources={},
            pixels={"mean": round(overall, 4), "std": round(spread**0.5, 4)},
            splits=splits,
            dataset={key: "; ".join(dict.fromkeys(texts)) for key, texts in terms.items()},
            not_annotated=tuple(label for label in LABELS if all(label in m.not_annotated for m in manifests)),
        )

    def open(self, name: str) -> OpenSplit:
        """A split over all folders that have it.

        Raises DataError as `open_split` does.
        """
        self.manifest.split(name)
        tables, shards = {}, list[ShardFile]()
        for place, folder in enumerate(self.folders):
            if name not in folder.manifest.splits:
                continue
            split = open_split(folder.path, folder.manifest, name, folder.remote, self._tables[place, name])
            if len(self.folders) == 1:
                return split
            numbers = pa.array(split.shard + np.int32(len(shards)))
            column = split.table.schema.get_field_index("shard")
            tables[place] = split.table.set_column(column, "shard", numbers)
            shards += [file._replace(place=place) for file in split.shards]
        table = concat_labels([*spell_alike(tables, self.namespace).values()])
        return OpenSplit(name, split.encoding, table, tuple(shards))

    def _name_rows(self, place: int, folder: Folder, table: pa.Table) -> pa.Table:
        """The table of one of several folders with its set; patients' names include the namespace if these differ."""
        if len(self.folders) == 1:
            return table
        table = renumber(table, folder.manifest.columns, place)
        if self.namespace == NAMED:
            patients = pc.binary_join_element_wise(folder.patients, table["patient"], "/")
            table = table.set_column(table.schema.get_field_index("patient"), "patient", patients)
        return table.append_column("set", pa.array([folder.manifest.dataset["name"]] * table.num_rows, pa.string()))

    def _refuse_shared(self) -> None:
        """Raise DataError for a patient in two splits of two folders, and an image in two folders."""
        patients = {side: identify_patients(table, self.namespace) for side, table in self._tables.items()}
        called = [folder.name for folder in self.folders]
        for (number, split), (other, other_split), (name, *_) in find_shared(patients):
            if number != other and split != other_split:
                raise DataError(
                    f"{name} is in {split} of {called[number]} and in {other_split} of {called[other]}; splits must "
                    "not share patients (if these are two people, shard one of the folders with a `name` of its own)"
                )
        # By name too: the content of an image changes if it is resized or encoded differently.
        names = {
            side: Ids(pc.binary_join_element_wise(self.folders[side[0]].patients, table["key"], "/"), table["key"])
            for side, table in self._tables.items()
        }
        contents = {side: identify_images(table) for side, table in self._tables.items()}
        for (number, split), (other, other_split), (name, *more) in chain(find_shared(names), find_shared(contents)):
            if number != other:
                others = f" and {len(more):,} others are" if more else " is"
                raise DataError(
                    f"{name}{others} in {other_split} of {called[other]} and, maybe under another name, in {split} of "
                    f"{called[number]}; an image may be in one folder only: take it out of one's table, and shard that "
                    "again"
                )


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
                raise DataError(f"label {describe_unknown(label, LABELS)}")
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
