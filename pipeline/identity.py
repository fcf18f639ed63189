"""Identity of patients and images, independent of their names; and the one join of tables by such ids.

A patient is (namespace, id): `007`, `7.0` and `patient7` are one person in one namespace, and two in two. An image is
the CRC-32 and length of its stored bytes. Ids are compared in this form; tables keep the names as a set writes them.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import line_of
from pipeline.base.errors import DataError, quote

NAMED = "*"  # the namespace of patients whose names include one: `nih/patient00012`
IMAGE_SUFFIX = r"\.(?i:dcm|dicom|png|jpg|jpeg)"
# Letters that sets write before a number, and what programs append if they read it as a measurement.
_NUMBER = r"^\s*(?i:patient|subject|study|pat|sub|id|p|s)?[_-]?0*(\d+)(?:\.0+)?\s*$"
_CODE = r"^\s*([A-Za-z]+[_-]?)0+(\d+)\s*$"

Side = TypeVar("Side")
Names: TypeAlias = pa.Array | pa.ChunkedArray
Normalize = Callable[[pa.Array], pa.Array]
Note = Callable[[str], None]  # takes a sentence about rows that a join did not match


def ignore(text: str) -> None:
    """Ignore notes."""


def normalize_ids(names: Names) -> pa.Array:
    """Ids [N] as they are compared: without `patient`, `s`, zeros and `.0` around a number; `MRN007` is MRN7."""
    numbers = pc.replace_substring_regex(_flatten(names.cast(pa.string())), _NUMBER, r"\1")
    return pc.replace_substring_regex(numbers, _CODE, r"\1\2")


def normalize_paths(paths: Names, parts: int = 1) -> pa.Array:
    """The last parts of image paths [N] without suffix: leading folders and the format do not identify an image."""
    slashed = pc.replace_substring(pc.utf8_trim_whitespace(_flatten(paths)), "\\", "/")
    bare = pc.replace_substring_regex(slashed, f"{IMAGE_SUFFIX}$", "")
    return pc.replace_substring_regex(bare, rf"^.*?((?:[^/]+/){{0,{parts - 1}}}[^/]+)$", r"\1")


def normalize_studies(names: Names) -> pa.Array:
    """`…/PATIENT/STUDY` [N] as normalized ids, `7/1`."""
    parts = pc.split_pattern(normalize_paths(names, 2), "/")
    ids = normalize_ids(pc.list_flatten(parts))
    return pc.binary_join(pa.ListArray.from_arrays(parts.offsets, ids, mask=parts.is_null()), "/")


def name_patients(patients: Names, namespace: str) -> pa.Array:
    """`namespace/id` of each patient [N]."""
    spaces: str | pa.Array = namespace
    if namespace == NAMED:
        parts = pc.split_pattern(_flatten(patients), "/", max_splits=1)
        spaces, patients = pc.list_element(parts, 0), pc.list_element(parts, 1)
    return pc.binary_join_element_wise(spaces, normalize_ids(patients), "/")


def _flatten(column: Names) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


class Ids(NamedTuple):
    """An identifier for each row [N], and the rows' names for messages."""

    ids: pa.Array
    names: pa.ChunkedArray


def identify_patients(table: pa.Table, namespace: str = "") -> Ids:
    """The patients of a label table, by namespace and id."""
    return Ids(name_patients(table["patient"], namespace), table["patient"])


def identify_images(table: pa.Table) -> Ids:
    """The images of a table of shards, whatever their keys are."""
    return Ids(join_content(table), table["key"])


def describe_repeats(splits: Mapping[str, pa.Table]) -> list[str]:
    """A text for each two splits of some shards that hold the same images, whatever their keys are."""
    images = {split: identify_images(table) for split, table in splits.items()}
    return [
        f"{1 + len(more):,} images of {other}, such as {name}, are in {split} too: results on them are too good"
        for split, other, (name, *more) in find_shared(images)
    ]


