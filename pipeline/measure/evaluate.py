"""Scores, truth and facts of a split's images → the figures of each finding, mean and group, as rows.

    calibration = calibrate(names, dev)              # calibration.json
    evaluation = assess(names, valid, calibration)   # evaluation-valid.json

An undefined figure is None, and never part of a mean.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.labels import name_ages
from pipeline.measure.bootstrap import (
    describe_difference,
    interval,
    resample_auprc,
    resampled_mean,
)
from pipeline.measure.calibration import apply_calibration, fit_calibration
from pipeline.measure.delong import Areas, combine_limits, measure_areas, weigh_labels
from pipeline.measure.evaluation import MEANS, UNITS, Evaluation
from pipeline.measure.metrics import (
    FEW,
    Bools,
    Floats,
    Ints,
    areas,
    averaged_labels,
    brier_score,
    calibration_error,
    count_classes,
    decide,
    independent_limits,
    label_cells,
    mean_of,
    rates_at,
    report_auroc,
    wilson_limits,
)

AREAS = ("auroc", "auprc")  # the metrics with intervals
DECISIONS = (0.05, 0.1, 0.2, 0.3, 0.5)  # probabilities at which to act, for the net benefit
KEPT = 0.6  # the AUROC above which a label is told without what an alteration takes away
# The groups to compare; images in none of them are counted separately.
GROUPS = {
    "sex": ("Female", "Male"),
    "age": ("18-39", "40-59", "60-79", "80+"),
    "projection": ("AP", "PA"),
}
MOST_GROUPS = 8  # of a fact
GIVEN = "given"  # the rule of a threshold that the user chose
LIMITS = ("low", "high")
LEVEL = 0.05  # of all gaps between groups together


class Scored(NamedTuple):
    """The scored images of a split, or one row per study of them."""

    scores: Floats  # [N, L] in [0, 1]
    target: Floats  # [N, L] in {0, 1}
    mask: Bools  # [N, L] the cells to use
    patient: npt.NDArray[Any]  # [N] names
    study: npt.NDArray[Any]  # [N] names or numbers, unique within a patient
    sex: npt.NDArray[Any]  # [N] names; None or empty: unknown
    age: Ints  # [N] years; -1 unknown
    projection: npt.NDArray[Any]  # [N] names; None or empty: unknown

    def take(self, rows: Any) -> "Scored":
        """The rows that an index selects: numbers, bools [N] or a slice."""
        return Scored(*(column[rows] for column in self))


def calibrate(
    names: Sequence[str], dev: Scored, sensitivity: float = 0.9, combine: str = "max"
) -> dict[str, Any]:
    """Calibration and thresholds per label (`fit_calibration`), fitted on dev's images and on its studies.

    `combine` is how the views' scores make a study's score: max or mean.
    """
    levels = {"image": dev, "study": study_level(dev, combine)}
    return {"sensitivity": sensitivity, "combine": combine} | {
        level: fit_calibration(names, *rows[:4], sensitivity) for level, rows in levels.items()
    }


def assess(
    names: Sequence[str],
    images: Scored,
    calibration: Mapping[str, Any],
    *,
    split: str = "",
    unit: str = "image",
    resamples: int = 1000,
    seed: int = 0,
    facts: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> Evaluation:
    """The figures of a split's scores; `calibration` is what `calibrate` or `leave_uncalibrated` returns.

    `unit` is what a row of `images` is: image or study. AUPRC intervals come from `resamples` resamples of patients,
    drawn by `seed`; with 0 they are None. `facts` are texts [N] to make further subgroups of, None where unknown;
    those of more than MOST_GROUPS values are counted in `many_groups` of the head instead. Raises ValueError if there
    are no images or a score is not finite.
    """
    if len(images.scores) == 0:
        raise ValueError("no images to evaluate")
    values = {name: _list_values(fact) for name, fact in facts.items()}
    few = {name: facts[name] for name, texts in values.items() if 1 < len(texts) <= MOST_GROUPS}
    head: dict[str, Any] = {"split": split, "unit": unit, "labels": list(names)}
    head |= {name: calibration[name] for name in ("combine", "sensitivity")}
    head |= {"resamples": resamples, "seed": seed}
    head["many_groups"] = {name: len(texts) for name, texts in values.items() if len(texts) > MOST_GROUPS}
    evaluation = Evaluation(head)
    levels = {"image": images} if unit == "image" else {}
    for level, rows in (levels | {"study": study_level(images, calibration["combine"])}).items():
        _add_level(evaluation, level, rows, calibration[level])
    _add_groups(evaluation, assess_groups(names, images, calibration["image"], few))
    return evaluation


def leave_uncalibrated(names: Sequence[str], threshold: float | None, combine: str = "max") -> dict[str, Any]:
    """In place of `calibrate` without a dev: scores as they are, and a threshold of the user's own, if any."""
    fit = {"temperature": None, "bias": None, "note": None}
    fits = {name: fit | {"thresholds": {} if threshold is None else {GIVEN: threshold}} for name in names}
    return {"sensitivity": None, "combine": combine, "image": fits, "study": fits}


