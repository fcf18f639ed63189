"""Scores, truth and covariates of a split → whether a shortcut explains each label's AUROC.

A covariate is a property of an image other than the disease: the patient's number, the projection, the sex. If one is
correlated with a label, a network may learn it, and its AUROC falls at the next hospital (Zech et al., Variable
generalization performance of a deep learning model to detect pneumonia, PLOS Medicine 15, 2018; DeGrave et al., AI for
radiographic COVID-19 detection selects shortcuts over signal, Nature Machine Intelligence 3, 2021).

A covariate cannot contribute to the AUROC among images with equal values. So the AUROC A of all pairs is compared
with W, that of the pairs within the same stratum: of each value or group of equal size of each covariate, of the label
most associated with this one, of the label's propensity given all covariates together (Rosenbaum and Rubin, Reducing
bias in observational studies using subclassification on the propensity score, JASA 79, 1984), and of the score that the
covariates predict. With paired 95 % intervals, patients as clusters:

    shown     for some strata, A - W > 0 (Bonferroni over the strata), and less than half of A - .5 is left,
              or W is not distinguishable from .5
    partly    for some strata, A - W > 0 in that sense and above .05, but half or more may be left
    none      for all strata, more than half of A - .5 is left, and the balanced AUROC, too, is above .5
    unclear   anything else: the intervals are too wide to tell
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.measure import metrics
from pipeline.measure.audit import DEVICES, predict, shorten
from pipeline.measure.delong import Areas, combine, measure_areas, score_limits, score_variance, share_won
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.metrics import FEW, NO_LIMITS, NOTHING, Bools, Cells, Facts, Figure, Floats, Ints, Named, Names
from pipeline.measure.scores import Scored

NO_FINDING = "No Finding"  # has no positives in common with any label, so it makes no strata
PROPENSITY, PREDICTED = "propensity", "predicted score"
GROUPS = (5, 20)  # at least and at most, of equal size, of a covariate's values
GROUP_CELLS = 20  # of the rarer class per group, if there are more than the fewest groups
LEVEL = 0.05
SMALL = 0.05  # a drop of AUROC too small to report


class Within(NamedTuple):
    """An AUROC within the strata of a variable, its drop from that of all pairs, and what is left, with limits.

    The limits of `fall` hold for all variables together; those of `left` are of W - .5 - (A - .5) / 2: above 0 if more
    than half of the AUROC above .5 is left. `pairs` is the share of all pairs that are within strata.
    """

    auroc: Figure
    pairs: Figure
    fall: Figure
    left: Figure


def add_belief(evaluation: Evaluation, images: Scored, covariates: Named, strata: Facts, edge: Named = NOTHING) -> None:
    """Add what each label's AUROC rests on; labels with fewer than 10 patients in a class are left out.

    `covariates` are numbers [N] by name, NaN if unknown; `strata` are names [N] by variable, empty if unknown.
    `edge` are further covariates, gray levels outside the lungs, used in the predictions alone, and not for Support
    Devices, whose wires cross the edge. A verdict's group is its mark, and its note the sentence.
    """
    names, level = evaluation.labels, evaluation.unit
    for column, cells in enumerate(metrics.label_cells(names, *images[:4])):
        every = measure_within(cells)
        if every.few[0]:
            continue
        name, score, truth, patient = cells
        rows = images.mask[:, column]
        values = {key: covariate[rows] for key, covariate in covariates.items()}
        edges = {} if name == DEVICES else {key: value[rows] for key, value in edge.items()}
        named = {variable: group[rows] for variable, group in strata.items()}
        groups = {key: np.where(group == "", -1, code_groups(group)) for key, group in named.items()}
        groups |= {key: split_values(value, truth) for key, value in values.items()}
        groups |= find_confounder(names, images.take(rows), column)
        if values or edges:
            table, used = np.column_stack([*values.values(), *edges.values()]), np.ones(len(truth), bool)
            owner, ranks = (np.unique(each, return_inverse=True)[1] for each in (patient, score))
            groups[PROPENSITY] = split_values(predict(table, truth, used, owner), truth)
            groups[PREDICTED] = split_values(predict(table, ranks / len(score), used, owner), truth)
        within = compare_within(cells, every, groups)
        for group, part in within.items():
            for metric, figure in part._asdict().items():
                evaluation.add(level, name, f"{metric}_within", group=group, **figure)
        area = combine(every, [1])
        text = f"{name} {shorten(area['value'])}"
        # Readers ask for the AUROC within each projection first.
        for side in sorted(set(named.get("projection", np.array([])).tolist()) - {""}):
            inside = measure_within(cells, named["projection"] == side)
            figure = {"value": None} if inside.few[0] else combine(inside, [1])
            text += "" if inside.few[0] else f"; {shorten(figure['value'])} within {side}"
            counts = inside.count_cells()[0]
            evaluation.add(level, name, "auroc_within", group=f"projection={side}", **figure, **counts)
        balanced = measure_balanced(score, truth, patient, values)
        mark, verdict = judge(area, within, balanced)
        evaluation.add(level, name, "auroc_balanced", balanced.pop("auroc"), **balanced)
        evaluation.add(level, name, "verdict", group=mark, note=f"{text}: {verdict}.")


def assess_belief(names: Sequence[str], images: Scored, covariates: Named, strata: Facts) -> dict[str, dict[str, str]]:
    """The `mark` and the `verdict` of each label with a verdict, as from `add_belief`."""
    evaluation = Evaluation({"split": "", "unit": "image", "labels": list(names)})
    add_belief(evaluation, images, covariates, strata)
    verdicts = evaluation.select(metric="verdict")
    return {str(row.label): {"mark": str(row.group), "verdict": row.note} for row in verdicts}


def split_values(value: Floats, truth: Bools) -> Ints:
    """The group of each value [n]: of groups of equal size, or of equal values if these are few; -1 if unknown."""
    known = ~np.isnan(value)
    levels = np.unique(value[known])
    count = int(np.clip(min(truth.sum(), (~truth).sum()) // GROUP_CELLS, *GROUPS))
    edges = levels[1:]
    if len(levels) > count:
        edges = np.unique(np.quantile(value[known], np.arange(1, count) / count))
    return np.where(known, np.searchsorted(edges, value, "right"), -1)


def code_groups(group: Names) -> Ints:
    """Groups [n] as numbers in the order in which they first appear, so that equal partitions are equal arrays."""
    codes: Ints = pa.array(group).dictionary_encode().indices.to_numpy()
    return codes


def compare_within(cells: Cells, every: Areas, groups: Mapping[str, Ints]) -> dict[str, Within]:
    """The comparison for each variable, without variables that divide the images exactly as another does.

    `every` is the AUROC of all cells, `groups` are numbers [n], -1 if unknown. Only images of known value count on both
    sides: unknown values are not equal. A variable that is known for fewer than 10 patients of a class is left out: it
    cannot explain more than their share.
    """
    # The same groups under two names, such as AP and projection, are compared once.
    distinct = {code_groups(group).tobytes(): variable for variable, group in reversed(list(groups.items()))}
    compared: dict[str, Within] = {}
    for variable in (name for name in groups if name in distinct.values()):
        group, known = groups[variable], groups[variable] >= 0
        plain = every if known.all() else measure_within(cells, known)
        if plain.few[0]:
            continue
        area = measure_within(cells, known, group)
        sides = [np.bincount(group[known], side[known]) for side in (cells.truth, ~cells.truth)]
        pairs = float(np.dot(*sides) / (every.positives[0] * every.negatives[0]))
        both = plain.join(area)
        left, fall = combine(both, [-0.5, 1]), combine(both, [1, -1], LEVEL / len(distinct))
        left = NO_LIMITS if left["low"] is None else {end: left[end] - 0.25 for end in NO_LIMITS}
        compared[variable] = Within(combine(area, [1]), {"value": pairs}, fall, left)
    return compared


def measure_within(cells: Cells, used: Bools | None = None, group: Ints | None = None) -> Areas:
    """The AUROC of the used cells [n], of all pairs or of those within the same group [n]."""
    mask = np.ones(len(cells.score), bool) if used is None else used
    return measure_areas(cells.score[:, None], cells.truth[:, None].astype(float), mask[:, None], cells.patient, group)


def measure_balanced(score: Floats, truth: Bools, patient: Names, covariates: Named) -> Figure:
    """AUROC of scores [n] under overlap weights, with limits, and the effective number of cells per class.

    The weights, 1 - e for positives and e for negatives, e from a logistic regression on the covariates, make these the
    same in both classes (Li, Morgan and Zaslavsky, Balancing covariates via propensity score weighting, JASA 113,
    2018); exactly so without a penalty. The limits take them as fixed. All None without covariates; an AUROC of None,
    and cells of 0, if these separate the classes completely.
    """
    nothing = dict.fromkeys(("auroc", "low", "high", "positives", "negatives"))
    features: list[Floats] = []
    for value in covariates.values():  # standardized ranks, 0 if unknown; and whether unknown, if any is
        known = ~np.isnan(value)
        ranks = np.unique(value[known], return_inverse=True)[1].astype(float)
        if len(ranks) and ranks.std() > 0:
            filled = np.zeros(len(value))
            filled[known] = (ranks - ranks.mean()) / ranks.std()
            features += [filled] if known.all() else [filled, (~known).astype(float)]
    if not features:
        return nothing
    from sklearn.linear_model import LogisticRegression  # takes half a second

    table = np.column_stack(features)
    propensity = LogisticRegression(C=np.inf, max_iter=1000).fit(table, truth).predict_proba(table)[:, 1]
    weight = np.where(truth, 1 - propensity, propensity)
    sums = [float(weight[side].sum()) for side in (truth, ~truth)]
    if min(sums) < 0.5:  # in images: the classes do not overlap
        return nothing | {"positives": 0.0, "negatives": 0.0}
    # Pairs count by the product of their weights.
    share, totals = share_won(score, truth, weight), np.where(truth, *sums)
    auroc = float((weight * share / totals)[truth].sum())
    influence = weight * (share - auroc) / totals
    cells = [total**2 / float((weight[side] ** 2).sum()) for total, side in zip(sums, (truth, ~truth), strict=True)]
    _, codes = np.unique(patient, return_inverse=True)
    independent, clustered = float((influence**2).sum()), float((np.bincount(codes, influence) ** 2).sum())
    design = max(1.0, clustered / independent) if independent > 0 else 1.0
    low, high = score_limits(auroc, lambda theta: design * score_variance(theta, *cells))
    return dict(zip(nothing, (auroc, low, high, *cells), strict=True))


def find_confounder(names: Sequence[str], images: Scored, column: int) -> dict[str, Ints]:
    """The states [n], -1 if unknown, of the label most associated with the one in `column`, by its name, if any."""
    positive = images.target == 1
    truth = positive[:, [column]]
    # Images by class of the label in `column`, and by state of each label: [2, 2, L].
    cells = np.array(
        [[(images.mask & (truth == own) & (positive == state)).sum(axis=0) for state in (0, 1)] for own in (0, 1)]
    )
    shares = cells[:, 1] / np.maximum(cells.sum(axis=1), 1)
    # A state in which 10 images of each class of the label in `column` can be compared.
    usable = (cells.min(axis=0).max(axis=0) >= FEW) & (cells.sum(axis=1).min(axis=0) > 0)
    usable &= [NO_FINDING not in (name, names[column]) and name != names[column] for name in names]
    gaps = np.where(usable, np.abs(shares[1] - shares[0]), -1)
    place = int(gaps.argmax())
    return {names[place]: np.where(images.mask[:, place], positive[:, place], -1)} if usable.any() else {}


def judge(area: Figure, within: Mapping[str, Within], balanced: Figure) -> tuple[str, str]:
    """The mark of a verdict (shown, partly, none or unclear), and its evidence in words."""
    falls = {variable: part for variable, part in within.items() if (part.fall["low"] or 0) > 0}
    shown = {variable: part for variable, part in falls.items() if part.left["high"] < 0 or part.auroc["low"] <= 0.5}
    partly = {variable: part for variable, part in falls.items() if part.fall["value"] > SMALL}
    unclear = [variable for variable, part in within.items() if (part.left["low"] or 0) <= 0]
    if balanced["auroc"] is not None and balanced["low"] <= 0.5:
        unclear.append("balanced covariates")
    elif balanced["positives"] == 0:
        unclear.append("the overlap of covariates")
    if area["high"] < 0.5:
        return "unclear", "cannot tell: below chance"
    if area["low"] <= 0.5:
        return "unclear", "cannot tell: not distinguishable from chance"
    if shown or partly:
        groups = shown or partly
        worst = min(groups, key=lambda variable: groups[variable].auroc["value"])
        text = f"{shorten(groups[worst].auroc['value'])} among images of equal {worst}"
        single = [variable for variable in falls if variable not in (PROPENSITY, PREDICTED)]
        if worst not in single and single:  # which covariate the predictions rest on most
            first = min(single, key=lambda variable: falls[variable].auroc["value"])
            text = f"{text}, {shorten(falls[first].auroc['value'])} of equal {first}"
        return ("shown", f"shortcut shown: {text}") if shown else ("partly", f"partly a shortcut: {text}")
    if unclear:
        return "unclear", f"cannot tell: too few pairs within {', '.join(unclear)}"
    return "none", f"no shortcut found among {', '.join(within) or 'no covariates'}"
