"""Scores, targets and masks → Brier score, calibration error, net benefit, and rates with limits; in float64."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy  # whose parts load when they are needed

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.integer[Any]]
Names = npt.NDArray[Any]  # [N] of patients, studies or groups
Named = Mapping[str, Floats]  # [N] or [N, L], by the name of their source
Facts = Mapping[str, Names]  # [N] by variable
Figure = dict[str, Any]  # of an evaluation's row, numbers or None
NOTHING: Mapping[str, Any] = MappingProxyType({})

# The five labels of the CheXpert competition (Irvin et al., 2019).
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FEW = 10  # patients of a class; with fewer, a label's figures are mostly chance
Z = 1.959963984540054  # the normal distribution's 0.975 quantile
BINS = 15  # of the calibration error, as in Guo et al., 2017
NO_LIMITS: Figure = {"low": None, "high": None}


class Cells(NamedTuple):
    """The cells of one label that are in the mask."""

    label: str
    score: Floats  # [n]
    truth: Bools  # [n]
    patient: Names  # [n]


class Curve(NamedTuple):
    """Counts of cells called positive at each distinct score as threshold, from the highest down."""

    threshold: Floats  # [T]
    true_positives: Ints  # [T]
    false_positives: Ints  # [T]
    place: Ints  # [n] the threshold that is each cell's score


def count_classes(truth: Bools, patient: Names) -> Figure:
    """The cells of each class of truth [n], and whether either has too `few` patients [n] for figures to mean much."""
    fewest = min(len(np.unique(patient[side])) for side in (truth, ~truth))
    return {"positives": int(truth.sum()), "negatives": int((~truth).sum()), "few": fewest < FEW}


def label_cells(names: Sequence[str], scores: Floats, target: Floats, mask: Bools, patient: Names) -> Iterator[Cells]:
    """The cells of each label, of scores, target and mask [N, L], patient [N]; ValueError if a score is not finite."""
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    for column, name in enumerate(names):
        used = mask[:, column]
        yield Cells(name, scores[used, column], target[used, column] == 1, patient[used])


def brier_score(score: Floats, truth: Bools) -> float | None:
    """Mean squared distance of score and truth (Brier, 1950); None without cells."""
    return float(np.mean((score.astype(np.float64) - truth) ** 2)) if len(truth) else None


def cross_entropy(score: Floats, target: Floats, mask: Bools) -> float:
    """The mean of -log p over the cells of mask [N, L], p the score of a target of 1, else 1 less it; nan for none."""
    chance = np.where(target == 1, score, 1 - score)[mask].astype(np.float64)
    return float(-np.log(np.maximum(chance, np.finfo(chance.dtype).eps)).mean())


def reliability(score: Floats, truth: Bools) -> tuple[Floats, Floats, Ints]:
    """Mean score, share of positives and cells of the non-empty of 15 bins of equal width, closed on the right."""
    _, bins = np.unique(np.searchsorted(np.arange(1, BINS) / BINS, score.astype(np.float64)), return_inverse=True)
    cells = np.bincount(bins)
    return np.bincount(bins, score) / cells, np.bincount(bins, truth) / cells, cells


def calibration_error(score: Floats, truth: Bools) -> float | None:
    """Expected calibration error: Σ_b n_b / n · |share of positives in b - mean score in b|; None without cells.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015, with the bins of
    Guo et al., "On calibration of modern neural networks", ICML 2017; on the score of positive.
    """
    mean, share, cells = reliability(score, truth)
    return float(np.average(np.abs(share - mean), weights=cells)) if len(truth) else None


def threshold_curve(score: Floats, truth: Bools) -> Curve:
    """Counts of cells called positive, `score >= threshold`, for each distinct score [n ≥ 1] as threshold."""
    ordered, place = np.unique(-score, return_inverse=True)
    hits, alarms = (np.cumsum(np.bincount(place[side], minlength=len(ordered))) for side in (truth, ~truth))
    return Curve(-ordered, hits, alarms, place)


def measure_rates(threshold: float, score: Floats, truth: Bools, patient: Names) -> dict[str, Figure]:
    """Sensitivity, specificity, PPV and NPV of `score >= threshold`, as `measure_share`; and the `value` of F1.

    F1 is 2 TP / (2 TP + FP + FN), and None without positives.
    """
    called = score >= threshold
    shares = {"sensitivity": (called, truth), "specificity": (~called, ~truth)}
    shares |= {"ppv": (truth, called), "npv": (~truth, ~called)}
    rates = {rate: measure_share(hits[cells], patient[cells]) for rate, (hits, cells) in shares.items()}
    hits, cells = int((called & truth).sum()), int(called.sum()) + int(truth.sum())
    return rates | {"f1": {"value": 2 * hits / cells if truth.any() else None}}


def net_benefit(probability: Floats, truth: Bools, threshold: float) -> Floats:
    """What each cell [n] adds to the net benefit of calling `probability >= threshold`: their mean is the net benefit.

    TP / n - FP / n · t / (1 - t): a threshold t says that a false alarm costs t / (1 - t) of a hit (Vickers and Elkin,
    Decision curve analysis, Medical Decision Making 26, 2006). Calling all is a probability of 1, calling none of -1.
    """
    gain = np.where(truth, 1.0, -threshold / (1 - threshold))
    return np.where(probability >= threshold, gain, 0.0)


def decide(probability: Floats, truth: Bools, owner: Names, threshold: float) -> dict[str, Figure]:
    """Net benefit of calling cells [n ≥ 1] by a threshold, of calling all, and the gain, with `mean_limits`.

    The gain is over the better default: calling all, or none with net benefit 0.
    """
    model, calls = (net_benefit(values, truth, threshold) for values in (probability, np.ones(len(truth))))
    benefits = {"net_benefit": {"value": float(model.mean())}, "net_benefit_all": {"value": float(calls.mean())}}
    return benefits | {"net_benefit_gain": mean_limits(model - calls if calls.mean() > 0 else model, owner)}


def mean_limits(values: Floats, owner: Names) -> Figure:
    """The mean of values [n ≥ 1], with limits by Student's t and owners [n] as clusters; None with one owner."""
    mean, codes = float(values.mean()), np.unique(owner, return_inverse=True)[1]
    sums = np.bincount(codes, values - mean)
    if len(sums) < 2:
        return {"value": mean, **NO_LIMITS}
    spread = float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)))
    half = student_quantile(len(sums) - 1) * spread / len(values)
    return {"value": mean, "low": mean - half, "high": mean + half}


