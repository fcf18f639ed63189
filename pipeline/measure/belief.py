"""Scores, truth and covariates of a split → how much of each label's AUROC can be told without the disease.

A covariate is a fact of a film that is not the disease: the patient's number, the projection, the sex. Where one goes
with a label, a network may learn the covariate, and its AUROC falls at the next hospital (Zech et al., Variable
generalization performance of a deep learning model to detect pneumonia, PLOS Medicine 15, 2018; DeGrave et al., AI for
radiographic COVID-19 detection selects shortcuts over signal, Nature Machine Intelligence 3, 2021). Three views of it:

    within strata    only pairs of films with the same projection, sex, age band, … are compared
    balanced         films are weighted so that the covariates do not differ between positives and negatives
    tells            how well the score itself tells the covariate, among the negatives

The AUROC within strata weighs each stratum by its pairs of a positive and a negative, so it is the share of pairs from
one stratum that are ranked right. Balancing takes overlap weights: 1 - e for positives and e for negatives, with the
propensity e from a logistic regression on the covariates (Li, Morgan and Zaslavsky, Balancing covariates via propensity
score weighting, JASA 113, 2018).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.measure.audit import DEVICES, THRESHOLD, shorten
from pipeline.measure.bootstrap import describe_difference
from pipeline.measure.delong import Areas, combine_limits, measure_areas, score_limits
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import FEW, Bools, Floats

SELF_EVIDENT = ("projection", "sex")  # variables whose strata need no explanation: AP, Female
NO_FINDING = "No Finding"  # has no positives in common with any label, so it makes no strata

Names = npt.NDArray[Any]  # [N]


def assess_belief(
    names: Sequence[str],
    images: Scored,
    covariates: Mapping[str, Floats],
    strata: Mapping[str, Names],
    edge: Mapping[str, Floats] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """What each label's AUROC rests on; labels with fewer than 10 positives or negatives are left out.

    `covariates` are numbers [N] by name, NaN where unknown; `strata` are names [N] by variable, empty where unknown.
    `edge` are further covariates, gray levels outside of the lungs. They are no covariates of Support Devices, whose
    wires cross them, and are not balanced: there are too many for the few positives of most labels.
    A label has `auroc`, `covariates`, `within`, `tells` and `balanced`, each with limits, and its `verdict`.
    """
    enough = [
        column
        for column in range(len(names))
        if min(int((images.mask[:, column] & (images.target[:, column] == side)).sum()) for side in (0, 1))
        >= FEW
    ]
    report: dict[str, dict[str, Any]] = {}
    for column in enough:
        rows = images.mask[:, column]
        own = images.take(rows)
        score, truth = own.scores[:, column].astype(float), own.target[:, column] == 1
        values = {name: covariate[rows] for name, covariate in covariates.items()}
        edges = {} if names[column] == DEVICES else {name: value[rows] for name, value in edge.items()}
        groups = {variable: group[rows] for variable, group in strata.items()}
        other = find_confounder(names, own, column)
        if other is not None:
            states = own.target[:, names.index(other)] == 1
            groups[other] = np.where(
                own.mask[:, names.index(other)], np.where(states, "positive", "negative"), ""
            )
        found = {
            "auroc": _describe(_measure(score, truth, own.patient)),
            "covariates": {
                name: _describe(_measure(value, truth, own.patient))
                for name, value in (values | edges).items()
            },
            "within": {
                variable: measure_within(score, truth, own.patient, group)
                for variable, group in groups.items()
            },
            "tells": {
                name: _describe(_measure(score[~truth], half[~truth], own.patient[~truth]))
                for name, half in split_halves(values | edges).items()
            },
            "balanced": measure_balanced(score, truth, own.patient, values),
        }
        report[names[column]] = found | judge(names[column], found)
    return report


def measure_within(score: Floats, truth: Bools, patient: Names, group: Names) -> dict[str, Any]:
    """AUROC within each stratum with 10 of each class, and over pairs of the same stratum (`pooled`), with limits.

    Of scores [n] against truth [n]. `less` is the pooled AUROC less that of all pairs. `pairs` is the share of all
    pairs that are of one of the strata.
    """
    strata: dict[str, Any] = {}
    measured, weights = [_measure(score, truth, patient)], [0.0]
    for name in sorted(set(group.tolist()) - {""}):
        rows = group == name
        positives, negatives = int((truth & rows).sum()), int((~truth & rows).sum())
        strata[name] = {"positives": positives, "negatives": negatives}
        if min(positives, negatives) < FEW:
            strata[name] |= _describe(None)
            continue
        measured.append(_measure(score, truth, patient, rows))
        weights.append(float(positives * negatives))
        strata[name] |= _describe(measured[-1])
    pairs = sum(weights)
    if not pairs:
        nothing = _describe(None)
        return {
            "strata": strata,
            "pooled": nothing,
            "less": describe_difference(None, None, nothing),
            "pairs": 0.0,
        }
    areas = Areas._make(np.concatenate(parts, axis=-1) for parts in zip(*measured, strict=True))
    share = np.array(weights) / pairs
    pooled = float(share @ areas.auroc)
    less = share.copy()
    less[0] = -1
    return {
        "strata": strata,
        "pooled": {"auroc": pooled, **combine_limits(areas, share)},
        "less": describe_difference(pooled, float(areas.auroc[0]), combine_limits(areas, less)),
        "pairs": pairs / float(truth.sum() * (~truth).sum()),
    }


def measure_balanced(
    score: Floats, truth: Bools, patient: Names, covariates: Mapping[str, Floats]
) -> dict[str, Any]:
    """AUROC of scores [n] under overlap weights, with limits, and the cells of each class that the weights are worth.

    Weights count as given, so the limits do not know how uncertain they are.
    """
    table = [column for value in covariates.values() for column in _standardize(value)]
    if not table:
        return _describe(None) | {"positives": None, "negatives": None}
    # Imported late: it takes half a second.
    from sklearn.linear_model import LogisticRegression

    features = np.column_stack(table)
    propensity = LogisticRegression(max_iter=1000).fit(features, truth).predict_proba(features)[:, 1]
    weight = np.where(truth, 1 - propensity, propensity)
    auroc, influence = weigh_pairs(score, truth, weight)
    positives, negatives = (
        float(weight[side].sum() ** 2 / (weight[side] ** 2).sum()) for side in (truth, ~truth)
    )
    codes = np.unique(patient, return_inverse=True)[1]
    independent, clustered = (
        (np.bincount(of, influence) ** 2).sum() for of in (np.arange(len(codes)), codes)
    )
    design = max(1.0, float(clustered / independent)) if independent > 0 else 1.0
    low, high = score_limits(auroc, positives, negatives, design)
    return {"auroc": auroc, "low": low, "high": high, "positives": positives, "negatives": negatives}


def weigh_pairs(score: Floats, truth: Bools, weight: Floats) -> tuple[float, Floats]:
    """The share of pairs, by the product of their weights, that are ranked right, ties half; and its influence [n]."""
    order = np.argsort(score, kind="stable")
    ranks = np.searchsorted(score[order], score, "left"), np.searchsorted(score[order], score, "right")
    share = np.empty(len(score))
    for side in (True, False):
        others = np.concatenate([[0.0], np.cumsum(np.where(truth[order] == side, 0, weight[order]))])
        below = (others[ranks[0]] + others[ranks[1]]) / 2 / others[-1]
        share = np.where(truth == side, below if side else 1 - below, share)
    totals = np.where(truth, weight[truth].sum(), weight[~truth].sum())
    auroc = float((weight * share / totals)[truth].sum())
    return auroc, weight * (share - auroc) / totals


def find_confounder(names: Sequence[str], images: Scored, column: int) -> str | None:
    """The other label that tells most of the one in `column`, as a covariate would.

    Of those with a state in which 10 images of each class of the one in `column` can be compared.
    """
    truth = images.target[:, column] == 1
    told: dict[str, float] = {}
    for other, name in enumerate(names):
        if other == column or NO_FINDING in (name, names[column]):
            continue
        known, states = images.mask[:, other], images.target[:, other] == 1
        cells = np.array(
            [[(known & (truth == one) & (states == two)).sum() for two in (0, 1)] for one in (0, 1)]
        )
        if cells.min(axis=0).max() >= FEW and cells.sum(axis=1).min() > 0:
            share = cells[:, 1] / cells.sum(axis=1)
            told[name] = abs(float(share[1] - share[0]))
    return max(told, key=lambda name: told[name], default=None)


def split_halves(covariates: Mapping[str, Floats]) -> dict[str, Floats]:
    """Each covariate as 1 above its median, 0 below or at it, NaN where unknown; those of two values as they are."""
    halves = {}
    for name, value in covariates.items():
        known = value[~np.isnan(value)]
        if len(known) and known.min() < known.max():
            middle = float(np.median(known))
            middle = middle if middle < known.max() else float(known[known < middle].max())
            halves[name] = np.where(np.isnan(value), np.nan, value > middle)
    return halves


def judge(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """A `verdict` in a sentence, and its `mark`: nothing, caution, or none.

    A label whose AUROC is above guessing, but not within the strata of some variable, has learned `nothing` of the
    disease that shows here. `caution` is for a covariate that alone tells the label, or an AUROC that falls within
    strata by more than .05, each by its interval.
    """
    folded = {
        covariate: max(of["low"], 1 - of["high"])
        for covariate, of in found["covariates"].items()
        if of["auroc"] is not None
    }
    worst = max(folded, key=lambda covariate: folded[covariate], default=None)
    pooled = {
        variable: within
        for variable, within in found["within"].items()
        if within["pooled"]["auroc"] is not None
    }
    # Of all strata the verdict names the projections, which everybody knows, and those that take away most.
    lowest = min(pooled, key=lambda variable: pooled[variable]["pooled"]["auroc"], default="")
    strata = [
        f"{shorten(of['auroc'])} within {'' if variable in SELF_EVIDENT else f'{variable} '}{stratum}"
        for variable in dict.fromkeys(["projection", lowest])
        for stratum, of in (pooled[variable]["strata"] if variable in pooled else {}).items()
        if of["auroc"] is not None
    ]
    lost = [variable for variable, within in pooled.items() if within["pooled"]["low"] <= 0.5]
    fell = [
        variable
        for variable, within in pooled.items()
        if within["less"]["difference"] < -0.05 and within["less"]["excludes_zero"]
    ]
    alone = ""
    if worst is not None and folded[worst] > THRESHOLD:
        tells = found["covariates"][worst]["auroc"]
        alone = f"; {worst} alone {shorten(max(tells, 1 - tells))}"
    if found["auroc"]["high"] < 0.5:
        mark, end = "nothing", "worse than guessing"
    elif found["auroc"]["low"] <= 0.5:
        mark, end = "nothing", "not told from guessing"
    elif lost:
        mark, end = "nothing", f"nothing is left within {' or '.join(lost)}: do not believe it"
    elif alone or fell:
        mark, end = "caution", "treat with caution"
    else:
        mark, end = "none", "no covariate here explains it"
    shown = f"; {', '.join(strata)}" if strata else ""
    return {"mark": mark, "verdict": f"{name} {shorten(found['auroc']['auroc'])}{shown}{alone}: {end}."}


def _measure(value: Floats, truth: Floats | Bools, patient: Names, rows: Bools | None = None) -> Areas:
    """The AUROC of values [n] against truth [n], of the rows where both are known."""
    known = ~(np.isnan(value) | np.isnan(truth.astype(float)))
    mask = known if rows is None else known & rows
    return measure_areas(np.nan_to_num(value)[:, None], truth.astype(float)[:, None], mask[:, None], patient)


def _describe(areas: Areas | None) -> dict[str, Any]:
    """The figure and limits of one area; None where it is undefined."""
    if areas is None or np.isnan(areas.auroc[0]):
        return {"auroc": None, "low": None, "high": None}
    return {name: float(getattr(areas, name)[0]) for name in ("auroc", "low", "high")}


def _standardize(value: Floats) -> list[Floats]:
    """A covariate as its standardized ranks, 0 where unknown; beside it whether it is, if that differs by film."""
    known = ~np.isnan(value)
    ranks = np.unique(value[known], return_inverse=True)[1].astype(float)
    if not len(ranks) or ranks.std() == 0:
        return []
    filled = np.zeros(len(value))
    filled[known] = (ranks - ranks.mean()) / ranks.std()
    return [filled] if known.all() else [filled, (~known).astype(float)]
