"""Other sets' findings → states of CheXpert's labels, by findings.csv: a row for each finding of a set.

`state` is the label's state in an image that shows the finding: positive; or not annotated, if no other finding
decides: a sign of it, or too wide a name for it. The label `all` is left open wherever nothing is named. A finding
without a label says nothing about the 14 or, not annotated, nothing about any finding. The set `any` holds the rule for
all sets, whose findings are labels; docs/mappings.md says why.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import line_of
from pipeline.base.errors import DataError, quote
from pipeline.labels import LABELS, NOT_ANNOTATED

TABLE = Path(__file__).with_name("findings.csv")
POSITIVE, OPEN = "positive", "not annotated"
EVERY = "all"


class Findings(NamedTuple):
    """A set's findings: label → findings that make it positive, and that leave it open; and those without a label."""

    positive: dict[str, list[str]]
    open: dict[str, list[str]]
    unmapped: list[str]  # which imply that others were looked for
    silent: list[str]  # which carry no information

    @property
    def known(self) -> list[str]:
        """All of them."""
        named = [*self.positive.values(), *self.open.values(), self.unmapped, self.silent]
        return [name for names in named for name in names]


@cache
def read_findings(dataset: str) -> Findings:
    """The findings of a data set, by its name in the table."""
    findings = Findings({}, {}, [], [])
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["set"] != dataset:
                continue
            if row["label"]:
                labels = findings.positive if row["state"] == POSITIVE else findings.open
                labels.setdefault(row["label"], []).append(row["finding"])
            else:
                (findings.silent if row["state"] else findings.unmapped).append(row["finding"])
    return findings


def leave_open(states: npt.NDArray[np.int8]) -> None:
    """In states [N, 14], mark as not annotated what is negative only because another finding was named."""
    for label, named in read_findings("any").open.items():
        column = states[:, LABELS.index(label)]
        is_named = np.isin(states[:, [LABELS.index(name) for name in named]], (1, -1)).any(axis=1)
        column[(column == 0) & is_named] = NOT_ANNOTATED


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

    def having(names: list[str]) -> npt.NDArray[np.int64]:
        """The lists with one of these findings."""
        rows: npt.NDArray[np.int64] = place[np.asarray(pc.is_in(words, value_set=pa.array(names, pa.string())))]
        return rows

    unknown = pc.index(pc.is_in(words, value_set=pa.array(findings.known)), False).as_py()
    if unknown >= 0:
        row = pc.index(encoded.indices, int(place[unknown])).as_py()
        finding = quote(words[unknown].as_py(), 80)
        where = f"{path}, line {line_of(path, row)}, column {name}"
        raise DataError(f"{where}: '{finding}' is not a finding of this set")
    annotated = [LABELS.index(label) for label in findings.positive]
    states = np.full((len(lists), len(LABELS)), NOT_ANNOTATED, np.int8)
    speaking = [word for word in findings.known if word not in (*findings.silent, *findings.open.get(EVERY, ()))]
    states[np.ix_(np.unique(having(speaking)), np.array(annotated))] = 0
    for label, names in findings.open.items():
        states[having(names), slice(None) if label == EVERY else LABELS.index(label)] = NOT_ANNOTATED
    for label, names in findings.positive.items():
        states[having(names), LABELS.index(label)] = 1
    states[(states[:, 1:-1] == 1).any(axis=1), 0] = 0  # No Finding: none of the others but Support Devices
    leave_open(states)
    by_row = states[encoded.indices.to_numpy()]
    return {label: by_row[:, number] for number, label in enumerate(LABELS)}
