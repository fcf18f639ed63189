"""Scores of images or studies, from any source: a CSV, Parquet or Arrow file with a row for each, a column per label.

Rows are identified by a column of KEYS (an image's key, path or file name), else a study's path, else patient and
study. A run writes `scores-<split>.arrow`, in the order of the split's table: key and patient (string), study (int32)
as in that table, and of each label that it learned the score in [0, 1] (float64).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy

from pipeline.base.csvs import ARROW, demand, demand_columns, name_row, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.base.files import read_arrow, write_table
from pipeline.identity import IMAGE_SUFFIX, Note, ignore, join, normalize_ids
from pipeline.labels import LABELS, find_label
from pipeline.measure.metrics import Bools, Floats, Ints, Names

KEYS = ("key", "path", "file", "filename", "image index", "image", "image id", "dicom id", "dicom")
FACTS = ("patient", "study")
NOT_SCORES = "damaged, or not a file of scores"


class Scored(NamedTuple):
    """The scored images of a split, or one row per study of them."""

    scores: Floats  # [N, L] in [0, 1]
    target: Floats  # [N, L] in {0, 1}
    mask: Bools  # [N, L] the cells to use
    patient: Names  # [N]
    study: Names  # [N] names or numbers, unique within a patient
    sex: Names  # [N]; None or empty: unknown
    age: Ints  # [N] years; -1 unknown
    projection: Names  # [N]; None or empty: unknown

    @staticmethod
    def of(scores: Floats, target: Floats, mask: Bools, table: pa.Table) -> "Scored":
        """Scores, targets and masks [N, L] with the facts of a label table's rows [N]."""
        patient, study, sex = (table[name].to_numpy() for name in ("patient", "study", "sex"))
        age = pc.fill_null(table["age"], -1).to_numpy()
        projection = pc.fill_null(table["projection"], "").to_numpy()
        return Scored(scores, target, mask, patient, study, sex, age, projection)

    def take(self, rows: Any) -> "Scored":
        """The rows that an index selects: numbers, bools [N] or a slice."""
        return Scored(*(column[rows] for column in self))


def study_level(images: Scored, combine: str = "max") -> Scored:
    """One row per study: the max or mean of its views' scores, which share their labels and facts.

    A cell is in the mask if any view's is; cells outside the mask (damaged images) are ignored. Raises ValueError for
    any other `combine`.
    """
    if combine not in ("max", "mean"):
        raise ValueError(f"combine is '{combine}'; choose max or mean")
    codes = [np.unique(column, return_inverse=True)[1] for column in (images.patient, images.study)]
    _, study = np.unique(codes[0] * (codes[1].max() + 1) + codes[1], return_inverse=True)
    order = np.argsort(study, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(study[order]) != 0]))
    scores, target, mask = (array[order] for array in images[:3])
    counts = np.add.reduceat(mask, starts, axis=0, dtype=np.int64)
    if combine == "max":
        combined = np.maximum.reduceat(np.where(mask, scores, 0), starts, axis=0)
    else:
        sums = np.add.reduceat(np.where(mask, scores, 0), starts, axis=0, dtype=np.float64)
        combined = (sums / np.maximum(counts, 1)).astype(scores.dtype)
    positive = np.maximum.reduceat(np.where(mask, target, 0), starts, axis=0)
    return Scored(combined, positive, counts > 0, *(fact[order[starts]] for fact in images[3:]))


