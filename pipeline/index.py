"""WebDataset shards that others wrote → Arrow tables and a manifest, so that they stream like our own.

    pipeline index ~/wds --csv ~/CheXpert-v1.0-small/train.csv

Stages: find each split's tars → walk each tar → group members into samples → read their labels, from their
json or a CheXpert CSV → refuse repeated keys and shared patients → measure gray levels → write the tables →
write the manifest, last. The tars are only read. Others name samples as they like: the tables have a column
`member` more than those of `pipeline shards`, the name of the image in the tar.
"""

import hashlib
import json
import mmap
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import DataError
from pipeline.images import decode_jpeg, gray_statistics
from pipeline.labels import LABELS, read_labels, repeated, shared
from pipeline.manifest import (
    FACTS,
    NAME,
    PLACES,
    Manifest,
    Shard,
    Split,
    claimed,
    count_rows,
    read_arrow,
    write_manifest,
    write_table,
)
from pipeline.tar import Member, map_file, walk_tar

PIXEL_SAMPLE = 1000  # images
_SUFFIXES = ("jpg", "jpeg")
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # key and suffix, by webdataset's rule
_IDENTITY = re.compile(r"(patient\d+)[_/]study(\d{1,6})[_/](view\d+_(?:frontal|lateral))")
_IDENTITY_FIELDS = ("key", "Path", "url", "caption")  # of a json; img2dataset writes key, url and caption
_CSV_NAMES = {"view": "Frontal/Lateral", "sex": "Sex", "age": "Age", "projection": "AP/PA"}
# What each value of a json must look like as text; null, NaN and "" are the empty text, and become null.
_PATTERNS = {
    "key": r"\S+",
    "patient": r"\S+",
    "study": r"\d{1,6}",
    "view": r"frontal|lateral",
    "sex": r".*",
    "age": r"(\d{1,3}(\.0)?)?",
    "projection": r".*",
    **dict.fromkeys(LABELS, r"((-1|0|1)(\.0)?)?"),
}
_NUMBERS = ("study", "age", *LABELS)


class Sample(NamedTuple):
    """Consecutive members of one key: the image, and the json where there is one."""

    key: str
    image: Member
    json: Member | None


ReadRows = Callable[[Path, list[Sample], mmap.mmap], pa.Table]


