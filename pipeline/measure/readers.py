"""Readers' calls of studies → each reader's sensitivity and specificity, beside the network's ROC curve."""

from collections.abc import Mapping

import numpy as np

from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.metrics import Bools, Floats, count_classes, label_cells, measure_rates, threshold_curve


def add_readers(evaluation: Evaluation, studies: Scored, readers: Mapping[str, Floats]) -> None:
    """Add each reader's rates, from calls [S, L] of 1, 0 or NaN: not read. All figures are of the studies read.

    `network` is the sensitivity of the network's ROC curve, straight between its points, at the reader's specificity,
    on the same studies. `below` is 1 if it is higher than the reader's, else 0; None if the studies have one class.
    """
    for reader, calls in readers.items():
        read = ~np.isnan(calls)
        evaluation.add("study", None, "studies", int(read.any(axis=1).sum()), scorer=reader)
        mask = studies.mask & read
        for column, cells in enumerate(label_cells(evaluation.labels, *studies[:2], mask, studies.patient)):
            name, score, truth, patient = cells
            if not len(truth):
                continue
            counts = count_classes(truth, patient)
            rates = measure_rates(0.5, calls[mask[:, column], column], truth, patient)
            for rate, figure in rates.items():
                evaluation.add("study", name, rate, **figure, **counts, scorer=reader)
            sensitivity, specificity = (rates[rate]["value"] for rate in ("sensitivity", "specificity"))
            network, below = place_on_curve(score, truth, specificity), None
            evaluation.add("study", name, "network", network, scorer=reader)
            if network is not None and sensitivity is not None:
                below = float(network > sensitivity + 1e-9)  # not by rounding
            evaluation.add("study", name, "below", below, **counts, scorer=reader)


def place_on_curve(score: Floats, truth: Bools, specificity: float | None) -> float | None:
    """The sensitivity of the ROC curve of scores [n] at a specificity; None with one class."""
    if specificity is None or not truth.any():
        return None
    curve = threshold_curve(score, truth)
    hits = np.concatenate([[0], curve.true_positives]) / truth.sum()
    alarms = np.concatenate([[0], curve.false_positives]) / (~truth).sum()
    highest = np.append(np.diff(alarms) > 0, True)  # where the curve rises straight up
    return float(np.interp(1 - specificity, alarms[highest], hits[highest]))
