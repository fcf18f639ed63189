"""Scores, targets, masks and patients → 95 % intervals of AUROCs, their means and paired differences.

A single AUROC gets Newcombe's score interval (method 5 in: Confidence intervals for an effect size measure based on
the Mann-Whitney statistic, part 2, Statistics in Medicine 25, 2006), which never has zero width. A patient's images
correlate, so its variance is multiplied by a design effect: DeLong's variance with clusters (Obuchowski, Nonparametric
analysis of clustered ROC curve data, Biometrics 53, 1997) divided by the one without. That effect is an estimate from
few patients if a class has few, so Student's t replaces the normal distribution if patients have
several images, with Satterthwaite's degrees of freedom; a class of a single patient leaves the interval [0, 1].

An AUROC within strata, Σ w_k A_k with w_k the stratum's share of all pairs that share a stratum, has the variance
Σ w_k² V_k. The limits of a mean or a difference follow from those of its AUROCs and their correlations (MOVER: Zou,
Toward using confidence intervals to compare correlations, Psychological Methods 12, 2007). `benchmarks/coverage.py`
compares this with other methods.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.measure.metrics import NO_LIMITS, Bools, Figure, Floats, Ints, Names, Z, student_quantile


class Areas(NamedTuple):
    """AUROCs with their limits, and each patient's contribution to each AUROC's error; NaN if a class is missing."""

    auroc: Floats  # [A]
    low: Floats  # [A]
    high: Floats  # [A]
    freedom: Floats  # [A] degrees of freedom: the patients with the rarer class, minus one
    design: Floats  # [A] by how much patients as clusters multiply the variance
    influence: Floats  # [P, A], one row for each patient, in the order of their names

    def join(self, other: "Areas") -> "Areas":
        """Both sets of areas, which must be of the same patients."""
        return Areas._make(np.concatenate(pair, axis=-1) for pair in zip(self, other, strict=True))


def measure_areas(scores: Floats, target: Floats, mask: Bools, patient: Names, stratum: Names | None = None) -> Areas:
    """The areas of scores [N, L] against targets [N, L] in {0, 1}, on the cells of mask [N, L], of patients [N].

    Every patient has a row in `influence`, even without a cell in the mask. With strata [N], only pairs of a positive
    and a negative of the same stratum count.
    """
    names, codes = np.unique(patient, return_inverse=True)
    strata = np.zeros(len(codes)) if stratum is None else stratum
    columns = scores.shape[1]
    fields = np.full((5, columns), np.nan)
    influence = np.full((len(names), columns), np.nan)
    for column in range(columns):
        used = mask[:, column].copy()  # modified below
        truth = target[used, column] == 1
        used[used] = share_stratum(truth, strata[used])
        if used.any():
            cells = scores[used, column], target[used, column] == 1, codes[used], strata[used]
            *fields[:, column], influence[:, column] = _measure(*cells, len(names))
    return Areas._make((*fields, influence))


def share_stratum(truth: Bools, stratum: Names) -> Bools:
    """Which cells [n] have a cell of the other class in their stratum."""
    _, codes = np.unique(stratum, return_inverse=True)
    both = (np.bincount(codes, truth) > 0) & (np.bincount(codes, ~truth) > 0)
    shared: Bools = both[codes]
    return shared


def weigh_labels(names: Sequence[str], over: Sequence[str]) -> Floats:
    """The weights [L] that make a mean over some of the labels `names`; all 0 for none."""
    return np.array([1 / len(over) if name in over else 0.0 for name in names])


def combine_limits(areas: Areas, weights: Sequence[float] | Floats, level: float = 0.05) -> Figure:
    """`low` and `high` of Σ weight · AUROC, for weights [A]; None if an area with a weight is undefined.

    `level` is the chance that they miss it.
    """
    weight = np.asarray(weights, float)
    kept = weight != 0
    if not kept.any() or np.isnan(areas.auroc[kept]).any():
        return NO_LIMITS
    weight, auroc, low, high, freedom = (values[kept] for values in (weight, *areas[:4]))
    influence = areas.influence[:, kept]
    norm = np.sqrt((influence**2).sum(axis=0))
    unit = influence / np.where(norm > 0, norm, 1)
    correlation = unit.T @ unit
    np.fill_diagonal(correlation, 1)  # of a perfect AUROC too, which has no influence values
    middle = float(weight @ auroc)

    def margin(sides: Floats) -> float:
        return float(np.sqrt(max((weight * sides) @ correlation @ (weight * sides), 0)))

    if (weight > 0).all():
        scale = student_quantile(np.inf, level) / Z
        return {"low": middle - scale * margin(auroc - low), "high": middle + scale * margin(high - auroc)}
    halves = (high - low) / 2  # symmetric, so that two runs with the same scores cancel out
    widest = max(margin(halves), Z * float(np.linalg.norm(influence @ weight)))
    # Satterthwaite's degrees of freedom; two runs have the same positives, hence half.
    shares = (weight * halves) ** 2
    pooled = float(shares.sum() ** 2 / (shares**2 / freedom).sum()) / 2
    half = widest * student_quantile(max(pooled, 1), level) / Z
    return {"low": middle - half, "high": middle + half}


def score_limits(auroc: float, variance: Callable[[float], float], z: float = Z) -> tuple[float, float]:
    """Newcombe's method 5: the θ on either side of an AUROC with |θ - AUROC| = z · √variance(θ)."""

    def limit(end: float) -> float:
        inside, outside = auroc, end
        for _ in range(50):
            middle = (inside + outside) / 2
            if abs(middle - auroc) < z * variance(middle) ** 0.5:
                inside = middle
            else:
                outside = middle
        return outside

    return limit(0.0), limit(1.0)