def study_level(images: Scored, combine: str = "max") -> Scored:
    """One row per study: the max or mean of its views' scores; a cell is in the mask if any view's is.

    Views of a study share their labels, patient, sex and age; cells outside the mask (damaged images) are ignored.
    Raises ValueError for any other `combine`.
    """
    if combine not in ("max", "mean"):
        raise ValueError(f"combine is '{combine}'; choose max or mean")
    codes = [np.unique(column, return_inverse=True)[1] for column in (images.patient, images.study)]
    _, study = np.unique(codes[0] * (codes[1].max() + 1) + codes[1], return_inverse=True)
    order = np.argsort(study, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(study[order]) != 0]))
    scores, target, mask = (array[order] for array in images[:3])
    counts = np.add.reduceat(mask, starts, axis=0, dtype=np.int64)
    if combine == "max":
        combined = np.maximum.reduceat(np.where(mask, scores, 0), starts, axis=0)
    else:
        sums = np.add.reduceat(np.where(mask, scores, 0), starts, axis=0, dtype=np.float64)
        combined = (sums / np.maximum(counts, 1)).astype(scores.dtype)
    positive = np.maximum.reduceat(np.where(mask, target, 0), starts, axis=0)
    return Scored(combined, positive, counts > 0, *(fact[order[starts]] for fact in images[3:]))


