"""Scores and truth → an evaluation: results of findings, means and groups, verdicts, and comparisons with others.

    calibration = calibrate(names, dev)              # calibration.json
    evaluation = assess(names, valid, calibration)   # evaluation-valid.json

An undefined figure is None, and never part of a mean. Differences between scores of the same patients are paired
(pipeline.measure.delong). Two data sets are independent samples, so the limits of their difference follow from the
limits of both (Newcombe, 1998, method 10; Zou, 2007); the thresholds and calibration remain those of the run's dev.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import comb
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.labels import find_unannotated, name_ages
from pipeline.manifest import name_facts
from pipeline.measure import metrics
from pipeline.measure.audit import find_covariates, find_strata
from pipeline.measure.belief import add_belief
from pipeline.measure.calibration import Calibration, apply_calibration, fit_calibration
from pipeline.measure.delong import Areas, average, combine, measure_areas, measure_precision, subtract, weigh_labels
from pipeline.measure.evaluation import COMMON, OWN, UNITS, Evaluation
from pipeline.measure.metrics import FEW, NO_LIMITS, NOTHING, Bools, Facts, Figure, Floats, Named, Names, label_cells
from pipeline.measure.scores import Scored as Scored
from pipeline.measure.scores import study_level as study_level

ERRORS = {"brier": metrics.brier_score, "ece": metrics.calibration_error}
AREAS = {"auroc": measure_areas, "auprc": measure_precision}
DECISIONS = (0.05, 0.1, 0.2, 0.3, 0.5)  # probabilities at which to act, for the net benefit
KEPT = 0.6  # the AUROC above which a label is still recognized in altered images
# The groups to compare; images in none of them are counted separately.
GROUPS = {"sex": ("Female", "Male"), "age": ("18-39", "40-59", "60-79", "80+"), "projection": ("AP", "PA")}
MOST_GROUPS = 8  # of a fact
GIVEN = "given"  # the rule of a threshold that the user chose
LEVEL = 0.05  # of all gaps between groups together
MEMBERS = "mean of the members"
ALTERED = "altered: "  # in front of the name of an alteration, as a scorer
Settings = Mapping[str, Any]  # ready for JSON
Fits = Mapping[str, Calibration]  # by label


class Beside(NamedTuple):
    """What scores are compared with, by name: other scores [N, L] of the same rows, and facts of the images.

    `against` are other networks', `members` an ensemble's, `altered` those of altered images; `readers` are calls
    [N, L] of 1, 0 or NaN. `edge` are gray levels [N] outside the lungs.
    """

    against: Named = NOTHING
    readers: Named = NOTHING
    members: Named = NOTHING
    altered: Named = NOTHING
    edge: Named = NOTHING


NONE = Beside()


def judge_scores(
    evaluated: Settings, images: Scored, table: pa.Table, calibration: Settings, beside: Beside = NONE
) -> Evaluation:
    """The evaluation of scores: of `images`, whose facts are the rows of a label table.

    `evaluated` has `split`, `unit`, `labels`, and anything else for the head; `calibration` is as for `assess`.
    """
    # Numbers in the order of names sort three times as fast as names.
    images = images._replace(patient=np.unique(images.patient, return_inverse=True)[1])
    texts = [name for name, kind in name_facts(table).items() if kind == "string"]
    facts = {name: table[name].to_numpy().astype(object) for name in texts}
    split, unit, names = (evaluated[name] for name in ("split", "unit", "labels"))
    evaluation = assess(names, images, calibration, split=split, unit=unit, facts=facts)
    head = evaluation.head
    head |= {name: value for name, value in evaluated.items() if name not in head}
    head["not_annotated"] = find_unannotated(table)
    head |= {name: list(getattr(beside, name)) for name in ("against", "readers", "members", "altered")}
    add_belief(evaluation, images, find_covariates(table)[0], find_strata(table), beside.edge)
    for name, scores in beside.against.items():
        add_other(evaluation, images, name, scores)
    altered = {f"{ALTERED}{name}": scores for name, scores in beside.altered.items()}
    add_comparisons(evaluation, unit, images, altered)
    add_comparisons(evaluation, unit, images, beside.members, mean=MEMBERS)
    readers = {}
    for name, calls in beside.readers.items():  # of a study, positive if any view's is, and NaN if none is read
        read = study_level(images._replace(scores=np.nan_to_num(calls), mask=~np.isnan(calls)))
        readers[name] = np.where(read.mask, read.scores, np.nan)
    add_readers(evaluation, study_level(images, head["combine"]), readers)
    return evaluation


def calibrate(names: Sequence[str], dev: Scored, sensitivity: float = 0.9, combine: str = "max") -> dict[str, Any]:
    """`fit_calibration` on dev's images, and on its studies, whose scores are the max or mean of their views'."""
    levels = {"image": dev, "study": study_level(dev, combine)}
    fits = {level: fit_calibration(names, *rows[:4], sensitivity) for level, rows in levels.items()}
    return {"sensitivity": sensitivity, "combine": combine} | fits


def leave_uncalibrated(names: Sequence[str], threshold: float | None, combine: str = "max") -> dict[str, Any]:
    """In place of `calibrate` without a dev: scores as they are, and the user's threshold, if any."""
    fit = {"temperature": None, "bias": None, "note": None}
    fits = {name: fit | {"thresholds": {} if threshold is None else {GIVEN: threshold}} for name in names}
    return {"sensitivity": None, "combine": combine, "image": fits, "study": fits}


