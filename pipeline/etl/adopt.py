"""WebDataset shards that others wrote → Arrow tables and a manifest, so that they stream like our own.

    pipeline index ~/wds --csv ~/CheXpert-v1.0-small/train.csv

Stages: find each split's tars → walk each tar → group members into samples → read their labels, from their
JSON or a CheXpert CSV → refuse repeated keys and shared patients → decode every image and measure gray levels →
write the tables → write the manifest, last. The tars are only read. Others name samples as they like: these tables
have one column more than those of `pipeline shards`, `member`: the name of the image in the tar.
"""

import hashlib
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
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import repeated
from pipeline.base.errors import DataError
from pipeline.base.files import claimed, hash_file, read_arrow
from pipeline.base.workers import run_threads
from pipeline.etl.exchange import PARTIAL
from pipeline.etl.facts import read_facts, read_identity
from pipeline.etl.tar import Member, map_file, walk_tar
from pipeline.etl.writing import write_split
from pipeline.images import decode_stored, gray_statistics
from pipeline.labels import read_labels, shared
from pipeline.manifest import FACTS, NAME, PLACES, Manifest, Shard, write_manifest

PIXEL_SAMPLE = 1000  # images whose gray levels are counted
# The suffixes of each encoding. Beside a JPEG, a PNG or an array is something else: a mask, an embedding.
_SUFFIXES = {"jpeg": ("jpg", "jpeg"), "png": ("png",), "raw": ("npy",)}
_SPLIT = re.compile(r"[a-z0-9_-]+")
_COUNTED = re.compile(r"(.*)-(\d+)-of-(\d+)")  # train-00000-of-00003
_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")  # key and suffix, by webdataset's rule


class Sample(NamedTuple):
    """Consecutive members of one key: the image with its encoding, and the JSON where there is one."""

    key: str
    image: Member
    encoding: str
    json: Member | None


class Indexed(NamedTuple):
    """A tar, its entry in the manifest, and its rows of the table."""

    path: Path
    shard: Shard
    rows: pa.Table


ReadRows = Callable[[Path, list[Sample], mmap.mmap], pa.Table]
Progress = Callable[[int, int, str], None]


def write_index(
    folder: Path,
    csv: Path | Mapping[str, Path] | None = None,
    split: str | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total, note: None,
) -> Manifest:
    """Write a table per split and the manifest into a folder of tars.

    `csv` holds the labels of all splits, or of each; without it, they are in each sample's JSON. `split` names the
    only split; without it, the tars' names tell. `progress` gets (shards done, total, what is read of them): first the
    labels, then the images. Raises DataError for a tar, sample, label or image that cannot be used, naming shard and
    key, and for a folder that `pipeline shards` has not finished.
    """
    if (folder / PARTIAL).exists():  # checked first: some of its shards are in there
        raise DataError(
            f"{folder}: `pipeline shards` has not finished it; continue with "
            f"`pipeline shards SOURCE {folder}` and the options it had"
        )
    paths = _find_shards(folder, split)
    csvs = _assign_csvs(csv, paths)
    with claimed(folder):
        if (folder / NAME).exists():
            raise DataError(
                f"{folder}: has a {NAME} already; `pipeline verify {folder}` checks it; to index anew, remove it first"
            )
        for name in paths:
            _check_free(folder / f"{name}.arrow")
        splits, encoding = _read_shards(paths, csvs, progress)
        tables = {name: pa.concat_tables(part.rows for part in parts) for name, parts in splits.items()}
        _check_tables(folder, tables, splits)
        levels = _check_images(splits, encoding, workers, progress)
        sources = {csv.name: csv} if isinstance(csv, Path) else csvs
        manifest = Manifest(
            options={"indexed": True, "labels": "csv" if csvs else "json", "encoding": encoding},
            policies={"uncertain": "best", "blank": "zeros"},
            sources={name: hash_file(path) for name, path in sources.items()},
            pixels=gray_statistics(levels),
            splits={
                name: write_split(folder, name, tables[name], [part.shard for part in parts])
                for name, parts in splits.items()
            },
        )
        write_manifest(folder, manifest)
    return manifest


