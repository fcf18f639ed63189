"""Scores beside others': another run's, other ways to score studies, an ensemble's members, altered images, other data.

Differences between scores of the same patients are paired (pipeline.measure.delong). Two data sets are independent
samples, so the limits of their difference follow from the limits of its sides (Newcombe, 1998, method 10; Zou, 2007);
the thresholds and calibration stay those of the run's own dev.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.labels import hash_fraction
from pipeline.measure.bootstrap import interval, resample_auprc, resampled_mean
from pipeline.measure.calibration import apply_calibration, fit_calibration
from pipeline.measure.delong import combine_limits, measure_areas, weigh_labels
from pipeline.measure.evaluate import AREAS, LIMITS, Scored, average
from pipeline.measure.evaluation import COMMON, OWN, Evaluation, Row
from pipeline.measure.metrics import (
    Floats,
    areas,
    brier_score,
    calibration_error,
    count_classes,
    independent_limits,
    label_cells,
    mean_of,
    report_auroc,
)

if TYPE_CHECKING:
    import pandas as pd

STUDY = ["patient", "study"]
MEMBERS = "mean of the members"
ALTERED = "altered: "  # in front of the name of an alteration, as a scorer


def combine_views(scores: "pd.DataFrame", name: str) -> "dict[str, pd.DataFrame]":
    """A run's scores of images → scores of studies, by max and by mean over views; unchanged if all have one view.

    `scores` has the columns patient, study and labels; the result maps a method's name to a row per study.
    """
    groups = scores.groupby(STUDY)
    if groups.size().max() == 1:
        return {name: scores.set_index(STUDY)}
    return {f"{name}, {how} of views": groups.agg(how) for how in ("max", "mean")}


def group_by_views(table: pa.Table) -> "pd.Series":
    """Which views each study in a split has, by (patient, study)."""
    import pandas as pd  # here and below, because it takes a second

    frame = pd.DataFrame({name: table[name].to_numpy() for name in (*STUDY, "view")})
    of_view = {view: frame["view"] == view for view in ("frontal", "lateral")}
    counts = frame.assign(**of_view).groupby(STUDY)[["frontal", "lateral"]].any()
    names = np.select(
        [counts["frontal"] & counts["lateral"], counts["frontal"], counts["lateral"]],
        ["frontal and lateral", "frontal alone", "lateral alone"],
        "other views alone",
    )
    return pd.Series(names, counts.index)


def add_methods(
    evaluation: Evaluation,
    names: Sequence[str],
    studies: Scored,
    others: "Mapping[str, pd.DataFrame]",
    views: "pd.Series",
) -> None:
    """Add other methods' AUROCs, and ours less theirs, on the studies that all have scored, and by their views.

    `others` are their scores by (patient, study). Raises DataError if no study is scored by all.
    """
    import pandas as pd

    index = pd.MultiIndex.from_arrays([studies.patient, studies.study], names=STUDY)
    methods = {name: frame.reindex(index)[list(names)].to_numpy() for name, frame in others.items()}
    common = np.all([~np.isnan(scores).any(axis=1) for scores in methods.values()], axis=0)
    if not common.any():
        raise DataError(f"none of these studies is scored by all of {', '.join(methods)}")
    of_study = views.reindex(index).to_numpy()
    groups = {"all": common} | {name: common & (of_study == name) for name in sorted(set(of_study[common]))}
    for group, rows in groups.items():
        place, chosen = f"studies={group}", studies.take(rows)
        evaluation.add("study", None, "studies", int(rows.sum()), group=place)
        means, area = average(names, chosen)
        labels = report_auroc(names, *chosen[:4])["labels"]
        for label, over in means.items():
            limits = combine_limits(area, weigh_labels(names, over))
            evaluation.add("study", label, "auroc", mean_of(labels, over, "auroc"), limits, group=place)
        add_comparison(
            evaluation, "study", chosen, {name: scores[rows] for name, scores in methods.items()}, place
        )


def add_comparison(
    evaluation: Evaluation,
    level: str,
    rows: Scored,
    others: Mapping[str, Floats],
    group: str | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Add the AUROCs of others' scores [N, L] of the same rows, and ours less theirs, for findings and means.

    `names` are those of the columns, by default the evaluation's. Means are over the findings that ours is over.
    """
    names = names or evaluation.labels
    means, ours = average(names, rows)
    cells = measure_cells(names, rows, rows.scores)
    for scorer, scores in others.items():
        area, theirs = measure_areas(scores, *rows[1:4]), measure_cells(names, rows, scores)
        both = ours.join(area)
        for label, over in means.items():
            share = weigh_labels(names, over)
            value, own = (mean_of(figures, over, "auroc") for figures in (theirs, cells))
            limits = combine_limits(area, share)
            evaluation.add(level, label, "auroc", value, limits, group=group, scorer=scorer)
            limits, less = combine_limits(both, np.concatenate([share, -share])), _subtract(own, value)
            evaluation.add(level, label, "auroc_difference", less, limits, group=group, scorer=scorer)


