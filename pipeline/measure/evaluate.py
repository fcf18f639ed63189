"""Scores, truth and facts of a split's images → the results of each finding, mean and group, as rows.

    calibration = calibrate(names, dev)              # calibration.json
    evaluation = assess(names, valid, calibration)   # evaluation-valid.json

An undefined figure is None, and never part of a mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.labels import name_ages
from pipeline.measure.calibration import Calibration, apply_calibration, fit_calibration
from pipeline.measure.delong import Areas, combine, measure_areas, measure_precision, report_auroc, weigh_labels
from pipeline.measure.evaluation import UNITS, Evaluation
from pipeline.measure.metrics import (
    FEW,
    NO_LIMITS,
    Bools,
    Cells,
    Figure,
    Floats,
    Ints,
    Names,
    averaged_labels,
    brier_score,
    calibration_error,
    count_classes,
    decide,
    label_cells,
    mean_of,
    measure_rates,
    subtract_independent,
    wilson_limits,
)

ERRORS = {"brier": brier_score, "ece": calibration_error}
AREAS = {"auroc": measure_areas, "auprc": measure_precision}
DECISIONS = (0.05, 0.1, 0.2, 0.3, 0.5)  # probabilities at which to act, for the net benefit
KEPT = 0.6  # the AUROC above which a label is still recognized in altered images
# The groups to compare; images in none of them are counted separately.
GROUPS = {"sex": ("Female", "Male"), "age": ("18-39", "40-59", "60-79", "80+"), "projection": ("AP", "PA")}
MOST_GROUPS = 8  # of a fact
GIVEN = "given"  # the rule of a threshold that the user chose
LEVEL = 0.05  # of all gaps between groups together


class Scored(NamedTuple):
    """The scored images of a split, or one row per study of them."""

    scores: Floats  # [N, L] in [0, 1]
    target: Floats  # [N, L] in {0, 1}
    mask: Bools  # [N, L] the cells to use
    patient: Names  # [N]
    study: Names  # [N] names or numbers, unique within a patient
    sex: Names  # [N]; None or empty: unknown
    age: Ints  # [N] years; -1 unknown
    projection: Names  # [N]; None or empty: unknown

    @staticmethod
    def of(scores: Floats, target: Floats, mask: Bools, table: pa.Table) -> "Scored":
        """Scores, targets and masks [N, L] with the facts of a label table's rows [N]."""
        patient, study, sex = (table[name].to_numpy() for name in ("patient", "study", "sex"))
        age = pc.fill_null(table["age"], -1).to_numpy()
        projection = pc.fill_null(table["projection"], "").to_numpy()
        return Scored(scores, target, mask, patient, study, sex, age, projection)

    def take(self, rows: Any) -> "Scored":
        """The rows that an index selects: numbers, bools [N] or a slice."""
        return Scored(*(column[rows] for column in self))


def calibrate(names: Sequence[str], dev: Scored, sensitivity: float = 0.9, combine: str = "max") -> dict[str, Any]:
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
    facts: Mapping[str, Names] = MappingProxyType({}),
) -> Evaluation:
    """The figures of a split's scores; `calibration` is what `calibrate` or `leave_uncalibrated` returns.

    `unit` is what a row of `images` is: image or study. `facts` are texts [N] for further subgroups, None if unknown;
    those of more than MOST_GROUPS values are counted in `many_groups` of the head instead. Raises ValueError if there
    are no images or a score is not finite.
    """
    if len(images.scores) == 0:
        raise ValueError("no images to evaluate")
    values = {name: _list_values(fact) for name, fact in facts.items()}
    few = {name: facts[name] for name, texts in values.items() if 1 < len(texts) <= MOST_GROUPS}
    head: dict[str, Any] = {"split": split, "unit": unit, "labels": list(names)}
    head |= {name: calibration[name] for name in ("combine", "sensitivity")}
    head["many_groups"] = {name: len(texts) for name, texts in values.items() if len(texts) > MOST_GROUPS}
    evaluation = Evaluation(head)
    levels = {"image": images} if unit == "image" else {}
    for level, rows in (levels | {"study": study_level(images, calibration["combine"])}).items():
        _add_level(evaluation, level, rows, calibration[level])
    add_groups(evaluation, images, calibration["image"], few)
    return evaluation


