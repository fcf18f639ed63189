"""A CheXpert folder, as people really have it → label table per split, and where each image lies.

Layouts: the folder that holds the CSVs or its parent; any name for it; AIMI's download batches side by side
(`CheXpert-v1.0 batch 1 (validate & csv)`, `batch 2 (train 1)`, …), which hold the patients directly; the test
set (`test_labels.csv` beside `test/`, `val_labels.csv` beside `val/`); CSVs gzipped. An image is found by its
patient/study/view, whatever its CSV says of the folders above. Folders and CSVs may be in an object store.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import DataError
from pipeline.images import ImageError
from pipeline.labels import hash_fraction, read_labels, select_views, shared, split_patients, study_names
from pipeline.store import (
    check_access,
    is_remote,
    list_folders,
    list_objects,
    named_failures,
    open_location,
    read_objects,
)

CSV_NAMES = {
    "train": ("train.csv", "train.csv.gz"),
    "valid": ("valid.csv", "valid.csv.gz", "val_labels.csv"),
    "test": ("test_labels.csv", "test.csv", "test.csv.gz"),
}
_BATCH = re.compile(r"batch[ _-]?\d", re.IGNORECASE)  # AIMI's download folders
_PATIENT = re.compile(r"patient\d+")


class Source(NamedTuple):
    """The CSV of each split, and the folders that images may be read from."""

    csvs: dict[str, Path]
    roots: tuple[Path, ...]


class Dropped(NamedTuple):
    """Rows of a split that are left out on purpose."""

    views: int
    limit: int


def find_csvs(folder: Path) -> dict[str, Path]:
    """Split → its CSV, where `folder` or exactly one folder in it holds at least one.

    Raises DataError where there is none, or more than one folder to choose from.
    """
    with named_failures(folder, "cannot be read"):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        if csvs := _csvs_in(folder):
            return csvs
        inside = {name: csvs for name in list_folders(folder) if (csvs := _csvs_in(folder / name))}
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
) -> tuple[dict[str, pa.Table], dict[str, Dropped]]:
    """Label table per split, shuffled, with the column `file` (absolute path or URL); and what was dropped.

    With all views it is studies that are shuffled, and the images of one follow each other. train is divided
    into train and dev by patient. Splits that end up empty are left out. Raises DataError where a CSV is bad, a
    patient is in two CSVs, or no image is left.
    """
    tables = {split: read_labels(csv) for split, csv in source.csvs.items()}
    _refuse_shared_patients(source, tables)
    if "train" in tables:
        train, held_out = split_patients(tables.pop("train"), dev, seed)
        tables = {"train": train, "dev": held_out} | tables
    folders = _find_patients(source)
    kept: dict[str, pa.Table] = {}
    dropped: dict[str, Dropped] = {}
    for split, table in tables.items():
        of_view = select_views(table, views)
        chosen = of_view if limit is None else limit_patients(of_view, limit, seed)
        chosen = _shuffle_studies(chosen, seed) if views == "all" else _shuffle(chosen, seed)
        dropped[split] = Dropped(table.num_rows - of_view.num_rows, of_view.num_rows - chosen.num_rows)
        if chosen.num_rows:
            kept[split] = chosen.append_column("file", _locate(chosen["path"].to_pylist(), folders, source))
    if not kept:
        raise DataError(f"{', '.join(map(str, source.csvs.values()))}: no {views} images")
    return kept, dropped


def divide_rows(table: pa.Table, size: int, views: str) -> Iterator[pa.Table]:
    """The rows of each shard: `size` of them; with all views a few more or less, so that no study is divided."""
    starts = np.arange(0, table.num_rows, size)
    if views == "all":
        studies = study_names(table).to_pylist()
        begins = np.array([row for row, study in enumerate(studies) if row == 0 or study != studies[row - 1]])
        starts = np.unique(begins[begins.searchsorted(starts[starts <= begins[-1]])])
    for start, stop in pairwise([*starts.tolist(), table.num_rows]):
        yield table.slice(start, stop - start)


def find_missing(files: Sequence[str], roots: Sequence[Path]) -> list[str]:
    """The files that are not there, in their order."""
    stored: set[str] = set().union(*(list_objects(root) for root in roots if is_remote(root)))
    return [file for file in files if not (file in stored if "://" in file else os.path.exists(file))]


def read_images(files: Sequence[str], roots: Sequence[Path]) -> Iterator[bytes | ImageError]:
    """The content of each file in turn, or why it has none that may be used.

    Raises DataError for a store that fails: only what is wrong with an image is a matter of that image.
    """
    stored = read_objects([file for file in files if "://" in file])
    for file in files:
        content = next(stored) if "://" in file else _read_file(file, roots)
        yield ImageError("no such file, but the CSV lists it") if content is None else content


def _read_file(path: str, roots: Sequence[Path]) -> bytes | ImageError | None:
    """Content, what is wrong with the file, or None where there is none."""
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
        line = pc.index(tables[second]["patient"], patient).as_py() + 2
        raise DataError(
            f"{source.csvs[second]}, line {line}: {patient} is in {source.csvs[first].name} too; "
            "splits must not share patients"
        )


def limit_patients(table: pa.Table, limit: int, seed: int) -> pa.Table:
    """Whole patients, in the order of a hash, as long as they fit into `limit` images (the first one always)."""
    patients = table["patient"].combine_chunks().dictionary_encode()
    counts = np.bincount(patients.indices.to_numpy(), minlength=len(patients.dictionary))
    draws = [hash_fraction("limit", seed, patient) for patient in patients.dictionary.to_pylist()]
    order = np.argsort(draws, kind="stable")
    fits = np.cumsum(counts[order]) <= limit
    fits[:1] = True
    chosen = np.zeros(len(counts), np.bool_)
    chosen[order] = fits
    return table.filter(pa.array(chosen[patients.indices.to_numpy()]))


def _shuffle(table: pa.Table, seed: int) -> pa.Table:
    """Rows in an order that depends on (seed, key) alone: CheXpert's own order is not random."""
    draws = [hash_fraction("shuffle", seed, key) for key in table["key"].to_pylist()]
    return table.take(np.argsort(np.array(draws), kind="stable"))


