"""A run's scores of a split ↔ `scores-<split>.arrow`.

An Arrow IPC file with one row per image, in the order of the split's table:
    key         string   as in that table
    patient     string
    study       int32
    <labels>    float64  score in [0, 1], of those that the run learned
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.base.files import read_arrow, write_table
from pipeline.labels import LABELS
from pipeline.measure.metrics import Floats

if TYPE_CHECKING:
    import pandas as pd


def write_scores(path: Path, table: pa.Table, labels: Sequence[str], scores: Floats) -> None:
    """Write the scores [N, L] of the labels, for the rows of a split's table, atomically."""
    columns = dict(zip(labels, scores.T.copy(), strict=True))
    write_table(path, pa.table({name: table[name] for name in ("key", "patient", "study")} | columns))


def read_frame(path: Path, labels: Sequence[str] = LABELS) -> "pd.DataFrame":
    """Patient, study and the scores of the labels, in the order of the file. Raises DataError as `read_scores` does."""
    import pandas as pd  # here, because it takes a second, and only studies' methods are compared by it

    table = _open(path)
    for name in ("patient", "study"):
        if table.column_names.count(name) != 1:
            what = f"column {name} twice" if name in table.column_names else f"no column {name}"
            raise DataError(f"{path}: damaged, or not a file of scores: it has {what}")
    scores = _check_scores(path, table, labels)
    facts = {name: table[name].to_numpy() for name in ("patient", "study")}
    return pd.DataFrame(facts | dict(zip(labels, scores.T, strict=True)))


def read_scores(path: Path, keys: pa.ChunkedArray, labels: Sequence[str] = LABELS) -> Floats:
    """The scores [N, L] of the labels for the images `keys` [N], in whatever order the file has them.

    Raises DataError where the file is not one of scores, lacks an image, or has a score outside [0, 1].
    """
    table = _open(path)
    scores = _check_scores(path, table, labels)
    rows = pc.index_in(keys, value_set=table["key"].combine_chunks())
    if rows.null_count:
        example = keys.filter(rows.is_null())[0]
        raise DataError(
            f"{path}: no scores of {rows.null_count:,} of {len(keys):,} images, such as {example}; "
            "they are of other shards, or of other images of these"
        )
    chosen: Floats = scores[rows.to_numpy()]
    return chosen


def _check_scores(path: Path, table: pa.Table, labels: Sequence[str]) -> Floats:
    """The scores [N, L] of the labels, in the order of the file. Raises DataError for one outside [0, 1]."""
    try:
        scores = np.column_stack([table[label].cast(pa.float64()).to_numpy() for label in labels])
    except (KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged, or not a file of scores: {error}") from error
    wrong = ~((scores >= 0) & (scores <= 1))  # so, because NaN is in no range
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        key = table["key"][int(row)]
        raise DataError(f"{path}: {key}, {labels[column]}: the score {scores[row, column]} is not in [0, 1]")
    return scores


def _open(path: Path) -> pa.Table:
    """The file, with its keys as strings, as other programs may have written it. Raises DataError."""
    try:
        table = read_arrow(path, path.read_bytes())
        return table.set_column(table.column_names.index("key"), "key", table["key"].cast(pa.string()))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # KeyError: a column is there twice
        raise DataError(f"{path}: damaged, or not a file of scores: {error}") from error
