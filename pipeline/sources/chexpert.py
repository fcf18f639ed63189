"""CheXpert, in every folder layout seen in practice → label table per split, and the file of each image.

Irvin et al., CheXpert: a large chest radiograph dataset with uncertainty labels and expert comparison, AAAI 2019:
224,316 radiographs of 65,240 patients; train.csv has 223,414 rows.

Layouts: the folder that holds the CSVs or its parent; any name for it; the CSVs beside it; AIMI's download batches side
by side (`CheXpert-v1.0 batch 1 (validate & csv)`, `batch 2 (train 1)`, …), which hold the patients directly; the test
set (`test_labels.csv` beside `test/`, `val_labels.csv` beside `val/`); CSVs gzipped. An image is taken from the folder
that its CSV names, else from any that has its patient, study and view. Folders and CSVs may be in an object store.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pyarrow as pa

from pipeline.base.csvs import demand_columns, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_folders, named_failures, open_location
from pipeline.labels import COLUMNS, FACTS, LABELS
from pipeline.sources.source import AGE, PROJECTION, SEX, Column, DataSet, find_files, read_terms

CSV_NAMES = {"train": ("train.csv",), "valid": ("valid.csv", "val_labels.csv"), "test": ("test_labels.csv", "test.csv")}
IMAGE = r"(?P<patient>patient\d{1,20})/study(?P<study>\d{1,6})/(?P<file>view\d{1,4}_(?P<side>frontal|lateral))"
KEY = {"key": "{patient}_study{study}_{file}"}
VIEW = Column("(?P<view>(?i:frontal|lateral))", "is neither Frontal nor Lateral")
_BATCH = re.compile(r"batch[ _-]?\d", re.IGNORECASE)  # AIMI's download folders
_PATIENT = re.compile(r"patient\d+")
_SPLIT_FOLDERS = ("train", "valid", "val", "test")
_FOLDER = r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # neither `..` nor the empty name before a first slash


class Chexpert(DataSet):
    """CheXpert's layouts."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """Split → its CSV, from `folder`, the only folder in it that holds CSVs, or the folder that holds `folder`.

        None if there are none. Raises DataError if several folders in it hold CSVs.
        """
        with named_failures(folder, "cannot be read"):
            if csvs := _csvs_in(folder):
                return csvs
            # A hidden folder is no data set, but a remnant of `pipeline sample` if it is killed.
            names = [name for name in list_folders(folder) if not name.startswith(".")]
            inside = {name: csvs for name in names if (csvs := _csvs_in(folder / name))}
            holds_images = any(name in _SPLIT_FOLDERS or _PATIENT.fullmatch(name) for name in names)
            path = folder.resolve()
            if not inside and holds_images and path.name not in _SPLIT_FOLDERS and (csvs := _csvs_in(path.parent)):
                return csvs
        if len(inside) > 1:
            raise DataError(f"{folder}: CSVs in several folders ({', '.join(inside)}); name one of them")
        return next(iter(inside.values()), None)

    def find_roots(self, homes: Sequence[Path]) -> list[Path]:
        """The other folders that may hold images: all of AIMI's download batches, if a home is one."""
        return [
            home.parent / name
            for home in (home.resolve() for home in homes)
            if _BATCH.search(home.name)
            for name in list_folders(home.parent)
            if _BATCH.search(name)
        ]

    def locate(self, paths: Sequence[str], roots: Sequence[Path]) -> list[str]:
        """The file of each path: in a folder that the CSV names, else in any that has it, else its expected path."""
        folders = _find_patients(roots, {_above(path) for path in paths})
        meant = cache(lambda above: _named_folders(above, roots))
        files = []
        for path in paths:
            above = _above(path)
            image = path[len(above) :].removeprefix("/")
            holding = folders.get(image.partition("/")[0], [])
            named = [folder for folder in meant(above) if folder in holding]
            others = [folder for folder in holding if folder not in named]
            candidates = [f"{folder}/{image}" for folder in (*named, *others)]
            if len(candidates) == 1 and (named or _is_batch(others[0])):  # no need to look
                files.append(candidates[0])
                continue
            parent = "/".join(filter(None, (str(roots[0]), above.rpartition("/")[2])))
            expected = candidates[0] if named else f"{parent}/{image}"
            files.append(next((file for file in candidates if open_location(file).exists()), expected))
        return files

    def describe_moved(self, tables: Iterable[pa.Table], roots: Sequence[Path]) -> str | None:
        """How many images lie in another folder than the CSV states, not counting AIMI's batches; None for no image."""
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

    def read_text(self, csv: Path) -> pa.Table:
        """The known columns, under their CheXpert names; the test set's tables have only paths and labels."""
        text = read_strings(csv)
        text = text.rename_columns([name.replace("_", " ") for name in text.column_names])
        names = COLUMNS if any(name in FACTS for name in text.column_names) else ("Path", *LABELS)
        demand_columns(csv, text.column_names, names)
        return text.select(names)

    def read_fields(self, csv: Path, text: pa.Table) -> dict[str, pa.Array]:
        """The fields of each image; the view comes from the file's name if no column states it."""
        fields = super().read_fields(csv, text)
        return {"view": fields["side"]} | fields


def _csvs_in(folder: Path) -> dict[str, Path]:
    with suppress(PermissionError):  # such as lost+found
        return find_files(folder, CSV_NAMES)
    return {}


def _above(path: str) -> str:
    """The folders above the patient's: `CheXpert-v1.0/train`, or nothing."""
    return "/".join(path.split("/")[:-3])


def _find_patients(roots: Sequence[Path], aboves: set[str]) -> dict[str, list[str]]:
    """Patient → the folders that hold a folder of that name: a root, a folder in one, or one that a CSV names."""
    folders: dict[Path, list[str]] = {root: list_folders(root) for root in roots}

    def look(folder: Path) -> list[str]:
        if folder not in folders:  # a root may lie in another one
            with suppress(PermissionError):  # such as lost+found
                folders[folder] = list_folders(folder)
        return folders.get(folder, [])

    for root in roots:
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
    holders: dict[str, list[str]] = {}
    for folder, names in folders.items():
        for name in names:
            if _PATIENT.fullmatch(name):
                holders.setdefault(name, []).append(str(folder))
    return holders


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


def _is_batch(folder: str) -> bool:
    return _BATCH.search(folder.rpartition("/")[2]) is not None


SET = Chexpert(
    read_terms("chexpert"),
    columns={
        # Of the folders above, those below the last one with another name: no absolute path gets through.
        "Path": Column(
            rf"(?:(?:.*?/)??(?P<above>(?:{_FOLDER}/)+))?(?P<image>{IMAGE}\.(?i:jpg|jpeg|png))",
            "does not end in patientN/studyN/viewN_frontal.jpg",
        ),
        "Sex": SEX,
        "Age": AGE,
        "Frontal/Lateral": VIEW,
        "AP/PA": PROJECTION,
    },
    templates=KEY | {"path": "{above}{image}"},
    files="a train.csv, valid.csv or test_labels.csv",
)