def assess(
    names: Sequence[str],
    images: Scored,
    fits: Settings,
    *,
    split: str = "",
    unit: str = "image",
    facts: Facts = NOTHING,
) -> Evaluation:
    """The figures of a split's scores; `fits` is what `calibrate` or `leave_uncalibrated` returns.

    `unit` is what a row of `images` is: image or study. `facts` are texts [N] of more subgroups, None if unknown; those
    with many values only count in `many_groups` of the head. ValueError for no images, or a score that is not finite.
    """
    if len(images.scores) == 0:
        raise ValueError("no images to evaluate")
    counts = {name: len(set(fact.tolist()) - {None, ""}) for name, fact in facts.items()}
    head: dict[str, Any] = {"split": split, "unit": unit, "labels": list(names)}
    head |= {name: fits[name] for name in ("combine", "sensitivity")}
    head["many_groups"] = {name: count for name, count in counts.items() if count > MOST_GROUPS}
    evaluation = Evaluation(head)
    levels = {"image": images} if unit == "image" else {}
    for level, rows in (levels | {"study": study_level(images, fits["combine"])}).items():
        _add_level(evaluation, level, rows, fits[level])
    few = {name: facts[name] for name, count in counts.items() if 1 < count <= MOST_GROUPS}
    add_groups(evaluation, images, fits["image"], few)
    return evaluation


def _add_level(evaluation: Evaluation, level: str, rows: Scored, fits: Fits) -> None:
    """Findings and their means, of images or of studies."""
    names = evaluation.labels
    evaluation.add(level, None, UNITS[level], len(rows.scores))
    evaluation.add(level, None, "patients", len(np.unique(rows.patient)))
    measured = {metric: measure(*rows[:4]) for metric, measure in AREAS.items()}
    errors: dict[str, Figure] = {}
    for name, score, truth, patient in label_cells(names, *rows[:4]):
        fit = fits[name]
        for metric in ("temperature", "bias"):
            evaluation.add(level, name, metric, fit[metric], note=fit["note"] or "")
        for rule, threshold in fit["thresholds"].items():
            evaluation.add(level, name, "threshold", threshold, rule)
            rates = {} if threshold is None else metrics.measure_rates(threshold, score, truth, patient)
            for rate, figure in rates.items():
                evaluation.add(level, name, rate, group=rule, **figure)
        calibrated = apply_calibration(score, fit)
        for at in DECISIONS if len(truth) else ():
            for metric, figure in metrics.decide(calibrated, truth, patient, at).items():
                evaluation.add(level, name, metric, group=f"at {at}", **figure)
        errors[name] = {metric: measure(score, truth) for metric, measure in ERRORS.items()}
        if evaluation.head["sensitivity"] is not None:
            errors[name] |= {f"{metric}_calibrated": measure(calibrated, truth) for metric, measure in ERRORS.items()}
    counts = dict(zip(names, measured["auroc"].count_cells(), strict=True))
    for label, over in average(names, measured["auroc"]).items():
        for metric, area in measured.items():
            evaluation.add(level, label, metric, **combine(area, weigh_labels(names, over)), **counts.get(label, {}))
        for metric in errors[names[0]]:
            mean = sum(errors[name][metric] for name in over) / len(over) if over else None
            value = errors[label][metric] if label in errors else mean
            evaluation.add(level, label, metric, value, **counts.get(label, {}))