def write_index(
    folder: Path,
    csv: Path | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a table per split and the manifest into a folder of tars; `progress` gets (shards done, total).

    Raises DataError for a tar, sample, label or image that cannot be used, naming shard and key.
    """
    if (folder / NAME).exists():
        raise DataError(f"{folder}: has a {NAME} already; `pipeline verify` checks it")
    paths = _find_shards(folder, split)
    with claimed(folder):
        return _write_index(folder, paths, csv, progress)


def _write_index(
    folder: Path, paths: Mapping[str, list[Path]], csv: Path | None, progress: Callable[[int, int], None]
) -> Manifest:
    for name in paths:
        _check_free(folder / f"{name}.arrow")
    read_rows: ReadRows = _rows_of_json if csv is None else partial(_rows_of_csv, csv, read_labels(csv))
    shards: dict[str, list[Shard]] = {name: [] for name in paths}
    parts: dict[str, list[pa.Table]] = {name: [] for name in paths}
    todo = [(name, path) for name, of_split in paths.items() for path in of_split]
    for done, (name, path) in enumerate(todo, start=1):
        shard, table = _index_shard(path, len(shards[name]), read_rows)
        shards[name].append(shard)
        parts[name].append(table)
        progress(done, len(todo))
    tables = {name: pa.concat_tables(of_split) for name, of_split in parts.items()}
    _check_tables(folder, tables, shards)

    measured = "train" if "train" in tables else next(iter(tables))
    manifest = Manifest(
        options={"indexed": True, "labels": "json" if csv is None else "csv"},
        policies={"uncertain": "best", "blank": "zeros"},
        sources={} if csv is None else {csv.name: hashlib.sha256(csv.read_bytes()).hexdigest()},
        pixels=_measure_pixels(paths[measured], tables[measured]),
        splits={name: _write_split(folder, name, tables[name], shards[name]) for name in tables},
    )
    write_manifest(folder, manifest)
    return manifest


def read_facts(data: bytes, sample_key: str) -> dict[str, Any]:
    """A sample's row (columns FACTS) from its json: in our own layout, or with the columns of CheXpert's CSV.

    Raises ValueError saying what is wrong with it.
    """
    document = _parse(data)
    labels = document.get("labels")
    values = document | labels if isinstance(labels, dict) else _flat_values(document, sample_key)
    row = {}
    for name, pattern in _PATTERNS.items():
        if name not in values:
            raise ValueError(f"its json lacks {name}")
        value = values[name]
        text = "" if value is None or value != value else str(value)
        if not re.fullmatch(pattern, text):
            raise ValueError(f"its json holds {value!r} as {name}")
        row[name] = None if not text else int(float(text)) if name in _NUMBERS else text
    return row


def _find_shards(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """The tars of each split: `train-000000.tar` belongs to train; all to `split` where it is given."""
    if split is not None and not re.fullmatch(r"[a-z0-9_]+", split):
        raise DataError(f"split '{split}' is not a name of letters a to z, digits and _")
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        name = split or path.stem.rpartition("-")[0]
        if not name:
            raise DataError(f"{path}: the name tells no split, as train-000000.tar does; give it by --split")
        splits.setdefault(name, []).append(path)
    if not splits:
        raise DataError(f"{folder}: no .tar files there")
    return splits


def _index_shard(path: Path, number: int, read_rows: ReadRows) -> tuple[Shard, pa.Table]:
    with map_file(path) as data:
        samples = list(_find_samples(path, walk_tar(path, data)))
        images = [sample.image for sample in samples]
        crc = [zlib.crc32(data[image.offset : image.offset + image.size]) for image in images]
        places = [[number] * len(images), [i.offset for i in images], [i.size for i in images], crc]
        table = read_rows(path, samples, data)
        for field, values in zip(PLACES, places, strict=True):
            table = table.append_column(field, pa.array(values, field.type))
        table = table.append_column("member", pa.array([image.name for image in images], pa.string()))
        return Shard(path.name, len(samples), len(data), hashlib.sha256(data).hexdigest()), table


def _find_samples(path: Path, members: Iterable[Member]) -> Iterator[Sample]:
    """Members grouped as webdataset does it. Raises DataError for a sample without exactly one JPEG."""
    # As in webdataset, a member without a suffix belongs to no sample.
    named = ((match[1], match[2].lower(), m) for m in members if (match := _NAME.fullmatch(m.name)))
    for key, group in groupby(named, key=itemgetter(0)):
        parts = [(suffix, member) for _, suffix, member in group]
        images = [member for suffix, member in parts if suffix in _SUFFIXES]
        if len(images) != 1 or len(dict(parts)) != len(parts):
            found = ", ".join(f".{suffix}" for suffix, _ in parts)
            raise DataError(f"{path}: sample {key}: needs one .jpg or .jpeg, but holds {found}")
        yield Sample(key, images[0], dict(parts).get("json"))


def _rows_of_json(path: Path, samples: list[Sample], data: mmap.mmap) -> pa.Table:
    """The rows of samples that carry their labels in their json."""
    return pa.Table.from_pylist(_read_each(read_facts, path, samples, data), FACTS)


def _rows_of_csv(csv: Path, table: pa.Table, path: Path, samples: list[Sample], data: mmap.mmap) -> pa.Table:
    """The CSV's rows of the samples, joined by patient, study and view."""
    keys = [identity["key"] for identity in _read_each(_read_identity, path, samples, data)]
    rows = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"].combine_chunks())
    for row in np.flatnonzero(rows.is_null()):
        raise DataError(f"{path}: sample {samples[row].key}: {keys[row]} is not in {csv}")
    return table.select(FACTS.names).take(rows).cast(FACTS)


def _read_each(
    read: Callable[[bytes, str], dict[str, Any]], path: Path, samples: list[Sample], data: mmap.mmap
) -> list[dict[str, Any]]:
    """What `read` makes of each sample's json (an empty object where there is none) and key."""
    found = []
    for key, _, member in samples:
        try:
            found.append(read(data[member.offset : member.offset + member.size] if member else b"{}", key))
        except ValueError as error:
            raise DataError(f"{path}: sample {key}: {error}") from None
    return found


def _parse(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json cannot be read: {error}") from None
    return document if isinstance(document, dict) else {}


def _flat_values(document: Mapping[str, Any], sample_key: str) -> dict[str, Any]:
    """A json with the columns of CheXpert's CSV, under the table's names."""
    values = {name.replace("_", " "): value for name, value in document.items()}
    if not any(label in values for label in LABELS):
        raise ValueError("no labels in a json; give them by --csv")
    values |= {name: values[column] for name, column in _CSV_NAMES.items() if column in values}
    values |= _find_identity(document, sample_key)
    return values | {"view": str(values.get("view")).lower()}


def _read_identity(data: bytes, sample_key: str) -> dict[str, Any]:
    # The json may be about anything where the key says enough.
    return _find_identity({} if _IDENTITY.search(sample_key) else _parse(data), sample_key)


def _find_identity(document: Mapping[str, Any], sample_key: str) -> dict[str, str]:
    """key, patient and study, from the sample's key or a field of its json. Raises ValueError."""
    for text in (sample_key, *map(document.get, _IDENTITY_FIELDS)):
        if isinstance(text, str) and (match := _IDENTITY.search(text)):
            patient, study, view = match.groups()
            return {"key": f"{patient}_study{study}_{view}", "patient": patient, "study": study}
    fields = ", ".join(_IDENTITY_FIELDS)
    raise ValueError(f"no patientN_studyN_viewN_frontal in its key, nor in {fields} of a json")


def _check_tables(folder: Path, tables: Mapping[str, pa.Table], shards: Mapping[str, list[Shard]]) -> None:
    """Raise DataError for an empty split, a key that occurs twice, or a patient in two splits."""
    for name, table in tables.items():
        if table.num_rows == 0:
            raise DataError(f"{folder}: no samples in the shards of {name}")
        for key in repeated(table["key"]):
            numbers = table.filter(pc.equal(table["key"], key))["shard"].to_pylist()
            first, second = (shards[name][number].file for number in numbers[:2])
            raise DataError(f"{folder / second}: sample {key}: is in {first} already")
    for first, second, patient in shared(tables, "patient"):
        raise DataError(f"{folder}: {patient} is in {first} and in {second}; splits must not share patients")


def _check_free(path: Path) -> None:
    """Raise DataError for a table in the way that is not one of an interrupted run of this command."""
    try:
        if not path.exists() or "member" in read_arrow(path, path.read_bytes()).column_names:
            return
    except DataError:
        pass
    raise DataError(f"{path}: not written by this command, which would replace it; move it away")


def _measure_pixels(paths: list[Path], table: pa.Table) -> dict[str, float]:
    """Mean and standard deviation of the gray levels of up to PIXEL_SAMPLE images, evenly spaced."""
    count = min(table.num_rows, PIXEL_SAMPLE)
    levels = np.zeros(256, np.int64)
    for row in table.take(np.arange(count) * table.num_rows // count).to_pylist():
        path = paths[row["shard"]]
        with path.open("rb") as file:
            file.seek(row["offset"])
            try:
                pixels = decode_jpeg(file.read(row["length"]))
            except ValueError as error:
                raise DataError(
                    f"{path}: sample {row['key']}: {row['member']} does not decode: {error}"
                ) from None
        levels += np.bincount(pixels.ravel(), minlength=256)
    return gray_statistics(levels)


def _write_split(folder: Path, name: str, table: pa.Table, shards: list[Shard]) -> Split:
    file = f"{name}.arrow"
    digest = write_table(folder / file, table)
    return Split(**count_rows(table), table=file, table_sha256=digest, shards=tuple(shards))
