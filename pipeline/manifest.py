"""A folder of shards → its `manifest.json` and one Arrow table per split, checked; and a manifest → its file.

The manifest is written last, so a folder that has one is complete. It holds no time, host or path: the same
input and options give the same bytes.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from zlib_ng import zlib_ng

from pipeline.base.errors import DataError
from pipeline.base.files import read_arrow, read_object, sync_folder, write_atomically, write_json
from pipeline.base.store import is_remote
from pipeline.labels import LABELS

FORMAT = "chexpert-shards"
VERSION = 1
NAME = "manifest.json"
CROISSANT = "croissant.json"
CELLS = "Labels: 1 positive, 0 negative, -1 uncertain, null blank, -2 not annotated."
# The columns of every table, in the order of a sample's JSON; of the first seven, study and age are numbers.
_TEXTS = dict.fromkeys(("key", "patient", "study", "view", "sex", "age", "projection"), pa.string())
FACTS = pa.schema(_TEXTS | {"study": pa.int32(), "age": pa.int16()} | dict.fromkeys(LABELS, pa.int8()))
PLACES = pa.schema({"shard": pa.int32(), "offset": pa.int64(), "length": pa.int32(), "crc": pa.uint32()})
KNOWN = {*FACTS.names, *PLACES.names, "path", "file", "note"}
MOST_STUDIES = 100_000  # of a patient


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, samples, size in bytes and hash."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One split: its Arrow table and, in the table's row order, its shards."""

    samples: int
    studies: int
    patients: int
    table: str
    table_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Manifest:
    """The whole folder."""

    options: Mapping[str, object]
    policies: Mapping[str, str]  # the defaults for uncertain and blank labels
    sources: Mapping[str, str]  # hashes of the CSVs
    pixels: Mapping[str, float]  # mean and std of train's gray levels
    splits: Mapping[str, Split]
    dataset: Mapping[str, str]  # the owner and the terms of the images (`sources.source.Terms`)
    rejects: tuple[Mapping[str, str], ...] = ()  # the images left out, each with split, key and reason
    not_annotated: tuple[str, ...] = ()  # labels that no sample is annotated for
    facts: Mapping[str, str] = field(default_factory=dict)  # the tables' further columns: string or int64

    def files(self) -> dict[str, str]:
        """Name → sha256 of all tables, shards, and the description for other tools."""
        tables = {split.table: split.table_sha256 for split in self.splits.values()}
        shards = {s.file: s.sha256 for split in self.splits.values() for s in split.shards}
        return tables | shards | {CROISSANT: hashlib.sha256(format_croissant(self)).hexdigest()}

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the user mapped: our names to the table's."""
        given = self.options.get("columns")
        return given if isinstance(given, dict) else {}

    def split(self, name: str) -> Split:
        """The split of that name. Raises DataError if it does not exist."""
        if name not in self.splits:
            raise DataError(f"split '{name}' does not exist; these shards hold {', '.join(self.splits)}")
        return self.splits[name]


def name_facts(table: pa.Table) -> dict[str, str]:
    """Name → type of the columns that only some tables have: what a set, a user or `images.Original` adds."""
    return {column.name: str(column.type) for column in table.schema if column.name not in KNOWN}


def find_notes(tables: Iterable[pa.Table]) -> dict[str, list[str]]:
    """The notes of sharding on images (`images.Prepared`), and the keys of those images."""
    keys: dict[str, list[str]] = {}
    for table in tables:
        if "note" in table.column_names:
            for row in table.select(["key", "note"]).drop_null().to_pylist():
                for note in row["note"].split("; "):
                    keys.setdefault(note, []).append(row["key"])
    return keys


