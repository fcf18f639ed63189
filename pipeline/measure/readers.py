"""Readers' CSVs and scores → each reader's sensitivity and specificity, beside the network's ROC curve.

A reader's CSV has a column `Study` (or `Path`) that ends in <patient>/study<number>, as in the labels of CheXpert's
test set, and 1, 0 or blank (not read) in columns named by labels. All figures are of studies.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.base.csvs import demand, demand_columns, line_of, read_strings
from pipeline.base.errors import DataError, quote
from pipeline.labels import parse_states
from pipeline.measure.evaluate import Scored, rate_limits
from pipeline.measure.metrics import Bools, Floats, count_classes, rates_at, threshold_curve

_STUDY = r"(?P<study>[^/]+/study\d+)(?:/[^/]+)?/?$"
Reads = Mapping[str, Mapping[str, int | None]]  # study → label → 1, 0 or None


def read_reader(csv: Path, names: Sequence[str]) -> Reads:
    """What a reader says of each study, for those of the labels that the CSV has.

    Raises DataError, naming the file, line and column, for a table without studies or labels, a cell that is none of
    1, 0 and blank, and two rows of a study that differ.
    """
    table = read_strings(csv)
    table = table.rename_columns([name.strip().replace("_", " ") for name in table.column_names])
    column = "Path" if "Study" not in table.column_names and "Path" in table.column_names else "Study"
    labels = [name for name in names if name in table.column_names]
    demand_columns(csv, table.column_names, [column, *(labels or names[:1])])
    studies = pc.struct_field(pc.extract_regex(table[column], _STUDY), "study")
    demand(csv, column, table[column], studies.is_valid(), "does not end in patient/study1")
    states = {label: parse_states(csv, label, table[label]) for label in labels}
    for label, state in states.items():
        known = pc.greater_equal(state, 0)
        demand(csv, label, table[label], pa.chunked_array([known]), "is neither 1 nor 0 nor blank", True)
    reads: dict[str, dict[str, int | None]] = {}
    rows = zip(*(state.to_pylist() for state in states.values()), strict=True)
    for row, (study, cells) in enumerate(zip(studies.to_pylist(), rows, strict=True)):
        read = dict(zip(labels, cells, strict=True))
        for label, cell in reads.setdefault(study, read).items():
            if cell != read[label]:
                where = f"line {line_of(csv, row)}, column {label}"
                raise DataError(f"{csv}, {where}: not what an earlier row says of {quote(study, 80)}")
    return reads


def assess_readers(names: Sequence[str], studies: Scored, readers: Mapping[str, Reads]) -> dict[str, Any]:
    """Per label and reader: rates with limits and counts, and whether the reader is `below` the network's ROC curve.

    On the studies that the reader has read. `below`: the curve, straight between its points, has a higher sensitivity
    (`network`) at the reader's specificity; None where the studies have one class. `readers` of the document is the
    number of studies that each has read. Raises DataError for a reader of none of these studies, or of several sets.
    """
    # Of several sets, patients have a namespace in front, which readers need not write.
    known = [f"{p.split('/')[-1]}/study{s}" for p, s in zip(studies.patient, studies.study, strict=True)]
    document: dict[str, Any] = {"readers": {}, "labels": {name: {} for name in names}}
    for reader, reads in readers.items():
        rows = [reads.get(study, {}) for study in known]
        sets = {p.rpartition("/")[0] for p, row in zip(studies.patient, rows, strict=True) if row}
        if len(sets) > 1:
            raise DataError(
                f"{reader}: its studies have names of {' and of '.join(sorted(sets))}: choose the set that was read, "
                "by `where` set=…"
            )
        document["readers"][reader] = sum(map(bool, rows))
        if not any(rows):
            theirs, ours = next(iter(reads), "no row"), known[0]
            raise DataError(
                f"{reader}: no study of these {len(known):,}: its first is {theirs}, theirs {ours}"
            )
        for column, name in enumerate(names):
            cells = np.array([row.get(name) for row in rows], np.float64)
            used = studies.mask[:, column] & ~np.isnan(cells)
            truth, score = studies.target[used, column] == 1, studies.scores[used, column]
            if len(truth):
                found = _place(cells[used], score, truth, studies.patient[used])
                found["intervals"] = rate_limits(0.5, cells[used], truth, studies.patient[used])
                document["labels"][name][reader] = found
    places = [place["below"] for of in document["labels"].values() for place in of.values()]
    return document | {"below": places.count(True), "of": len(places) - places.count(None)}


def _place(called: Floats, score: Floats, truth: Bools, patient: npt.NDArray[Any]) -> dict[str, Any]:
    """A reader's calls [n] of 0 and 1: rates, counts, and the network's sensitivity at the same specificity."""
    rates = rates_at(0.5, called, truth)
    found: dict[str, Any] = {**rates, **count_classes(truth, patient), "network": None, "below": None}
    if rates["sensitivity"] is not None and rates["specificity"] is not None:
        curve = threshold_curve(score, truth)
        hits = np.concatenate([[0], curve.true_positives]) / truth.sum()
        alarms = np.concatenate([[0], curve.false_positives]) / (~truth).sum()
        highest = np.append(np.diff(alarms) > 0, True)  # where the curve rises straight up
        found["network"] = float(np.interp(1 - rates["specificity"], alarms[highest], hits[highest]))
        found["below"] = found["network"] > rates["sensitivity"] + 1e-9  # not by rounding
    return found


def count_below(places: Mapping[str, Mapping[str, Any]]) -> str:
    """How many of the readers of a label are below the ROC curve, of those that can be placed."""
    below = [place["below"] for place in places.values() if place["below"] is not None]
    few = "few " if any(place["few"] for place in places.values()) else ""
    return f"{few}{sum(below)} of {len(below)}" if below else "–"