class Scores(NamedTuple):
    """A file's scores [M, L], NaN if blank, and the names [M] of the scored images or studies."""

    path: Path
    labels: tuple[str, ...]
    values: Floats
    names: pa.Array
    unit: str  # image or study

    def check(self) -> "Scores":
        """Return self. Raises DataError for a column in which all scores are equal."""
        for name, values in zip(self.labels, self.values.T, strict=True):
            if len(values) > 1 and np.ptp(values) == 0:
                alike = f"all {len(values):,} scores are {values[0]:g}"
                raise DataError(f"{self.path}, column {name}: {alike}: nothing to judge")
        return self

    def align(self, table: pa.Table, note: Note) -> Ints:
        """The row [N] of the scores for each row of a label table, -1 if there is none; `note` gets what is left over.

        Raises DataError if nothing is joined, if a name occurs twice in any spelling, and if names are of several sets.
        """
        names, unit = table["key"].combine_chunks(), "images"
        if self.unit == "study":
            parts = table["patient"].cast(pa.string()), table["study"].cast(pa.string())
            names, unit = pc.binary_join_element_wise(*parts, "/study").combine_chunks(), "studies"
        # A run's own file has the keys of its shards, which may contain the same file name in two folders.
        same = pc.all(pc.is_in(names, value_set=self.names)).as_py()
        normalize = pc.utf8_trim_whitespace if same else normalize_names
        numbers = normalize(self.names).dictionary_encode().indices.to_numpy(zero_copy_only=False)
        _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
        if (counts > 1).any():
            places = np.flatnonzero(numbers == numbers[first[counts > 1].min()])[:2].tolist()
            lines = " and ".join(name_row(self.path, place).removeprefix(f"{self.path}, ") for place in places)
            raise DataError(f"{self.path}: {lines} are both of {quote(self.names[places[0]].as_py(), 80)}")
        rows = pa.table({"row": pa.array(range(len(self.names)))})
        place = join(names, self.path, rows, self.names, unit, note, normalize)
        aligned: Ints = pc.fill_null(place, -1).to_numpy(zero_copy_only=False)
        patients = table["patient"].to_numpy()[aligned >= 0].tolist()
        if not same and len(sets := {patient.rpartition("/")[0] for patient in patients}) > 1:
            mixed = f"its rows have names of {' and of '.join(sorted(sets))}"
            raise DataError(f"{self.path}: {mixed}: choose the set that was read, by `where` set=…")
        return aligned

    def take(self, rows: Ints, names: Sequence[str]) -> Floats:
        """The scores [N, L] of those labels, for rows as `align` returns them; NaN without a row or a column."""
        columns = np.array([self.labels.index(name) if name in self.labels else -1 for name in names], int)
        known = (rows >= 0)[:, None] & (columns >= 0)
        return np.where(known, self.values[rows[:, None], columns], np.nan)

    def take_all(self, table: pa.Table, names: Sequence[str]) -> Floats:
        """The scores [N, L] of each row of a label table. Raises DataError if a row or all labels are missing."""
        rows = self.align(table, ignore)
        if (rows < 0).any():
            count, example = f"{(rows < 0).sum():,} of these {len(rows):,}", table["key"][int(rows.argmin())]
            raise DataError(f"{self.path}: no scores of {count} images, such as {example}")
        if not set(names) & set(self.labels):
            raise DataError(f"{self.path}: none of the labels {', '.join(names)}")
        return self.take(rows, names)


def name_files(paths: Sequence[Path]) -> dict[str, Path]:
    """The files by the first part of their names, as shown in reports."""
    named = {path.name.split(".")[0]: path for path in paths}
    if len(named) < len(paths):
        files = ", ".join(map(str, paths))
        raise DataError(f"{files}: two files of one name, by which they are shown; rename one")
    return named


def normalize_names(names: pa.Array) -> pa.Array:
    """Names of images and studies to compare: a file's name without folders, CheXpert's key, or patient/studyN."""
    bare = pc.replace_substring_regex(pc.utf8_trim_whitespace(names.cast(pa.string())), f"{IMAGE_SUFFIX}$", "")
    parts = pc.extract_regex(bare, r"(?P<patient>[^/]+)/(?P<study>study\d+)/(?P<view>view[^/]+)$")
    keys = pc.binary_join_element_wise(*(pc.struct_field(parts, name) for name in ("patient", "study", "view")), "_")
    studies = pc.extract_regex(bare, r"(?P<patient>[^/]+)/study0*(?P<study>\d+)/?$")
    patients = normalize_ids(pc.struct_field(studies, "patient"))
    named = pc.binary_join_element_wise(patients, pc.struct_field(studies, "study"), "/study")
    return pc.coalesce(keys, named, pc.replace_substring_regex(bare, r"^.*/", ""))


def open_scores(
    path: Path, columns: Mapping[str, str] | None = None, *, logits: bool = False, calls: bool = False
) -> Scores:
    """Scores of any file; `columns` maps our names (a label, key, patient, study) to the file's.

    `logits` become probabilities; `calls` are a reader's: 1, 0 or blank. Raises DataError, naming line and column, for
    a file without a key or a label, and a cell that is not a score.
    """
    if path.suffix.lower() not in ARROW:
        table = read_strings(path)
    else:
        try:
            if path.suffix.lower() == ".parquet":
                from pyarrow import parquet

                table = parquet.read_table(path)
            else:
                table = read_arrow(path, path.read_bytes())
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DataError(f"{path}: {NOT_SCORES}: {quote(str(error), 200)}") from error
    if columns:
        demand_columns(path, table.column_names, list(columns.values()))
        renamed = {column: name for name, column in columns.items()}
        table = table.rename_columns([renamed.get(name, name) for name in table.column_names])
    known = {name: find_label(name.strip().replace("_", " ")) for name in table.column_names}
    chosen = {name: label for name, label in known.items() if label}
    demand_columns(path, list(chosen.values()), list(dict.fromkeys(chosen.values())))
    names, unit = _find_names(path, table)
    if not chosen:
        present = quote(", ".join(table.column_names), 300)
        how = f"map them: `columns` Edema={table.column_names[-1]}"
        raise DataError(f"{path}: no column is named by a label; it has {present}; {how}")
    if not table.num_rows:
        raise DataError(f"{path}: no rows")
    read = {
        label: _read_column(path, name, table[name].combine_chunks(), logits, calls) for name, label in chosen.items()
    }
    labels = tuple(label for label in LABELS if label in read)
    return Scores(path, labels, np.column_stack([read[label] for label in labels]), names, unit)


