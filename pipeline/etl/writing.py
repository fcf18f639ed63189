"""The rows of a shard + its images → a tar and a record of it; the records → Arrow tables and the manifest.

A shard is a pure function of its rows and options: the bytes do not depend on the number of workers, nor on how often
the run was killed and started again.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file, hash_file, read_object, write_csv, write_json, write_table
from pipeline.base.tar import BLOCK, END, tar_member
from pipeline.base.workers import report_item
from pipeline.etl.planning import count_planned, read_planned
from pipeline.images import ENCODINGS, ImageError, ImageOptions, Original, gray_statistics, prepare
from pipeline.labels import LABELS, count_rows, find_unannotated
from pipeline.manifest import PLACES, Manifest, Shard, Split, checksum, name_facts, write_manifest
from pipeline.sources.rows import read_images

REJECTS = "rejects.csv"
CHANGED = "the source no longer gives the bytes of these shards; remove the folder, or name another"
_FACTS = ("key", "patient", "study", "view", "sex", "age", "projection")


class ShardTask(NamedTuple):
    """One shard to write into `out`, by the plan in `partial`, where its record goes.

    `sha256` is what the tar must hash to, if it restores a finished one.
    """

    out: Path
    partial: Path
    split: str
    number: int
    roots: tuple[Path, ...]
    options: ImageOptions
    sha256: str | None = None

    @property
    def file(self) -> str:
        """The shard's file name."""
        return f"{self.split}-{self.number:06d}.tar"

    @property
    def record(self) -> Path:
        """What the index needs of the shard, as JSON; written after the tar."""
        return (self.partial / self.file).with_suffix(".json")

    def __str__(self) -> str:
        return str(self.out / self.file)


class Reject(NamedTuple):
    """An image that did not get into its shard."""

    split: str
    key: str
    file: str
    reason: str


class ShardSummary(NamedTuple):
    """A finished shard, in numbers."""

    samples: int
    bytes_in: int
    stripped: int
    rejects: tuple[Reject, ...]


class FinishTask(NamedTuple):
    """A run to finish: its splits, the manifest's options, policies and sources, and the data set."""

    out: Path
    partial: Path
    splits: tuple[str, ...]
    wanted: dict[str, dict[str, Any]]
    dataset: dict[str, str]


class Index(NamedTuple):
    """A split's entry in the manifest, the counts of its gray levels [256], its rejects, labels it lacks, and facts."""

    entry: Split
    levels: npt.NDArray[np.int64]
    rejects: list[Reject]
    not_annotated: list[str]
    facts: dict[str, str]


def write_shard(task: ShardTask) -> ShardSummary:
    """Write one tar, then its record; images that cannot be used are left out and reported.

    Raises DataError, and leaves the file as it is, where the tar would have another hash than `sha256`.
    """
    rows = read_planned(task.partial, task.split, task.number).to_pylist()
    with atomic_file(task.out / task.file) as file:
        summary, record = _write_tar(task, rows, file)
        if task.sha256 not in (None, record["shard"]["sha256"]):
            raise DataError(f"{task}: {CHANGED}")
    write_json(task.record, {"summary": summary, **record})
    return summary


