"""A CheXpert folder, in any layout people have → label table per split, and where each image lies.

Layouts: the folder that holds the CSVs or its parent; any name for it; the CSVs beside it; AIMI's download batches side
by side (`CheXpert-v1.0 batch 1 (validate & csv)`, `batch 2 (train 1)`, …), which hold the patients directly; the test
set (`test_labels.csv` beside `test/`, `val_labels.csv` beside `val/`); CSVs gzipped. An image is taken from the folder
that its CSV names, else from any that has its patient, study and view. Folders and CSVs may be in an object store.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.base.store import (
    check_access,
    is_remote,
    list_folders,
    list_objects,
    named_failures,
    open_location,
    read_objects,
)
from pipeline.images import ImageError, unexplained_level
from pipeline.labels import (
    hash_fraction,
    limit_patients,
    line_of,
    read_labels,
    select_views,
    shared,
    split_patients,
    study_names,
)

CSV_NAMES = {
    "train": ("train.csv", "train.csv.gz"),
    "valid": ("valid.csv", "valid.csv.gz", "val_labels.csv"),
    "test": ("test_labels.csv", "test.csv", "test.csv.gz"),
}
_BATCH = re.compile(r"batch[ _-]?\d", re.IGNORECASE)  # AIMI's download folders
_PATIENT = re.compile(r"patient\d+")
_SPLIT_FOLDERS = ("train", "valid", "val", "test")
SAMPLED = 64  # images whose bit depth is checked


class Source(NamedTuple):
    """The CSV of each split, and the folders that images may be read from."""

    csvs: dict[str, Path]
    roots: tuple[Path, ...]


class Omitted(NamedTuple):
    """Rows of a split that are left out on purpose."""

    views: int
    limit: int


def find_csvs(folder: Path) -> dict[str, Path]:
    """Split → its CSV, from `folder`, the only folder in it that holds CSVs, or the folder that holds `folder`.

    Raises DataError where none has CSVs, or several folders in it do.
    """
    with named_failures(folder, "cannot be read"):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        if csvs := _csvs_in(folder):
            return csvs
        names = list_folders(folder)
        inside = {name: csvs for name in names if (csvs := _csvs_in(folder / name))}
        holds_images = any(name in _SPLIT_FOLDERS or _PATIENT.fullmatch(name) for name in names)
        whole = folder.resolve()
        if (
            not inside
            and holds_images
            and whole.name not in _SPLIT_FOLDERS
            and (csvs := _csvs_in(whole.parent))
        ):
            return csvs
    if not inside:
        raise DataError(
            f"{folder}: neither it nor a folder in it holds a train.csv, valid.csv or test_labels.csv"
        )
    if len(inside) > 1:
        raise DataError(f"{folder}: CSVs in several folders ({', '.join(inside)}); name one of them")
    return next(iter(inside.values()))


def find_source(folder: Path, splits: Mapping[str, Path], roots: Sequence[Path]) -> Source:
    """The CSVs of `folder`, or those named in `splits` instead, and every folder that may hold images.

    Raises DataError for a folder or file that does not exist.
    """
    for path in (folder, *splits.values(), *roots):
        check_access(path)
        if path is not folder and not path.exists():
            raise DataError(f"{path}: no such file or folder")
    csvs = dict(splits) or find_csvs(folder)
    homes = [folder, *(csv.parent for csv in csvs.values()), *roots]
    batches = [
        home.parent / name
        for home in (home.resolve() for home in homes[1:])
        if _BATCH.search(home.name)
        for name in list_folders(home.parent)
        if _BATCH.search(name)
    ]
    return Source(csvs, tuple(dict.fromkeys(path.resolve() for path in (*homes, *batches))))


def read_splits(
    source: Source, *, views: str, dev: float, seed: int, limit: int | None = None
) -> tuple[dict[str, pa.Table], dict[str, Omitted]]:
    """Label table per split, shuffled, with the column `file` (absolute path or URL); and what was dropped.

    With all views, studies are shuffled, and the images of each stay together. train is divided into train and dev
    by patient. Empty splits are left out. Raises DataError where a CSV is bad, a patient is in two CSVs, or no image
    is left.
    """
    tables = {split: read_labels(csv) for split, csv in source.csvs.items()}
    _refuse_shared_patients(source, tables)
    if "train" in tables:
        train, held_out = split_patients(tables.pop("train"), dev, seed)
        tables = {"train": train, "dev": held_out} | tables
    paths = pa.concat_tables(tables.values())["path"]
    folders = _find_patients(source, {_above(path) for path in paths.to_pylist()})
    kept: dict[str, pa.Table] = {}
    dropped: dict[str, Omitted] = {}
    for split, table in tables.items():
        of_view = select_views(table, views)
        chosen = of_view if limit is None else limit_patients(of_view, limit, seed)
        chosen = _shuffle(chosen, seed, by_study=views == "all")
        dropped[split] = Omitted(table.num_rows - of_view.num_rows, of_view.num_rows - chosen.num_rows)
        if chosen.num_rows:
            kept[split] = chosen.append_column("file", _locate(chosen["path"].to_pylist(), folders, source))
    if not kept:
        raise DataError(f"{', '.join(map(str, source.csvs.values()))}: no {views} images")
    return kept, dropped


def divide_rows(table: pa.Table, size: int, views: str) -> Iterator[pa.Table]:
    """The rows of each shard: `size` rows; with all views a few more or less, so that no study is divided."""
    starts = np.arange(0, table.num_rows, size)
    if views == "all":
        studies = study_names(table).to_pylist()
        begins = np.array([row for row, study in enumerate(studies) if row == 0 or study != studies[row - 1]])
        starts = np.unique(begins[begins.searchsorted(starts[starts <= begins[-1]])])
    for start, stop in pairwise([*starts.tolist(), table.num_rows]):
        yield table.slice(start, stop - start)


def find_missing(files: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The files that do not exist, in their order."""
    stored: set[str] = set().union(*(list_objects(root) for root in roots if is_remote(root)))
    return [file for file in files if not (file in stored if "://" in file else os.path.exists(file))]


