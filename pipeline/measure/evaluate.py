"""Scores, truth and facts of a split's images → everything reported about it, as one JSON document.

    calibration = calibrate(names, dev)              # calibration.json
    evaluation = assess(names, valid, calibration)   # evaluation-valid.json

The top of the document is the image level (labels, means, intervals, against); `study` holds the same for studies,
and `subgroups` the groups. Undefined figures are None and never part of a mean.
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
    difference_interval,
    interval,
    resample_auprc,
    resampled_mean,
)
from pipeline.measure.calibration import apply_calibration, fit_calibration
from pipeline.measure.delong import Areas, combine_limits, measure_areas, weigh_labels
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

AVERAGED = ("auroc", "auprc", "brier", "ece", "brier_calibrated", "ece_calibrated")
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
    unit: str = "image",
    against: tuple[str, Floats] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    facts: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The whole evaluation of a split, ready for JSON; `calibration` is what `calibrate` returns.

    `unit` is what a row of `images` is: image, or study if the run scores studies. `against` is another run's name
    and its scores [N, L] of the same images. AUPRC intervals come from `resamples` resamples of patients, drawn by
    `seed`; with 0 they are None. `facts` are texts [N] to make further
    subgroups of, None where unknown; those of more than MOST_GROUPS values are counted in `many_groups` instead. Raises
    ValueError if there are no images or a score is not finite.
    """
    if len(images.scores) == 0:
        raise ValueError("no images to evaluate")
    combine = calibration["combine"]
    level = _assess_level(names, images, calibration["image"], against, resamples, seed)
    studies = study_level(images, combine)
    if against is not None:
        other = study_level(images._replace(scores=against[1]), combine)
        against = (against[0], other.scores)
    study = _assess_level(names, studies, calibration["study"], against, resamples, seed)
    values = {name: _list_values(fact) for name, fact in facts.items()}
    few = {name: facts[name] for name, texts in values.items() if 1 < len(texts) <= MOST_GROUPS}
    return level | {
        "unit": unit,
        "study": study,
        "subgroups": assess_groups(names, images, calibration["image"], few),
        "many_groups": {name: len(texts) for name, texts in values.items() if len(texts) > MOST_GROUPS},
        "calibration": calibration,
    }


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
    limits = {name: calibration[name]["thresholds"]["youden"] for name in names}
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


def assess_altered(
    names: Sequence[str], images: Scored, altered: Mapping[str, Floats]
) -> dict[str, dict[str, Any]]:
    """AUROCs of the scores [N, L] of altered images, with limits: per label, and their mean as in `averaged_labels`.

    `less` is each AUROC less that of the images as they are, paired. `kept` are the labels, of those with 10 patients
    of each class, whose AUROC stays above KEPT with the alteration: the lower limit is above it.
    """
    plain = measure_areas(*images[:4])
    means = averaged_labels(report_auroc(names, *images[:4])["labels"])
    over = {name: [name] for name in names} | {"macro": means["macro10"] or means["macro"]}
    found = {}
    for alteration, scores in altered.items():
        ours = measure_areas(scores, *images[1:4])
        both = ours.join(plain)
        figures: dict[str, dict[str, Any]] = {}
        for key, of in over.items():
            share = weigh_labels(names, of)
            limits = combine_limits(ours, share)
            paired = combine_limits(both, np.concatenate([share, -share]))
            auroc, before = (
                None if limits["low"] is None else float(share @ np.nan_to_num(which.auroc))
                for which in (ours, plain)
            )
            figures[key] = {"auroc": auroc, **limits, "less": describe_difference(auroc, before, paired)}
        kept = [name for name in means["macro10"] if figures[name]["low"] > KEPT]
        found[alteration] = {"labels": figures, "macro_labels": over["macro"], "kept": kept}
    return found


def _assess_level(
    names: Sequence[str],
    rows: Scored,
    calibration: Mapping[str, Mapping[str, Any]],
    against: tuple[str, Floats] | None,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Labels, means, intervals and comparison of images or of studies."""
    labels = {
        name: _assess_label(score, truth, rows.patient[rows.mask[:, column]], calibration[name])
        for column, (name, score, truth) in enumerate(label_cells(names, *rows[:3]))
    }
    means = averaged_labels(labels)
    report: dict[str, Any] = {
        f"{mean}_{metric}": mean_of(labels, kept, metric)
        for mean, kept in means.items()
        for metric in AVERAGED
    }
    # A label is a mean over itself, or over nothing if it is undefined.
    kept = {name: [name] if label["auroc"] is not None else [] for name, label in labels.items()} | means
    shares = {key: weigh_labels(names, over) for key, over in kept.items()}
    ours = measure_areas(*rows[:4])
    drawn = resample_auprc(*rows[:4], resamples, seed)
    report |= {
        "skipped": [name for name in names if not kept[name]],
        "rows": len(rows.scores),
        "patients": len(np.unique(rows.patient)),
        "labels": labels,
        "intervals": {"resamples": resamples, "seed": seed}
        | {
            "auroc": {key: combine_limits(ours, share) for key, share in shares.items()},
            "auprc": {key: interval(resampled_mean(drawn, names, over)) for key, over in kept.items()},
        },
    }
    if against is not None:
        both = ours.join(measure_areas(against[1], *rows[1:4]))
        theirs = resample_auprc(against[1], *rows[1:4], resamples, seed)
        cells = label_cells(names, against[1], *rows[1:3])
        other = {name: dict(zip(AREAS, areas(score, truth), strict=True)) for name, score, truth in cells}
        report["against"] = {
            "run": against[0],
            "auroc": {
                key: describe_difference(
                    mean_of(labels, over, "auroc"),
                    mean_of(other, over, "auroc"),
                    combine_limits(both, np.concatenate([shares[key], -shares[key]])),
                )
                for key, over in kept.items()
            },
            "auprc": {
                key: difference_interval(
                    mean_of(labels, over, "auprc"),
                    mean_of(other, over, "auprc"),
                    *(resampled_mean(values, names, over) for values in (drawn, theirs)),
                )
                for key, over in kept.items()
            },
        }
    return report


def _assess_label(
    score: Floats, truth: Bools, patient: npt.NDArray[Any], calibration: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of one label's cells [n]."""
    auroc, auprc = areas(score, truth)
    calibrated = apply_calibration(score, calibration)
    return {
        "auroc": auroc,
        "auprc": auprc,
        **count_classes(truth, patient),
        "brier": brier_score(score, truth),
        "brier_calibrated": brier_score(calibrated, truth),
        "ece": calibration_error(score, truth),
        "ece_calibrated": calibration_error(calibrated, truth),
        "net_benefit": [decide(calibrated, truth, patient, at) for at in DECISIONS] if len(truth) else [],
        "operating_points": {
            rule: None
            if threshold is None
            else {"threshold": threshold}
            | rates_at(threshold, score, truth)
            | {"intervals": rate_limits(threshold, score, truth, patient)}
            for rule, threshold in calibration["thresholds"].items()
        },
    }


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
        threshold = calibration[name]["thresholds"]["youden"]
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
