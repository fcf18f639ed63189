"""The rows of a shard + its images → a tar and its record; the records → Arrow tables and the manifest.

A shard is a pure function of its rows and options: the bytes do not depend on the number of workers, nor on how often
the run was killed and started again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.base.files import (
    atomic_file,
    format_table,
    hash_file,
    read_arrow,
    write_atomically,
    write_csv,
    write_table,
)
from pipeline.base.store import read_bytes
from pipeline.base.tar import BLOCK, END, tar_member
from pipeline.base.workers import report_item
from pipeline.etl.planning import Plan, Request, read_planned
from pipeline.images import ENCODINGS, ImageError, Original, gray_statistics, prepare
from pipeline.labels import LABELS, count_rows, find_unannotated
from pipeline.manifest import PLACES, Manifest, Shard, Split, checksum, name_facts, write_manifest
from pipeline.sources.rows import read_images
from pipeline.sources.sets import find_terms

REJECTS = "rejects.csv"
RECORD = b"record"  # in the metadata of a table
CHANGED = "the source no longer gives the bytes of these shards; remove the folder, or name another"
_FACTS = ("key", "patient", "study", "view", "sex", "age", "projection")


class ShardTask(NamedTuple):
    """One shard to write; `sha256` is the tar's required hash if it restores a finished one."""

    request: Request
    split: str
    number: int
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """The tar."""
        return self.request.out / f"{self.split}-{self.number:06d}.tar"

    @property
    def record(self) -> Path:
        """The sha256 of what follows, and the table of its rows with its `ShardRecord`; written after the tar."""
        return self.request.partial / f"{self.path.stem}.arrow"

    def __str__(self) -> str:
        return str(self.path)


class Reject(NamedTuple):
    """An image that did not get into its shard."""

    split: str
    key: str
    file: str
    reason: str


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> None:
    """List the images that did not get into their shards in the folder's rejects.csv."""
    write_csv(folder / REJECTS, [Reject._fields, *sorted(rejects)])


class ShardRecord(NamedTuple):
    """A finished shard: its entry in the manifest, bytes read, images that had metadata, and gray levels [256].

    It lies in the metadata of the table of the shard's rows, which have the columns PLACES and those of `Original`.
    """

    shard: Shard
    bytes_in: int
    stripped: int
    levels: list[int]
    rejects: tuple[Reject, ...]


class Index(NamedTuple):
    """A split's entry in the manifest, the counts of its gray levels [256], its rejects, labels it lacks, and facts."""

    entry: Split
    levels: npt.NDArray[np.int64]
    rejects: list[Reject]
    not_annotated: list[str]
    facts: dict[str, str]


def write_shard(task: ShardTask) -> ShardRecord:
    """Write one tar, then its record; images that cannot be used are left out and reported.

    Raises DataError, and leaves the file unchanged, if the tar would have another hash than `sha256`.
    """
    with atomic_file(task.path) as file:
        record, table = _write_tar(task, file)
        if task.sha256 not in (None, record.shard.sha256):
            raise DataError(f"{task}: {CHANGED}")
    text = json.dumps([astuple(record.shard), *record[1:]])
    data = format_table(table.replace_schema_metadata({RECORD: text}))
    write_atomically(task.record, hashlib.sha256(data).digest() + data.to_pybytes())
    return record


def read_record(path: Path) -> tuple[ShardRecord, pa.Table]:
    """A shard's record and rows. Raises DataError for a damaged file, and FileNotFoundError."""
    content = read_bytes(path)
    digest, data = content[:32], content[32:]
    if hashlib.sha256(data).digest() != digest:  # Arrow has no checksum of its own
        raise DataError(f"{path}: damaged")
    table = read_arrow(path, data)
    shard, bytes_in, stripped, levels, rejects = json.loads(table.schema.metadata[RECORD])
    record = ShardRecord(Shard(*shard), bytes_in, stripped, levels, tuple(Reject(*row) for row in rejects))
    return record, table.replace_schema_metadata(None)


