"""A dataset's folder and options → the rows of each shard; these and their images → tars, Arrow tables, the manifest.

A plan is `<split>.plan`, Arrow with a record batch per shard. A shard is a pure function of its rows and options: the
bytes do not depend on the number of workers, nor on how often the run was killed and started again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base import files
from pipeline.base.errors import DataError
from pipeline.base.options import option
from pipeline.base.store import read_bytes
from pipeline.base.tar import BLOCK, END, tar_member
from pipeline.base.workers import report_item
from pipeline.etl.cluster import PACKAGES
from pipeline.images import ENCODINGS, SQUARES, ImageError, ImageOptions, Original, prepare
from pipeline.labels import LABELS, VIEWS, count_rows, find_unannotated
from pipeline.manifest import FACTS, PLACES, Manifest, Shard, Split, checksum, name_facts, write_manifest
from pipeline.policies import find_one_class
from pipeline.sources.rows import Splits, divide_rows, find_missing, read_images, read_splits
from pipeline.sources.sets import SETS, find_terms
from pipeline.sources.source import Source

PARTIAL = ".partial"  # inside the output folder, until the run is finished
REJECTS = "rejects.csv"
RECORD = b"record"  # in the metadata of a table
BY_FILE = "as the file says, else by its levels"
CHANGED = "the source no longer gives the bytes of these shards; remove the folder, or name another"


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
    bits: int | None = option(None, "How many bits of a 16-bit PNG hold the picture.", low=8, high=16, shown=BY_FILE)

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
    """Write the plan of every split. Returns the rows of each of its shards, and notes. Raises DataError."""
    options, rows = request.options, dict[str, list[int]]()
    tables, _, notes = options.read_splits(request.source)
    if request.strict and "train" in tables and (one_class := find_one_class(tables["train"], request.policies)):
        raise DataError(f"`strict`: {'; '.join(one_class)}; choose other policies")
    for split, table in tables.items():
        parts = list(divide_rows(table.combine_chunks(), options.samples_per_shard, options.views))
        rows[split] = [part.num_rows for part in parts]
        with (
            files.atomic_file(request.partial / f"{split}.plan") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            for part in parts:
                writer.write_table(part)
    return rows, notes


def preview_split(table: pa.Table, source: Source, options: Options) -> tuple[list[str], int, int]:
    """The files of a split's rows that do not exist, and how many shards and bytes may be written."""
    paths, sizes = table["file"].to_pylist(), list[int]()
    # The bytes of a sample are estimated by usable images spread evenly over the split.
    spread = np.linspace(0, len(paths) - 1, min(24, len(paths)), dtype=int)
    for content in read_images([paths[position] for position in spread], source.roots):
        with suppress(ImageError):
            if isinstance(content, bytes):  # beside the image: two headers, the JSON and half a block of padding
                sizes.append(len(prepare(content, options.image).data) + 2304)
    shards = len(list(divide_rows(table, options.samples_per_shard, options.views)))
    size = round(sum(sizes) / max(1, len(sizes)) * table.num_rows) + shards * 1024
    return find_missing(paths, source.roots), shards, size


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
    files.write_csv(folder / REJECTS, [Reject._fields, *sorted(rejects)])


class ShardRecord(NamedTuple):
    """A finished shard, in the metadata of the table of its rows, which have the columns PLACES and of `Original`."""

    shard: Shard
    bytes_in: int  # read
    stripped: int  # images that had metadata
    levels: list[int]  # [256]: counts of gray levels
    rejects: tuple[Reject, ...]


class Index(NamedTuple):
    """What the manifest gets from a split."""

    entry: Split
    records: list[ShardRecord]
    not_annotated: list[str]
    facts: dict[str, str]


def write_shard(task: ShardTask) -> ShardRecord:
    """Write one tar, then its record. Raises DataError, and changes nothing, if it has another hash than `sha256`."""
    with files.atomic_file(task.path) as file:
        record, table = _write_tar(task, file)
        if task.sha256 not in (None, record.shard.sha256):
            raise DataError(f"{task}: {CHANGED}")
    text = json.dumps([astuple(record.shard), *record[1:]])
    data = files.format_table(table.replace_schema_metadata({RECORD: text}))
    files.write_atomically(task.record, hashlib.sha256(data).digest() + data.to_pybytes())
    return record


def read_record(path: Path) -> tuple[ShardRecord, pa.Table]:
    """A shard's record and rows. Raises DataError for a damaged file, and FileNotFoundError."""
    content = read_bytes(path)
    if hashlib.sha256(content[32:]).digest() != content[:32]:  # Arrow has no checksum of its own
        raise DataError(f"{path}: damaged")
    table = files.read_arrow(path, content[32:])
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
    with suppress(OSError):
        return path.is_file() and files.hash_file(path) == sha256
    return False