def add_groups(evaluation: Evaluation, images: Scored, fits: Fits, more: Facts = NOTHING) -> None:
    """Add, by sex, age, projection and the texts [N] of `more`: images, AUROC per label, TPR at dev's Youden threshold.

    `tpr_gap` is the highest TPR minus the lowest, over groups with positives of at least 10 patients; None if there are
    fewer than two such groups. The data choose which two groups differ most, and which label a reader looks at,
    so the limits of all pairs of groups, of all variables and labels, hold jointly at 95 % (Bonferroni).
    """
    names, level = evaluation.labels, evaluation.unit
    facts = {"sex": images.sex, "age": name_ages(images.age), "projection": images.projection, **more}
    calls: dict[tuple[str, str], list[tuple[Bools, Names]]] = {}  # of positives [n], and their patients
    for variable, fact in facts.items():
        compared = GROUPS.get(variable) or sorted(set(fact.tolist()) - {None, ""})
        measured: dict[str, Areas] = {}
        for name in compared:
            group, inside = f"{variable}={name}", fact == name
            evaluation.add(level, None, "images", int(inside.sum()), group)
            # Over all patients, so that patients in two groups are recognized.
            rows = images._replace(mask=images.mask & inside[:, None])
            areas = measured[group] = measure_areas(*rows[:4])
            for cells, counts in zip(label_cells(names, *rows[:4]), areas.count_cells(), strict=True):
                label, score, truth, patient = cells
                threshold = next(iter(fits[label]["thresholds"].values()), None)  # Youden's, or the user's
                positive = truth & (threshold is not None)
                called, owner = score[positive] >= (threshold or 0), patient[positive]
                auroc = combine(areas, weigh_labels(names, [label]))
                evaluation.add(level, label, "auroc", group=group, **auroc, **counts)
                evaluation.add(level, label, "tpr", group=group, **metrics.measure_share(called, owner), **counts)
                enough = len(np.unique(owner)) >= FEW
                calls.setdefault((variable, label), []).extend([(called, owner)] if enough else [])
        _add_macros(evaluation, measured)
        for name, count in sorted(Counter(name or "unknown" for name in fact.tolist()).items()):
            if name not in compared:
                evaluation.add(level, None, "images", count, f"{variable}={name}", note="in no group")
    pairs = sum(comb(len(groups), 2) for groups in calls.values())
    for (variable, label), groups in calls.items():
        rates = [metrics.measure_share(*group, LEVEL / max(pairs, 1)) for group in groups]
        rates.sort(key=lambda rate: [*rate.values()])
        # The limits assume that no patient is in two groups.
        gap = NO_LIMITS if len(rates) < 2 else metrics.subtract_independent(rates[-1], rates[0])
        evaluation.add(level, label, "tpr_gap", group=variable, **gap)


def assess_groups(names: Sequence[str], images: Scored, fits: Fits) -> dict[str, dict[str, dict[str, Any]]]:
    """`tpr_gap` and `tpr_gap_limits` of each label, by variable, as from `add_groups`."""
    evaluation = Evaluation({"split": "", "unit": "image", "labels": list(names)})
    add_groups(evaluation, images, fits)
    gaps: dict[str, dict[str, dict[str, Any]]] = {}
    for row in evaluation.select(metric="tpr_gap"):
        variable = gaps.setdefault(str(row.group), {"tpr_gap": {}, "tpr_gap_limits": {}})
        variable["tpr_gap"][str(row.label)] = row.value
        variable["tpr_gap_limits"][str(row.label)] = {"low": row.low, "high": row.high}
    return gaps


