"""Scores on dev → a calibration and thresholds per label, which are then applied to any split.

A calibrated score is sigmoid(logit(score) / temperature + bias) (Platt, Probabilistic outputs for support vector
machines, 1999); the bias undoes the shift by class weights and balanced sampling. Calibration keeps the order of
scores, so thresholds apply to the raw score: positive is `score >= threshold`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import scipy

from pipeline.measure.metrics import Bools, Floats, Ints, Names, label_cells, threshold_curve

RULES = ("youden", "max_f1", "sensitivity")
SLOPES = (0.05, 20.0)  # of a fit; outside them, scores say almost nothing, or the opposite
PRIOR = 4.0  # holds the slope near 1: a normal prior with standard deviation 0.5
FOLDS = 5
GAP = 1e-3  # in logits: more than batch sizes, processors and runtimes change a float32 score


class Calibration(TypedDict, total=False):
    """The calibration of a label as fitted on dev, ready for JSON; without its thresholds, it still calibrates."""

    temperature: float | None  # None, as is the bias, if scores stay unchanged
    bias: float | None
    thresholds: dict[str, float | None]  # by rule
    note: str | None


class Fit(NamedTuple):
    """A calibration: logit = slope · logit + bias."""

    slope: float
    bias: float


def fit_calibration(
    names: Sequence[str], scores: Floats, target: Floats, mask: Bools, patient: Names, sensitivity: float = 0.9
) -> dict[str, Calibration]:
    """Per label: `temperature`, `bias`, `thresholds` by rule, and a `note` if any is None; ready for JSON.

    Scores [N, L], targets [N, L] in {0, 1}, mask [N, L], patients [N]. Temperature and bias are None, and scores stay
    unchanged, if `choose_fit` says so. Raises ValueError if a score is not finite.
    """
    labels: dict[str, Calibration] = {}
    for name, score, truth, owner in label_cells(names, scores, target, mask, patient):
        thresholds: dict[str, float | None] = dict.fromkeys(RULES)
        fit: Fit | None = None
        note: str | None = "one class: no thresholds, scores as they are"
        if truth.any() and not truth.all():
            thresholds |= choose_thresholds(score, truth, sensitivity)
            fit, note = choose_fit(score, truth, owner)
        temperature, bias = (None, None) if fit is None else (1 / fit.slope, fit.bias)
        labels[name] = {"temperature": temperature, "bias": bias, "thresholds": thresholds, "note": note}
    return labels


def choose_fit(score: Floats, truth: Bools, patient: Names) -> tuple[Fit | None, str | None]:
    """The fit to scores [n] of both classes; None and the reason if it lowers the likelihood of held-out patients."""
    fold = deal_folds(truth, np.unique(patient, return_inverse=True)[1])
    logits, gain = _logits(score), 0.0
    for number in range(FOLDS):
        left, rest = fold == number, fold != number
        if truth[rest].all() or not truth[rest].any():
            return None, "one patient has all of a class: scores as they are"
        for sign, fit in ((1, fit_logistic(logits[rest], truth[rest])), (-1, Fit(1, 0))):
            signed = np.where(truth[left], 1, -1) * (fit.slope * logits[left] + fit.bias)
            gain += sign * float(scipy.special.log_expit(signed).sum())
    fit = fit_logistic(logits, truth)
    if not SLOPES[0] <= fit.slope <= SLOPES[1]:
        return None, "the scores tell nothing or the contrary: scores as they are"
    if gain <= 0:
        return None, "calibration did not help on held-out patients: raw scores shown"
    return fit, None


def deal_folds(truth: Bools, codes: Ints) -> Ints:
    """The fold of each cell [n]: that of its patient, who are dealt by their number of positives, then by code."""
    positives = np.bincount(codes, truth)
    order = np.argsort(-positives, kind="stable")
    fold = np.empty(len(order), np.int64)
    fold[order] = np.arange(len(order)) % FOLDS
    return fold[codes]


def fit_logistic(logits: Floats, truth: Bools) -> Fit:
    """The slope and bias with the highest likelihood of truth [n], both classes, given sigmoid(slope · logit + bias).

    The penalty PRIOR / 2 · (slope - 1)² keeps the slope near 1, so that it cannot diverge with few positives; it
    also makes the loss strictly convex, so that its gradient has a single root.
    """
    scale = float(np.abs(logits).max()) or 1.0  # else the solver stops far from the root if all logits are extreme
    units = logits / scale

    def gradient(fit: Floats) -> tuple[float, float]:
        error = scipy.special.expit(fit[0] * units + fit[1]) - truth
        return float(units @ error + PRIOR * (fit[0] / scale - 1) / scale), float(error.sum())

    # At slope 0, the loss is not flat.
    slope, bias = scipy.optimize.root(gradient, (0.0, scipy.special.logit(truth.mean())), tol=1e-12).x.tolist()
    return Fit(slope / scale, bias)


def apply_calibration(score: Floats, calibration: Calibration) -> Floats:
    """The calibrated scores [n] of a label, float64; unchanged without a temperature."""
    fit = read_fit(calibration)
    return score.astype(np.float64) if fit is None else scipy.special.expit(_logits(score) * fit.slope + fit.bias)


def read_fit(calibration: Calibration) -> Fit | None:
    """The fit in one label's calibration; None if scores stay unchanged."""
    temperature, bias = calibration["temperature"], calibration["bias"]
    return None if temperature is None or bias is None else Fit(1 / temperature, bias)


def apply_calibrations(names: Sequence[str], scores: Floats, calibration: Mapping[str, Calibration]) -> Floats:
    """The calibrated scores [N, L], float64, by the calibration of each of the labels `names` [L]; NaN stays NaN."""
    columns = [apply_calibration(score, calibration[name]) for name, score in zip(names, scores.T, strict=True)]
    return np.column_stack(columns)


def choose_thresholds(score: Floats, truth: Bools, sensitivity: float) -> dict[str, float]:
    """The threshold of each of RULES for scores [n] of both classes, halfway between two scores, in logits.

    They are those of the highest Youden's J (sensitivity + specificity - 1), of the highest F1, and the highest one
    whose sensitivity is at least `sensitivity`; ties go to the highest; below all scores, it is 0. A threshold equal to
    a score would depend on the last bit, which differs by processor, batch size and runtime. So scores nearer than GAP
    in logits (or than the median gap, if scores are dense), or than 16 units of a float32's last place, stay together.
    """
    curve = threshold_curve(score, truth)
    logits = _logits(curve.threshold)
    gaps = -np.diff(logits)
    steps = -np.diff(curve.threshold.astype(np.float64)) / np.spacing(curve.threshold[:-1].astype(np.float32))
    wide = gaps > min(GAP, float(np.median(gaps))) * (1 - 1e-9) if len(gaps) else gaps > 0
    apart = np.append(wide & (steps > 16), True)
    limits = np.append(scipy.special.expit((logits[:-1] + logits[1:]) / 2), 0.0)[apart]
    hits, alarms = curve.true_positives[apart], curve.false_positives[apart]
    reached, f1 = hits / hits[-1], 2 * hits / (hits + alarms + hits[-1])
    best = (reached - alarms / alarms[-1], f1, reached >= sensitivity)
    return {rule: float(limits[np.argmax(values)]) for rule, values in zip(RULES, best, strict=True)}


def _logits(score: Floats) -> Floats:
    lost = float(np.finfo(score.dtype).eps) / 2  # a score of this type that is nearer to 0 or 1 has lost its logit
    logits: Floats = scipy.special.logit(np.clip(score.astype(np.float64), lost, 1 - lost))
    return logits
