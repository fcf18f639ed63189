"""What is sharded, and on what terms: facts that the modules of all data sets share."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.base.tar import Member
from pipeline.labels import LABELS, NOT_ANNOTATED

# Labels and the kinds of them in CheXpert's hierarchy (Irvin et al., figure 1).
KINDS = {
    "Lung Opacity": ("Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis"),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}
_IN_TAR = re.compile(r"(.+\.tar)@(\d+)\+(\d+)#.*", re.DOTALL)


class Terms(NamedTuple):
    """Who made a data set, and how it may be used. Sets with the same `patients` share the names of patients.

    `paper` is empty if there is none.
    """

    name: str
    title: str
    patients: str
    license: str
    paper: str


class Source(NamedTuple):
    """A data set as somebody has it.

    `csvs` are its tables, by split or by role; `roots` are the folders that images may be read from; `set` is its name
    in `sources.sets.SETS`. `columns` are what a table of no known set calls ours: ("path", "Image"), …; `facts` are
    files of further columns (`sources.joined`). `name` is what the user calls a set that has the layout of another one,
    but patients of its own.
    """

    csvs: dict[str, Path]
    roots: tuple[Path, ...]
    set: str = "chexpert"
    columns: tuple[tuple[str, str], ...] = ()
    facts: tuple[Path, ...] = ()
    name: str = ""


def no_more_roots(homes: Sequence[Path]) -> list[Path]:
    """For a set whose images lie in its own folder: no other folder may hold some."""
    return []


def nothing_moved(tables: Iterable[pa.Table], roots: Sequence[Path]) -> None:
    """For a set with one layout: no image can be elsewhere."""


def make_key(name: str) -> str:
    """The key of an image of that name: up to 90 letters, digits, _ and -.

    / and . become _; of a name with any other character, or a longer one, a hash keeps it apart from others.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    if len(plain) <= 90 and re.fullmatch(r"[A-Za-z0-9_./-]*", name):
        return plain
    return f"{plain[:80]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def place_in_tar(tar: Path, member: Member) -> str:
    """The file of an image that is a member of a tar."""
    return f"{tar}@{member.offset}+{member.size}#{member.name}"


def find_place(file: str) -> tuple[str, int, int | None]:
    """Path, offset and size in bytes of an image; its size is None if it is a file of its own."""
    match = _IN_TAR.fullmatch(file)
    return (match[1], int(match[2]), int(match[3])) if match else (file, 0, None)


def leave_parents_open(states: npt.NDArray[np.int8]) -> None:
    """In states [N, 14], mark as not annotated a negative parent of a kind that is positive or uncertain."""
    for parent, kinds in KINDS.items():
        column = states[:, LABELS.index(parent)]
        is_kind = np.isin(states[:, [LABELS.index(kind) for kind in kinds]], (1, -1)).any(axis=1)
        column[(column == 0) & is_kind] = NOT_ANNOTATED


def number_studies(patients: pa.ChunkedArray, studies: pa.ChunkedArray) -> pa.Array:
    """The number [N] of each image's study within its patient, from 1 in the order of the table."""
    known: dict[str, dict[str, int]] = {}
    pairs = zip(patients.to_pylist(), studies.to_pylist(), strict=True)
    of_patients = ((known.setdefault(patient, {}), study) for patient, study in pairs)
    return pa.array(
        [numbers.setdefault(study, len(numbers) + 1) for numbers, study in of_patients], pa.int32()
    )
