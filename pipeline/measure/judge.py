"""Scores and truth → an evaluation: results, verdicts, and comparisons with other scores.

Differences between scores of the same patients are paired (pipeline.measure.delong). Two data sets are independent
samples, so the limits of their difference follow from the limits of both (Newcombe, 1998, method 10; Zou, 2007);
the thresholds and calibration remain those of the run's dev.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.labels import find_unannotated
from pipeline.manifest import name_facts
from pipeline.measure.audit import find_covariates, find_strata
from pipeline.measure.belief import add_belief
from pipeline.measure.delong import combine, measure_areas, weigh_labels
from pipeline.measure.evaluate import AREAS, Scored, assess, average, study_level
from pipeline.measure.evaluation import COMMON, OWN, UNITS, Evaluation, Row
from pipeline.measure.metrics import (
    Bools,
    Floats,
    count_classes,
    label_cells,
    measure_rates,
    subtract_independent,
    threshold_curve,
)

MEMBERS = "mean of the members"
ALTERED = "altered: "  # in front of the name of an alteration, as a scorer
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Beside(NamedTuple):
    """What scores are compared with, by name: other scores [N, L] of the same rows, and facts of the images.

    `against` are other networks', `members` an ensemble's, `altered` those of altered images; `readers` are calls
    [N, L] of 1, 0 or NaN. `edge` are gray levels [N] outside the lungs.
    """

    against: Mapping[str, Floats] = NOTHING
    readers: Mapping[str, Floats] = NOTHING
    members: Mapping[str, Floats] = NOTHING
    altered: Mapping[str, Floats] = NOTHING
    edge: Mapping[str, Floats] = NOTHING


def judge_scores(
    evaluated: Mapping[str, Any],
    images: Scored,
    table: pa.Table,
    calibration: Mapping[str, Any],
    beside: Beside = Beside(),  # noqa: B008 - immutable
) -> Evaluation:
    """The evaluation of scores: of `images`, whose facts are the rows of a label table.

    `evaluated` describes them: `split`, `unit`, `labels`, and anything else for the head. `calibration` is
    what `calibrate` or `leave_uncalibrated` returns.
    """
    names, unit = evaluated["labels"], evaluated["unit"]
    texts = [name for name, kind in name_facts(table).items() if kind == "string"]
    facts = {name: table[name].to_numpy().astype(object) for name in texts}
    evaluation = assess(names, images, calibration, split=evaluated["split"], unit=unit, facts=facts)
    head = evaluation.head
    head |= {name: value for name, value in evaluated.items() if name not in head}
    head["not_annotated"] = find_unannotated(table)
    head |= {name: list(getattr(beside, name)) for name in ("against", "readers", "members", "altered")}
    covariates, strata = find_covariates(table), find_strata(table)
    add_belief(evaluation, images, covariates, strata, beside.edge)
    for name, scores in beside.against.items():
        add_other(evaluation, images, name, scores)
    for name, scores in beside.altered.items():
        add_comparison(evaluation, unit, images, f"{ALTERED}{name}", [scores])
    for name, scores in beside.members.items():
        add_comparison(evaluation, unit, images, name, [scores])
    if beside.members:
        add_comparison(evaluation, unit, images, MEMBERS, [*beside.members.values()])
    studies = study_level(images, head["combine"])
    add_readers(evaluation, studies, {name: combine_calls(images, calls) for name, calls in beside.readers.items()})
    return evaluation


def add_other(evaluation: Evaluation, images: Scored, name: str, scores: Floats) -> None:
    """Add the paired differences from other scores [N, L], of images and of studies.

    Only on the findings and rows that they cover: a column of NaN is a missing finding, any other NaN a missing row.
    Raises DataError if they cover none.
    """
    known = ~np.isnan(scores)
    columns = known.any(axis=0)
    rows = known[:, columns].all(axis=1)
    if not columns.any() or not rows.any():
        raise DataError(f"`against` {name}: it has scored none of these {UNITS[evaluation.unit]}, or no label")
    names = [evaluation.labels[column] for column in np.flatnonzero(columns)]
    fields = ("scores", "target", "mask")
    covered = images.take(rows)
    covered = covered._replace(**{field: getattr(covered, field)[:, columns] for field in fields})
    other_scores = scores[rows][:, columns]
    if not rows.all():
        evaluation.add(evaluation.unit, None, UNITS[evaluation.unit], int(rows.sum()), scorer=name)
    for level in evaluation.levels:
        if level == "study":
            combine = evaluation.head["combine"]
            other_scores = study_level(covered._replace(scores=other_scores), combine).scores
            covered = study_level(covered, combine)
        add_comparison(evaluation, level, covered, name, [other_scores], names)


def combine_calls(images: Scored, calls: Floats) -> Floats:
    """A reader's calls [N, L] of images → of studies [S, L]: positive if any view's is, NaN if none is read."""
    read = study_level(images._replace(scores=np.nan_to_num(calls), mask=~np.isnan(calls)))
    return np.where(read.mask, read.scores, np.nan)


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


def add_comparison(
    evaluation: Evaluation,
    level: str,
    rows: Scored,
    scorer: str,
    others: Sequence[Floats],
    names: Sequence[str] | None = None,
) -> None:
    """Add the mean AUROC and AUPRC of other scores [N, L] of the same rows, and ours minus it, for findings and means.

    Differences are contrasts of correlated areas, paired by patient. `names` are those of the columns, by default the
    evaluation's. Means are over the same findings as ours.
    """
    names = names or evaluation.labels
    means = average(names, rows)
    for metric, measure in AREAS.items():
        joined = measure(*rows[:4])
        for scores in others:
            joined = joined.join(measure(scores, *rows[1:4]))
        for label, over in means.items():
            share = weigh_labels(names, over)
            mean = np.tile(share / len(others), len(others))
            for name, weights in ((metric, [0 * share, mean]), (f"{metric}_difference", [share, -mean])):
                evaluation.add(level, label, name, **combine(joined, np.concatenate(weights)), scorer=scorer)


def add_own(evaluation: Evaluation, images: Scored, own: Evaluation) -> None:
    """Add a run's AUROCs on its own valid, and those of `images` minus these, for findings with both AUROCs.

    Their mean is over those with 10 patients of each class on both sides, which its note names. The limits of the own
    valid's mean are as evaluated if it is over the same findings; otherwise they are the means of its findings' limits,
    as if these were fully correlated: the note of the difference is then `widened`.
    """
    level, names, kept = evaluation.unit, evaluation.labels, list[str]()
    for name in names:
        row, other = evaluation.get("auroc", name), own.get("auroc", name)
        if row.value is not None and other.low is not None:
            _add_pair(evaluation, row, other)
            kept += [] if row.few or other.few else [name]
    if not kept:
        return
    rows = [own.get("auroc", name) for name in kept]
    value, low, high = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("value", "low", "high"))
    enough = [own.get("auroc", name) for name in own.labels]
    widened = set(kept) != {row.label for row in enough if row.value is not None and not row.few}
    if not widened:
        mean = own.get("auroc", "macro10")
        value, low, high = mean.number, mean.low, mean.high
    mean = Row(level, own.split, COMMON, OWN, "auroc", None, value, low, high, note=", ".join(kept))
    common = combine(measure_areas(*images[:4]), weigh_labels(names, kept))
    evaluation.add(level, COMMON, "auroc", **common, note=", ".join(kept))
    _add_pair(evaluation, evaluation.get("auroc", COMMON), mean, "widened" if widened else "")


def _add_pair(evaluation: Evaluation, row: Row, own: Row, note: str = "") -> None:
    """Add the own valid's figure and the difference, of a finding or of the mean."""
    judged, other = ({name: getattr(side, name) for name in ("value", "low", "high", "few")} for side in (row, own))
    counts = {"positives": own.positives, "negatives": own.negatives}
    evaluation.add(row.level, row.label, "auroc", group=OWN, **other, **counts, note=own.note)
    difference, few = subtract_independent(judged, other), row.few or own.few
    evaluation.add(row.level, row.label, "auroc_difference", group=OWN, **difference, few=few, note=note)