def leave_uncalibrated(names: Sequence[str], threshold: float | None, combine: str = "max") -> dict[str, Any]:
    """In place of `calibrate` without a dev: scores as they are, and the user's threshold, if any."""
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


def _add_level(evaluation: Evaluation, level: str, rows: Scored, calibration: Mapping[str, Calibration]) -> None:
    """Findings and their means, of images or of studies."""
    names = evaluation.labels
    evaluation.add(level, None, UNITS[level], len(rows.scores))
    evaluation.add(level, None, "patients", len(np.unique(rows.patient)))
    measured = {metric: measure(*rows[:4]) for metric, measure in AREAS.items()}
    cells = {cell.label: cell for cell in label_cells(names, *rows[:4])}
    figures: dict[str, Figure] = {}
    for name, cell in cells.items():
        scores = {"": cell.score}
        if evaluation.head["sensitivity"] is not None:
            scores["_calibrated"] = apply_calibration(cell.score, calibration[name])
        figures[name] = {
            f"{metric}{suffix}": measure(score, cell.truth)
            for suffix, score in scores.items()
            for metric, measure in ERRORS.items()
        }
    for label, over in average(names, rows).items():
        counts = count_classes(cells[label].truth, cells[label].patient) if label in cells else {}
        for metric, area in measured.items():
            evaluation.add(level, label, metric, **combine(area, weigh_labels(names, over)), **counts)
        for metric in figures[names[0]]:
            value = figures[label][metric] if label in figures else mean_of(figures, over, metric)
            evaluation.add(level, label, metric, value, **counts)
    for name, cell in cells.items():
        _add_decisions(evaluation, level, cell, calibration[name])


def average(names: Sequence[str], rows: Scored) -> dict[str, list[str]]:
    """The findings of each mean; a finding is a mean over itself, or over nothing if it is undefined."""
    labels = report_auroc(names, *rows[:4])["labels"]
    alone = {name: [name] if label["auroc"] is not None else [] for name, label in labels.items()}
    return alone | averaged_labels(labels)


def _add_decisions(evaluation: Evaluation, level: str, cells: Cells, fit: Calibration) -> None:
    """A finding's calibration, rates at its thresholds, and net benefit."""
    name, score, truth, patient = cells
    for metric in ("temperature", "bias"):
        evaluation.add(level, name, metric, fit[metric], note=fit["note"] or "")
    for rule, threshold in fit["thresholds"].items():
        evaluation.add(level, name, "threshold", threshold, rule)
        rates = {} if threshold is None else measure_rates(threshold, score, truth, patient)
        for rate, figure in rates.items():
            evaluation.add(level, name, rate, group=rule, **figure)
    calibrated = apply_calibration(score, fit)
    for at in DECISIONS if len(truth) else ():
        for metric, figure in decide(calibrated, truth, patient, at).items():
            evaluation.add(level, name, metric, group=f"at {at}", **figure)


def _list_values(fact: Names) -> tuple[str, ...]:
    return tuple(sorted({text for text in fact.tolist() if text}))


Calls = tuple[Bools, Names]  # which of a group's positives [n] are called, and their patients


def add_groups(
    evaluation: Evaluation,
    images: Scored,
    fits: Mapping[str, Calibration],
    more: Mapping[str, Names] = MappingProxyType({}),
) -> None:
    """Add, by sex, age, projection and the texts [N] of `more`: images, AUROC per label, TPR at dev's Youden threshold.

    `tpr_gap` is the highest TPR minus the lowest, over groups with positives of at least 10 patients; None if there are
    fewer than two such groups. The data choose which two groups differ most, and which label a reader looks at,
    so the limits of all pairs of groups, of all variables and labels, hold jointly at 95 % (Bonferroni).
    """
    facts = {"sex": images.sex, "age": name_ages(images.age), "projection": images.projection, **more}
    calls: dict[tuple[str, str], list[Calls]] = {}
    for variable, fact in facts.items():
        compared = GROUPS[variable] if variable in GROUPS else _list_values(fact)
        # Over all patients, so that patients in two groups are recognized.
        measured = {
            f"{variable}={name}": measure_areas(*images[:2], images.mask & (fact == name)[:, None], images.patient)
            for name in compared
        }
        for name, group in zip(compared, measured, strict=True):
            rows = images.take(fact == name)
            evaluation.add(evaluation.unit, None, "images", len(rows.scores), group)
            for label, called in _add_group(evaluation, group, rows, fits, measured[group]):
                calls.setdefault((variable, label), []).extend(called)
        _add_macros(evaluation, measured)
        others, counts = np.unique([name or "unknown" for name in fact.tolist()], return_counts=True)
        for name, count in zip(others.tolist(), counts.tolist(), strict=True):
            if name not in compared:
                evaluation.add(evaluation.unit, None, "images", count, f"{variable}={name}", note="in no group")
    pairs = sum(comb(len(groups), 2) for groups in calls.values())
    for (variable, label), groups in calls.items():
        gap = _tpr_gap(groups, LEVEL / max(pairs, 1))
        evaluation.add(evaluation.unit, label, "tpr_gap", group=variable, **gap)


