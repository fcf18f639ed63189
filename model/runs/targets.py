"""What a run learns from, and what it can be chosen by: targets, masks and weights of its rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.runs.config import learned_columns
from model.runs.job import TEACHER_SCORES, Job, Selected, open_rows
from model.runs.scores import read_scores
from pipeline.base.errors import DataError
from pipeline.console import say
from pipeline.labels import LABELS, label_states
from pipeline.policies import describe_one_class, make_targets, one_class_labels, parse_uncertain_policy
from pipeline.stream.batches import Labels
from pipeline.stream.plan import Rows, Weights
from pipeline.stream.select import NothingSelectedError, balance_weights, mix_weights


def check_reported(job: Job, dev: Selected) -> None:
    """Before the first step: say where the run's conditions leave nothing of valid, which is then not reported.

    Raises DataError where no checkpoint could be chosen by dev, and where valid cannot be read.
    """
    found = one_class_labels(dev.truth.target[dev.rows], dev.truth.mask[dev.rows])
    one_class = {label for label, *_ in found}
    if one_class.issuperset(job.config.labels):
        raise DataError(no_choice(job))
    if "valid" in job.manifest.splits:
        try:
            open_rows(job, "valid")
        except NothingSelectedError as error:
            say(f"valid: {error}: the report is without valid")


def no_choice(job: Job) -> str:
    """What is said where dev does not suffice."""
    return f"{job.shards}: no label of dev has both classes to choose a checkpoint by; raise `dev`"


def training_labels(job: Job, train: Selected) -> Labels:
    """Targets and masks of all of train by the run's policies; warns of selected labels with one class.

    Raises DataError for them where the job is strict, and for a teacher that is missing or unusable.
    """
    config, table = job.config, train.split.table
    policy = parse_uncertain_policy(config.uncertain)
    wanted = [label for label in config.labels if policy[label] == "selftrained"]
    scores = None if job.teacher is None else teacher_scores(job.teacher, train, wanted)
    labels = Labels(*make_targets(table, policy, config.blank, config.seed, scores))
    unannotated = [label for label in job.manifest.not_annotated if label in config.labels]
    if unannotated:
        say(f"not annotated in {job.shards}, so not learned: {', '.join(unannotated)}")
    found = one_class_labels(labels.target[train.rows], labels.mask[train.rows])
    known = set(config.labels).difference(unannotated)
    lacking = describe_one_class(counts for counts in found if counts[0] in known)
    if lacking and job.strict:
        raise DataError(f"`strict`: {'; '.join(lacking)}")
    for text in lacking:
        say(f"{text}: it cannot be learned")
    labels.mask[:, np.setdiff1d(range(len(LABELS)), learned_columns(config))] = False
    return labels


def teacher_scores(teacher: Path, train: Selected, labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """A teacher's scores [N, 14] of the labels' uncertain cells in the rows used; 0 in those that nothing learns from.

    Raises DataError where one of these rows was not scored.
    """
    table = train.split.table
    scores = np.zeros((table.num_rows, len(LABELS)), np.float32)
    columns = np.array([LABELS.index(label) for label in labels], np.int64)
    states, _ = label_states(table)
    rows = train.rows[(states[train.rows][:, columns] == -1).any(axis=1)]
    scores[np.ix_(rows, columns)] = read_scores(teacher / TEACHER_SCORES, table["key"].take(rows), labels)
    return scores


def training_weights(job: Job, labels: Labels, train: Selected) -> Weights | None:
    """Weights [N] of train's samples, in proportion to which they are drawn; None where each is drawn once.

    Raises DataError where there is nothing to draw for a label or a folder.
    """
    if job.config.balance is not None:
        return draw_weights(job.config.balance, labels, train.rows)
    if not job.config.mix:
        return None
    try:
        return mix_weights(train.split.home[train.split.shard[train.rows]], job.config.mix)
    except ValueError as error:
        raise DataError(f"`mix`: {error} of {job.shards}, in train") from None


def draw_weights(label: str, labels: Labels, rows: Rows) -> Weights:
    """Weights [N] of the rows, under which positives and negatives of a label are drawn equally often.

    Raises DataError where the label has no positives or no negatives among them.
    """
    column = LABELS.index(label)
    try:
        return balance_weights(labels.target[rows, column], labels.mask[rows, column])
    except ValueError as error:
        raise DataError(f"`balance` {label}: {error} in train") from None
