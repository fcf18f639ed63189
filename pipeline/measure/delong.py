"""Scores, targets, masks and patients → 95 % intervals of AUROCs, their means and paired differences.

A single AUROC gets Newcombe's score interval (method 5 in: Confidence intervals for an effect size measure based on
the Mann-Whitney statistic, part 2, Statistics in Medicine 25, 2006), which never has zero width. A patient's images
are alike, so its variance is multiplied by a design effect: DeLong's variance with clusters (Obuchowski, Nonparametric
analysis of clustered ROC curve data, Biometrics 53, 1997) divided by the one without. The limits of a mean or a
difference follow from those of its AUROCs and their correlations (MOVER: Zou, Toward using confidence intervals to
compare correlations, Psychological Methods 12, 2007). `benchmarks/coverage.py` compares this with other methods.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.measure.metrics import Bools, Floats, Ints, Z


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


def measure_areas(scores: Floats, target: Floats, mask: Bools, patient: npt.NDArray[Any]) -> Areas:
    """The areas of scores [N, L] against targets [N, L] in {0, 1}, on the cells of mask [N, L], of patients [N].

    Every patient has a row in `influence`, even without a cell in the mask.
    """
    names, codes = np.unique(patient, return_inverse=True)
    columns = scores.shape[1]
    found = np.full((5, columns), np.nan)
    influence = np.full((len(names), columns), np.nan)
    for column in range(columns):
        used = mask[:, column]
        truth = target[used, column] == 1
        if truth.any() and not truth.all():
            *found[:, column], influence[:, column] = _measure(
                scores[used, column], truth, codes[used], len(names)
            )
    return Areas._make((*found, influence))


def weigh_labels(names: Sequence[str], over: Sequence[str]) -> Floats:
    """The weights [L] that make a mean over some of the labels `names`; all 0 for none."""
    return np.array([1 / len(over) if name in over else 0.0 for name in names])


def combine_limits(areas: Areas, weights: Sequence[float] | Floats) -> dict[str, float | None]:
    """`low` and `high` of Σ weight · AUROC, for weights [A]; None if an area with a weight is undefined."""
    weight = np.asarray(weights, float)
    kept = weight != 0
    if not kept.any() or np.isnan(areas.auroc[kept]).any():
        return {"low": None, "high": None}
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
        return {"low": middle - margin(auroc - low), "high": middle + margin(high - auroc)}
    halves = (high - low) / 2  # symmetric, so that two runs with the same scores cancel out
    widest = max(margin(halves), Z * float(np.linalg.norm(influence @ weight)))
    shares = (
        weight * halves
    ) ** 2  # Satterthwaite's degrees of freedom; two runs have the same positives, hence half
    pooled = float(shares.sum() ** 2 / (shares**2 / freedom).sum()) / 2
    half = widest * student_quantile(max(pooled, 1)) / Z
    return {"low": middle - half, "high": middle + half}


def student_quantile(freedom: float) -> float:
    """Student's t of 0.975, by Abramowitz and Stegun (1964), 26.7.5; from 5 degrees on within 0.2 %."""
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def score_limits(
    auroc: float, positives: float, negatives: float, design: float = 1, z: float = Z
) -> tuple[float, float]:
    """Newcombe's method 5, its variance times a design effect: the θ with |θ - AUROC| = z · √(design · V(θ))."""

    def distance(theta: float) -> float:
        variance = design * score_variance(theta, positives, negatives)
        return abs(theta - auroc) - z * float(np.sqrt(variance))

    limits = []
    for end in (0.0, 1.0):
        inside, outside = auroc, end
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if distance(middle) < 0 else (inside, middle)
        limits.append(outside)
    return limits[0], limits[1]


def score_variance(theta: float, positives: float, negatives: float) -> float:
    """V(θ) of an AUROC of θ: θ (1 - θ) (1 + n (1 - θ) / (2 - θ) + n θ / (1 + θ)) / (positives · negatives).

    n = (positives + negatives) / 2 - 1; the same for θ and 1 - θ.
    """
    spread = (positives + negatives) / 2 - 1
    factor = 1 + spread * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return theta * (1 - theta) * factor / (positives * negatives)


def _measure(
    score: Floats, truth: Bools, codes: Ints, patients: int
) -> tuple[float, float, float, int, float, Floats]:
    """AUROC, its limits, degrees of freedom, design effect, and influence values [P] of cells of both classes."""
    positive, negative = np.sort(score[truth]), np.sort(score[~truth])
    sizes = len(positive), len(negative)
    # The share of the other class that each cell wins against, ties counted half: DeLong's structural components.
    share = np.where(truth, share_below(score, negative), 1 - share_below(score, positive))
    auroc = float(share[truth].mean())
    centered = (share - auroc) / np.where(truth, *sizes)
    influence = np.zeros(patients)
    independent, kish = 0.0, 1.0
    owners = []
    for side, size in zip((truth, ~truth), sizes, strict=True):
        cells = np.bincount(codes[side], minlength=patients)
        own = int((cells > 0).sum())
        owners.append(own)
        influence += np.bincount(codes[side], centered[side], patients) * np.sqrt(own / max(own - 1, 1))
        independent += float((centered[side] ** 2).sum()) * size / max(size - 1, 1)
        kish = max(kish, float((cells.astype(np.int64) ** 2).sum()) / size)
    clustered = float(influence @ influence)
    # Similar images never carry more information; for a perfect AUROC, as much as one image per patient.
    design = max(1, clustered / independent) if independent > 0 else kish
    return auroc, *score_limits(auroc, *sizes, design), max(min(owners) - 1, 1), design, influence


def share_below(score: Floats, others: Floats) -> Floats:
    """The share of the sorted others [m] that is below each score [n], ties counted half."""
    sides = np.searchsorted(others, score, "left") + np.searchsorted(others, score, "right")
    share: Floats = sides / (2 * len(others))
    return share