def score_variance(theta: float, positives: float, negatives: float) -> float:
    """V(θ) of an AUROC of θ: θ (1 - θ) (1 + n (1 - θ) / (2 - θ) + n θ / (1 + θ)) / (positives · negatives).

    n = (positives + negatives) / 2 - 1; the same for θ and 1 - θ.
    """
    spread = (positives + negatives) / 2 - 1
    factor = 1 + spread * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return theta * (1 - theta) * factor / (positives * negatives)


def _measure(
    score: Floats, truth: Bools, codes: Ints, stratum: Names, patients: int
) -> tuple[float, float, float, float, float, Floats]:
    """AUROC, its limits, degrees of freedom, design effect, and influence values [P]; strata have both classes."""
    _, strata = np.unique(stratum, return_inverse=True)
    sizes = np.array([np.bincount(strata, side) for side in (truth, ~truth)])  # [2, K]
    weights = sizes.prod(axis=0) / sizes.prod(axis=0).sum()
    # The share of the other class that each cell wins against, ties counted half: DeLong's structural components.
    share = np.empty(len(score))
    for number in range(len(weights)):
        rows = strata == number
        sides = truth & rows, ~truth & rows
        for side, other in (sides, sides[::-1]):
            share[side] = share_below(score[side], np.sort(score[other]))
    share[~truth] = 1 - share[~truth]
    areas = np.bincount(strata, np.where(truth, share, 0)) / sizes[0]
    auroc = float(weights @ areas)
    own = np.where(truth, *sizes[:, strata])
    centered = (share - areas[strata]) * weights[strata] / own
    independent = float((centered**2 * own / np.maximum(own - 1, 1)).sum())
    influence, kish, errors = np.zeros(patients), 1.0, []
    for side in (truth, ~truth):
        cells = np.bincount(codes[side], minlength=patients)
        owners = int((cells > 0).sum())
        part = np.bincount(codes[side], centered[side], patients) * np.sqrt(owners / max(owners - 1, 1))
        influence += part
        kish = max(kish, float((cells**2.0).sum()) / side.sum())
        errors.append((float(part @ part), owners))
    clustered = float(influence @ influence)
    # Similar images never carry more information; for a perfect AUROC, as much as one image per patient.
    design = max(1, clustered / independent) if independent > 0 else kish

    def variance(theta: float) -> float:
        parts = (score_variance(theta, *counts) for counts in sizes.T)
        return design * float(sum(weight**2 * part for weight, part in zip(weights, parts, strict=True)))

    freedom = max(min(owners for _, owners in errors) - 1, 1)
    if kish == 1:
        limits = score_limits(auroc, variance)
    elif any(owners == 1 for _, owners in errors):
        limits = 0.0, 1.0  # one patient's images say nothing about how much patients differ
    else:
        total = sum(error for error, _ in errors)
        parts = sum(error**2 / (owners - 1) for error, owners in errors)
        limits = score_limits(auroc, variance, student_quantile(total**2 / parts if total > 0 else freedom))
    return auroc, *limits, freedom, design, influence


def share_below(score: Floats, others: Floats) -> Floats:
    """The share of the sorted others [m] that is below each score [n], ties counted half."""
    sides = np.searchsorted(others, score, "left") + np.searchsorted(others, score, "right")
    share: Floats = sides / (2 * len(others))
    return share