def describe_notes(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for each note: how many images have it, and the first one."""
    return [f"{len(keys):,} of the images: {note}; the first is {keys[0]}" for note, keys in notes.items()]


def concat_labels(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of several label tables; facts that a table lacks are null for its rows, and text if types differ."""
    texts = {name for table in tables for name, kind in name_facts(table).items() if kind == "string"}
    schemas = [pa.schema(f.with_type(pa.string()) if f.name in texts else f for f in table.schema) for table in tables]
    cast = [table.cast(schema) for table, schema in zip(tables, schemas, strict=True)]
    return pa.concat_tables(cast, promote_options="default")


def renumber(table: pa.Table, columns: Mapping[str, str], place: int) -> pa.Table:
    """The table of the folder at a `place` among several: studies that it numbered itself are none of the others'."""
    if not columns or "study" in columns:  # it only numbers those of a user's table without a column for them
        return table
    study = pc.add(table["study"], pa.scalar(place * MOST_STUDIES, pa.int32()))
    return table.set_column(table.schema.get_field_index("study"), "study", study)


def find_restriction(dataset: Mapping[str, str]) -> str:
    """The license of a manifest's `dataset` if it forbids passing the data on; "" otherwise."""
    name = dataset.get("license", "")
    return name if "Credentialed" in name or "Research Use Agreement" in name else ""


def format_croissant(manifest: Manifest) -> bytes:
    """`croissant.json`, by which other tools list and load the shards (Akhtar et al., arXiv:2403.19546, version 1.0).

    A split is two record sets: its images, if their encoding is a common one, and its labels: the JSON of each image.
    """
    encoding = str(manifest.options["encoding"])
    kinds = {"labels": ("application/json", "json", "sc:Text")}
    if encoding in ("jpeg", "png"):
        kinds["images"] = (f"image/{encoding}", encoding.replace("jpeg", "jpg"), "sc:ImageObject")

    def node(kind: str, name: str, **values: object) -> dict[str, object]:
        return {"@type": f"cr:{kind}", "@id": name, "name": name} | values

    files, records = list[dict[str, object]](), list[dict[str, object]]()
    for split_name, split in manifest.splits.items():
        stored = [(split.table, "application/vnd.apache.arrow.file", split.table_sha256)]
        stored += [(shard.file, "application/x-tar", shard.sha256) for shard in split.shards]
        for file, form, sha256 in stored:
            files.append(node("FileObject", file, contentUrl=file, encodingFormat=form, sha256=sha256))
        tars = [{"@id": shard.file} for shard in split.shards]
        for kind, (form, suffix, data_type) in kinds.items():
            name, members = f"{split_name}-{kind}", f"{split_name}-{kind}-files"
            files.append(node("FileSet", members, containedIn=tars, encodingFormat=form, includes=f"*.{suffix}"))
            source: dict[str, object] = {"fileSet": {"@id": members}}
            key = source | {"extract": {"fileProperty": "filename"}, "transform": {"regex": rf"^(.*)\.{suffix}$"}}
            content = source | {"extract": {"fileProperty": "content"}}
            keys = node("Field", f"{name}/key", dataType="sc:Text", source=key)
            contents = node("Field", f"{name}/{kind}", dataType=data_type, source=content)
            records.append(node("RecordSet", name, field=[keys, contents]))
    counts = ", ".join(f"{name} {split.samples:,}" for name, split in manifest.splits.items())
    document = json.loads(Path(__file__).with_name("croissant.json").read_text())
    for name, term in (("name", "name"), ("license", "license"), ("citeAs", "paper")):
        if manifest.dataset.get(term):
            document[name] = manifest.dataset[term]
    document["description"] = f"{manifest.dataset.get('title', 'Chest X-rays')}, images: {counts}. {CELLS}"
    return json.dumps(document | {"distribution": files, "recordSet": records}, indent=1).encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `croissant.json`, then `manifest.json`, atomically; on disk, too, it is the last file to appear."""
    write_atomically(folder / CROISSANT, format_croissant(manifest))
    sync_folder(folder)
    write_json(folder / NAME, {"format": FORMAT, "version": VERSION, **asdict(manifest)})
    sync_folder(folder)  # before the caller removes what is needed to resume


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shards folder. Raises DataError if it is missing, damaged or in another format."""
    path = folder / NAME
    try:
        document = read_object(path)
    except FileNotFoundError:
        near = [] if is_remote(folder) else sorted({*folder.glob(f"*/{NAME}"), *folder.parent.glob(f"*/{NAME}")})
        how = "write one with `pipeline shards`" + (f", or did you mean {near[0].parent}?" if near else "")
        raise DataError(f"{folder}: not a folder of shards (no {NAME}); {how}") from None
    if document.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of {FORMAT}")
    if document.get("version") != VERSION:
        version, how = repr(document.get("version"))[:20], "write the shards again into a new folder"
        raise DataError(f"{path}: format version {version}; this program reads {VERSION}: {how}")
    try:
        manifest = _parse(document)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: damaged: {str(error)[:200]}") from error
    for name in manifest.files():
        if Path(name).name != name or name in ("", ".."):
            raise DataError(f"{path}: '{name}' is not a plain file name")
    return manifest


def _parse(document: Mapping[str, Any]) -> Manifest:
    """A manifest from its JSON. Raises KeyError, TypeError, AttributeError, ValueError or OverflowError."""

    def demand(sound: bool, name: str, value: object) -> None:
        if not sound:
            raise ValueError(f"{name} is {value!r}")

    splits = {}
    for split_name, split in document["splits"].items():
        for entry in (*split["shards"], split):
            for name, value in entry.items():
                if name in ("file", "table", "sha256", "table_sha256"):
                    demand(isinstance(value, str) and value.isprintable() and len(value) < 256, name, value)
                elif name != "shards":  # numbers that a file can have
                    demand(type(value) is int and 0 <= value < 2**63, name, value)
        splits[split_name] = Split(**split | {"shards": tuple(Shard(**shard) for shard in split["shards"])})
    policies, sources, rejects = document["policies"], document["sources"], document["rejects"]
    dataset, unannotated, facts = (document[name] for name in ("dataset", "not_annotated", "facts"))
    for texts in (policies, sources, dataset, facts, *rejects):
        demand(all(isinstance(text, str) for text in texts.values()), "text", texts)
    pixels = {name: float(document["pixels"][name]) for name in ("mean", "std")}
    demand(all(map(math.isfinite, pixels.values())) and pixels["std"] > 0, "mean and std", pixels)
    demand({"uncertain", "blank"} <= policies.keys(), "policies", policies)
    demand({"name", "patients"} <= dataset.keys(), "dataset", dataset)
    for text in (*splits, *policies.values(), *dataset.values(), *facts):  # quoted in messages
        demand(text.isprintable() and len(text) < 1000, "text", text)
    demand(set(LABELS).issuperset(unannotated), "not_annotated", unannotated)
    options, needed = dict(document["options"].items()), "size square encoding quality max_pixels bits views"
    demand(options.keys() >= {*needed.split()}, "options", options)
    return Manifest(options, policies, sources, pixels, splits, dataset, tuple(rejects), tuple(unannotated), facts)


def find_blank(source: Path) -> str:
    """The policy for blank cells of a folder of shards; zeros if it is none."""
    return read_manifest(source).policies["blank"] if (source / NAME).is_file() else "zeros"


def checksum(data: bytes | memoryview, encoding: str, before: int = 0) -> int:
    """The index's checksum of stored bytes: CRC-32, which continues from that `before`, or a PNG's Adler-32."""
    # A PNG holds the CRC-32 of its own parts, which cancel out: 16 bits would be left to tell images apart.
    return int(zlib_ng.adler32(data) if encoding == "png" else zlib_ng.crc32(data, before))


def read_table(folder: Path, split: Split) -> pa.Table:
    """The memory-mapped table of a split, checked against the manifest. Raises DataError naming file and problem."""
    path = folder / split.table
    try:
        source = pa.BufferReader(path.read_bytes()) if is_remote(path) else pa.memory_map(str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if hashlib.sha256(source.read_buffer()).hexdigest() != split.table_sha256:
        raise DataError(f"{path}: its sha256 is not the manifest's; it is damaged or belongs to other shards")
    source.seek(0)
    table = read_arrow(path, source)
    for column in (*FACTS, *PLACES):
        place = table.schema.get_field_index(column.name)  # negative for a duplicate, too
        if place < 0 or table.schema.types[place] != column.type:
            raise DataError(f"{path}: column {column.name} is missing, duplicated, or not {column.type}")
        if column.name in ("key", "patient", "study", "view", *PLACES.names) and table[column.name].null_count:
            raise DataError(f"{path}: column {column.name} has empty cells")
    for name, kind in name_facts(table).items():
        if table.column_names.count(name) > 1 or kind not in ("string", "int64"):
            raise DataError(f"{path}: column {name} is duplicated, or neither string nor int64")
    if "note" in table.column_names and table.schema.field("note").type != pa.string():
        raise DataError(f"{path}: column note is not string")
    return table
