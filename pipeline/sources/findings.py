"""Other sets' findings → states of CheXpert's labels, by findings.csv: a row for each finding of a set.

`state` is the label's state in an image that shows the finding: positive; or not annotated, if no other finding
decides: a sign of it, or too wide a name for it. The label `all` is left open wherever nothing is named. A finding
without a label says nothing about the 14 or, not annotated, nothing about any finding. The set `any` holds the rule for
all sets, whose findings are labels; docs/mappings.md says why.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import name_row, read_data
from pipeline.base.errors import DataError, quote
from pipeline.labels import LABELS, NOT_ANNOTATED

POSITIVE, EVERY = "positive", "all"
Mask = npt.NDArray[np.bool_]


class Findings(NamedTuple):
    """A set's findings [F] → labels: those [F, 14] that a finding makes positive, and that it leaves open.

    Who `speaks` [F] of a finding has looked for all.
    """

    names: list[str]
    positive: Mask
    open: Mask
    speaks: Mask


@cache
def read_findings(dataset: str) -> Findings:
    """The findings of a data set, by its name in the table."""
    rows = [row for row in read_data(Path(__file__).parent, "findings.csv") if row["set"] == dataset]
    names = [*dict.fromkeys(row["finding"] for row in rows)]
    positive, opened = np.zeros((2, len(names), len(LABELS)), np.bool_)
    speaks = np.ones(len(names), np.bool_)
    for row in rows:
        finding, labels = names.index(row["finding"]), LABELS if row["label"] == EVERY else [row["label"]]
        columns = [LABELS.index(label) for label in labels if label]
        (positive if row["state"] == POSITIVE else opened)[finding, columns] = True
        speaks[finding] &= not (row["state"] and row["label"] in ("", EVERY))
    return Findings(names, positive, opened, speaks)


def leave_open(states: npt.NDArray[np.int8]) -> None:
    """In states [N, 14], mark as not annotated what is negative only because another finding was named."""
    names, _, opened, _ = read_findings("any")
    named = np.isin(states[:, [LABELS.index(name) for name in names]], (1, -1))
    states[(states == 0) & (named @ opened)] = NOT_ANNOTATED


def parse_findings(
    path: Path, name: str, column: pa.Array, separator: str, findings: Findings
) -> dict[str, npt.NDArray[np.int8]]:
    """The states [N] of the 14 labels, from lists of findings [N] as texts.

    What is not listed is negative, if the set annotates it. Raises DataError, naming file and line, for a finding of
    another set.
    """
    encoded = pc.fill_null(column, "").dictionary_encode()
    lists = pc.split_pattern(encoded.dictionary, separator)
    place: npt.NDArray[np.int64] = pc.list_parent_indices(lists).to_numpy()
    words = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    codes = pc.index_in(words, value_set=pa.array(findings.names, pa.string()))
    unknown = pc.index(codes.is_null(), True).as_py()
    if unknown >= 0:
        row = pc.index(encoded.indices, int(place[unknown])).as_py()
        finding = quote(words[unknown].as_py(), 80)
        raise DataError(f"{name_row(path, row)}, column {name}: '{finding}' is not a finding of this set")
    listed = np.zeros((len(lists), len(findings.names)), np.bool_)
    listed[place, codes.to_numpy()] = True
    states = np.full((len(lists), len(LABELS)), NOT_ANNOTATED, np.int8)
    states[np.ix_(listed @ findings.speaks, findings.positive.any(axis=0))] = 0
    states[listed @ findings.open] = NOT_ANNOTATED
    states[listed @ findings.positive] = 1
    states[(states[:, 1:-1] == 1).any(axis=1), 0] = 0  # No Finding: none of the others but Support Devices
    leave_open(states)
    by_row = states[encoded.indices.to_numpy()]
    return {label: by_row[:, number] for number, label in enumerate(LABELS)}