def _find_shards(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """The tars of each split: `train-000000.tar` belongs to train; all to `split` where it is given.

    Raises DataError for a name that tells no split, and where names like `train-00000-of-00003.tar` promise more.
    """
    if split is not None and not _SPLIT.fullmatch(split):
        raise DataError(f"split '{split}' is not a name of letters a to z, digits, _ and -")
    splits: dict[str, list[Path]] = {}
    sets: dict[tuple[str, str], dict[int, Path]] = {}  # (train, 00003) → number → tar
    for path in sorted(folder.glob("*.tar")):
        if counted := _COUNTED.fullmatch(path.stem):
            prefix, number, total = counted.groups()
            sets.setdefault((prefix, total), {})[int(number)] = path
        else:
            prefix = path.stem.rpartition("-")[0]
        name = split or prefix
        if not name:
            raise DataError(f"{path}: the name tells no split, as train-000000.tar does; give it by `split`")
        if not _SPLIT.fullmatch(name):
            raise DataError(
                f"{path}: '{name}' is not a split's name of letters a to z, digits, _ and -; rename the file, or "
                "give all shards one by `split`"
            )
        splits.setdefault(name, []).append(path)
    if not splits:
        raise DataError(f"{folder}: no .tar files there")
    for (prefix, total), numbers in sets.items():
        _check_count(folder, prefix, total, numbers)
    return splits


def _check_count(folder: Path, prefix: str, total: str, numbers: Mapping[int, Path]) -> None:
    """Raise DataError unless the numbers are 0 … total - 1, or 1 … total."""
    count = int(total)
    wanted = range(1, count + 1) if count in numbers else range(count)
    for number, path in numbers.items():
        if number not in wanted:
            raise DataError(f"{path}: there is no such number among {count:,}; rename or remove it")
    for number in wanted:
        if number not in numbers:
            name = f"{prefix}-{number:0{len(total)}}-of-{total}.tar"
            raise DataError(f"{folder / name}: missing; the names of the others say that there are {count:,}")


def _assign_csvs(
    csv: Path | Mapping[str, Path] | None, paths: Mapping[str, list[Path]]
) -> Mapping[str, Path]:
    """The CSV of each split; none where the labels are in JSON. Raises DataError for one too many or too few."""
    if csv is None:
        return {}
    csvs = dict.fromkeys(paths, csv) if isinstance(csv, Path) else csv
    for name in csvs:
        if name not in paths:
            raise DataError(f"`csv` {name}={csvs[name]}: no shards of {name}; there are {', '.join(paths)}")
    for name, of_split in paths.items():
        if name not in csvs:
            raise DataError(f"{of_split[0]}: no CSV for {name}; add `csv` {name}=FILE")
    return csvs


def _check_free(path: Path) -> None:
    """Raise DataError where another program's table is in the way; one of an interrupted run is replaced."""
    try:
        if not path.exists() or "member" in read_arrow(path, path.read_bytes()).column_names:
            return
    except DataError:
        pass
    raise DataError(f"{path}: not written by this command, which would replace it; move it away")


def _read_shards(
    paths: Mapping[str, list[Path]], csvs: Mapping[str, Path], progress: Progress
) -> tuple[dict[str, list[Indexed]], str]:
    """The shards of each split, and the encoding of all images."""
    readers: dict[Path | None, ReadRows] = {None: _rows_of_json}
    readers |= {csv: partial(_rows_of_csv, csv, read_labels(csv)) for csv in set(csvs.values())}
    splits: dict[str, list[Indexed]] = {name: [] for name in paths}
    encodings: dict[str, str] = {}  # each with the first image that has it
    todo = [(name, path) for name, of_split in paths.items() for path in of_split]
    for done, (name, path) in enumerate(todo, start=1):
        splits[name].append(_index_shard(path, len(splits[name]), readers[csvs.get(name)], encodings))
        progress(done, len(todo), "labels")
    return splits, next(iter(encodings), "jpeg")


def _index_shard(path: Path, number: int, read_rows: ReadRows, encodings: dict[str, str]) -> Indexed:
    """A tar with its rows. Raises DataError where its images do not have the encoding of all others."""
    with map_file(path) as data:
        samples = list(_find_samples(path, walk_tar(path, data)))
        for sample in samples:
            encodings.setdefault(sample.encoding, f"{path.name}: {sample.image.name}")
            if len(encodings) > 1:
                first = next(iter(encodings.values()))
                raise DataError(
                    f"{path}: sample {sample.key}: {sample.image.name} is {sample.encoding}, unlike {first}; index "
                    "images of one encoding"
                )
        images = [sample.image for sample in samples]
        crc = [zlib.crc32(data[image.offset : image.offset + image.size]) for image in images]
        places = [[number] * len(images), [i.offset for i in images], [i.size for i in images], crc]
        table = read_rows(path, samples, data)
        for field, values in zip(PLACES, places, strict=True):
            table = table.append_column(field, pa.array(values, field.type))
        table = table.append_column("member", pa.array([image.name for image in images], pa.string()))
        digest = hashlib.sha256(data).hexdigest()
        return Indexed(path, Shard(path.name, len(samples), len(data), digest), table)


def _find_samples(path: Path, members: Iterable[Member]) -> Iterator[Sample]:
    """Members grouped as webdataset does it. Raises DataError for a sample without exactly one image."""
    # As in webdataset, a member without a suffix belongs to no sample.
    named = ((match[1], match[2].lower(), m) for m in members if (match := _NAME.fullmatch(m.name)))
    for key, group in groupby(named, key=itemgetter(0)):
        parts = [(suffix, member) for _, suffix, member in group]
        there = [suffix for suffix, _ in parts]
        encoding = next((name for name, ends in _SUFFIXES.items() if not set(ends).isdisjoint(there)), "jpeg")
        images = [member for suffix, member in parts if suffix in _SUFFIXES[encoding]]
        if len(images) != 1 or len(dict(parts)) != len(parts):
            found = ", ".join(f".{suffix}" for suffix in there)
            raise DataError(f"{path}: sample {key}: needs one .jpg, .jpeg, .png or .npy, but holds {found}")
        if images[0].size >= 2**31:
            raise DataError(f"{path}: sample {key}: {images[0].name} has 2 GiB or more; images are smaller")
        yield Sample(key, images[0], encoding, dict(parts).get("json"))


def _rows_of_json(path: Path, samples: list[Sample], data: mmap.mmap) -> pa.Table:
    """The rows of samples that carry their labels in their JSON."""
    return pa.Table.from_pylist(_read_each(read_facts, path, samples, data), FACTS)


def _rows_of_csv(csv: Path, table: pa.Table, path: Path, samples: list[Sample], data: mmap.mmap) -> pa.Table:
    """The CSV's rows of the samples, joined by patient, study and view."""
    keys = [identity["key"] for identity in _read_each(read_identity, path, samples, data)]
    rows = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"].combine_chunks())
    for row in np.flatnonzero(rows.is_null()):
        raise DataError(f"{path}: sample {samples[row].key}: {keys[row]} is not in {csv}")
    return table.select(FACTS.names).take(rows).cast(FACTS)


def _read_each(
    read: Callable[[bytes, str], dict[str, Any]], path: Path, samples: list[Sample], data: mmap.mmap
) -> list[dict[str, Any]]:
    """What `read` makes of each sample's JSON (an empty object where there is none) and key."""
    found = []
    for sample in samples:
        json = sample.json
        try:
            found.append(read(data[json.offset : json.offset + json.size] if json else b"{}", sample.key))
        except ValueError as error:
            raise DataError(f"{path}: sample {sample.key}: {error}") from None
    return found


def _check_tables(folder: Path, tables: Mapping[str, pa.Table], splits: Mapping[str, list[Indexed]]) -> None:
    """Raise DataError for an empty split, a key that occurs twice, or a patient in two splits."""
    for name, table in tables.items():
        if table.num_rows == 0:
            raise DataError(f"{folder}: no samples in the shards of {name}")
        for key in repeated(table["key"]):
            numbers = table.filter(pc.equal(table["key"], key))["shard"].to_pylist()
            first, second = (splits[name][number].path for number in numbers[:2])
            raise DataError(f"{second}: sample {key}: is in {first.name} already")
    for one, other, patient in shared(tables, "patient"):
        raise DataError(f"{folder}: {patient} is in {one} and in {other}; splits must not share patients")


def _check_images(
    splits: Mapping[str, list[Indexed]], encoding: str, workers: int, progress: Progress
) -> npt.NDArray[np.int64]:
    """Decode every image; count [256] the gray levels of PIXEL_SAMPLE of train, or of the first split.

    Raises DataError for the first image that does not decode, naming shard and sample.
    """
    measured = "train" if "train" in splits else next(iter(splits))
    tasks: list[tuple[Indexed, npt.NDArray[np.bool_]]] = []
    for name, parts in splits.items():
        bounds = np.cumsum([part.shard.samples for part in parts])
        counts = np.zeros(bounds[-1], bool)
        if name == measured:  # evenly spaced
            sample = min(len(counts), PIXEL_SAMPLE)
            counts[np.arange(sample) * len(counts) // sample] = True
        tasks += zip(parts, np.split(counts, bounds[:-1]), strict=True)
    decode = partial(_decode_images, encoding)
    levels = run_threads(decode, tasks, workers, lambda done, total: progress(done, total, "images"))
    return sum(levels, np.zeros(256, np.int64))


def _decode_images(encoding: str, task: tuple[Indexed, npt.NDArray[np.bool_]]) -> npt.NDArray[np.int64]:
    """Decode the images of a tar; the gray levels [256] of those that count."""
    (path, _, rows), counts = task
    levels = np.zeros(256, np.int64)
    places = rows.select(["key", "member", "offset", "length"]).to_pylist()
    with path.open("rb") as file:
        for row, is_counted in zip(places, counts, strict=True):
            file.seek(row["offset"])
            try:
                pixels = decode_stored(file.read(row["length"]), encoding)
            except ValueError as error:
                raise DataError(
                    f"{path}: sample {row['key']}: {row['member']} does not decode: {error}"
                ) from None
            if is_counted:
                levels += np.bincount(pixels.ravel(), minlength=256)
    return levels