def _shuffle_studies(table: pa.Table, seed: int) -> pa.Table:
    """Studies in an order that depends on (seed, study) alone, the images of each by key."""
    draws = np.array([hash_fraction("shuffle", seed, study) for study in study_names(table).to_pylist()])
    return table.take(np.lexsort((table["key"].to_pylist(), draws)))


def _find_patients(source: Source) -> dict[str, list[str]]:
    """Patient → the folders that hold a folder of that name: a root, or a folder in a root."""
    found: dict[str, list[str]] = {}
    folders: dict[Path, list[str]] = {}  # a root may lie in another one
    for root in source.roots:
        folders[root] = list_folders(root)
        for name in folders[root]:
            if not _PATIENT.fullmatch(name) and root / name not in folders:
                with suppress(PermissionError):  # such as lost+found
                    folders[root / name] = list_folders(root / name)
    for folder, names in folders.items():
        for name in names:
            if _PATIENT.fullmatch(name):
                found.setdefault(name, []).append(str(folder))
    return found


def _locate(paths: Sequence[str], folders: Mapping[str, list[str]], source: Source) -> pa.Array:
    """The file of each row: in a folder of the name that the CSV gives, else in any that has the patient."""
    files = []
    for path in paths:
        parent, patient, study_and_view = path.split("/", 2)
        candidates = folders.get(patient, [])
        if len(candidates) > 1:
            named = [folder for folder in candidates if folder.endswith(f"/{parent}")]
            whole = [f"{folder}/{patient}/{study_and_view}" for folder in (*named, *candidates)]
            files.append(next((file for file in whole if open_location(file).exists()), whole[0]))
        else:
            folder = candidates[0] if candidates else f"{source.roots[0]}/{parent}"
            files.append(f"{folder}/{patient}/{study_and_view}")
    return pa.array(files, pa.string())
