"""Scores of dev → per label a temperature and thresholds, which are then applied to any split.

The temperature divides the logit of the score (Guo et al., 2017), one for each label; it keeps the order, so the
thresholds are on the score itself: positive is `score >= threshold`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from model.metrics import Bools, Floats, label_cells, threshold_curve

RULES = ("youden", "max_f1", "sensitivity")
TEMPERATURES = (0.05, 20.0)  # a minimum outside is none: the likelihood falls towards a limit
SMALLEST = 2.0**-24  # a float32 score that is nearer to 0 or 1 has lost its logit


def fit_calibration(
    names: Sequence[str], scores: Floats, target: Floats, mask: Bools, sensitivity: float = 0.9
) -> dict[str, dict[str, Any]]:
    """Per label: `temperature`, `thresholds` by rule, and a `note` where something is None; fit for JSON.

    Scores [N, L], targets [N, L] in {0, 1}, mask [N, L]. The thresholds of RULES: the most of Youden's J
    (sensitivity + specificity - 1), the most of F1, and the highest one whose sensitivity is at least
    `sensitivity`; of equally good ones the highest. Raises ValueError where a score is not finite.
    """
    labels: dict[str, dict[str, Any]] = {}
    for name, score, truth in label_cells(names, scores, target, mask):
        if truth.all() or not truth.any():
            thresholds: dict[str, float | None] = dict.fromkeys(RULES)
            temperature = None
            note: str | None = "one class: no thresholds, scores as they are"
        else:
            thresholds = dict(choose_thresholds(score, truth, sensitivity))
            temperature = fit_temperature(score, truth)
            note = None if temperature else "no temperature has the highest likelihood: scores as they are"
        labels[name] = {"temperature": temperature, "thresholds": thresholds, "note": note}
    return labels


def fit_temperature(score: Floats, truth: Bools) -> float | None:
    """The temperature in [0.05, 20] with the highest likelihood of truth [n] given sigmoid(logit(score) / T).

    None where there is none: scores that 0.5 separates without error, scores that tell nothing or the
    contrary. The log-likelihood is concave in 1 / T, so its slope is bisected.
    """
    logits = _logits(score)

    def slope(inverse: float) -> float:  # of the negative log-likelihood, by 1 / T; it rises
        return float(logits @ (1 / (1 + np.exp(-inverse * logits)) - truth))

    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    for _ in range(50):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / low


def apply_temperature(score: Floats, temperature: float | None) -> Floats:
    """The calibrated scores [n], float64; without a temperature as they are."""
    if temperature is None:
        return score.astype(np.float64)
    calibrated: Floats = 1 / (1 + np.exp(-_logits(score) / temperature))
    return calibrated


def choose_thresholds(score: Floats, truth: Bools, sensitivity: float) -> dict[str, float]:
    """The threshold of each of RULES for scores [n] of both classes."""
    thresholds, hits, alarms = threshold_curve(score, truth)
    positives, negatives = hits[-1], alarms[-1]
    places = (
        np.argmax(hits / positives - alarms / negatives),
        np.argmax(2 * hits / (hits + alarms + positives)),
        np.argmax(hits / positives >= sensitivity),
    )
    return {rule: float(thresholds[place]) for rule, place in zip(RULES, places, strict=True)}


def _logits(score: Floats) -> Floats:
    inside = np.clip(score.astype(np.float64), SMALLEST, 1 - SMALLEST)
    logits: Floats = np.log(inside / (1 - inside))
    return logits