def assess_groups(
    names: Sequence[str], images: Scored, fits: Mapping[str, Calibration]
) -> dict[str, dict[str, dict[str, Any]]]:
    """`tpr_gap` and `tpr_gap_limits` of each label, by variable, as from `add_groups`."""
    evaluation = Evaluation({"split": "", "unit": "image", "labels": list(names)})
    add_groups(evaluation, images, fits)
    gaps: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation.select(metric="tpr_gap"):
        variable = gaps.setdefault(str(row.group), {"tpr_gap": {}, "tpr_gap_limits": {}})
        variable["tpr_gap"][str(row.label)] = row.value
        variable["tpr_gap_limits"][str(row.label)] = {"low": row.low, "high": row.high}
    return gaps


def _add_group(
    evaluation: Evaluation, group: str, rows: Scored, fits: Mapping[str, Calibration], measured: Areas
) -> Iterator[tuple[str, list[Calls]]]:
    """Add a group's figures; yield each label's calls of its positives, if these are of 10 patients."""
    names, level = evaluation.labels, evaluation.unit
    for name, score, truth, patient in label_cells(names, *rows[:4]):
        counts = count_classes(truth, patient)
        threshold = next(iter(fits[name]["thresholds"].values()), None)  # Youden's, which comes first, or the user's
        evaluation.add(level, name, "auroc", group=group, **combine(measured, weigh_labels(names, [name])), **counts)
        tpr = NO_LIMITS if threshold is None else measure_rates(threshold, score, truth, patient)["sensitivity"]
        evaluation.add(level, name, "tpr", group=group, **tpr, **counts)
        enough = len(np.unique(patient[truth])) >= FEW
        yield name, [(score[truth] >= threshold, patient[truth])] if enough and threshold is not None else []


def _add_macros(evaluation: Evaluation, measured: Mapping[str, Areas]) -> None:
    """Add each group's macro AUROC, and each later group's minus the first one's, paired by patient.

    A macro is the mean over the labels with 10 patients of each class in every group that has any such label; its note
    names them. So groups are compared on the same labels, with enough cells of each; the other groups have None.
    """
    names, level = evaluation.labels, evaluation.unit
    rows = {group: [evaluation.get("auroc", name, level, group) for name in names] for group in measured}
    compared = [group for group in measured if any(not row.few for row in rows[group])]
    kept = [
        name for column, name in enumerate(names) if compared and all(not rows[group][column].few for group in compared)
    ]
    share = weigh_labels(names, kept)
    for group in rows:
        macro = combine(measured[group], share if group in compared else 0 * share)
        evaluation.add(level, "macro", "auroc", group=group, **macro, note=", ".join(kept))
    for group in compared[1:]:
        both = measured[group].join(measured[compared[0]])
        difference = combine(both, np.concatenate([share, -share]))
        evaluation.add(level, "macro", "auroc_less_first", group=group, **difference)


def _tpr_gap(groups: Sequence[Calls], level: float) -> Figure:
    """The highest TPR minus the lowest, with limits at a level, assuming separate patients."""
    rates = [{"value": float(called.mean()), **wilson_limits(called, patient, level)} for called, patient in groups]
    rates.sort(key=lambda rate: [*rate.values()])
    return NO_LIMITS if len(rates) < 2 else subtract_independent(rates[-1], rates[0])
