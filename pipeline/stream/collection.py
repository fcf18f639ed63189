"""One or more folders of shards → one manifest, and splits over the shards of all of them.

To grow a data set, or add another hospital, shard the new images into another folder. The plan depends on shards and
rows alone, so the batches of several folders are as reproducible and as resumable as those of one. Folders may be
local or at a URL. The order of the folders decides the order of batches.

Of several folders, the table of a split has a column `set`, the name of each image's data set. If the sets have
different patient namespaces (`Terms.patients`), the namespace precedes each name: `nih/patient00012`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError, printable
from pipeline.identity import NAMED, Ids, describe_repeats, find_shared, identify_images, identify_patients, spell_alike
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import Manifest, Split, concat_labels, manifest_digest, read_manifest, read_table
from pipeline.stream.cache import CACHE, CACHE_SIZE, Remote, find_shards, redact
from pipeline.stream.samples import OpenSplit, ShardFile, open_split

SAME = ("size", "square", "encoding")  # options that folders must share


class Folder(NamedTuple):
    """A folder of manifest and tables, and the `remote` that has its tars, if any; `name` is as the user gave it."""

    name: str
    path: Path
    remote: Remote | None
    manifest: Manifest

    @property
    def set(self) -> str:
        """The name of its data set."""
        return self.manifest.dataset["name"]

    @property
    def patients(self) -> str:
        """The namespace of its patients."""
        return self.manifest.dataset["patients"]


class Collection:
    """Folders of shards that are read as one."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        """Raises DataError, naming both folders, if they differ in an option that all must share."""
        self.folders = tuple(folders)
        for first, other in combinations(self.folders, 2):
            if first.path.resolve() == other.path.resolve():
                raise DataError(f"{first.name}: given twice")
            for option in SAME:
                values = [folder.manifest.options.get(option) for folder in (first, other)]
                if values[0] != values[1]:
                    raise DataError(
                        f"{first.name} and {other.name} differ in {option}: {values[0]} and {values[1]}; shard one of "
                        "them again as the other"
                    )
        self._tables = {
            (number, split): self._name_rows(folder, read_table(folder.path, entry))
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
        names = dict.fromkeys(name for manifest in manifests for name in manifest.splits)
        tables = {
            name: {number: table for (number, split), table in self._tables.items() if split == name} for name in names
        }
        policies = {key: {m.policies[key] for m in manifests} for key in ("uncertain", "blank")}
        weight = np.array([_measured(manifest) for manifest in manifests], float)
        mean, std = (np.array([m.pixels[key] for m in manifests]) for key in ("mean", "std"))
        overall = float(np.average(mean, weights=weight))
        spread = float(np.average(std**2 + mean**2, weights=weight)) - overall**2
        return Manifest(
            options=dict(manifests[0].options),
            policies={key: chosen.pop() if len(chosen) == 1 else "" for key, chosen in policies.items()},
            sources={},
            pixels={"mean": round(overall, 4), "std": round(spread**0.5, 4)},
            splits={
                name: Split(
                    **count_rows(concat_labels([*spell_alike(tables[name], self.namespace).values()])),
                    table="",
                    table_sha256="",
                    shards=tuple(s for m in manifests if name in m.splits for s in m.splits[name].shards),
                )
                for name in names
            },
            dataset=_join_terms([folder.manifest.dataset for folder in self.folders]),
            not_annotated=tuple(
                label for label in LABELS if all(label in manifest.not_annotated for manifest in manifests)
            ),
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

    def _name_rows(self, folder: Folder, table: pa.Table) -> pa.Table:
        """The table of one of several folders with its set; patients' names include the namespace if these differ."""
        if len(self.folders) == 1:
            return table
        if self.namespace == NAMED:
            patients = pc.binary_join_element_wise(folder.patients, table["patient"], "/")
            table = table.set_column(table.schema.get_field_index("patient"), "patient", patients)
        return table.append_column("set", pa.array([folder.set] * table.num_rows, pa.string()))

    def _refuse_shared(self) -> None:
        """Raise DataError for a patient in two splits of two folders, and an image in two folders."""
        tables = self._tables
        patients = {side: identify_patients(table, self.namespace) for side, table in tables.items()}
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
            for side, table in tables.items()
        }
        contents = {side: identify_images(table) for side, table in tables.items()}
        for (number, split), (other, other_split), (name, *more) in chain(find_shared(names), find_shared(contents)):
            if number != other:
                others = f" and {len(more):,} others are" if more else " is"
                raise DataError(
                    f"{name}{others} in {other_split} of {called[other]} and, maybe under another name, in {split} of "
                    f"{called[number]}; an image may be in one folder only: take it out of one's table, and shard that "
                    "again"
                )


def open_collection(
    shards: str | Path | Sequence[str | Path], cache: Path = CACHE, cache_size: int = CACHE_SIZE
) -> Collection:
    """The folders or URLs of shards as one. Raises DataError naming a folder that cannot be read or combined."""
    named = [shards] if isinstance(shards, (str, Path)) else shards
    folders = []
    for name in named:
        path, remote = find_shards(name, cache, cache_size)
        folders.append(Folder(redact(str(name)), path, remote, read_manifest(path)))
    return Collection(folders)


def _measured(manifest: Manifest) -> int:
    """The number of images that the manifest's gray levels were measured on."""
    return manifest.splits.get("train", next(iter(manifest.splits.values()))).samples


def _join_terms(datasets: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The terms of all data sets, without repeats."""
    keys = dict.fromkeys(chain.from_iterable(datasets))
    terms = {key: [dataset[key] for dataset in datasets if dataset.get(key)] for key in keys}
    return {key: "; ".join(dict.fromkeys(texts)) for key, texts in terms.items()}
