"""A run: its configuration, folder and shards; and the data that it learns from or scores.

run = open_run(Config(lr=1e-3, epochs=3), Setup(shards=("shards",)), "runs/first")
train.train(run)
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from model.checkpoint import Start
from model.predict import choose_precision, find_device
from model.ranks import ALONE, Ranks
from model.runs.config import TEACHER_SCORES, Config, Setup, check_config, open_start, parse_choice, resolve_config
from pipeline import policies
from pipeline.base.errors import DataError
from pipeline.console import say, say_once
from pipeline.labels import LABELS, MOST_VIEWS, label_states, split_patients
from pipeline.manifest import Manifest
from pipeline.measure.scores import read_scores
from pipeline.stream.batches import BatchStream, Labels, Unusable, stream_batches
from pipeline.stream.dataset import Shards
from pipeline.stream.plan import Rows, Samples, Step, Weights, balance_weights, find_strata, mix_weights
from pipeline.stream.samples import NothingSelectedError, OpenSplit, find_images, find_studies, select_rows


@dataclass(frozen=True)
class Run:
    """Everything that stays constant while a run trains or is scored."""

    config: Config
    shards: Shards
    folder: Path
    setup: Setup
    ranks: Ranks = ALONE
    start: Start | None = None  # the weights to start from

    @property
    def device(self) -> torch.device:
        """The GPU if there is one, else the CPU."""
        return find_device()

    @property
    def precision(self) -> torch.dtype:
        """The precision of autocast. Raises DataError if this machine cannot compute in it."""
        return choose_precision(self.config.amp)

    @property
    def manifest(self) -> Manifest:
        """The shards' manifest."""
        return self.shards.manifest

    @property
    def pixels(self) -> Mapping[str, float]:
        """Mean and std that normalize the run's gray levels: the shards', or those of the network's first weights."""
        return dict(zip(("mean", "std"), self.config.input_scale, strict=False)) or self.manifest.pixels


def open_run(config: Config, setup: Setup, folder: str | Path, ranks: Ranks = ALONE) -> Run:
    """A run to train in a folder.

    Open settings are taken from the shards (policies, and a share of train to hold out if there is no dev split), or
    from the network or its initial weights (the size and scale of its input). Raises SettingError and DataError.
    """
    collection, start = setup.open(), open_start(config, setup.init)
    for text in collection.warnings:
        say_once(text)
    config = resolve_config(config, collection, setup.teacher, start)
    check_config(config, ranks)
    choose_precision(config.amp)  # before hours of work
    return Run(config, collection, Path(folder), setup, ranks, start)


class Selected(NamedTuple):
    """A split, and the samples that a run uses."""

    split: OpenSplit
    samples: Samples
    truth: Labels  # for metrics, of all rows of the split
    bad: Unusable  # over all epochs and evaluations

    @property
    def rows(self) -> Rows:
        """The row of each sample's first image: the images of a study share their labels."""
        return self.samples.rows[:, 0]


def holds_out(run: Run) -> bool:
    """Whether the run's dev is part of its shards' train split; other shards are used unchanged."""
    return run.config.dev is not None and "dev" not in run.manifest.splits and run.shards.digest == run.config.manifest


def open_images(run: Run, name: str) -> tuple[OpenSplit, Rows]:
    """A split, and the rows of its images that meet the run's conditions. Raises NothingSelectedError if none does."""
    config, is_part = run.config, name in ("train", "dev") and holds_out(run)
    split = replace(run.shards.open("train" if is_part else name), name=name)
    limit = config.limit if name == "train" else None
    select = partial(select_rows, conditions=config.where, views=config.views, limit=limit)
    if not is_part:
        return split, select(split.table)
    patients = split.table.select(["patient"]).append_column("row", pa.array(np.arange(split.table.num_rows)))
    places: Rows = split_patients(patients, config.dev or 0.0, config.seed)[name == "dev"]["row"].to_numpy()
    if len(places) == 0:
        less = "raise" if name == "dev" else "lower"
        raise DataError(f"{run.shards}: `dev` {config.dev:g} leaves no patient of train for {name}; {less} it")
    return split, places[select(split.table.take(places))]


def selected_splits(run: Run) -> list[str]:
    """The splits, including a held-out dev, with any image that meets the run's conditions."""
    splits = []
    for name in [*run.manifest.splits, *(["dev"] if holds_out(run) else [])]:
        with suppress(NothingSelectedError):
            open_images(run, name)
            splits.append(name)
    return splits


def open_rows(run: Run, name: str) -> Selected:
    """A split and the samples that meet the run's conditions. Raises DataError for a study with different labels."""
    split, rows = open_images(run, name)
    samples, left_out = find_studies(split, rows) if run.config.fusion else (find_images(split, rows), 0)
    if left_out:
        say(f"{name}: {left_out:,} images beyond their study's first {MOST_VIEWS} are left out")
    # By the shards' policy for blanks: runs with any policy are measured on the same cells.
    blank = policies.check_blank_policy(run.manifest.policies["blank"] or run.config.blank)
    truth = Labels(*policies.evaluation_targets(split.table, blank))
    return Selected(split, samples, truth, Unusable(int(run.config.max_bad * len(rows))))


