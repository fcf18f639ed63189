"""Several methods' scores of the same studies → how good each method is, and whether they differ.

A method is a run that scores studies, or a run that scores images whose scores are combined over a study's views
(late fusion). All are measured on the studies that every method has scored; differences are paired by patient
(pipeline.measure.delong).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.measure.bootstrap import describe_difference
from pipeline.measure.delong import combine_limits, measure_areas, weigh_labels
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import Floats, averaged_labels, mean_of, report_auroc

if TYPE_CHECKING:
    import pandas as pd

STUDY = ["patient", "study"]


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


def compare_methods(
    names: Sequence[str],
    studies: Scored,
    name: str,
    others: "Mapping[str, pd.DataFrame]",
    views: "pd.Series",
) -> dict[str, Any]:
    """The method `name`, with its `studies` (one row each), beside the `others`, ready for JSON.

    For all studies and for each group of `views`: the number of studies, and per method its mean AUROC with an
    interval, its AUROC per label, and the first method's minus its own. The mean is over labels with at least 10
    positives, if there are any. Raises DataError if the methods have no study in common.
    """
    import pandas as pd

    index = pd.MultiIndex.from_arrays([studies.patient, studies.study], names=STUDY)
    found = {other: frame.reindex(index)[list(names)].to_numpy() for other, frame in others.items()}
    common = np.all([~np.isnan(scores).any(axis=1) for scores in found.values()], axis=0)
    if not common.any():
        raise DataError(f"{name}: none of its studies is scored by all of {', '.join(found)}")
    methods = {name: studies.scores, **found}
    groups = {"all": common}
    of_study = views.reindex(index).to_numpy()
    groups |= {group: common & (of_study == group) for group in sorted(set(of_study[common]))}
    return {
        group: {"studies": int(rows.sum())}
        | _compare(names, studies.take(rows), {key: scores[rows] for key, scores in methods.items()})
        for group, rows in groups.items()
    }


def measure_gain(names: Sequence[str], rows: Scored, members: Mapping[str, Floats]) -> dict[str, Any]:
    """What an ensemble's scores of `rows` gain over the mean of its members' AUROCs, ready for JSON.

    `members` are their scores [N, L] of the same rows, by name. Per label and mean (macro, …): `auroc`, the `members`'
    AUROCs, their mean as `mean_member`, and the difference, paired by patient: a contrast of correlated AUROCs.
    """
    reports = [report_auroc(names, scores, *rows[1:4]) for scores in (rows.scores, *members.values())]
    areas = measure_areas(*rows[:4])
    for scores in members.values():
        areas = areas.join(measure_areas(scores, *rows[1:4]))
    labels = reports[0]["labels"]
    kept = {name: [name] if labels[name]["auroc"] is not None else [] for name in names} | averaged_labels(
        labels
    )
    gain = {}
    for key, over in kept.items():
        share = weigh_labels(names, over)
        limits = combine_limits(areas, np.concatenate([share, *[-share / len(members)] * len(members)]))
        ours, *theirs = (mean_of(of["labels"], over, "auroc") for of in reports)
        mean = sum(found for found in theirs if found is not None) / len(theirs) if over else None
        gain[key] = {"auroc": ours, "mean_member": mean, "members": dict(zip(members, theirs, strict=True))}
        gain[key] |= describe_difference(ours, mean, limits)
    return gain


def _compare(names: Sequence[str], studies: Scored, methods: Mapping[str, Floats]) -> dict[str, Any]:
    reports = {name: report_auroc(names, scores, *studies[1:4]) for name, scores in methods.items()}
    areas = {name: measure_areas(scores, *studies[1:4]) for name, scores in methods.items()}
    first, ours = next(iter(reports.values())), next(iter(areas.values()))
    kept = averaged_labels(first["labels"])
    mean = "macro10" if kept["macro10"] else "macro"
    shares = {label: weigh_labels(names, [label]) for label in names} | {
        "mean": weigh_labels(names, kept[mean])
    }
    result: dict[str, Any] = {"mean": mean, "methods": {}}
    for name, report in reports.items():
        figures = {label: row["auroc"] for label, row in report["labels"].items()}
        figure = mean_of(report["labels"], kept[mean], "auroc")
        firsts = {label: row["auroc"] for label, row in first["labels"].items()}
        firsts["mean"] = mean_of(first["labels"], kept[mean], "auroc")
        both = ours.join(areas[name])
        result["methods"][name] = {
            "auroc": figure,
            "interval": combine_limits(areas[name], shares["mean"]),
            "labels": figures,
            "first_less_this": {
                key: describe_difference(
                    firsts[key],
                    (figures | {"mean": figure})[key],
                    combine_limits(both, np.concatenate([share, -share])),
                )
                for key, share in shares.items()
            },
        }
    return result