def student_quantile(freedom: float, level: float = 0.05) -> float:
    """Student's t of 1 - level / 2; the normal distribution's for infinite freedom."""
    return float(-scipy.special.stdtrit(freedom, level / 2))


def measure_share(called: Bools, owner: Names, level: float = 0.05) -> Figure:
    """`value`, `low` and `high` of the share of `called` [n], as `wilson_limits`; None without cells."""
    return {"value": float(called.mean()) if len(called) else None, **wilson_limits(called, owner, level)}


def wilson_limits(called: Bools, owner: Names, level: float = 0.05) -> Figure:
    """`low` and `high` of the share of `called` [n], whose cells belong to owners [n]; None without cells.

    Wilson's score interval (1927) for the effective number of cells: n divided by the design effect, the variance of
    the share with owners as clusters over the one without (Rao and Scott, A simple method for the analysis of
    clustered binary data, Biometrics 48, 1992). It never has zero width. If owners have several cells, the design
    effect is estimated from the owners, so the quantile is Student's; a single owner with several leaves [0, 1].
    """
    if not len(called):
        return NO_LIMITS
    share = float(np.mean(called))
    _, codes = np.unique(owner, return_inverse=True)
    cells, hits = np.bincount(codes), np.bincount(codes, called)
    count, owners = len(called), len(cells)
    if owners == 1 < count:
        return {"low": 0.0, "high": 1.0}
    estimated = owners < count and 0 < share < 1
    z = student_quantile(owners - 1 if estimated else np.inf, level)
    if 0 < share < 1:
        spread = float(((hits - cells * share) ** 2).sum()) * owners / (owners - 1)
        design = max(1.0, spread / (count * share * (1 - share)))  # never below that of independent cells
    else:
        design = float((cells**2).sum()) / count  # all of an owner's cells count as one
    size = count / design
    middle = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * (share * (1 - share) / size + z**2 / (4 * size**2)) ** 0.5
    return {"low": max(0.0, middle - half), "high": min(1.0, middle + half)}


def subtract_independent(left: Figure, right: Figure) -> Figure:
    """The left figure minus the right, from independent samples; each has a value, low and high.

    Method 10 of Newcombe, Interval estimation for the difference between independent proportions, Statistics in
    Medicine 17, 1998; for figures of other kinds: Zou, Psychological Methods 12, 2007.
    """
    a, b = left["value"], right["value"]
    below = float(np.hypot(a - left["low"], right["high"] - b))
    above = float(np.hypot(left["high"] - a, b - right["low"]))
    return {"value": a - b, "low": a - b - below, "high": a - b + above}
