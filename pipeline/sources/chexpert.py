"""CheXpert, in every folder layout seen in practice → label table per split, and the file of each image.

Irvin et al., CheXpert: a large chest radiograph dataset with uncertainty labels and expert comparison, AAAI 2019:
224,316 radiographs of 65,240 patients; train.csv has 223,414 rows. Layouts: the folder that holds the CSVs or its
parent; any name for it; the CSVs beside it; AIMI's download batches side by side (`CheXpert-v1.0 batch 1 (validate &
csv)`, `batch 2 (train 1)`, …), which hold the patients directly; the test set (`test_labels.csv` beside `test/`,
`val_labels.csv` beside `val/`). An image is taken from the folder that its CSV names, else from any that has it.
"""

import re
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from itertools import takewhile
from pathlib import Path

import pyarrow as pa

from pipeline.base.csvs import demand_columns, read_strings
from pipeline.base.errors import DataError
from pipeline.base.store import list_folders, open_location
from pipeline.identity import Note, ignore
from pipeline.labels import COLUMNS, FACTS, LABELS
from pipeline.sources.source import AGE, Column, DataSet, find_files, read_terms

CSV_NAMES = {"train": ("train.csv",), "valid": ("valid.csv", "val_labels.csv"), "test": ("test_labels.csv", "test.csv")}
IMAGE = r"(?P<patient>patient\d{1,20})/study(?P<study>\d{1,6})/(?P<file>view\d{1,4}_(?P<side>frontal|lateral))"
SEX, PROJECTION = (Column(f"(?P<{name}>.*)", "", optional=True) for name in ("sex", "projection"))
KEY = {"key": "{patient}_study{study}_{file}"}
VIEW = Column("(?P<view>(?i:frontal|lateral))", "is neither Frontal nor Lateral")
_BATCH = re.compile(r"batch[ _-]?\d", re.IGNORECASE)  # AIMI's download folders
_PATIENT = re.compile(r"patient\d+")
DEEPEST = 6  # levels of folders that are searched for patients
_SPLIT_FOLDERS = ("train", "valid", "val", "test")
_FOLDER = r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # neither `..` nor the empty name before a first slash


class Chexpert(DataSet):
    """CheXpert's layouts."""

    def find_tables(self, folder: Path) -> dict[str, Path] | None:
        """Split → its CSV, from `folder`, the only folder in it that holds CSVs, or the folder that holds `folder`."""
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
        parents = [home.resolve().parent for home in homes if _BATCH.search(home.resolve().name)]
        return [parent / name for parent in parents for name in list_folders(parent) if _BATCH.search(name)]

    def locate(self, paths: Sequence[str], roots: Sequence[Path], note: Note = ignore) -> list[str]:
        """The file of each path: in a folder that the CSV names, else (which is noted) in any that has it."""
        holders = _find_patients(roots, {name for path in paths for name in path.split("/")[:-3]})
        names, files, moved = [*map(str, roots)], [], []

        @cache
        def count_alike(above: tuple[str, ...], folder: str) -> int:
            """How many of the folders above a patient's a folder ends in; 0 if the CSV means another."""
            ends = zip(above[::-1], folder.split("/")[::-1], strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
            # What the CSV calls `CheXpert-v1.0`, without folders in it, may have any name.
            return alike or int(len(above) < 2 and folder in names)

        def is_meant(above: tuple[str, ...], folder: str) -> bool:
            return count_alike(above, folder) > 0 or _BATCH.search(folder.rpartition("/")[2]) is not None

        for path in paths:
            *parts, patient, study, file = path.split("/")
            above, image = tuple(parts), f"{patient}/{study}/{file}"
            expected = "/".join([names[0], *above[-1:]])
            folders = sorted(holders.get(patient, [expected]), key=partial(count_alike, above), reverse=True)
            folder = folders[0]
            if len(folders) > 1 or not is_meant(above, folder):  # else, no need to look
                held = (folder for folder in folders if open_location(f"{folder}/{image}").exists())
                folder = next(held, folder if count_alike(above, folder) else expected)
            files.append(f"{folder}/{image}")
            if not is_meant(above, folder):
                moved.append((path, files[-1]))
        if moved:
            path, file = moved[0]
            note(f"{len(moved):,} images are in another folder than the CSV says, for example {file} for {path}")
        return files

    def read_text(self, csv: Path) -> pa.Table:
        """The known columns, under their CheXpert names; the test set's tables have only paths and labels."""
        text = read_strings(csv)
        text = text.rename_columns([name.replace("_", " ") for name in text.column_names])
        names = COLUMNS if any(name in FACTS for name in text.column_names) else ("Path", *LABELS)
        demand_columns(csv, text.column_names, names)
        return text.select(names)


def _csvs_in(folder: Path) -> dict[str, Path]:
    with suppress(PermissionError):  # such as lost+found
        return find_files(folder, CSV_NAMES)
    return {}


def _find_patients(roots: Sequence[Path], named: set[str]) -> dict[str, list[str]]:
    """Patient → the folders that hold a folder of that name: a root, one in a root, and below these a `named` one."""
    holders: dict[str, list[str]] = {}
    level, seen = [*roots], set(roots)  # each once, as roots may lie in one another
    for _ in range(DEEPEST):
        below = []
        for folder in level:
            with nullcontext() if folder in roots else suppress(PermissionError):  # such as lost+found
                for name in list_folders(folder):
                    if _PATIENT.fullmatch(name):
                        holders.setdefault(name, []).append(str(folder))
                    elif folder in roots or name in named:
                        below.append(folder / name)
        level = [folder for folder in below if folder not in seen]
        seen.update(level)
    return holders


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
