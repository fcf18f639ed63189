"""The data for training and selecting a run: targets, masks and weights of its rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.runs.config import TEACHER_SCORES, learned_columns, parse_choice, split_columns
from model.runs.job import Job, Selected, open_rows
from model.runs.overlap import Seen, list_seen
from pipeline.base.errors import DataError
from pipeline.console import say
from pipeline.labels import LABELS, label_states
from pipeline.measure.scores import read_scores
from pipeline.policies import describe_one_class, make_targets, one_class_labels, parse_uncertain_policy
from pipeline.stream.batches import Labels
from pipeline.stream.plan import Weights, training_steps
from pipeline.stream.select import NothingSelectedError, balance_weights, find_strata, mix_weights


class TrainingData(NamedTuple):
    """The data for training a run."""

    train: Selected
    dev: Selected  # chooses the checkpoint
    labels: Labels  # of train, under the run's policies
    weights: Weights | None  # for sampling train; None: each sample once per epoch
    seen: Seen  # images and patients in the training data
    steps: int  # in an epoch


def open_training(job: Job) -> TrainingData:
    """The training data in a job's shards. Raises DataError if it is too small, before anything is written."""
    config = job.config
    if "dev" not in job.manifest.splits and config.dev is None:
        raise DataError(f"{job.shards}: no dev split to choose a checkpoint by; hold one out by `dev`")
    train, dev = open_rows(job, "train"), open_rows(job, "dev")
    check_reported(job, dev)
    seen = list_seen(job, [("train", train), ("dev", dev)])
    steps = training_steps(len(train.rows), config.batch_size)
    if steps == 0:
        most = len(train.rows) // 2 * 2
        how = f"choose one of {most} or less" if most else "there must be 2 or more"
        raise DataError(
            f"{job.shards}: {len(train.rows)} train {config.units} are less than one batch of `batch_size` "
            f"{config.batch_size}: {how}"
        )
    labels = training_labels(job, train)
    return TrainingData(train, dev, labels, training_weights(job, labels, train), seen, steps)


def check_reported(job: Job, dev: Selected) -> None:
    """Before training, report which folders have no dev, and if no image of valid meets the conditions.

    Raises DataError if dev cannot choose a checkpoint, or if valid cannot be read.
    """
    one_class = {label for label, *_ in one_class_labels(dev.truth.target[dev.rows], dev.truth.mask[dev.rows])}
    chosen = parse_choice(job.config.choose_by)
    if one_class.issuperset(job.config.labels) or one_class.intersection(chosen):
        raise DataError(no_choice(job, [label for label in chosen if label in one_class]))
    has_dev = {folder.name: "dev" in folder.manifest.splits for folder in job.shards.folders}
    if lacking := [name for name, has in has_dev.items() if not has and any(has_dev.values())]:
        others = ", ".join(name for name, has in has_dev.items() if has)
        say(
            f"{', '.join(lacking)}: no dev split, so checkpoint and thresholds are chosen on {others} alone; to choose "
            "on all, write these shards with `dev`"
        )
    if "valid" in job.manifest.splits:
        try:
            open_rows(job, "valid")
        except NothingSelectedError as error:
            say(f"valid: {error}: the report is without valid")


def no_choice(job: Job, lacking: Sequence[str] = ()) -> str:
    """The error if dev is insufficient: labels of `choose_by` lack a class there, or all labels do."""
    if lacking:
        what = "have" if len(lacking) > 1 else "has"
        how = "raise `dev`, or choose by other labels"
        return f"{job.shards}: `choose_by`: {', '.join(lacking)} {what} one class on dev; {how}"
    return f"{job.shards}: no label of dev has both classes to choose a checkpoint by; raise `dev`"


def training_labels(job: Job, train: Selected) -> Labels:
    """Targets and masks of train under the run's policies; warns about selected labels with one class.

    For these, raises DataError if the job is strict; also if a teacher is missing or unusable.
    """
    config, table = job.config, train.split.table
    policy = parse_uncertain_policy(config.uncertain)
    wanted = [label for label in config.labels if policy[label] == "selftrained"]
    scores = None if job.setup.teacher is None else teacher_scores(job.setup.teacher, train, wanted)
    labels = Labels(*make_targets(table, policy, config.blank, config.seed, scores))
    if job.manifest.not_annotated:
        say(f"not annotated in {job.shards}, so not learned: {', '.join(job.manifest.not_annotated)}")
    one_class = one_class_labels(labels.target[train.rows], labels.mask[train.rows])
    lacking = describe_one_class(counts for counts in one_class if counts[0] in config.labels)
    if lacking and job.setup.strict:
        raise DataError(f"`strict`: {'; '.join(lacking)}")
    for text in lacking:
        say(f"{text}: it cannot be learned")
    labels.mask[:, np.setdiff1d(range(len(LABELS)), learned_columns(config))] = False
    return labels


def teacher_scores(teacher: Path, train: Selected, labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """A teacher's scores [N, 14] of the labels' uncertain cells in the rows used; 0 in cells not used for training.

    Raises DataError if one of these rows was not scored.
    """
    table = train.split.table
    scores = np.zeros((table.num_rows, len(LABELS)), np.float32)
    columns = np.array([LABELS.index(label) for label in labels], np.int64)
    states, _ = label_states(table)
    rows = train.rows[(states[train.rows][:, columns] == -1).any(axis=1)]
    scores[np.ix_(rows, columns)] = read_scores(teacher / TEACHER_SCORES, table["key"].take(rows), labels)
    return scores


def training_weights(job: Job, labels: Labels, train: Selected) -> Weights | None:
    """Sampling weights [N] of train's samples; None if each is used once per epoch.

    Raises DataError if a label or a folder has nothing to sample.
    """
    if job.config.balance is not None:
        over = split_columns(job.config.balance_over) if job.config.balance_over else []
        return draw_weights(job.config.balance, over, labels, train)
    if not job.config.mix:
        return None
    try:
        return mix_weights(train.split.folder[train.rows], job.config.mix)
    except ValueError as error:
        raise DataError(f"`mix`: {error} of {job.shards}, in train") from None


def draw_weights(label: str, over: Sequence[str], labels: Labels, train: Selected) -> Weights:
    """Weights [S] that sample a label's positives and negatives equally often.

    Also within each combination of values of the columns `over`; reports how many samples are never used, because
    their combination has one class. Raises DataError for an unknown column, or if nothing can be balanced.
    """
    rows, column = train.rows, LABELS.index(label)
    options = f"`balance` {label}" + (f" `balance_over` {','.join(over)}" if over else "")
    try:
        strata = find_strata(train.split.table.take(rows), over) if over else None
        weights = balance_weights(labels.target[rows, column], labels.mask[rows, column], strata)
    except DataError as error:
        raise DataError(f"{options}: {error}") from None
    except ValueError as error:
        raise DataError(f"{options}: {error} in train") from None
    if left_out := int((weights == 0).sum()):
        say(f"{options}: {left_out:,} of {len(rows):,} samples are never used: those like them have one class")
    return weights
