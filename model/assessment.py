"""Scores, truth and facts of a split's images → everything that is reported of it, as one JSON document.

    calibration = calibrate(names, dev)              # calibration.json
    evaluation = assess(names, valid, calibration)   # evaluation-valid.json

The document holds the image level at its top (labels, means, intervals, against), the same for studies under
`study`, and subgroups. What is undefined is None, and never part of a mean.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.bootstrap import difference_interval, interval, resample_areas, resampled_mean
from model.calibration import apply_temperature, fit_calibration
from model.metrics import (
    FEW,
    Bools,
    Floats,
    Ints,
    areas,
    averaged_labels,
    brier_score,
    calibration_error,
    label_cells,
    mean_of,
    rates_at,
    report_auroc,
)

AVERAGED = ("auroc", "auprc", "brier", "ece", "brier_calibrated", "ece_calibrated")
AREAS = ("auroc", "auprc")  # the metrics with intervals
# The groups that are compared; images in none of them are counted apart.
GROUPS = {
    "sex": ("Female", "Male"),
    "age": ("18-39", "40-59", "60-79", "80+"),
    "projection": ("AP", "PA"),
}
AGES = {"unknown": -1, "0-17": 0, "18-39": 18, "40-59": 40, "60-79": 60, "80+": 80}  # from that year on


class Scored(NamedTuple):
    """The scored images of a split, or one row per study of them."""

    scores: Floats  # [N, L] in [0, 1]
    target: Floats  # [N, L] in {0, 1}
    mask: Bools  # [N, L] the cells that count
    patient: npt.NDArray[Any]  # [N] names
    study: npt.NDArray[Any]  # [N] names or numbers, unique within a patient
    sex: npt.NDArray[Any]  # [N] names; None or empty: unknown
    age: Ints  # [N] years; -1 unknown
    projection: npt.NDArray[Any]  # [N] names; None or empty: unknown

    def take(self, rows: Any) -> "Scored":
        """The rows of an index: numbers, bools [N] or a slice."""
        return Scored(*(column[rows] for column in self))


def calibrate(
    names: Sequence[str], dev: Scored, sensitivity: float = 0.9, combine: str = "max"
) -> dict[str, Any]:
    """Temperatures and thresholds per label (`fit_calibration`), fitted on dev's images and on its studies.

    `combine` is how a study's score comes from its views: max or mean.
    """
    levels = {"image": dev, "study": study_level(dev, combine)}
    return {"sensitivity": sensitivity, "combine": combine} | {
        level: fit_calibration(names, rows.scores, rows.target, rows.mask, sensitivity)
        for level, rows in levels.items()
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
) -> dict[str, Any]:
    """The whole evaluation of a split, fit for JSON; `calibration` as `calibrate` gives it.

    `unit` is what a row of `images` is: image, or study where a run scores these.
    `against` is another run's name and its scores [N, L] of the same images. Intervals are from so many
    resamples of patients by `seed`; with 0 they are None. Raises ValueError without images, or where a score is
    not finite.
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
    return level | {
        "unit": unit,
        "study": study,
        "subgroups": assess_groups(names, images, calibration["image"]),
        "calibration": calibration,
    }