def measure_cells(names: Sequence[str], rows: Scored, scores: Floats) -> dict[str, dict[str, float | None]]:
    """AUROC and AUPRC of scores [N, L] of the rows, by finding."""
    return {
        name: dict(zip(AREAS, areas(score, truth), strict=True))
        for name, score, truth in label_cells(names, scores, *rows[1:3])
    }


def add_auprc(
    evaluation: Evaluation, level: str, rows: Scored, scorer: str, scores: Floats, names: Sequence[str]
) -> None:
    """Add our AUPRC less that of another's scores [N, L] of the same rows, on the same resamples."""
    resamples, seed = evaluation.head["resamples"], evaluation.head["seed"]
    means, _ = average(names, rows)
    ours, theirs = (measure_cells(names, rows, which) for which in (rows.scores, scores))
    drawn = [resample_auprc(which, *rows[1:4], resamples, seed) for which in (rows.scores, scores)]
    for label, over in means.items():
        mine, other = (resampled_mean(values, names, over) for values in drawn)
        limits = {side: interval(mine - other)[side] for side in LIMITS}
        value = _subtract(mean_of(ours, over, "auprc"), mean_of(theirs, over, "auprc"))
        evaluation.add(level, label, "auprc_difference", value, limits, scorer=scorer)


def add_gain(evaluation: Evaluation, rows: Scored, members: Mapping[str, Floats]) -> None:
    """Add the AUROCs of an ensemble's members, their mean, and what the ensemble gains over it, paired by patient.

    `members` are their scores [N, L] of the same rows: the gain is a contrast of correlated AUROCs.
    """
    names, level = evaluation.labels, evaluation.unit
    means, joined = average(names, rows)
    add_comparison(evaluation, level, rows, members)
    for scores in members.values():
        joined = joined.join(measure_areas(scores, *rows[1:4]))
    for label, over in means.items():
        share = weigh_labels(names, over)
        limits = combine_limits(joined, np.concatenate([share, *[-share / len(members)] * len(members)]))
        values = [evaluation.get("auroc", label, scorer=name).value for name in members]
        mean = None if None in values else sum(value or 0 for value in values) / len(values)
        evaluation.add(level, label, "auroc", mean, scorer=MEMBERS)
        gain = _subtract(evaluation.get("auroc", label).value, mean)
        evaluation.add(level, label, "auroc_difference", gain, limits, scorer=MEMBERS)