def assess_groups(
    names: Sequence[str],
    images: Scored,
    calibration: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """By sex, age, projection and the texts [N] of `more`: images, AUROC per label, TPR at dev's Youden threshold.

    A group's `macro_auroc` is the mean over `macro_labels`: those with 10 patients of each class in every group
    that has any such label. So groups are compared on the same labels, with enough cells of each; the other groups
    have None. `less_first` is each later group's macro minus the first group's. `tpr_gap` is the highest TPR minus
    the lowest, over groups with positives of at least 10 patients, with limits in `tpr_gap_limits`; None if there are
    fewer than two such groups. Which two groups differ most is chosen by the data, and so is the label that a reader
    looks at: the limits of all pairs of groups, of all variables and labels, hold together at 95 % (Bonferroni).
    """
    facts = {"sex": images.sex, "age": name_ages(images.age), "projection": images.projection, **more}
    groups_of = GROUPS | {name: _list_values(fact) for name, fact in more.items()}
    limits = {name: first_threshold(calibration[name]) for name in names}
    report: dict[str, Any] = {}
    for variable, compared in groups_of.items():
        rows = {name: facts[variable] == name for name in compared}
        # Over all patients, so that patients in two groups are recognized.
        measured = {
            name: measure_areas(*images[:2], images.mask & chosen[:, None], images.patient)
            for name, chosen in rows.items()
        }
        groups = {
            name: _assess_group(names, images.take(chosen), calibration, measured[name])
            for name, chosen in rows.items()
        }
        enough = {
            group: {name for name in names if not result["labels"][name]["few"]}
            for group, result in groups.items()
        }
        told = [group for group, own in enough.items() if own]
        kept = [name for name in names if told and all(name in enough[group] for group in told)]
        share = weigh_labels(names, kept)
        for group, result in groups.items():
            result["macro_auroc"] = mean_of(result["labels"], kept, "auroc") if group in told else None
            nothing = np.zeros_like(share)
            result["interval"] = combine_limits(measured[group], share if group in told else nothing)
        others = Counter(name or "unknown" for name in facts[variable].tolist() if name not in compared)
        report[variable] = {
            "groups": groups,
            "macro_labels": kept,
            "less_first": _subtract_first(told, groups, measured, share),
            "others": dict(sorted(others.items())),
            "tpr": {
                name: _find_calls(images, column, limits[name], rows) for column, name in enumerate(names)
            },
        }
    pairs = sum(comb(len(calls), 2) for of in report.values() for calls in of["tpr"].values())
    for of in report.values():
        gaps = {name: _tpr_gap(calls, LEVEL / max(pairs, 1)) for name, calls in of.pop("tpr").items()}
        of["tpr_gap"] = {name: gap["difference"] for name, gap in gaps.items()}
        of["tpr_gap_limits"] = {name: {"low": gap["low"], "high": gap["high"]} for name, gap in gaps.items()}
    return report


def first_threshold(fit: Mapping[str, Any]) -> float | None:
    """The threshold of groups' TPR: Youden's, which comes first, or the user's own."""
    return next(iter(fit["thresholds"].values()), None)


def _subtract_first(
    names: Sequence[str],
    groups: Mapping[str, Mapping[str, Any]],
    measured: Mapping[str, Areas],
    share: Floats,
) -> dict[str, Any]:
    """Each later group's macro less the first one's, paired by patient; `share` are the labels' weights in a macro."""
    return {
        name: describe_difference(
            groups[name]["macro_auroc"],
            groups[names[0]]["macro_auroc"],
            combine_limits(measured[name].join(measured[names[0]]), np.concatenate([share, -share])),
        )
        for name in names[1:]
    }


def _list_values(fact: npt.NDArray[Any]) -> tuple[str, ...]:
    return tuple(sorted({text for text in fact.tolist() if text}))


def _add_level(
    evaluation: Evaluation, level: str, rows: Scored, calibration: Mapping[str, Mapping[str, Any]]
) -> None:
    """Findings and their means, of images or of studies."""
    names, resamples, seed = evaluation.labels, evaluation.head["resamples"], evaluation.head["seed"]
    evaluation.add(level, None, UNITS[level], len(rows.scores))
    evaluation.add(level, None, "patients", len(np.unique(rows.patient)))
    means, ours = average(names, rows)
    drawn = resample_auprc(*rows[:4], resamples, seed)
    cells = list(label_cells(names, *rows[:3]))
    figures: dict[str, dict[str, float | None]] = {}
    for column, (name, score, truth) in enumerate(cells):
        fit, fitted = calibration[name], evaluation.head["sensitivity"] is not None
        figures[name] = dict(zip(AREAS, areas(score, truth), strict=True))
        for suffix, scores in {
            "": score,
            "_calibrated": apply_calibration(score, fit) if fitted else None,
        }.items():
            if scores is not None:
                figures[name] |= {f"brier{suffix}": brier_score(scores, truth)}
                figures[name] |= {f"ece{suffix}": calibration_error(scores, truth)}
        counts = count_classes(truth, rows.patient[rows.mask[:, column]])
        for metric, value in figures[name].items():
            more: dict[str, Any] = dict(counts)
            if metric == "auroc":
                more |= combine_limits(ours, weigh_labels(names, means[name]))
            elif metric == "auprc":
                more |= _add_resamples(evaluation, level, name, resampled_mean(drawn, names, means[name]))
            evaluation.add(level, name, metric, value, more)
    for mean in MEANS:
        for metric in figures[names[0]]:
            more = {}
            if metric == "auroc":
                more = combine_limits(ours, weigh_labels(names, means[mean]))
            elif metric == "auprc":
                more = _add_resamples(evaluation, level, mean, resampled_mean(drawn, names, means[mean]))
            evaluation.add(level, mean, metric, mean_of(figures, means[mean], metric), more)
    for column, (name, score, truth) in enumerate(cells):
        patient = rows.patient[rows.mask[:, column]]
        _add_decisions(evaluation, (level, name), score, truth, patient, calibration[name])


def _add_resamples(evaluation: Evaluation, level: str, label: str, values: Floats) -> dict[str, Any]:
    """The limits of an AUPRC; the number of resamples that they rest on is a figure too."""
    found = interval(values)
    evaluation.add(level, label, "auprc_resamples", found.pop("resamples"))
    return found


def average(names: Sequence[str], rows: Scored) -> tuple[dict[str, list[str]], Areas]:
    """The findings of each mean, and the areas: a finding is a mean over itself, or over nothing if it is undefined."""
    labels = report_auroc(names, *rows[:4])["labels"]
    alone = {name: [name] if label["auroc"] is not None else [] for name, label in labels.items()}
    return alone | averaged_labels(labels), measure_areas(*rows[:4])


def _add_decisions(
    evaluation: Evaluation,
    place: tuple[str, str],
    score: Floats,
    truth: Bools,
    patient: npt.NDArray[Any],
    fit: Mapping[str, Any],
) -> None:
    """A finding's calibration, rates at its thresholds, and net benefit, from its cells [n]; `place`: level, name."""
    for metric in ("temperature", "bias"):
        evaluation.add(*place, metric, fit[metric], note=fit["note"] or "")
    for rule, threshold in fit["thresholds"].items():
        evaluation.add(*place, "threshold", threshold, group=rule)
        if threshold is not None:
            limits = rate_limits(threshold, score, truth, patient)
            for rate, value in rates_at(threshold, score, truth).items():
                evaluation.add(*place, rate, value, limits.get(rate), group=rule)
    calibrated = apply_calibration(score, fit)
    for at in DECISIONS if len(truth) else ():
        found = decide(calibrated, truth, patient, at)
        gain = found["gain"]
        evaluation.add(*place, "net_benefit", found["model"], group=f"at {at}")
        evaluation.add(*place, "net_benefit_all", found["all"], group=f"at {at}")
        evaluation.add(*place, "net_benefit_gain", gain.pop("difference"), gain, group=f"at {at}")


def _add_groups(evaluation: Evaluation, report: Mapping[str, Any]) -> None:
    """What `assess_groups` says, as rows; a macro's note names its findings."""
    level = evaluation.unit
    for variable, compared in report.items():
        over = ", ".join(compared["macro_labels"])
        for name, found in compared["groups"].items():
            group = f"{variable}={name}"
            evaluation.add(level, None, "images", found["images"], group=group)
            for label, figures in found["labels"].items():
                counts = {key: figures[key] for key in ("positives", "negatives", "few")}
                for metric in ("auroc", "tpr"):
                    more = counts | figures["intervals"][metric]
                    evaluation.add(level, label, metric, figures[metric], more, group=group)
            evaluation.add(
                level, "macro", "auroc", found["macro_auroc"], found["interval"], group=group, note=over
            )
        for name, less in compared["less_first"].items():
            limits = {side: less[side] for side in ("low", "high")}
            group = f"{variable}={name}"
            evaluation.add(level, "macro", "auroc_less_first", less["difference"], limits, group=group)
        for name, count in compared["others"].items():
            evaluation.add(level, None, "images", count, group=f"{variable}={name}", note="in no group")
        for label, gap in compared["tpr_gap"].items():
            evaluation.add(level, label, "tpr_gap", gap, compared["tpr_gap_limits"][label], group=variable)


def add_belief(evaluation: Evaluation, belief: Mapping[str, Mapping[str, Any]]) -> None:
    """Add what `assess_belief` says of images: `within` each variable, and a verdict whose group is its mark."""
    level = evaluation.unit
    for label, found in belief.items():
        sides = {f"projection={side}": area for side, area in found["projections"].items()}
        for group, area in (found["within"] | sides).items():
            more = {key: area[key] for key in (*LIMITS, "positives", "negatives", "few") if key in area}
            evaluation.add(level, label, "auroc_within", area["auroc"], more, group=group)
        for group, area in found["within"].items():
            fall = {side: area["fall"][side] for side in LIMITS}
            evaluation.add(level, label, "pairs_within", area["pairs"], group=group)
            evaluation.add(level, label, "fall_within", area["fall"]["difference"], fall, group=group)
            evaluation.add(level, label, "left_within", None, area["left"], group=group)
        balanced = dict(found["balanced"])
        evaluation.add(level, label, "auroc_balanced", balanced.pop("auroc"), balanced)
        evaluation.add(level, label, "verdict", None, group=found["mark"], note=found["verdict"])


def rate_limits(
    threshold: float, score: Floats, truth: Bools, patient: npt.NDArray[Any]
) -> dict[str, dict[str, float | None]]:
    """Limits of those of `rates_at` that are a share of cells [n], with patients as clusters (`wilson_limits`)."""
    called = score >= threshold
    parts = {
        "sensitivity": (called, truth),
        "specificity": (~called, ~truth),
        "ppv": (truth, called),
        "npv": (~truth, ~called),
    }
    return {rate: wilson_limits(hits[of], patient[of]) for rate, (hits, of) in parts.items()}


def _assess_group(
    names: Sequence[str], images: Scored, calibration: Mapping[str, Mapping[str, Any]], measured: Areas
) -> dict[str, Any]:
    """A group's figures per label."""
    labels: dict[str, Any] = {}
    for column, (name, score, truth) in enumerate(label_cells(names, *images[:3])):
        threshold = first_threshold(calibration[name])
        tpr, limits = None, wilson_limits(truth[:0], truth[:0])
        patient = images.patient[images.mask[:, column]]
        if threshold is not None:
            tpr = rates_at(threshold, score, truth)["sensitivity"]
            limits = rate_limits(threshold, score, truth, patient)["sensitivity"]
        labels[name] = {
            "auroc": areas(score, truth)[0],
            **count_classes(truth, patient),
            "tpr": tpr,
            "intervals": {
                "auroc": combine_limits(measured, weigh_labels(names, [name])),
                "tpr": limits,
            },
        }
    return {"images": len(images.scores), "labels": labels}


Calls = tuple[Bools, npt.NDArray[Any]]  # which of a group's positives [n] are called, and their patients


def _find_calls(
    images: Scored, column: int, threshold: float | None, rows: Mapping[str, Bools]
) -> list[Calls]:
    """A label's calls in each of the groups that have positives of 10 patients; none without a threshold."""
    if threshold is None:
        return []
    sick = images.mask[:, column] & (images.target[:, column] == 1)
    groups = [
        (images.scores[sick & of, column] >= threshold, images.patient[sick & of]) for of in rows.values()
    ]
    return [(called, patient) for called, patient in groups if len(np.unique(patient)) >= FEW]


def _tpr_gap(groups: Sequence[Calls], level: float) -> dict[str, float | None]:
    """The highest TPR minus the lowest, with limits at a level, as for separate patients."""
    rates = []
    for called, patient in groups:
        limits = wilson_limits(called, patient, level)
        rates.append((float(called.mean()), limits["low"] or 0.0, limits["high"] or 0.0))
    if len(rates) < 2:
        return dict.fromkeys(("difference", "low", "high"))
    lowest, *_, highest = sorted(rates)
    return {"difference": highest[0] - lowest[0], **independent_limits(highest, lowest)}
