"""Scores on another data set than a run's own → how far its AUROCs fall there, and what recalibration there would give.

The thresholds and calibration of an evaluation stay those of the run's own dev. The two sets are independent samples,
so the limits of a difference follow from the limits of its sides (Newcombe, 1998, method 10; Zou, 2007).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.labels import hash_fraction
from pipeline.measure.bootstrap import describe_difference
from pipeline.measure.calibration import apply_calibration, fit_calibration
from pipeline.measure.delong import combine_limits, measure_areas, weigh_labels
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import (
    Bools,
    Floats,
    averaged_labels,
    brier_score,
    calibration_error,
    count_classes,
    independent_limits,
    label_cells,
    mean_of,
    report_auroc,
)


def subtract_own(there: Scored, evaluation: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """AUROC there less that on the run's own valid, ready for JSON: `labels`, and the mean over some as `macro`.

    `evaluation` is what `assess` made of `there`; `own` is evaluation-valid.json. `labels` are those with an AUROC on
    both sides, `macro_labels` those of them with 10 patients of each class on both. The own macro's limits are as
    evaluated where it is over the same labels; otherwise `widened`: the means of its labels' limits, as if their
    errors were one.
    """
    names, owns = list(evaluation["labels"]), own["labels"]
    limits, own_limits = evaluation["intervals"]["auroc"], own["intervals"]["auroc"]
    labels, kept = {}, []
    for name, label in evaluation["labels"].items():
        other = owns[name]
        if label["auroc"] is None or own_limits[name]["low"] is None:
            continue
        counts = {
            "positives": label["positives"],
            "negatives": label["negatives"],
            "own_positives": other["positives"],
            "own_negatives": other["negatives"],
        }
        found = _subtract(label["auroc"], limits[name], other["auroc"], own_limits[name])
        labels[name] = found | counts | {"few": label["few"] or other["few"]}
        if not labels[name]["few"]:
            kept.append(name)
    widened = set(kept) != set(averaged_labels(owns)["macro10"])
    macro = None
    if kept:
        here = combine_limits(measure_areas(*there[:4]), weigh_labels(names, kept))
        theirs = {end: mean_of(own_limits, kept, end) for end in ("low", "high")}
        means = [mean_of(of, kept, "auroc") for of in (evaluation["labels"], owns)]
        macro = _subtract(means[0], here, means[1], theirs if widened else own_limits["macro10"])
    return {"labels": labels, "macro": macro, "macro_labels": kept, "widened": bool(kept) and widened}


def _subtract(
    auroc: Any, limits: Mapping[str, Any], own: Any, own_limits: Mapping[str, Any]
) -> dict[str, Any]:
    """Both AUROCs with their limits, and the first less the second."""
    there = {"auroc": auroc, "low": limits["low"], "high": limits["high"]}
    at_home = {"auroc": own, "low": own_limits["low"], "high": own_limits["high"]}
    apart = independent_limits(tuple(there.values()), tuple(at_home.values()))
    return {**there, "own": at_home, "less_own": describe_difference(auroc, own, apart)}


def try_recalibration(
    names: Sequence[str], there: Scored, calibration: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What a calibration fitted on half of the patients there does to the figures of the other half, ready for JSON.

    `calibration` is the run's own, label by label: the figures `before` are under it. Halves are by a hash of the
    patient's name. Where `fit_calibration` finds no fit that helps, `after` is None and `note` says why; labels
    without both classes in the half that is measured are left out.
    """
    chosen = {name: hash_fraction("recalibrate", name) < 0.5 for name in np.unique(there.patient).tolist()}
    fitting = np.array([chosen[name] for name in there.patient.tolist()], np.bool_)
    fitted, measured = there.take(fitting), there.take(~fitting)
    fits = fit_calibration(names, *fitted[:4])
    counts = report_auroc(names, *fitted[:4])["labels"]
    labels = {}
    for column, (name, score, truth) in enumerate(label_cells(names, *measured[:3])):
        if truth.all() or not truth.any():
            continue
        fit, own = fits[name], calibration[name]
        labels[name] = {
            "fitted": {key: counts[name][key] for key in ("positives", "negatives", "few")},
            "measured": count_classes(truth, measured.patient[measured.mask[:, column]]),
            "before": _measure(apply_calibration(score, own), truth),
            "after": None if fit["note"] else _measure(apply_calibration(score, fit), truth),
            "note": fit["note"] and fit["note"].partition(":")[0],
        }
    patients = {
        name: len(np.unique(half.patient)) for name, half in (("fitted", fitted), ("measured", measured))
    }
    return {"patients": patients, "labels": labels}


def _measure(score: Floats, truth: Bools) -> dict[str, float | None]:
    return {"ece": calibration_error(score, truth), "brier": brier_score(score, truth)}