def read_batches(run: Run, chosen: Selected, labels: Labels, plan: Callable[[int], Iterator[Step]]) -> BatchStream:
    """The batches of a plan over the chosen samples, as the run reads them."""
    return stream_batches(chosen.split, labels, plan, size=run.config.shape, threads=run.setup.workers, bad=chosen.bad)


class Data(NamedTuple):
    """The data for training a run."""

    train: Selected
    dev: Selected  # chooses the checkpoint
    labels: Labels  # of train, under the run's policies
    weights: Weights | None  # for sampling train; None: each sample once per epoch
    steps: int  # in an epoch


def open_training(run: Run) -> Data:
    """The training data in a run's shards. Raises DataError if it is too small, or dev cannot choose a checkpoint."""
    config = run.config
    train, dev = open_rows(run, "train"), open_rows(run, "dev")
    one_class = policies.describe_one_class(dev.truth.target[dev.rows], dev.truth.mask[dev.rows]).keys()
    if one_class >= {*config.labels} or not one_class.isdisjoint(parse_choice(config.choose_by)):
        raise DataError(no_choice(run, one_class))
    having = [folder.name for folder in run.shards.folders if "dev" in folder.manifest.splits]
    lacking = [folder.name for folder in run.shards.folders if "dev" not in folder.manifest.splits]
    if having and lacking:
        chosen = f"checkpoint and thresholds are chosen on {', '.join(having)} alone"
        say(f"{', '.join(lacking)}: no dev split, so {chosen}; to choose on all, write these shards with `dev`")
    if "valid" in run.manifest.splits:
        try:
            open_rows(run, "valid")
        except NothingSelectedError as error:
            say(f"valid: {error}: the report is without valid")
    steps = len(train.rows) // config.batch_size
    if steps == 0:
        most = len(train.rows) // 2 * 2
        less = f"{len(train.rows)} train {config.units} are less than one batch of `batch_size` {config.batch_size}"
        how = f"choose one of {most} or less" if most else "there must be 2 or more"
        raise DataError(f"{run.shards}: {less}: {how}")
    labels = training_labels(run, train)
    return Data(train, dev, labels, training_weights(run, labels, train), steps)


def no_choice(run: Run, one_class: Container[str]) -> str:
    """The error if dev cannot choose a checkpoint: labels of `choose_by` have one class there, or all labels do."""
    lacking = [label for label in parse_choice(run.config.choose_by) if label in one_class]
    if not lacking:
        return f"{run.shards}: no label of dev has both classes to choose a checkpoint by; raise `dev`"
    have = f"{', '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} one class on dev"
    return f"{run.shards}: `choose_by`: {have}; raise `dev`, or choose by other labels"


def training_labels(run: Run, train: Selected) -> Labels:
    """Targets and masks of train, by the run's policies. Raises DataError for a bad teacher, and if it is `strict`."""
    config, table, scores = run.config, train.split.table, None
    policy = policies.parse_uncertain_policy(config.uncertain)
    if run.setup.teacher is not None:
        # Only of the uncertain cells to be learned: the teacher need not have scored any other image.
        wanted = [label for label in config.labels if policy[label] == "selftrained"]
        columns = [LABELS.index(label) for label in wanted]
        rows = train.rows[(label_states(table)[0][train.rows][:, columns] == -1).any(axis=1)]
        scores = np.zeros((table.num_rows, len(LABELS)), np.float32)
        keys = table["key"].take(rows)
        scores[np.ix_(rows, columns)] = read_scores(run.setup.teacher / TEACHER_SCORES, keys, wanted)
    labels = Labels(*policies.make_targets(table, policy, config.blank, config.seed, scores))
    if run.manifest.not_annotated:
        say(f"not annotated in {run.shards}, so not learned: {', '.join(run.manifest.not_annotated)}")
    one_class = policies.describe_one_class(labels.target[train.rows], labels.mask[train.rows])
    lacking = [text for label, text in one_class.items() if label in config.labels]
    if lacking and run.setup.strict:
        raise DataError(f"`strict`: {'; '.join(lacking)}")
    for text in lacking:
        say(f"{text}: it cannot be learned")
    labels.mask[:, [label not in config.labels for label in LABELS]] = False
    return labels


def training_weights(run: Run, labels: Labels, train: Selected) -> Weights | None:
    """Sampling weights [S] of train's samples; None if each is used once per epoch.

    With `balance`, a label's classes weigh the same, also within each combination of values of the columns
    `balance_over`; reports how many samples are never used, as of combinations with one class. Raises DataError.
    """
    config, rows = run.config, train.rows
    if config.balance is None:
        try:
            return mix_weights(train.split.folder[rows], config.mix) if config.mix else None
        except ValueError as error:
            raise DataError(f"`mix`: {error} of {run.shards}, in train") from None
    column, over = LABELS.index(config.balance), config.balance_over
    options = f"`balance` {config.balance}" + (f" `balance_over` {','.join(over)}" if over else "")
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
