"""A source's label tables → the shuffled rows of each split, and the content of their images."""

import os
from collections.abc import Iterator, Sequence
from errno import EACCES, EISDIR, ELOOP, ENAMETOOLONG, ENODEV, ENOTDIR, ENXIO, EPERM
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import line_of
from pipeline.base.errors import DataError, MachineError, explain_os_error
from pipeline.base.store import is_remote, list_objects, read_at, read_objects
from pipeline.identity import find_shared, identify_patients, spell_alike
from pipeline.images import ImageError
from pipeline.labels import hash_fraction, limit_patients, select_views, split_patients, study_names
from pipeline.sources.facts import join_facts
from pipeline.sources.sets import SETS, numbers_studies
from pipeline.sources.source import Source, find_place, settle_blanks

READ = 2**16  # bytes, at first: most images are smaller
MISSING = "no such file, but the CSV lists it"
# Reasons to reject an image, wherever it is read; any other error is the machine's, such as a failing disk.
OF_A_FILE = {EACCES, EPERM, EISDIR, ENOTDIR, ELOOP, ENAMETOOLONG, ENXIO, ENODEV}
Splits = tuple[dict[str, pa.Table], dict[str, dict[str, int]], tuple[str, ...]]


def read_splits(source: Source, *, views: str, dev: float, seed: int, limit: int | None = None) -> Splits:
    """Label table per split, shuffled, with the column `file` (absolute path or URL); rows dropped by option; notes.

    With all views, studies are shuffled, and the images of each stay together. train is divided into train and dev by
    patient. Empty splits are left out. Raises DataError if a CSV is bad, a patient is in two, or no image is left.
    """
    adapter, csvs, columns = SETS[source.set], source.csvs, dict(source.columns)
    notes: list[str] = []
    tables = spell_alike(settle_blanks(source, adapter.read(source, notes.append)))
    tables = join_facts(tables, source.facts, notes.append, numbers_studies(source.set, columns), columns)
    patients = {split: identify_patients(table) for split, table in tables.items()}
    for first, second, (patient, *_) in find_shared(patients):
        if second not in csvs or "table" in csvs:  # official lists of one table's images
            raise DataError(f"{patient} is in {first} and {second}; splits must not share patients")
        line = line_of(csvs[second], pc.index(tables[second]["patient"], patient).as_py())
        shared = f"{patient} is in {csvs[first].name} too; splits must not share patients"
        raise DataError(f"{csvs[second]}, line {line}: {shared}")
    if "train" in tables:
        train, held_out = split_patients(tables.pop("train"), dev, seed)
        tables = {"train": train, "dev": held_out} | tables
    kept: dict[str, pa.Table] = {}
    dropped: dict[str, dict[str, int]] = {}
    for split, table in tables.items():
        of_view = select_views(table, views)
        chosen = of_view if limit is None else limit_patients(of_view, limit, seed)
        dropped[split] = {"views": len(table) - len(of_view), "limit": len(of_view) - len(chosen)}
        if chosen.num_rows:
            # An order that depends only on the seed and the names of images or studies.
            keys = chosen["key"].to_pylist()
            units = study_names(chosen).to_pylist() if views == "all" else keys
            draws = np.array([hash_fraction("shuffle", seed, unit) for unit in units])
            kept[split] = chosen.take(np.lexsort((keys, draws)))
    if not kept:
        raise DataError(f"{', '.join(map(str, csvs.values()))}: no {views} images")
    paths = [path for table in kept.values() for path in table["path"].to_pylist()]
    files = iter(adapter.locate(paths, source.roots, notes.append))
    complete = {
        split: table.append_column("file", pa.array(islice(files, len(table)))) for split, table in kept.items()
    }
    return complete, dropped, tuple(notes)


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
    return [file for file in files if not (file in stored if "://" in file else os.path.exists(find_place(file)[0]))]


def read_images(files: Sequence[str], roots: Sequence[Path]) -> Iterator[bytes | ImageError]:
    """The content of each file, or why it cannot be used. Raises DataError if a store, MachineError if a disk fails."""
    stored = read_objects([file for file in files if "://" in file])
    for file in files:
        content = next(stored) if "://" in file else _read_file(file, roots)
        yield ImageError(MISSING) if content is None else content


def _read_file(file: str, roots: Sequence[Path]) -> bytes | ImageError | None:
    """The file's content, or the reason that it is unusable; None for a missing file."""
    path, offset, size = find_place(file)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        try:
            # A link may point anywhere: files must lie under a folder that the user named.
            try:
                opened = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - once per image
            except FileNotFoundError:  # not Linux
                opened = os.path.realpath(path, strict=True)
            if not any(opened.startswith(f"{str(root).rstrip('/')}/") for root in roots):
                return ImageError(f"leads out of its folder to {opened}; allow that by --root")
            if size is not None:
                return read_at(descriptor, size, offset)
            content = b""
            while part := os.read(descriptor, max(READ, len(content))):
                content += part
            return content
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in OF_A_FILE:
            raise MachineError(f"{path}: cannot be read: {explain_os_error(error)}") from None
        return ImageError(f"cannot be read: {error.strerror}")