def find_record(task: ShardTask) -> ShardRecord | None:
    """The record of a shard that an earlier start finished. One with rejects is written again."""
    try:
        record, _ = read_record(task.record)
    except (FileNotFoundError, DataError):
        return None
    return record if is_intact(task.path, record.shard.sha256) and not record.rejects else None


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file exists, can be read, and has this hash."""
    try:
        return path.is_file() and hash_file(path) == sha256
    except OSError:
        return False


def _write_tar(task: ShardTask, file: BinaryIO) -> tuple[ShardRecord, pa.Table]:
    """Write the members; returns the record, and the rows that were kept, with their places and originals."""
    batch = read_planned(task.request.partial, task.split, task.number)
    rows, options = batch.to_pylist(), task.request.options.image
    sha256 = hashlib.sha256()
    position = bytes_in = stripped = 0
    kept, places, notes = [], [], []
    levels = np.zeros(256, np.int64)
    rejects: list[Reject] = []
    suffix = ENCODINGS[options.encoding]

    def write(data: bytes) -> None:
        nonlocal position
        file.write(data)
        sha256.update(data)
        position += len(data)

    # All at once: between two images, the codec has driven this code out of the processor's caches.
    documents = [tar_member(f"{row['key']}.json", _sample_json(row)) for row in rows]
    contents = read_images([row["file"] for row in rows], task.request.source.roots)
    for row, document, content in zip(rows, documents, contents, strict=True):
        try:
            if isinstance(content, ImageError):
                raise content
            image = prepare(content, options, row.get("bits"))
        except ImageError as error:
            rejects.append(Reject(task.split, row["key"], row["file"], str(error)))
            kept.append(False)
        else:
            kept.append(True)
            bytes_in += len(content)
            stripped += image.stripped
            crc = checksum(image.data, options.encoding)
            places.append((task.number, position + BLOCK, len(image.data), crc, *image.original))
            notes.append("; ".join(image.notes) or None)
            write(tar_member(f"{row['key']}.{suffix}", image.data) + document)
            levels += image.levels
        report_item()
    write(END)
    unlisted = [name for name in ("path", "file", "bits") if name in batch.schema.names]
    table = pa.Table.from_batches([batch.filter(pa.array(kept))]).drop_columns(unlisted)
    fields = [*PLACES, *(pa.field(name, pa.int64()) for name in Original._fields)]
    for number, field in enumerate(fields):
        table = table.append_column(field, pa.array([row[number] for row in places], field.type))
    table = table.append_column("note", pa.array(notes, pa.string()))
    shard = Shard(task.path.name, len(places), position, sha256.hexdigest())
    return ShardRecord(shard, bytes_in, stripped, levels.tolist(), tuple(rejects)), table


def _sample_json(row: Mapping[str, object]) -> bytes:
    """Raw labels and view facts of one row, for readers that have the tar alone."""
    labels = {label: row[label] for label in LABELS}
    return json.dumps({name: row[name] for name in _FACTS} | {"labels": labels}).encode()


def finish(task: tuple[Request, Plan]) -> Manifest:
    """Write the Arrow tables, rejects.csv if there are any, and the manifest."""
    request, plan = task
    indexes = {split: index_split((request, plan, split)) for split in plan.rows}
    rejects = [reject for index in indexes.values() for reject in index.rejects]
    if rejects:
        write_rejects(request.out, rejects)
    else:
        (request.out / REJECTS).unlink(missing_ok=True)
    measured = indexes.get("train", next(iter(indexes.values())))
    manifest = Manifest(
        options=request.wanted["options"],
        policies=request.policies,
        sources=request.sources,
        pixels=gray_statistics(measured.levels),
        splits={split: index.entry for split, index in indexes.items()},
        rejects=tuple({"split": r.split, "key": r.key, "reason": r.reason} for r in rejects),
        dataset=find_terms(request.source)._asdict(),
        not_annotated=tuple(
            label for label in LABELS if all(label in index.not_annotated for index in indexes.values())
        ),
        facts=measured.facts,
    )
    write_manifest(request.out, manifest)
    return manifest


def index_split(task: tuple[Request, Plan, str]) -> Index:
    """Write `<split>.arrow`: the rows that were kept, without paths, plus each image's position and original facts."""
    request, plan, split = task
    parts = [read_record(ShardTask(request, split, number).record) for number in range(len(plan.rows[split]))]
    samples = pa.concat_tables(table for _, table in parts)
    if samples["note"].null_count == len(samples):
        samples = samples.drop_columns(["note"])
    digest = write_table(request.out / f"{split}.arrow", samples)
    shards = tuple(record.shard for record, _ in parts)
    entry = Split(**count_rows(samples), table=f"{split}.arrow", table_sha256=digest, shards=shards)
    levels = np.array([record.levels for record, _ in parts], np.int64).sum(axis=0)
    rejects = [reject for record, _ in parts for reject in record.rejects]
    return Index(entry, levels, rejects, find_unannotated(samples), name_facts(samples))