def _add_macros(evaluation: Evaluation, measured: Mapping[str, Areas]) -> None:
    """Add each group's macro AUROC, and each later group's minus the first one's, paired by patient.

    A macro is the mean over the labels with 10 patients of each class in every group that has any such label; its note
    names them. So groups are compared on the same labels, with enough cells of each; the other groups have None.
    """
    names, level = evaluation.labels, evaluation.unit
    compared = {group: areas for group, areas in measured.items() if not areas.few.all()}
    few = np.any([areas.few for areas in compared.values()], axis=0)
    kept = [name for name, lacking in zip(names, few, strict=True) if not lacking] if compared else []
    share = weigh_labels(names, kept)
    for group, areas in measured.items():
        macro = combine(areas, share if group in compared else 0 * share)
        evaluation.add(level, "macro", "auroc", group=group, **macro, note=", ".join(kept))
    for group, areas in list(compared.items())[1:]:
        difference = subtract([areas], [next(iter(compared.values()))], share)
        evaluation.add(level, "macro", "auroc_less_first", group=group, **difference)


def add_other(evaluation: Evaluation, images: Scored, name: str, scores: Floats) -> None:
    """Add the paired differences from other scores [N, L], of images and of studies.

    Only on the findings and rows that they cover: a column of NaN is a missing finding, any other NaN a missing row.
    Raises DataError if they cover none.
    """
    known, units = ~np.isnan(scores), UNITS[evaluation.unit]
    columns = known.any(axis=0)
    rows = known[:, columns].all(axis=1)
    if not columns.any() or not rows.any():
        raise DataError(f"`against` {name}: no scores of these {units} and labels")
    if not rows.all():
        evaluation.add(evaluation.unit, None, units, int(rows.sum()), scorer=name)
    names = np.array(evaluation.labels)[columns].tolist()
    ours = images.take(rows)
    ours = ours._replace(**{field: getattr(ours, field)[:, columns] for field in ("scores", "target", "mask")})
    other = ours._replace(scores=scores[rows][:, columns])
    for level in evaluation.levels:
        if level == "study":
            ours, other = (study_level(side, evaluation.head["combine"]) for side in (ours, other))
        add_comparisons(evaluation, level, ours, {name: other.scores}, names=names)


def combine_views(table: pa.Table, scores: Floats, studies: Scored) -> dict[str, Floats]:
    """Scores [N, L] of a table's images, NaN if missing → of the studies [S, L], by how views are combined.

    By the max and by the mean over a study's views; unchanged, under "", if all have one view.
    """
    learned = ~np.isnan(scores).all(axis=0)
    known = ~np.isnan(scores[:, learned]).any(axis=1)
    patient, study = (table[name].to_numpy()[known] for name in ("patient", "study"))
    target, mask = np.zeros_like(scores[known]), np.ones(scores[known].shape, bool)
    views = Scored(scores[known], target, mask, patient, study, *[patient] * 3)  # facts are not needed
    combined: dict[str, Floats] = {}
    for how in ("max", "mean"):
        level = study_level(views, how)
        place = {pair: row for row, pair in enumerate(zip(level.patient, level.study, strict=True))}
        rows = [place.get(pair, -1) for pair in zip(studies.patient, studies.study, strict=True)]
        chosen = np.where((np.array(rows) >= 0)[:, None] & learned, level.scores[rows], np.nan)
        if len(level.scores) == len(views.scores):
            return {"": chosen}
        combined[f", {how} of views"] = chosen
    return combined


def add_comparisons(
    evaluation: Evaluation, level: str, rows: Scored, others: Named, mean: str = "", names: Sequence[str] = ()
) -> None:
    """Add AUROC and AUPRC of other scores [N, L] of the same rows, and ours minus them, for findings and means.

    With `mean`, also those of the mean of all others' areas, by that name. Differences are paired by patient. `names`
    are those of the columns, by default the evaluation's. Means are over the same findings as ours.
    """
    if not others:
        return
    names = names or evaluation.labels
    own = {metric: measure(*rows[:4]) for metric, measure in AREAS.items()}
    means = average(names, own["auroc"])
    cells = {name: rows._replace(scores=scores)[:4] for name, scores in others.items()}
    groups = {name: [{metric: measure(*cells[name]) for metric, measure in AREAS.items()}] for name in cells}
    groups |= {mean: [areas for (areas,) in groups.values()]} if mean else {}
    for scorer, group in groups.items():
        for metric, area in own.items():
            areas = [member[metric] for member in group]
            joined = reduce(Areas.join, areas)
            for label, over in means.items():
                share = weigh_labels(names, over)
                figure = combine(joined, np.tile(share / len(areas), len(areas)))
                evaluation.add(level, label, metric, **figure, scorer=scorer)
                difference = subtract([area], areas, share)
                evaluation.add(level, label, f"{metric}_difference", **difference, scorer=scorer)