def add_own(evaluation: Evaluation, there: Scored, own: Evaluation) -> None:
    """Add a run's AUROCs on its own valid, and those there less these, for findings with one on both sides.

    Their mean is over those with 10 patients of each class on both sides, which its note names. The own mean's limits
    are as evaluated if it is over the same findings; otherwise the means of its findings' limits, as if their errors
    were one: the note of the difference is then `widened`.
    """
    level, names, kept = evaluation.unit, evaluation.labels, list[str]()
    for name in names:
        here, other = evaluation.get("auroc", name), own.get("auroc", name)
        if here.value is not None and other.low is not None:
            _add_pair(evaluation, here, other)
            kept += [] if here.few or other.few else [name]
    if not kept:
        return
    rows = [own.get("auroc", name) for name in kept]
    value, low, high = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("value", *LIMITS))
    mean = Row(level, own.split, COMMON, OWN, "auroc", None, value, low, high, note=", ".join(kept))
    enough = {
        row.label for row in own.select(metric="auroc", level=level, group=None, scorer=None) if not row.few
    }
    defined = {name for name in own.labels if own.get("auroc", name).value is not None}
    widened = set(kept) != enough & defined
    if not widened:
        same = own.get("auroc", "macro10")
        mean = replace(mean, value=same.value, low=same.low, high=same.high)
    limits = combine_limits(measure_areas(*there[:4]), weigh_labels(names, kept))
    value = sum(evaluation.get("auroc", name).value or 0 for name in kept) / len(kept)
    evaluation.add(level, COMMON, "auroc", value, limits, note=", ".join(kept))
    _add_pair(evaluation, evaluation.get("auroc", COMMON), mean, "widened" if widened else "")


def _add_pair(evaluation: Evaluation, here: Row, own: Row, note: str = "") -> None:
    """The own figure and the difference of a finding or of the mean."""
    sides = [(row.value, row.low, row.high) for row in (here, own)]
    limits = independent_limits(*sides)  # type: ignore[arg-type]  # both are defined
    counts = {"positives": own.positives, "negatives": own.negatives}
    limits_own = {side: getattr(own, side) for side in LIMITS}
    evaluation.add(here.level, here.label, "auroc", own.value, limits_own | counts, group=OWN, note=own.note)
    less = _subtract(here.value, own.value)
    few = {"few": here.few or own.few}
    evaluation.add(here.level, here.label, "auroc_difference", less, limits | few, group=OWN, note=note)


def add_recalibration(
    evaluation: Evaluation, there: Scored, calibration: Mapping[str, Mapping[str, Any]]
) -> None:
    """Add what a calibration fitted on half of the patients there does to ECE and Brier score of the other half.

    `calibration` is the run's own, finding by finding: the figures `before` are under it. Halves are by a hash of the
    patient's name. If `fit_calibration` finds no fit that helps, `after` has no value and the note says why; findings
    without both classes in the half that is measured are left out.
    """
    names, level = evaluation.labels, evaluation.unit
    chosen = {name: hash_fraction("recalibrate", name) < 0.5 for name in np.unique(there.patient).tolist()}
    fitting = np.array([chosen[name] for name in there.patient.tolist()], np.bool_)
    fitted, measured = there.take(fitting), there.take(~fitting)
    for group, half in (("fitted", fitted), ("measured", measured)):
        evaluation.add(level, None, "patients", len(np.unique(half.patient)), group=group)
    fits = fit_calibration(names, *fitted[:4])
    counts = report_auroc(names, *fitted[:4])["labels"]
    for column, (name, score, truth) in enumerate(label_cells(names, *measured[:3])):
        if truth.all() or not truth.any():
            continue
        fit, note = fits[name], (fits[name]["note"] or "").partition(":")[0]
        more: dict[str, Any] = {key: counts[name][key] for key in ("positives", "negatives", "few")}
        evaluation.add(level, name, "cells", None, more, group="fitted")
        evaluation.add(
            level,
            name,
            "cells",
            None,
            count_classes(truth, measured.patient[measured.mask[:, column]]),
            group="measured",
        )
        scores = {"before": apply_calibration(score, calibration[name])}
        scores["after"] = apply_calibration(score, fit)
        for group, values in scores.items():
            left_out = group == "after" and bool(note)
            for metric, measure in (("ece", calibration_error), ("brier", brier_score)):
                value = None if left_out else measure(values, truth)
                evaluation.add(level, name, metric, value, group=group, note=note if left_out else "")


def _subtract(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs
