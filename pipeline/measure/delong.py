"""Scores, targets, masks and patients → 95 % intervals of AUROCs and AUPRCs, their means and paired differences.

A patient's images correlate, so the variance of an area is multiplied by a design effect: the variance with patients as
clusters divided by the one without. That effect is an estimate from few patients if a class has few, so Student's t
replaces the normal distribution if patients have several images, with Satterthwaite's degrees of freedom; a class of a
single patient leaves the interval [0, 1]. `benchmarks/coverage.py` compares this with other methods.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import scipy

from pipeline.measure import metrics
from pipeline.measure.metrics import COMPETITION, FEW, NO_LIMITS, Bools, Figure, Floats, Ints, Names, Z

Area = tuple[float, float, float, float, float, Floats]  # of a label: the first fields of Areas, and influence [P]


class Areas(NamedTuple):
    """Areas under curves with their limits, and each patient's contribution to their errors; NaN without a class."""

    value: Floats  # [A]
    low: Floats  # [A]
    high: Floats  # [A]
    freedom: Floats  # [A] degrees of freedom: the patients with the rarer class, minus one
    design: Floats  # [A] by how much patients as clusters multiply the variance
    positives: Floats  # [A] cells
    negatives: Floats  # [A] cells
    influence: Floats  # [P, A], one row for each patient, in the order of their names

    @property
    def few(self) -> Bools:
        """Which areas [A] have a class of too few patients, or of none."""
        return ~(self.freedom + 1 >= FEW)

    def count_cells(self) -> list[Figure]:
        """The cells of each area by class, and whether it is `few`."""
        cells = zip(self.positives.tolist(), self.negatives.tolist(), self.few.tolist(), strict=True)
        return [{"positives": int(hits), "negatives": int(rest), "few": few} for hits, rest, few in cells]

    def join(self, other: "Areas") -> "Areas":
        """Both sets of areas, which must be of the same patients."""
        return Areas._make(np.concatenate(pair, axis=-1) for pair in zip(self, other, strict=True))


class _Clusters(NamedTuple):
    influence: Floats  # [P] patients' contributions to an area's error
    owners: int  # the patients with the rarer class
    freedom: float  # Satterthwaite's degrees of freedom
    kish: float  # the design effect if a patient's images were the same: 1 with one image of a class per patient
    independent: float  # the variance if images were independent
    design: float  # by how much patients as clusters multiply that variance


def report_auroc(names: Sequence[str], scores: Floats, target: Floats, mask: Bools, patient: Names) -> Figure:
    """`labels`, each with `auroc`, None with one class, and the counts of its cells; and `macro_auroc` and so on."""
    areas = measure_areas(scores, target, mask, patient)
    means, counts = average(names, areas).items(), areas.count_cells()
    values = {label: combine(areas, weigh_labels(names, over))["value"] for label, over in means}
    labels = {name: {"auroc": values.pop(name), **cells} for name, cells in zip(names, counts, strict=True)}
    return {f"{mean}_auroc": value for mean, value in values.items()} | {"labels": labels}


def average(names: Sequence[str], areas: Areas) -> dict[str, list[str]]:
    """The labels of each mean: all with an AUROC; those with 10 patients in each class; the competition's five.

    A label is a mean over itself, or over nothing if its area is undefined.
    """
    known = zip(names, areas.value, areas.few.tolist(), strict=True)
    few = {name: lacking for name, area, lacking in known if not np.isnan(area)}
    five = list(COMPETITION) if set(COMPETITION) <= few.keys() else []
    means = {"macro": [*few], "macro10": [name for name in few if not few[name]], "mean5": five}
    return {name: [name] if name in few else [] for name in names} | means


def measure_areas(
    scores: Floats, target: Floats, mask: Bools, patient: Names, stratum: Names | None = None, precision: bool = False
) -> Areas:
    """The areas of scores [N, L] against targets [N, L] in {0, 1}, on the cells of mask [N, L], of patients [N].

    Every patient has a row in `influence`, even without a cell in the mask. With strata [N], only pairs of a positive
    and a negative of the same stratum count. Raises ValueError if a score is not finite.
    """
    names, codes = np.unique(patient, return_inverse=True)
    columns = scores.shape[1]
    fields, influence = np.full((7, columns), np.nan), np.full((len(names), columns), np.nan)
    strata = np.zeros(len(patient), int) if stratum is None else np.unique(stratum, return_inverse=True)[1]
    measure: Callable[..., Area] = _measure_auprc if precision else _measure_auroc
    for column, cells in enumerate(metrics.label_cells([""] * columns, scores, target, mask, codes)):
        place = strata[mask[:, column]]
        counts = [np.bincount(place, side) for side in (cells.truth, ~cells.truth)]
        fields[5:, column] = [count.sum() for count in counts]
        shared = np.minimum(*counts)[place] > 0  # cells with one of the other class in their stratum
        if shared.any():
            used = (values[shared] for values in (*cells[1:], place))
            *fields[:5, column], influence[:, column] = measure(*used, len(names))
    return Areas._make((*fields, influence))