def add_own(evaluation: Evaluation, images: Scored, own: Evaluation) -> None:
    """Add a run's AUROCs on its own valid, and those of `images` minus these, for findings with both AUROCs.

    Their mean is over those with 10 patients of each class on both sides, which its note names. The limits of the own
    valid's mean are as evaluated if it is over the same findings; otherwise they are the means of its findings' limits,
    as if these were fully correlated: the note of the difference is then `widened`.
    """
    level, names, widened = evaluation.unit, evaluation.labels, ""
    rows = {name: (evaluation.get("auroc", name), own.get("auroc", name)) for name in names}
    pairs = {name: pair for name, pair in rows.items() if pair[0].value is not None and pair[1].low is not None}
    kept = [name for name, pair in pairs.items() if not any(row.few for row in pair)]
    if kept:
        common = combine(measure_areas(*images[:4]), weigh_labels(names, kept))
        evaluation.add(level, COMMON, "auroc", **common, note=", ".join(kept))
        mean = replace(own.get("auroc", "macro10"), label=COMMON, note=", ".join(kept))
        known = [name for name in own.labels if own.get("auroc", name).value is not None]
        if set(kept) != {name for name in known if not own.get("auroc", name).few}:
            widened = "widened"
            limits = np.array([[row.number, row.low, row.high] for row in (pairs[name][1] for name in kept)], float)
            mean = replace(mean, **dict(zip(("value", "low", "high"), limits.mean(axis=0).tolist(), strict=True)))
        pairs[COMMON] = evaluation.get("auroc", COMMON), mean
    fields = ("value", "low", "high", "few", "positives", "negatives", "note")
    for label, pair in pairs.items():
        judged, other = ({name: getattr(row, name) for name in fields} for row in pair)
        evaluation.add(level, label, "auroc", group=OWN, **other)
        difference, few = metrics.subtract_independent(judged, other), any(row.few for row in pair)
        note = widened if label == COMMON else ""
        evaluation.add(level, label, "auroc_difference", group=OWN, **difference, few=few, note=note)


def add_readers(evaluation: Evaluation, studies: Scored, readers: Named) -> None:
    """Add each reader's rates, from calls [S, L] of 1, 0 or NaN (not read). All figures are of the studies read.

    `network` is the sensitivity of the network's ROC curve, linear between its points, at the reader's specificity,
    on the same studies. `below` is 1 if it is higher than the reader's, else 0; None if the studies have one class.
    """
    for reader, calls in readers.items():
        read = ~np.isnan(calls)
        evaluation.add("study", None, "studies", int(read.any(axis=1).sum()), scorer=reader)
        mask = studies.mask & read
        for column, cells in enumerate(label_cells(evaluation.labels, *studies[:2], mask, studies.patient)):
            name, score, truth, patient = cells
            if not len(truth):
                continue
            counts = metrics.count_classes(truth, patient)
            rates = metrics.measure_rates(0.5, calls[mask[:, column], column], truth, patient)
            for rate, figure in rates.items():
                evaluation.add("study", name, rate, **figure, **counts, scorer=reader)
            sensitivity, specificity = (rates[rate]["value"] for rate in ("sensitivity", "specificity"))
            network = below = None
            if sensitivity is not None and specificity is not None:  # both classes
                curve = metrics.threshold_curve(score, truth)
                hits = np.concatenate([[0], curve.true_positives]) / truth.sum()
                alarms = np.concatenate([[0], curve.false_positives]) / (~truth).sum()
                top = np.append(np.diff(alarms) > 0, True)  # of each vertical segment
                network = float(np.interp(1 - specificity, alarms[top], hits[top]))
                below = float(network > sensitivity + 1e-9)  # beyond rounding
            evaluation.add("study", name, "network", network, scorer=reader)
            evaluation.add("study", name, "below", below, **counts, scorer=reader)