def _write_tar(task: ShardTask, file: BinaryIO) -> tuple[ShardRecord, pa.Table]:
    """Write the members; returns the record, and the rows that were kept, with their places and originals."""
    plan = task.request.partial / f"{task.split}.plan"
    try:
        with plan.open("rb") as planned:  # read, not mapped: a memory map would stay resident
            batch = pa.ipc.open_file(planned).get_batch(task.number)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{plan}: cannot be read: {error}; the same command writes it again") from error
    rows, options = batch.to_pylist(), task.request.options.image
    sha256, levels = hashlib.sha256(), np.zeros(256, np.int64)
    position = bytes_in = stripped = 0
    kept, added, rejects = list[bool](), list[tuple[object, ...]](), list[Reject]()

    def write(data: bytes) -> None:
        nonlocal position
        file.write(data)
        sha256.update(data)
        position += len(data)

    # All at once: between two images, the codec has driven this code out of the processor's caches.
    documents = []
    for row in rows:  # raw labels and view facts, for readers that have the tar alone
        facts = {name: row[name] for name in FACTS.names if name not in LABELS}
        text = json.dumps(facts | {"labels": {label: row[label] for label in LABELS}})
        documents.append(tar_member(f"{row['key']}.json", text.encode()))
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
            levels += image.levels
            place = (task.number, position + BLOCK, len(image.data), checksum(image.data, options.encoding))
            added.append((*place, *image.original, "; ".join(image.notes) or None))
            write(tar_member(f"{row['key']}.{ENCODINGS[options.encoding]}", image.data) + document)
        report_item()
    write(END)
    unlisted = [name for name in ("path", "file", "bits") if name in batch.schema.names]
    table = pa.Table.from_batches([batch.filter(pa.array(kept))]).drop_columns(unlisted)
    fields = [*PLACES, *(pa.field(name, pa.int64()) for name in Original._fields), pa.field("note", pa.string())]
    for number, field in enumerate(fields):
        table = table.append_column(field, pa.array([values[number] for values in added], field.type))
    shard = Shard(task.path.name, len(added), position, sha256.hexdigest())
    return ShardRecord(shard, bytes_in, stripped, levels.tolist(), tuple(rejects)), table


def finish(task: tuple[Request, Mapping[str, int]]) -> Manifest:
    """Write the Arrow tables of splits of so many shards, rejects.csv if there are any, and the manifest."""
    request, shards = task
    indexes = {split: index_split((request, split, number)) for split, number in shards.items()}
    rejects = [reject for index in indexes.values() for record in index.records for reject in record.rejects]
    if rejects:
        write_rejects(request.out, rejects)
    else:
        (request.out / REJECTS).unlink(missing_ok=True)
    measured = indexes.get("train", next(iter(indexes.values())))
    levels, values = np.array([record.levels for record in measured.records]).sum(axis=0), np.arange(256)
    count = max(int(levels.sum()), 1)
    mean = int(levels @ values) / count
    deviation = max(int(levels @ values**2) / count - mean**2, 0.0) ** 0.5
    lacking = [index.not_annotated for index in indexes.values()]
    manifest = Manifest(
        options=request.wanted["options"],
        policies=request.policies,
        sources=request.sources,
        # Images of one level cannot be scaled to unit variance: they are only centered.
        pixels={"mean": round(mean, 4), "std": round(deviation, 4) or 1.0},
        splits={split: index.entry for split, index in indexes.items()},
        rejects=tuple({"split": r.split, "key": r.key, "reason": r.reason} for r in rejects),
        dataset=find_terms(request.source)._asdict(),
        not_annotated=tuple(label for label in LABELS if all(label in labels for labels in lacking)),
        facts=measured.facts,
    )
    write_manifest(request.out, manifest)
    return manifest


def index_split(task: tuple[Request, str, int]) -> Index:
    """Write `<split>.arrow` of so many shards: the rows that were kept, without paths, and each image's position."""
    request, split, shards = task
    parts = [read_record(ShardTask(request, split, number).record) for number in range(shards)]
    samples = pa.concat_tables(table for _, table in parts)
    if samples["note"].null_count == len(samples):
        samples = samples.drop_columns(["note"])
    digest = files.write_table(request.out / f"{split}.arrow", samples)
    records = [record for record, _ in parts]
    written = tuple(record.shard for record in records)
    entry = Split(**count_rows(samples), table=f"{split}.arrow", table_sha256=digest, shards=written)
    return Index(entry, records, find_unannotated(samples), name_facts(samples))
