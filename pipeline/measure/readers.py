"""Readers' calls of studies → each reader's sensitivity and specificity, beside the network's ROC curve."""

from collections.abc import Mapping

import numpy as np

from pipeline.measure.evaluate import Scored, rate_limits
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.metrics import Bools, Floats, count_classes, rates_at, threshold_curve


def add_readers(evaluation: Evaluation, studies: Scored, readers: Mapping[str, Floats]) -> None:
    """Add each reader's rates, from calls [S, L] of 1, 0 or NaN: not read. All figures are of the studies read.

    `network` is the sensitivity of the network's ROC curve, straight between its points, at the reader's specificity,
    on the same studies. `below` is 1 if it is higher than the reader's, else 0; None if the studies have one class.
    """
    for reader, calls in readers.items():
        evaluation.add("study", None, "studies", int((~np.isnan(calls)).any(axis=1).sum()), scorer=reader)
        for column, name in enumerate(evaluation.labels):
            used = studies.mask[:, column] & ~np.isnan(calls[:, column])
            truth, score, patient = (
                studies.target[used, column] == 1,
                studies.scores[used, column],
                studies.patient[used],
            )
            if not len(truth):
                continue
            cells = calls[used, column]
            limits, counts = rate_limits(0.5, cells, truth, patient), count_classes(truth, patient)
            rates = rates_at(0.5, cells, truth)
            for rate, value in rates.items():
                evaluation.add("study", name, rate, value, limits.get(rate, {}) | counts, scorer=reader)
            network = place_on_curve(score, truth, rates["specificity"])
            evaluation.add("study", name, "network", network, scorer=reader)
            below = None
            if network is not None and rates["sensitivity"] is not None:
                below = float(network > rates["sensitivity"] + 1e-9)  # not by rounding
            evaluation.add("study", name, "below", below, counts, scorer=reader)


def place_on_curve(score: Floats, truth: Bools, specificity: float | None) -> float | None:
    """The sensitivity of the ROC curve of scores [n] at a specificity; None with one class."""
    if specificity is None or not truth.any():
        return None
    curve = threshold_curve(score, truth)
    hits = np.concatenate([[0], curve.true_positives]) / truth.sum()
    alarms = np.concatenate([[0], curve.false_positives]) / (~truth).sum()
    highest = np.append(np.diff(alarms) > 0, True)  # where the curve rises straight up
    return float(np.interp(1 - specificity, alarms[highest], hits[highest]))