def find_summary(task: ShardTask) -> ShardSummary | None:
    """The summary of a shard that an earlier start finished. One with rejects is written again."""
    try:
        record = read_object(task.record)
        summary = ShardSummary(*record["summary"])
        intact = is_intact(task.out / task.file, record["shard"]["sha256"])
    except (FileNotFoundError, DataError, KeyError, TypeError):
        return None
    return summary if intact and not summary.rejects else None


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file exists, can be read, and has this hash."""
    try:
        return path.is_file() and hash_file(path) == sha256
    except OSError:
        return False


def _write_tar(
    task: ShardTask, rows: list[dict[str, Any]], file: BinaryIO
) -> tuple[ShardSummary, dict[str, Any]]:
    """Write the members; returns the summary, and the columns that the index needs."""
    sha256 = hashlib.sha256()
    position = bytes_in = stripped = 0
    kept, places, originals, notes = [], [], [], []
    levels = np.zeros(256, np.int64)
    rejects: list[Reject] = []
    suffix = ENCODINGS[task.options.encoding]

    def write(data: bytes) -> None:
        nonlocal position
        file.write(data)
        sha256.update(data)
        position += len(data)

    # All at once: between two images, the codec has driven this code out of the processor's caches.
    documents = [tar_member(f"{row['key']}.json", _sample_json(row)) for row in rows]
    contents = read_images([row["file"] for row in rows], task.roots)
    for row, document, content in zip(rows, documents, contents, strict=True):
        try:
            if isinstance(content, ImageError):
                raise content
            image = prepare(content, task.options, row.get("bits"))
        except ImageError as error:
            rejects.append(Reject(task.split, row["key"], row["file"], str(error)))
            kept.append(False)
        else:
            kept.append(True)
            bytes_in += len(content)
            stripped += image.stripped
            places.append((position + BLOCK, len(image.data), checksum(image.data, task.options.encoding)))
            originals.append(image.original)
            notes.append("; ".join(image.notes) or None)
            write(tar_member(f"{row['key']}.{suffix}", image.data) + document)
            levels += image.levels
        report_item()
    write(END)
    shard = Shard(task.file, len(places), position, sha256.hexdigest())
    record = {"shard": asdict(shard), "kept": kept, "places": places, "originals": originals}
    record |= {"notes": notes, "levels": levels.tolist()}
    return ShardSummary(len(places), bytes_in, stripped, tuple(rejects)), record


def _sample_json(row: Mapping[str, Any]) -> bytes:
    """Raw labels and view facts of one row, for readers that have the tar alone."""
    labels = {label: row[label] for label in LABELS}
    return json.dumps({name: row[name] for name in _FACTS} | {"labels": labels}).encode()


def finish(task: FinishTask) -> Manifest:
    """Write the Arrow tables, rejects.csv where there are any, and the manifest."""
    indexes = {split: index_split((task, split)) for split in task.splits}
    rejects = [reject for index in indexes.values() for reject in index.rejects]
    if rejects:
        write_rejects(task.out, rejects)
    else:
        (task.out / REJECTS).unlink(missing_ok=True)
    measured = indexes.get("train", next(iter(indexes.values())))
    manifest = Manifest(
        **task.wanted,
        pixels=gray_statistics(measured.levels),
        splits={split: index.entry for split, index in indexes.items()},
        rejects=tuple({"split": r.split, "key": r.key, "reason": r.reason} for r in rejects),
        dataset=task.dataset,
        not_annotated=tuple(
            label for label in LABELS if all(label in index.not_annotated for index in indexes.values())
        ),
        facts=measured.facts,
    )
    write_manifest(task.out, manifest)
    return manifest


def index_split(of: tuple[FinishTask, str]) -> Index:
    """Write `<split>.arrow`: the rows that were kept, without paths, plus where each image lies and what it was."""
    task, split = of
    tables, shards, rejects = [], [], []
    levels = np.zeros(256, np.int64)
    for number in range(count_planned(task.partial, split)):
        record = read_object(task.partial / f"{split}-{number:06d}.json")
        rows = read_planned(task.partial, split, number).filter(pa.array(record["kept"]))
        unlisted = [name for name in ("path", "file", "bits") if name in rows.schema.names]
        table = pa.Table.from_batches([rows]).drop_columns(unlisted)
        places = np.array(record["places"], np.int64).reshape(-1, 3)
        for field, values in zip(PLACES, (np.full(len(places), number), *places.T), strict=True):
            table = table.append_column(field.name, pa.array(values, field.type))
        for column, name in enumerate(Original._fields):
            values = pa.array([original[column] for original in record["originals"]], pa.int64())
            table = table.append_column(name, values)
        tables.append(table.append_column("note", pa.array(record["notes"], pa.string())))
        shards.append(Shard(**record["shard"]))
        levels += np.array(record["levels"])
        rejects += [Reject(*reject) for reject in record["summary"][-1]]
    whole = pa.concat_tables(tables)
    if whole["note"].null_count == len(whole):
        whole = whole.drop_columns(["note"])
    digest = write_table(task.out / f"{split}.arrow", whole)
    entry = Split(**count_rows(whole), table=f"{split}.arrow", table_sha256=digest, shards=tuple(shards))
    return Index(entry, levels, rejects, find_unannotated(whole), name_facts(whole))


def write_rejects(folder: Path, rejects: list[Reject]) -> None:
    """Write rejects.csv."""
    write_csv(folder / REJECTS, [Reject._fields, *sorted(rejects)])