def join_content(table: pa.Table) -> pa.Array:
    """Checksum and length of each row's image as one uint64 [N]."""
    crc, length = (table[name].to_numpy().astype(np.uint64) for name in ("crc", "length"))
    return pa.array(crc << np.uint64(32) | length)


def spell_alike(tables: Mapping[Side, pa.Table], namespace: str = "") -> dict[Side, pa.Table]:
    """The tables, with each patient under one name: the first one with the id."""
    names = pa.chunked_array([chunk for table in tables.values() for chunk in table["patient"].chunks])
    distinct = names.unique()
    ids = name_patients(distinct, namespace)
    if len(ids.unique()) == len(distinct):
        return dict(tables)
    first = distinct.take(pc.index_in(ids, value_set=ids))
    alike = dict(tables)
    for side, table in tables.items():
        patients = first.take(pc.index_in(table["patient"].combine_chunks(), value_set=distinct))
        alike[side] = table.set_column(table.schema.get_field_index("patient"), "patient", patients)
    return alike


def find_shared(sides: Mapping[Side, Ids]) -> Iterator[tuple[Side, Side, list[str]]]:
    """(side, later side, names) for each two sides that share patients or images, by their names on the later side."""
    distinct = {side: members.ids.unique() for side, members in sides.items()}
    for first, second in combinations(distinct, 2):
        common = distinct[second].filter(pc.is_in(distinct[second], value_set=distinct[first]))
        if len(common):
            rows = pc.index_in(common, value_set=sides[second].ids)
            yield first, second, sides[second].names.take(rows).to_pylist()


def join(
    names: Names, path: Path, rows: pa.Table, row_names: Names, unit: str, note: Note, by: Normalize = normalize_ids
) -> pa.Array:
    """The row [N] of a file's table, whose rows are called `row_names`, for each of the names [N]; null without one.

    `unit` is the kind of name: images, studies, patients. Names without a match, on either side, are noted. Raises
    DataError if nothing matches, if a row with content has no name, and for two different rows of one name.
    """
    names, row_names = _flatten(names), _flatten(row_names)
    keys, row_keys = by(names), by(row_names)
    for column in rows.columns:
        row = pc.index(pc.and_(column.is_valid(), row_keys.is_null()), True).as_py()
        if row >= 0:
            raise DataError(f"{path}, line {line_of(path, row)}: its key is blank")
    if len(row_keys.unique()) < len(row_keys):
        first = pc.index_in(row_keys, value_set=row_keys)  # the first row of the same name
        for name, column in zip(rows.column_names, rows.columns, strict=True):
            cells = pc.fill_null(column.cast(pa.string()).combine_chunks(), "")
            row = pc.index(pc.equal(cells, cells.take(first)), False).as_py()
            if row >= 0:
                pair = (first[row].as_py(), row)
                lines = " and ".join(str(line_of(path, number)) for number in pair)
                values = " and ".join(f"'{quote(cells[number].as_py(), 80)}'" for number in pair)
                raise DataError(f"{path}, lines {lines}, column {name}: {values} for {_quote(row_names[row:])}")
    place = pc.index_in(keys, value_set=row_keys)
    alone = names.filter(place.is_null()).unique()
    total = len(names.unique())
    if total and len(alone) == total:
        ours = f"the data set's '{_quote(names)}'"
        raise DataError(f"{path}: no row of these {total:,} {unit}: its first is '{_quote(row_names)}', {ours}")
    unused = row_names.filter(pc.invert(pc.is_in(row_keys, value_set=keys))).drop_null().unique()
    if len(alone):
        note(f"{path.name}: {len(alone):,} of {total:,} {unit} have no row, such as {_quote(alone)}")
    if len(unused):
        note(f"{path.name}: {len(unused):,} of its {unit} are not in the data set, such as {_quote(unused)}")
    return place


def _quote(names: pa.Array) -> str:
    return quote(str(names[0]), 80) if len(names) else ""
