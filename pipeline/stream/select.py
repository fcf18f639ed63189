"""Conditions on the label table → the rows to train or evaluate on, and weights that balance a label among them.

    select_rows(table, ["sex=Female", "age>=60", "Pleural Effusion!=uncertain"], views="frontal")

A condition is COLUMN OPERATOR VALUE, with = != < <= > >=; all conditions must hold. Nothing is written: the shards
do not change, and the rows go to `pipeline.stream.samples`.

    text columns     = and !=, letter by letter
    number columns   every operator, with whole numbers
    the 14 labels    = and !=, with positive, negative, uncertain, blank, or 1, 0, -1
    every column     = and != with `blank`, an empty cell: `projection=blank`

An empty cell is neither equal to a value nor less or greater, so of = and != exactly one holds in every row:
`projection!=AP` keeps the laterals, which have none.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.errors import DataError
from pipeline.labels import LABELS, STATES, limit_patients, select_views
from pipeline.policies import divide_cells
from pipeline.stream.plan import Rows

OPERATORS = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_CONDITION = re.compile(
    r"\s*(?P<column>[^\s=!<>][^=!<>]*?)\s*(?P<operator>!=|<=|>=|=|<|>)\s*(?P<value>[^\s=!<>][^=!<>]*?)\s*"
)
_NUMBER = re.compile(r"[+-]?\d{1,18}", re.ASCII)


class NothingSelectedError(DataError):
    """The conditions leave no row of a table."""


def select_rows(table: pa.Table, conditions: Sequence[str], views: str = "all", limit: int | None = None) -> Rows:
    """Row numbers int64 [n], ascending, of the images of these views (see VIEWS) for which every condition holds.

    `limit` keeps at most this many images, patient by patient in the order of a hash: ids would select by date. The
    first patient is always kept. Raises DataError for a condition that cannot be parsed, and for the first one
    that leaves no row.
    """
    parsed = [parse_condition(text, table.schema) for text in conditions]
    needed = dict.fromkeys(["patient", "view", *(column for column, _ in parsed)])
    rows = pa.array(np.arange(table.num_rows, dtype=np.int64))
    chosen = select_views(table.select(list(needed)).append_column("row", rows), views)
    if chosen.num_rows == 0:
        raise NothingSelectedError(f"no {views} images among the {table.num_rows:,}")
    for text, (column, holds) in zip(conditions, parsed, strict=True):
        before, chosen = chosen, chosen.filter(holds(chosen[column]))
        if chosen.num_rows == 0:
            raise NothingSelectedError(
                f"condition '{text}' leaves none of {before.num_rows:,} images" + _describe(before[column])
            )
    if limit is not None:
        chosen = limit_patients(chosen, limit, seed=0)
    selected: Rows = chosen["row"].to_numpy()
    return selected


def parse_condition(text: str, schema: pa.Schema) -> tuple[str, Callable[[pa.ChunkedArray], pa.ChunkedArray]]:
    """The column [N] of a condition, and whether it holds in each row [N], never null.

    For a table of that schema; column names are case-insensitive.
    Raises DataError for anything but COLUMN OPERATOR VALUE, an unknown column, and an operator or value that
    does not fit the column's type.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise DataError(f"condition '{text}': write COLUMN=VALUE, or != < <= > >= (an empty cell is blank)")
    columns = {name.casefold(): name for name in schema.names}
    column = columns.get(match["column"].casefold())
    if column is None:
        raise DataError(f"condition '{text}': no column '{match['column']}'; there are {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)):
        raise DataError(f"condition '{text}': {column} is {kind}; only texts and whole numbers are compared")
    operator, value = match["operator"], match["value"]
    compare, if_empty = OPERATORS[operator], operator == "!="
    is_number = pa.types.is_integer(kind) and column not in LABELS
    if operator not in ("=", "!=") and (value == "blank" or not is_number):
        subject = "blank" if is_number else column
        raise DataError(f"condition '{text}': {subject} has no order; compare it by = or !=")
    if value == "blank":
        return column, pc.is_valid if if_empty else pc.is_null
    wanted: str | int | None = value
    if column in LABELS:
        states = STATES | {"1": 1, "0": 0, "-1": -1}
        if value not in states:
            raise DataError(f"condition '{text}': '{value}' is no state; a label is one of {', '.join(states)}")
        wanted = states[value]
    elif is_number:
        if not _NUMBER.fullmatch(value):
            raise DataError(f"condition '{text}': '{value}' is not a whole number, as {column} is")
        wanted = int(value)
    return column, lambda cells: pc.fill_null(compare(cells, wanted), if_empty)


def balance_weights(
    target: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_], strata: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float64]:
    """Weights float64 [N] under which a label's positives and negatives weigh the same in total.

    `target` [N] and `mask` [N] are the label's after its policy; a soft target counts as the nearer class.
    Cells that are masked, or of the third class of `multiclass` (-1), are neither and keep weight 1. With `strata`
    [N], numbers from 0, the two weigh the same within each stratum, whose total weight is its number of cells: in
    draws by these weights, the label is independent of the stratum. This is impossible in a stratum with one class:
    its cells get 0. Raises ValueError if there are no positives or no negatives, or no stratum has both.
    """
    strata = np.zeros(len(target), np.int64) if strata is None else strata
    classes = divide_cells(target, mask)
    for name, cells in zip(("positives", "negatives"), classes, strict=True):
        if not cells.any():
            raise ValueError(f"no {name} to balance")
    counts = np.array([np.bincount(strata[cells], minlength=strata.max() + 1) for cells in classes])
    usable = counts.all(axis=0)
    if not usable.any():
        raise ValueError("no stratum has both positives and negatives")
    weights = np.ones(len(target))
    for cells, count in zip(classes, counts, strict=True):
        shares = np.where(usable, counts.sum(axis=0) / 2 / np.maximum(count, 1), 0)
        weights[cells] = shares[strata[cells]]
    return weights


def find_strata(table: pa.Table, columns: Sequence[str]) -> npt.NDArray[np.int64]:
    """The stratum of each row, int64 [N] from 0: rows with the same values in these columns share one.

    An empty cell counts as a value. Column names are case-insensitive. Raises DataError for an unknown column.
    """
    known = {name.casefold(): name for name in table.column_names}
    for column in columns:
        if column.casefold() not in known:
            raise DataError(f"no column '{column}'; there are {', '.join(table.column_names)}")
    codes = [
        pc.dictionary_encode(table[known[column.casefold()]].combine_chunks(), null_encoding="encode").indices
        for column in columns
    ]
    strata: npt.NDArray[np.int64] = np.unique(np.stack(codes), axis=1, return_inverse=True)[1]
    return strata.ravel()


def mix_weights(folder: Rows, shares: Sequence[float]) -> npt.NDArray[np.float64]:
    """Weights float64 [N], of mean 1, under which each folder's images have its share of the draws.

    `folder` [N] is the place of each image's folder in `shares`, which need not add up to 1. Raises ValueError naming
    the place of a folder that has no image.
    """
    counts = np.bincount(folder, minlength=len(shares))
    if not counts.all():
        raise ValueError(f"none of the images is in folder {int(np.argmin(counts)) + 1}")
    wanted = np.array(shares) / sum(shares) * len(folder)
    return (wanted / counts)[folder]


def _describe(column: pa.ChunkedArray) -> str:
    """The values that a column holds, briefly, for an error message."""
    values = column.unique().drop_null().sort().to_pylist()
    if not values:
        return ", all of whose cells are blank"
    if len(values) <= 5:
        return f", whose values are {', '.join(map(str, values))}"
    return f", whose values go from {values[0]} to {values[-1]}"