def _find_names(path: Path, table: pa.Table) -> tuple[pa.Array, str]:
    """The names of the rows, and whether they are of images or studies."""
    plain = {name.strip().lower().replace("_", " "): name for name in reversed(table.column_names)}
    key, names, is_study = next((key for key in KEYS if key in plain), "study"), None, False
    try:
        known = {name: table[plain[name]].combine_chunks().cast(pa.string()) for name in (key, *FACTS) if name in plain}
    except pa.ArrowException as error:
        raise DataError(f"{path}: {NOT_SCORES}: {quote(str(error), 200)}") from error
    if key == "study" and known.keys() == set(FACTS):
        numbers = pc.replace_substring_regex(known["study"], r"^study", "")
        names, is_study = pc.binary_join_element_wise(known["patient"], numbers, "/study"), True
    elif key in known:
        names = known[key]
        has_views = key != "study" and pc.any(pc.match_substring_regex(names, r"/view[^/]+$")).as_py()
        is_path = pc.match_substring_regex(names, r"([^/]+)/study0*(\d+)(?:/[^/]*)?/?$")
        is_study = pc.all(is_path).as_py() and not has_views
    if names is None or (key == "study" and not is_study):
        known_keys = f"{', '.join(KEYS[:5])}, or patient and study"
        raise DataError(f"{path}: no column says whose row it is: {known_keys}; map one: `columns` key=NAME")
    row = pc.index(pc.or_kleene(names.is_null(), pc.equal(names, "")), True).as_py()
    if row >= 0:
        raise DataError(f"{name_row(path, row)}, column {plain[key]}: blank, so nothing says whose row it is")
    return names, "study" if is_study else "image"


def _read_column(path: Path, name: str, column: pa.Array, logits: bool, calls: bool) -> Floats:
    """A column's scores [M]. Raises DataError for the first invalid one."""
    texts = column.cast(pa.string())
    if not pa.types.is_floating(column.type):
        number = pc.match_substring_regex(texts, r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$")
        column = pc.if_else(pc.fill_null(number, False), pc.utf8_trim_whitespace(texts), None)
    values: Floats = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    if calls:
        valid = pc.or_(texts.is_null(), pa.array(np.isin(values, (0, 1))))
        demand(path, name, texts, valid, "is not a reader's call: 1, 0 or blank")
        return values
    demand(path, name, texts, pa.array(np.isfinite(values)), "is not a score")
    values = scipy.special.expit(values) if logits else values
    hint = "" if logits else "; give `logits` if these are logits"
    demand(path, name, texts, pa.array((values >= 0) & (values <= 1)), f"is not in [0, 1]{hint}")
    return values


def write_scores(path: Path, table: pa.Table, labels: Sequence[str], scores: Floats) -> None:
    """Write the scores [N, L] of the labels, for the rows of a split's table, atomically."""
    columns = dict(zip(labels, scores.T.copy(), strict=True))
    write_table(path, pa.table({name: table[name] for name in ("key", *FACTS)} | columns))


def read_scores(path: Path, keys: pa.ChunkedArray, labels: Sequence[str] = LABELS) -> Floats:
    """The scores [N, L] of a run's images `keys` [N]. DataError as `open_scores`, and if one or a label is missing."""
    scores = open_scores(path)
    demand_columns(path, scores.labels, labels)
    rows = pc.index_in(keys.cast(pa.string()), value_set=scores.names)
    if rows.null_count:
        count = f"{rows.null_count:,} of {len(keys):,} images, such as {keys.filter(rows.is_null())[0]}"
        raise DataError(f"{path}: no scores of {count}; they are of other shards, or of other images of these")
    return scores.take(rows.to_numpy(), labels)