def measure_precision(scores: Floats, target: Floats, mask: Bools, patient: Names) -> Areas:
    """The AUPRCs of scores [N, L], as `measure_areas` returns AUROCs."""
    return measure_areas(scores, target, mask, patient, precision=True)


def weigh_labels(names: Sequence[str], over: Sequence[str]) -> Floats:
    """The weights [L] that make a mean over some of the labels `names`; all 0 for none."""
    return np.array([1 / len(over) if name in over else 0.0 for name in names])


def combine(areas: Areas, weights: Sequence[float] | Floats, level: float = 0.05) -> Figure:
    """`value`, `low` and `high` of Σ weight · area, for weights [A]; None if an area with a weight is undefined.

    `level` is the chance that the limits miss it. They follow from those of the areas and their correlations (MOVER:
    Zou, Toward using confidence intervals to compare correlations, Psychological Methods 12, 2007).
    """
    kept = np.asarray(weights) != 0
    if not kept.any() or np.isnan(areas.value[kept]).any():
        return {"value": None, **NO_LIMITS}
    weight, area, low, high, freedom = (np.asarray(values)[kept] for values in (weights, *areas[:4]))
    influence = areas.influence[:, kept]
    norm = np.sqrt((influence**2).sum(axis=0))
    unit = influence / np.where(norm > 0, norm, 1)
    correlation = unit.T @ unit
    np.fill_diagonal(correlation, 1)  # of a perfect area too, which has no influence values
    middle = float(weight @ area)

    def margin(sides: Floats) -> float:
        return float(np.sqrt(max((weight * sides) @ correlation @ (weight * sides), 0)))

    if (weight > 0).all():
        scale = metrics.student_quantile(np.inf, level) / Z
        below, above = scale * margin(area - low), scale * margin(high - area)
        return {"value": middle, "low": middle - below, "high": middle + above}
    halves = (high - low) / 2  # symmetric, so that two runs with the same scores cancel out
    widest = max(margin(halves), Z * float(np.linalg.norm(influence @ weight)))
    # Satterthwaite's degrees of freedom; two runs have the same positives, hence half.
    shares = (weight * halves) ** 2
    pooled = float(shares.sum() ** 2 / (shares**2 / freedom).sum()) / 2
    half = widest * metrics.student_quantile(max(pooled, 1), level) / Z
    return {"value": middle, "low": middle - half, "high": middle + half}


def subtract(left: Sequence[Areas], right: Sequence[Areas], weights: Floats) -> Figure:
    """The mean of Σ weight · area over `left` less that over `right`, paired by patient; for weights [A]."""
    signed = [weights / len(left)] * len(left) + [-weights / len(right)] * len(right)
    return combine(reduce(Areas.join, [*left, *right]), np.concatenate(signed))


def score_limits(auroc: float, variance: Callable[[float], float], z: float = Z) -> tuple[float, float]:
    """The θ on either side of an AUROC with |θ - AUROC| = z · √variance(θ), which are never the same.

    Newcombe, Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2, method 5,
    Statistics in Medicine 25, 2006.
    """

    def excess(theta: float) -> float:
        return float(abs(theta - auroc) - z * variance(theta) ** 0.5)

    auroc = min(max(auroc, 0.0), 1.0)  # a sum of weights may be a rounding error above 1, where variance is negative
    # Not from the AUROC itself, which has no variance if it is perfect.
    low, high = (
        end if auroc == end else float(scipy.optimize.brentq(excess, auroc + 1e-9 * (end - auroc), end, xtol=1e-15))
        for end in (0.0, 1.0)
    )
    return low, high


def score_variance(theta: float, positives: float, negatives: float) -> float:
    """V(θ) of an AUROC of θ: θ (1 - θ) (1 + n (1 - θ) / (2 - θ) + n θ / (1 + θ)) / (positives · negatives).

    n = (positives + negatives) / 2 - 1; the same for θ and 1 - θ. Also of arrays of cells.
    """
    spread = (positives + negatives) / 2 - 1
    factor = 1 + spread * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return theta * (1 - theta) * factor / (positives * negatives)