def read_images(files: Sequence[str], roots: Sequence[Path]) -> Iterator[bytes | ImageError]:
    """The content of each file in turn, or why it cannot be used. Raises DataError for a store that fails."""
    stored = read_objects([file for file in files if "://" in file])
    for file in files:
        content = next(stored) if "://" in file else _read_file(file, roots)
        yield ImageError("no such file, but the CSV lists it") if content is None else content


def _read_file(path: str, roots: Sequence[Path]) -> bytes | ImageError | None:
    """Its content, or what is wrong with it; None for a missing file."""
    try:
        # A link may point anywhere: what is read must lie under a folder that the user named.
        resolved = _resolve(path)
        if not any(resolved.startswith(f"{root}/") for root in roots):
            return ImageError(f"leads out of its folder to {resolved}; allow that by --root")
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - once per image
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        return ImageError(f"cannot be read: {error.strerror}")


def _resolve(path: str) -> str:
    """The path without links. The folders above a patient's are the same for all, and looked up once."""
    folder, patient, study, name = path.rsplit("/", 3)
    parts = (f"{folder}/{patient}", f"{folder}/{patient}/{study}", path)
    if any(map(os.path.islink, parts)):
        return os.path.realpath(path, strict=True)
    return f"{_resolve_folder(folder)}/{patient}/{study}/{name}"


@cache
def _resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _csvs_in(folder: Path) -> dict[str, Path]:
    csvs: dict[str, Path] = {}
    for split, names in CSV_NAMES.items():
        for name in names:
            with suppress(PermissionError):  # such as lost+found
                if split not in csvs and (folder / name).is_file():
                    csvs[split] = folder / name
    return csvs


def _refuse_shared_patients(source: Source, tables: Mapping[str, pa.Table]) -> None:
    for first, second, patient in shared(tables, "patient"):
        line = line_of(source.csvs[second], pc.index(tables[second]["patient"], patient).as_py())
        raise DataError(
            f"{source.csvs[second]}, line {line}: {patient} is in {source.csvs[first].name} too; "
            "splits must not share patients"
        )


def _shuffle(table: pa.Table, seed: int, by_study: bool) -> pa.Table:
    """Images, or studies with their images by key, in an order that depends only on the seed and their names."""
    keys = table["key"].to_pylist()
    units = study_names(table).to_pylist() if by_study else keys
    draws = np.array([hash_fraction("shuffle", seed, unit) for unit in units])
    return table.take(np.lexsort((keys, draws)))


def _above(path: str) -> str:
    """The folders above the patient's: `CheXpert-v1.0/train`, or nothing."""
    return "/".join(path.split("/")[:-3])