def add_readers(evaluation: Evaluation, studies: Scored, readers: Mapping[str, Floats]) -> None:
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
            counts = count_classes(truth, patient)
            rates = measure_rates(0.5, calls[mask[:, column], column], truth, patient)
            for rate, figure in rates.items():
                evaluation.add("study", name, rate, **figure, **counts, scorer=reader)
            sensitivity, specificity = (rates[rate]["value"] for rate in ("sensitivity", "specificity"))
            network, below = place_on_curve(score, truth, specificity), None
            evaluation.add("study", name, "network", network, scorer=reader)
            if network is not None and sensitivity is not None:
                below = float(network > sensitivity + 1e-9)  # beyond rounding
            evaluation.add("study", name, "below", below, **counts, scorer=reader)


def place_on_curve(score: Floats, truth: Bools, specificity: float | None) -> float | None:
    """The sensitivity of the ROC curve of scores [n] at a specificity; None with one class."""
    if specificity is None or not truth.any():
        return None
    curve = threshold_curve(score, truth)
    hits = np.concatenate([[0], curve.true_positives]) / truth.sum()
    alarms = np.concatenate([[0], curve.false_positives]) / (~truth).sum()
    highest = np.append(np.diff(alarms) > 0, True)  # the top of each vertical segment
    return float(np.interp(1 - specificity, alarms[highest], hits[highest]))