def study_level(images: Scored, combine: str = "max") -> Scored:
    """One row per study: the max or mean of its views' scores; in the mask where any view is.

    Views of a study share their labels, patient, sex and age; cells out of the mask (damaged images) count for
    nothing. Raises ValueError for another `combine`.
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
    names: Sequence[str], images: Scored, calibration: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Sex, age and projection: per group the images, AUROC per label and TPR at dev's Youden threshold.

    A group's `macro_auroc` is over `macro_labels`, those with an AUROC in every group that has any, so that groups
    are compared on the same labels. `tpr_gap` is the highest TPR less the lowest, over groups with 10
    positives or more, and None where fewer than two have them.
    """
    bands = np.array(list(AGES))[np.digitize(images.age, list(AGES.values())) - 1]
    facts = {"sex": images.sex, "age": bands, "projection": images.projection}
    report: dict[str, Any] = {}
    for variable, compared in GROUPS.items():
        rows = {name: facts[variable] == name for name in compared}
        groups = {
            name: _assess_group(names, images.take(chosen), calibration) for name, chosen in rows.items()
        }
        defined = [
            {name for name in names if group["labels"][name]["auroc"] is not None}
            for group in groups.values()
        ]
        some = [own for own in defined if own]
        kept = [name for name in names if some and all(name in own for own in some)]
        for group, own in zip(groups.values(), defined, strict=True):
            group["macro_auroc"] = mean_of(group["labels"], kept, "auroc") if own else None
        others = Counter(name or "unknown" for name in facts[variable].tolist() if name not in compared)
        report[variable] = {
            "groups": groups,
            "macro_labels": kept,
            "others": dict(sorted(others.items())),
            "tpr_gap": {
                name: _tpr_gap([group["labels"][name] for group in groups.values()]) for name in names
            },
        }
    return report


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
        name: _assess_label(score, truth, calibration[name])
        for name, score, truth in label_cells(names, *rows[:3])
    }
    means = averaged_labels(labels)
    report: dict[str, Any] = {
        f"{mean}_{metric}": mean_of(labels, kept, metric)
        for mean, kept in means.items()
        for metric in AVERAGED
    }
    # A label is a mean over itself, and over nothing where it is undefined.
    kept = {name: [name] if label["auroc"] is not None else [] for name, label in labels.items()} | means
    ours = resample_areas(*rows[:4], resamples, seed)
    report |= {
        "skipped": [name for name in names if not kept[name]],
        "rows": len(rows.scores),
        "patients": len(np.unique(rows.patient)),
        "labels": labels,
        "intervals": {"resamples": resamples, "seed": seed}
        | {
            metric: {key: interval(resampled_mean(ours, metric, names, over)) for key, over in kept.items()}
            for metric in AREAS
        },
    }
    if against is not None:
        theirs = resample_areas(against[1], *rows[1:4], resamples, seed)
        cells = label_cells(names, against[1], *rows[1:3])
        other = {name: dict(zip(AREAS, areas(score, truth), strict=True)) for name, score, truth in cells}
        report["against"] = {"run": against[0]} | {
            metric: {
                key: difference_interval(
                    mean_of(labels, over, metric),
                    mean_of(other, over, metric),
                    *(resampled_mean(values, metric, names, over) for values in (ours, theirs)),
                )
                for key, over in kept.items()
            }
            for metric in AREAS
        }
    return report


def _assess_label(score: Floats, truth: Bools, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of one label's cells [n]."""
    auroc, auprc = areas(score, truth)
    positives = int(truth.sum())
    calibrated = apply_temperature(score, calibration["temperature"])
    return {
        "auroc": auroc,
        "auprc": auprc,
        "positives": positives,
        "negatives": len(truth) - positives,
        "brier": brier_score(score, truth),
        "brier_calibrated": brier_score(calibrated, truth),
        "ece": calibration_error(score, truth),
        "ece_calibrated": calibration_error(calibrated, truth),
        "operating_points": {
            rule: None if threshold is None else {"threshold": threshold} | rates_at(threshold, score, truth)
            for rule, threshold in calibration["thresholds"].items()
        },
    }


def _assess_group(
    names: Sequence[str], images: Scored, calibration: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    labels: dict[str, Any] = dict(report_auroc(names, *images[:3])["labels"])
    for name, score, truth in label_cells(names, *images[:3]):
        threshold = calibration[name]["thresholds"]["youden"]
        tpr = None if threshold is None else rates_at(threshold, score, truth)["sensitivity"]
        labels[name] = labels[name] | {"tpr": tpr}
    return {"images": len(images.scores), "labels": labels}


def _tpr_gap(results: Sequence[Mapping[str, Any]]) -> float | None:
    rates = [result["tpr"] for result in results if result["positives"] >= FEW and result["tpr"] is not None]
    return max(rates) - min(rates) if len(rates) > 1 else None