def _find_patients(source: Source, aboves: set[str]) -> dict[str, list[str]]:
    """Patient → the folders that hold a folder of that name: a root, a folder in one, or one that a CSV names."""
    folders: dict[Path, list[str]] = {root: list_folders(root) for root in source.roots}

    def look(folder: Path) -> list[str]:
        if folder not in folders:  # a root may lie in another one
            with suppress(PermissionError):  # such as lost+found
                folders[folder] = list_folders(folder)
        return folders.get(folder, [])

    for root in source.roots:
        for name in folders[root]:
            if not _PATIENT.fullmatch(name):
                look(root / name)
        for tail in {tail for above in aboves for tail in _tails(above)}:
            folder = root
            for name in tail.split("/"):
                if name not in look(folder):
                    break
                folder /= name
            else:
                look(folder)
    found: dict[str, list[str]] = {}
    for folder, names in folders.items():
        for name in names:
            if _PATIENT.fullmatch(name):
                found.setdefault(name, []).append(str(folder))
    return found


def _tails(above: str) -> list[str]:
    """`a/b/c` → itself, `b/c` and `c`: the CSV's folders may begin above those that the user named."""
    parts = above.split("/") if above else []
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _named_folders(above: str, roots: Sequence[Path]) -> list[str]:
    """The folders that a CSV may mean by the folders above a patient's, the most literal ones first, each once."""
    named = [f"{root}/{tail}" for tail in _tails(above) for root in roots]
    # What the CSV calls `CheXpert-v1.0` may have another name; and a root may itself be the last of the folders.
    last = above.rpartition("/")[2]
    alike = [str(root) for root in roots if "/" not in above or root.name == last]
    return list(dict.fromkeys(named + alike))  # roots may lie in one another


def _locate(paths: Sequence[str], folders: Mapping[str, list[str]], source: Source) -> pa.Array:
    """The file of each row: in a folder that the CSV names, else in any that has it, else where it should be."""
    meant = cache(lambda above: _named_folders(above, source.roots))
    files = []
    for path in paths:
        above = _above(path)
        image = path[len(above) :].removeprefix("/")
        holding = folders.get(image.partition("/")[0], [])
        named = [folder for folder in meant(above) if folder in holding]
        others = [folder for folder in holding if folder not in named]
        whole = [f"{folder}/{image}" for folder in (*named, *others)]
        if len(whole) == 1 and (named or _is_batch(others[0])):  # no need to look
            files.append(whole[0])
            continue
        parent = "/".join(filter(None, (str(source.roots[0]), above.rpartition("/")[2])))
        expected = whole[0] if named else f"{parent}/{image}"
        files.append(next((file for file in whole if open_location(file).exists()), expected))
    return pa.array(files, pa.string())


def _is_batch(folder: str) -> bool:
    return _BATCH.search(folder.rpartition("/")[2]) is not None


def describe_moved(tables: Iterable[pa.Table], roots: Sequence[Path]) -> str | None:
    """How many images lie in another folder than the CSV says, not counting AIMI's batches; None for no image."""
    meant = cache(lambda above: {*_named_folders(above, roots)})
    moved = [
        (path, file)
        for table in tables
        for path, file in zip(table["path"].to_pylist(), table["file"].to_pylist(), strict=True)
        if (folder := file.rsplit("/", 3)[0]) not in meant(_above(path)) and not _is_batch(folder)
    ]
    if not moved:
        return None
    path, file = moved[0]
    return f"{len(moved):,} images are in another folder than the CSV says, for example {file} for {path}"


def refuse_dark_images(tables: Iterable[pa.Table], roots: Sequence[Path], max_pixels: int) -> None:
    """Raise DataError where a sample of 64 images has 16-bit PNGs and none uses more than 14 of their bits.

    Such images, as many programs make them of DICOM, would be stored nearly black. PNGs come first.
    """
    files = [file for table in tables for file in table["file"][:SAMPLED].to_pylist()]
    files = sorted(files, key=lambda file: not file.lower().endswith(".png"))[:SAMPLED]
    contents = read_images(files, roots)
    levels = [unexplained_level(content, max_pixels) for content in contents if isinstance(content, bytes)]
    deep = [level for level in levels if level is not None]
    bits = next((bits for bits in (10, 12, 14) if max(deep, default=2**16) < 2**bits), None)
    if bits is not None:
        raise DataError(
            f"{len(deep)} of {len(levels)} images of a sample are 16-bit PNGs, whose highest level is {max(deep):,} of "
            f"65,535: they would be nearly black; give `bits` {bits} (or 8 to 16, as the images were made)"
        )
