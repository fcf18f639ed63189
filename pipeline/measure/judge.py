"""Scores and truth → an evaluation, whoever made the scores: figures, verdicts, comparisons, readers."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.base.errors import DataError
from pipeline.labels import find_unannotated
from pipeline.manifest import name_facts
from pipeline.measure.audit import find_covariates, find_strata
from pipeline.measure.belief import add_belief
from pipeline.measure.compare import ALTERED, MEMBERS, add_auprc, add_comparison, add_readers
from pipeline.measure.evaluate import Scored, assess, study_level
from pipeline.measure.evaluation import UNITS, Evaluation
from pipeline.measure.metrics import Floats

NOTHING: Mapping[str, Any] = MappingProxyType({})
RESAMPLES = 1000  # of patients, for intervals of AUPRC


class Beside(NamedTuple):
    """What scores are judged with, by name: others' scores [N, L] of the same rows, and facts of the images.

    `against` are other networks', `members` an ensemble's, `altered` those of altered images; `readers` are calls
    [N, L] of 1, 0 or NaN. `edge` are gray levels [N] outside of the lungs.
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

    `evaluated` says what they are: `split`, `unit`, `labels`, and anything else for the head. `calibration` is
    what `calibrate` or `leave_uncalibrated` returns.
    """
    names, unit = evaluated["labels"], evaluated["unit"]
    texts = [name for name, kind in name_facts(table).items() if kind == "string"]
    facts = {name: table[name].to_numpy().astype(object) for name in texts}
    evaluation = assess(
        names, images, calibration, split=evaluated["split"], unit=unit, resamples=RESAMPLES, facts=facts
    )
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
    add_readers(
        evaluation, studies, {name: combine_calls(images, calls) for name, calls in beside.readers.items()}
    )
    return evaluation


def add_other(evaluation: Evaluation, images: Scored, name: str, scores: Floats) -> None:
    """Add the paired differences from another's scores [N, L], of images and of studies.

    On the findings and the rows that it has: a column of NaN is of a finding that it lacks, other NaN are of such rows.
    Raises DataError if there is none.
    """
    known = ~np.isnan(scores)
    columns = known.any(axis=0)
    rows = known[:, columns].all(axis=1)
    if not columns.any() or not rows.any():
        raise DataError(
            f"`against` {name}: it has scored none of these {UNITS[evaluation.unit]}, or no label"
        )
    names = [evaluation.labels[column] for column in np.flatnonzero(columns)]
    fields = ("scores", "target", "mask")
    ours = images.take(rows)
    ours = ours._replace(**{field: getattr(ours, field)[:, columns] for field in fields})
    theirs = scores[rows][:, columns]
    if not rows.all():
        evaluation.add(evaluation.unit, None, UNITS[evaluation.unit], int(rows.sum()), scorer=name)
    for level in evaluation.levels:
        if level == "study":
            combine = evaluation.head["combine"]
            theirs = study_level(ours._replace(scores=theirs), combine).scores
            ours = study_level(ours, combine)
        add_comparison(evaluation, level, ours, name, [theirs], names)
        add_auprc(evaluation, level, ours, name, theirs, names)


def combine_calls(images: Scored, calls: Floats) -> Floats:
    """A reader's calls [N, L] of images → of studies [S, L]: positive if any view's is, NaN if none is read."""
    read = study_level(images._replace(scores=np.nan_to_num(calls), mask=~np.isnan(calls)))
    return np.where(read.mask, read.scores, np.nan)