def _measure_auroc(score: Floats, truth: Bools, codes: Ints, stratum: Ints, patients: int) -> Area:
    """The AUROC within strata, Σ w_k A_k with w_k a stratum's share of all pairs; its variance is Σ w_k² V_k.

    DeLong's variance, with clusters as in Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics
    53, 1997. Each stratum has both classes.
    """
    _, strata = np.unique(stratum, return_inverse=True)
    sizes = np.array([np.bincount(strata, side) for side in (truth, ~truth)])  # [2, K]
    weights = sizes.prod(axis=0) / sizes.prod(axis=0).sum()
    # The share of the other class that each cell wins against, ties counted half: DeLong's structural components.
    share = np.empty(len(score))
    for number in range(len(weights)):
        rows = strata == number
        share[rows] = share_won(score[rows], truth[rows], np.ones(rows.sum()))
    areas = np.bincount(strata, np.where(truth, share, 0)) / sizes[0]
    auroc, own = float(weights @ areas), np.where(truth, *sizes[:, strata])
    clusters = _cluster((share - areas[strata]) * weights[strata] / own, truth, own, codes, patients)
    limits = 0.0, 1.0  # one patient's images say nothing about how much patients differ
    if clusters.kish == 1 or clusters.owners > 1:
        z = Z if clusters.kish == 1 else metrics.student_quantile(clusters.freedom)
        limits = score_limits(auroc, lambda theta: clusters.design * (weights**2 @ score_variance(theta, *sizes)), z)
    return auroc, *limits, max(clusters.owners - 1, 1), clusters.design, clusters.influence


def _measure_auprc(score: Floats, truth: Bools, codes: Ints, _: Ints, patients: int) -> Area:
    """The AUPRC with a logit interval (Boyd, Eng and Page, Area under the precision-recall curve, ECML 2013).

    Its variance is from the influence of each patient's images (the infinitesimal jackknife: Efron, The jackknife, the
    bootstrap and other resampling plans, 1982).
    """
    auprc, cells = influence_precision(score, truth)
    clusters = _cluster(cells, truth, np.where(truth, truth.sum(), (~truth).sum()), codes, patients)
    if clusters.owners == 1:
        limits = 0.0, 1.0
    elif auprc == 1:
        limits = 0.025 ** (1 / clusters.owners), 1.0  # the exact binomial's, since nothing varies
    else:
        error = (clusters.design * clusters.independent) ** 0.5 / (auprc * (1 - auprc))  # in logits
        half = min(metrics.student_quantile(clusters.freedom) * error, 700)
        odds = auprc / (1 - auprc) * np.exp([-half, half])
        limits = tuple((odds / (1 + odds)).tolist())
    return auprc, *limits, max(clusters.owners - 1, 1), clusters.design, clusters.influence


def influence_precision(score: Floats, truth: Bools) -> tuple[float, Floats]:
    """AUPRC, the average precision, and its derivative [n] by each cell's weight, at weights of 1.

    With H(s) positives among the C(s) cells that score s or more, and P positives in all: AUPRC = Σ_i H_i / C_i / P
    over positives i, without interpolation. Its derivative by the weight of a cell k is
    [y_k (H_k / C_k - AUPRC) + Σ_{i: s_i ≤ s_k} (y_k / C_i - H_i / C_i²)] / P.
    """
    curve = metrics.threshold_curve(score, truth)
    hits, called = curve.true_positives, curve.true_positives + curve.false_positives
    gained, precision = np.diff(hits, prepend=0), hits / called
    auprc = float(gained @ precision / hits[-1])
    # Sums over a cell's own place and all below it.
    rise, fall = (np.cumsum((gained * part)[::-1])[::-1] for part in (1 / called, precision / called))
    gain = np.where(truth, (precision - auprc + rise)[curve.place], 0)
    return auprc, (gain - fall[curve.place]) / hits[-1]


def _cluster(cells: Floats, truth: Bools, own: Ints, codes: Ints, patients: int) -> _Clusters:
    """Patients' contributions, from those of their cells [n], whose class (and stratum) has `own` [n] cells."""
    influence, kish, errors = np.zeros(patients), 1.0, []
    for side in (truth, ~truth):
        counts = np.bincount(codes[side])
        owners = int((counts > 0).sum())
        part = np.bincount(codes[side], cells[side], patients) * np.sqrt(owners / max(owners - 1, 1))
        influence += part
        kish = max(kish, float((counts**2.0).sum()) / side.sum())
        errors.append((float(part @ part), owners))
    total, fewest = sum(error for error, _ in errors), min(owners for _, owners in errors)
    parts = sum(error**2 / max(owners - 1, 1) for error, owners in errors)
    freedom = total**2 / parts if total > 0 else max(fewest - 1, 1)
    independent = float((cells**2 * own / np.maximum(own - 1, 1)).sum())
    # Similar images never carry more information; for a perfect area, as much as one image per patient.
    design = max(1, float(influence @ influence) / independent) if independent > 0 else kish
    return _Clusters(influence, fewest, freedom, kish, independent, design)


def share_won(score: Floats, truth: Bools, weight: Floats) -> Floats:
    """The share of the other class's weight [n] that each cell is on the right side of, ties counted half."""
    _, place = np.unique(score, return_inverse=True)
    positives, negatives = (np.bincount(place, np.where(side, weight, 0)) for side in (truth, ~truth))
    sums = ((side, np.cumsum(side)) for side in (negatives, positives))
    below, above = ((cumulated - side / 2) / cumulated[-1] for side, cumulated in sums)
    share: Floats = np.where(truth, below[place], 1 - above[place])
    return share
