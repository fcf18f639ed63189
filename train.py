"""Train a network on shards, score it, and use it: the one place where `pipeline` and `model` meet.

    python train.py --shards shards --run runs/first --lr 1e-4        train, or continue where it stopped
    python train.py sweep --sweep runs/sweep --lr "1e-4 1e-3"         a run for each value
    python train.py evaluate --run runs/first --split valid           score its best checkpoint on a split
    python train.py predict --run runs/first --out scores.csv films   score image files
    python train.py export --run runs/first --out model.onnx          for other programs (.onnx or .pt2)

`torchrun --nproc-per-node 8 train.py …` trains on so many GPUs: every rank takes its slice of the same batches.

A run folder holds config.json, environment.jsonl (a line per start), metrics.jsonl (a line per evaluation) and
TensorBoard's events; last.pt (all that a resume restores) and best.pt (the averaged weights with the best dev
macro AUROC); calibration.json (thresholds and calibrations chosen on dev), and for every split that was scored
evaluation-<split>.json and scores-<split>.arrow; report.html and model-card.md. The same command on the same
folder continues where it stopped, exactly: batches and augmentations are functions of (seed, epoch, step).

Self-training (U-SelfTrained of Irvin et al., 2019) is three commands: a teacher that leaves uncertain cells
out, its scores of train, and a student whose uncertain targets they are:
    python train.py --run runs/teacher --uncertain ignore
    python train.py evaluate --run runs/teacher --split train
    python train.py --run runs/student --uncertain selftrained --teacher runs/teacher
"""

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the seconds that the imports take: no traceback. `run_command` puts the usual handler back.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

# Before torch is imported, which reads it once: OpenMP's threads spin where they wait for each other, and beside any
# other load on the cores a network on a CPU then trains at a tenth of its speed. With a short spin it is half, and
# 15 % less on idle cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import contextlib
import copy
import gc
import hashlib
import io
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchvision.ops import StochasticDepth

from model.augment import AUGMENTATIONS, augment, normalize
from model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    refused,
    restore_random_state,
    save_checkpoint,
)
from model.export import Scorer, export_scorer
from model.fusion import FUSIONS
from model.losses import AUCMarginLoss, MaskedLoss, positive_weights
from model.networks import ARCHITECTURES, build_network, load_initial
from model.optim import build_optimizer, scheduled_lr, update_average
from model.predict import DivergedError, InterruptedEvaluationError, explain_memory
from model.ranks import ALONE, Ranks, join_ranks, share_of_cores
from model.runs.config import (
    Config,
    can_divide,
    check_config,
    learnt_columns,
    output_count,
    read_config,
    three_class_columns,
)
from model.runs.job import (
    Job,
    Selected,
    StopFlag,
    agree,
    choose_device,
    follow_by_wandb,
    fuse,
    load_best,
    open_rows,
    open_run,
    record_environment,
    save_best,
    to_device,
    view_tensors,
)
from model.runs.overlap import check_evaluation, check_teacher, write_trained_on
from model.runs.scores import read_scores
from model.runs.scoring import (
    CALIBRATION,
    evaluate,
    find_scores,
    finish_run,
    measure_run,
    name_comparison,
    name_result,
    print_comparison,
    print_evaluations,
    score_best,
    score_files,
    score_split,
    write_report,
)
from pipeline.base.errors import DataError, SettingError
from pipeline.base.files import claimed, write_atomically, write_csv
from pipeline.console import Checked, Number, progress_bar, run_command
from pipeline.labels import LABELS, MOST_VIEWS, VIEWS, label_states
from pipeline.manifest import manifest_digest, read_manifest
from pipeline.measure.metrics import report_auroc
from pipeline.policies import (
    BLANK_HELP,
    UNCERTAIN_HELP,
    check_blank_policy,
    describe_one_class,
    evaluation_targets,
    make_targets,
    one_class_labels,
    parse_uncertain_policy,
)
from pipeline.stream.batches import Batch, Labels, stream_training
from pipeline.stream.cache import Cache, Remote, is_url, redact
from pipeline.stream.plan import Rows, Weights, plan_training, training_steps
from pipeline.stream.samples import StudyBatch, stream_studies
from pipeline.stream.select import NothingSelectedError, balance_weights

CLIP_NORM = 1.0
CHECK_STEPS = 20  # how often the loss is read back: each read waits for the device
SAVE_SECONDS = 300.0  # a killed run loses little more work than this
TEACHER_SCORES = "scores-train.arrow"
HELD_OUT = 0.05  # share of the patients, where the shards have no dev split
LOSSES = ("bce", "aucm")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
Log = Callable[[str, float, int], None]  # name of a curve, value, step


@dataclass
class TrainState:
    """What last.pt restores, and nothing more: epoch, schedule and augmentation follow from `done`."""

    network: nn.Module
    loss: nn.Module
    ema: nn.Module  # the averaged weights, which are evaluated
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str  # of autocast, to which `--amp auto` comes on this device
    ranks: int  # that train it now
    forward: Callable[
        [Tensor], Tensor
    ]  # the network, which averages gradients over ranks and may be compiled
    done: int = 0  # steps, of all epochs
    evaluated: int = 0  # steps that were done at the last evaluation
    loss_sum: float = 0.0  # over the steps since then
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    MODULES = ("network", "loss", "ema", "optimizer", "scaler")
    VALUES = ("done", "evaluated", "loss_sum", "best", "history")

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        values = {name: getattr(self, name) for name in self.VALUES}
        how = {"random": random_state(), "precision": self.precision, "ranks": self.ranks}
        save_checkpoint(path, modules | values | how)

    def restore(self, path: Path, ranks: Ranks) -> int:
        """Read the checkpoint; returns the number of ranks that wrote it.

        Raises CheckpointError where it is damaged, another run's, or of another precision.
        """
        best = path.with_name("best.pt")
        instead = f", or start another --run with --init {path.parent}" if best.exists() else ""
        remedy = f"; remove it to train from the beginning{instead}"
        saved = load_checkpoint(path, ranks, remedy)
        before = saved.get("precision", self.precision)  # version 0.1 did not say
        if before != self.precision:
            how = "continue on such a device as before, or choose another --run"
            raise CheckpointError(
                f"{path}: trained in {before}, --amp is {self.precision} on this device: {how}"
            )
        with refused(path, remedy):
            for name in self.MODULES:
                getattr(self, name).load_state_dict(saved[name])
            for name in self.VALUES:
                if not isinstance(saved[name], type(getattr(self, name))):
                    raise TypeError(f"{name} is {saved[name]!r}")
                setattr(self, name, saved[name])
            restore_random_state(saved["random"])
            return int(saved.get("ranks", self.ranks))  # nor this


def train(job: Job, watch: Callable[[list[dict[str, Any]]], None] = lambda history: None) -> int:
    """Train to the end, or continue; returns the exit code. Raises DataError for unusable input.

    `watch` gets all evaluations so far after each one is saved; what it raises ends the run there.
    """
    config, run = job.config, job.run
    if "dev" not in job.manifest.splits and config.dev is None:
        raise DataError(f"{job.shards}: no dev split to choose a checkpoint by; hold one out by --dev")
    train, dev = open_rows(job, "train"), open_rows(job, "dev")
    check_reported(job, dev)
    if job.teacher is not None:
        check_teacher(job, job.teacher)
    steps = training_steps(len(train.rows), config.batch_size)
    if steps == 0:
        raise DataError(f"{job.shards}: {len(train.rows)} train samples are less than one batch")
    labels = training_labels(job, train)
    weights = None if config.balance is None else draw_weights(config.balance, labels, train.rows)
    state = start_state(job, labels, train.rows)
    if not job.ranks.is_first:
        return train_epochs(job, state, (train, dev), labels, weights, watch)
    run.mkdir(parents=True, exist_ok=True)  # only now: a run that cannot start leaves no folder
    with claimed(run):
        open_run(run, config)
        write_trained_on(job, [("train", train), ("dev", dev)])
        record_environment(job)
        return train_epochs(job, state, (train, dev), labels, weights, watch)


def check_reported(job: Job, dev: Selected) -> None:
    """Before the first step: say where the run's conditions leave nothing of valid, which is then not reported.

    Raises DataError where no checkpoint could be chosen by dev, and where valid cannot be read.
    """
    blank = check_blank_policy(job.manifest.policies["blank"])
    target, mask = evaluation_targets(dev.split.table, blank)
    one_class = {label for label, *_ in one_class_labels(target[dev.rows], mask[dev.rows])}
    if one_class.issuperset(job.config.labels):
        raise DataError(no_choice(job))
    if "valid" in job.manifest.splits:
        try:
            open_rows(job, "valid")
        except NothingSelectedError as error:
            click.echo(f"valid: {error}: the report is without valid", err=True)


def no_choice(job: Job) -> str:
    """What is said where dev does not suffice."""
    return f"{job.shards}: no label of dev has both classes to choose a checkpoint by; raise --dev"


def train_epochs(
    job: Job,
    state: TrainState,
    selected: tuple[Selected, Selected],
    labels: Labels,
    weights: Weights | None,
    watch: Callable[[list[dict[str, Any]]], None],
) -> int:
    """Restore what there is, train on the first of the selected to the end, and evaluate; returns the exit code."""
    config, run, (train, dev) = job.config, job.run, selected
    steps = training_steps(len(train.rows), config.batch_size)
    together = f", {job.ranks.count} ranks" if job.ranks.joined else ""
    click.echo(f"{config.arch} on {job.device.type}, {state.precision}{together}", err=True)
    total, every = config.epochs * steps, config.eval_every or steps
    if job.ranks.gather((run / "last.pt").exists())[0, 0]:
        before = state.restore(run / "last.pt", job.ranks)
        if state.done < total and not is_out_of_patience(config, state):
            check_ranks(job, state, before)
        click.echo(f"{run}: continuing after step {state.done:,} of {total:,}", err=True)
    with open_events(job, state.done) as log:
        while True:
            due = state.done % steps == 0 or state.done % steps % every == 0
            if state.evaluated < state.done and due:
                try:
                    evaluate_state(job, state, dev, steps, log)
                except InterruptedEvaluationError:
                    return stop_run(job, state)  # a resume begins with this evaluation
                save_state(job, state)
                watch(state.history)
            if state.done == total or is_out_of_patience(config, state):
                break
            epoch, step = divmod(state.done, steps)
            batches = stream_epoch(job, train, labels, weights, epoch, step)
            train_steps(job, state, batches, epoch, min(steps, (step // every + 1) * every), steps, log)
            agree(job)
            if job.stop.code:
                return stop_run(job, state)
    try:
        finish_run(job)
    except InterruptedEvaluationError:
        return say_stopped(job)
    return 0


def check_ranks(job: Job, state: TrainState, before: int) -> None:
    """Say that a run goes on on another number of ranks than before.

    Raises CheckpointError where it would then learn otherwise: where a layer sees a rank's part of a batch alone.
    """
    now = job.ranks.count
    if before == now:
        return
    state.network.train()
    trained = [module for module in state.network.modules() if module.training]
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trained)
    reasons = {
        "BatchNorm's statistics are of a rank's part of a batch": norms and not job.config.sync_bn,
        "stochastic depth is drawn for a rank's part of a batch": any(
            isinstance(module, StochasticDepth) and module.p > 0 for module in trained
        ),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise CheckpointError(
            f"{job.run / 'last.pt'}: trained on {before} ranks, and {now} here would learn otherwise: {reason}; "
            f"continue on {before}, or choose another --run"
        )
    click.echo(
        f"{job.run}: begun on {before} ranks, continuing on {now}: the same but for rounding", err=True
    )


def stream_epoch(
    job: Job, train: Selected, labels: Labels, weights: Weights | None, epoch: int, start_step: int
) -> Iterable[Batch | StudyBatch]:
    """Slices for this rank of the batches of an epoch, of images or of studies."""
    config = job.config
    order: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "epoch": epoch,
        "start_step": start_step,
        "weights": weights,
        "rank": job.ranks.rank,
        "ranks": job.ranks.count,
    }
    reading: dict[str, Any] = {
        "size": config.image_size,
        "threads": job.workers,
        "max_bad": int(config.max_bad * len(train.images)),
    }
    if train.studies is None:
        return stream_training(train.split, labels, rows=train.rows, **order, **reading)
    plan = partial(plan_training, train.studies.shard_sizes, **order)
    return stream_studies(plan, train.split, train.studies, labels, **reading)


def stop_run(job: Job, state: TrainState) -> int:
    """Save, and say so; returns the exit code."""
    save_state(job, state)
    return say_stopped(job)


def save_state(job: Job, state: TrainState) -> None:
    """Write last.pt, which is the same for all ranks: their generators have drawn the same.

    Raises DivergedError where the last step, after which no loss was looked at, has ruined the weights.
    """
    weights = torch.stack(torch._foreach_norm(list(state.network.parameters())))
    if not weights.isfinite().all():
        raise DivergedError(f"the weights are not finite after step {state.done:,}; try a lower --lr")
    if job.ranks.is_first:
        state.save(job.run / "last.pt")


@contextlib.contextmanager
def open_events(job: Job, done: int) -> Iterator[Log]:
    """What adds a value to the curve of that name in TensorBoard's events, of which those after step `done` go."""
    if not job.ranks.is_first:
        yield lambda name, value, step: None
        return
    with (
        follow_by_wandb(job),
        SummaryWriter(str(job.run / "tensorboard"), purge_step=done + 1) as events,
    ):
        yield events.add_scalar


def say_stopped(job: Job) -> int:
    """Say how to go on; returns the exit code."""
    click.echo(f"{job.run}: stopped and saved; the same command continues", err=True)
    return job.stop.code


def training_labels(job: Job, train: Selected) -> Labels:
    """Targets and masks of all of train by the run's policies; warns of selected labels with one class.

    Raises DataError for them where the job is strict, and for a teacher that is missing or unusable.
    """
    config, table = job.config, train.split.table
    policy = parse_uncertain_policy(config.uncertain)
    wanted = [label for label in config.labels if policy[label] == "selftrained"]
    scores = None if job.teacher is None else teacher_scores(job.teacher, train, wanted)
    labels = Labels(*make_targets(table, policy, config.blank, config.seed, scores))
    found = one_class_labels(labels.target[train.rows], labels.mask[train.rows])
    lacking = describe_one_class(counts for counts in found if counts[0] in config.labels)
    if lacking and job.strict:
        raise DataError(f"--strict: {'; '.join(lacking)}")
    for text in lacking:
        click.echo(f"{text}: it cannot be learnt", err=True)
    labels.mask[:, np.setdiff1d(range(len(LABELS)), learnt_columns(config))] = False
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


def draw_weights(label: str, labels: Labels, rows: Rows) -> Weights:
    """Weights [N] of the rows, under which positives and negatives of a label are drawn equally often.

    Raises DataError where the label has no positives or no negatives among them.
    """
    column = LABELS.index(label)
    try:
        return balance_weights(labels.target[rows, column], labels.mask[rows, column])
    except ValueError as error:
        raise DataError(f"--balance {label}: {error} in train") from None


def train_steps(
    job: Job,
    state: TrainState,
    batches: Iterable[Batch | StudyBatch],
    epoch: int,
    end: int,
    steps: int,
    log: Log,
) -> None:
    """Run the steps of an epoch up to `end`, or as far as the stop flag lets it.

    Raises DivergedError, naming the step, for a loss or gradient that is not finite.
    """
    config = job.config
    state.network.train()
    found: list[Tensor] = []
    images, waited, start = 0, 0.0, time.perf_counter()
    saved = start
    iterator = iter(batches)
    with progress_bar(f"Epoch {epoch + 1}/{config.epochs}", "steps") as advance:
        for step in range(state.done % steps, end):
            asked = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - asked
            (cells,) = agree(job, batch.mask.sum())
            if job.stop.code:
                break
            lr = scheduled_lr(config.lr, state.done, config.epochs * steps)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            with explain_memory(*describe_step(job)):
                found.append(train_step(job, state, batch, cells))
            shown = len(batch.images) if isinstance(batch, Batch) else int(batch.present.sum())
            images += shown * job.ranks.count
            state.done += 1
            if (step + 1) % CHECK_STEPS == 0 or step + 1 == end:
                loss = check_steps(job, found, state, epoch, step)
                now = time.perf_counter()
                rate, wait = images / (now - start), waited / (now - start)
                for name, value in {"loss": loss, "lr": lr, "images_per_s": rate, "data_wait": wait}.items():
                    log(f"train/{name}", value, state.done)
                note = f"loss {loss:.4f}  {rate:,.0f} images/s  data wait {wait:.0%}"
                advance(step + 1, steps, note)
                if now - saved > SAVE_SECONDS:
                    save_state(job, state)
                    saved = now
        check_steps(job, found, state, epoch, (state.done - 1) % steps)  # those before a stop


def describe_step(job: Job) -> tuple[str, str]:
    """What a step computes at once, and how to compute less at once: for one that runs out of memory."""
    config = job.config
    size = config.image_size
    doing = f"in a step with --batch-size {config.batch_size} --accumulate {config.accumulate} --image-size {size}"
    parts = next(
        (
            parts
            for exponent in range(config.batch_size.bit_length())
            if (parts := 2**exponent) > config.accumulate and can_divide(config.batch_size, parts, job.ranks)
        ),
        None,
    )
    if parts is None or config.loss == "aucm":  # which is of a whole batch
        return doing, "choose a smaller --batch-size or --image-size"
    return doing, f"--accumulate {parts} computes the same batch in {parts} parts"


def train_step(job: Job, state: TrainState, batch: Batch | StudyBatch, cells: float) -> Tensor:
    """One update of the weights; returns this rank's part of the loss and the norm of the whole batch's gradient, [2].

    The device may still be computing both. The norm is 0 for a step that the scaler skips: in half precision, with
    too large a factor, gradients that are not finite are expected, and never reach the weights.
    `cells` is how many cells of the mask are set in the whole batch, of which `batch` is this rank's slice.
    """
    config, device, ranks = job.config, job.device, job.ranks
    state.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    # In parts where a batch would not fit the device: each counts by its cells, so the gradients are the batch's.
    size = len(batch.target) // config.accumulate
    for start in range(0, len(batch.target), size):
        part = slice(start, start + size)
        inputs = training_inputs(job, batch, part)
        target, mask = (to_device(array[part], device) for array in (batch.target, batch.mask))
        with ranks.exchange(state.forward, part.stop == len(batch.target)):
            with torch.autocast(device.type, job.precision, enabled=job.precision != torch.float32):
                logits = state.forward(*inputs)
            loss = state.loss(logits, target, mask) * (mask.sum() / max(cells, 1))
            state.scaler.scale(loss * ranks.count).backward()  # which takes the mean over ranks, not the sum
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)  # so that what is clipped are the gradients themselves
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), CLIP_NORM)
    if state.scaler.is_enabled():
        (skipped,) = state.scaler._found_inf_per_device(state.optimizer).values()
        norm = torch.where(skipped > 0, 0.0, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_average(state.ema, state.network, config.ema, state.done)
    return torch.stack([total, norm])


def training_inputs(job: Job, batch: Batch | StudyBatch, part: slice) -> tuple[Tensor, ...]:
    """What the network takes of a part of this rank's slice of a batch, normalised and augmented, on the device."""
    config, ranks, pixels = job.config, job.ranks, job.manifest.pixels
    images, *others = view_tensors(batch, job.device, part)
    if config.augment == "none":
        inputs = normalize(images, pixels["mean"], pixels["std"])
    else:
        # Every place of the whole batch has its own draws, also those of views that are not there.
        shape = batch.images.shape[:-3]
        total = math.prod(shape)
        places = (ranks.rank * total + np.arange(total)).reshape(shape)[part]
        inputs = augment(
            images,
            pixels["mean"],
            pixels["std"],
            config.seed,
            *batch.step[:2],
            AUGMENTATIONS[config.augment],
            places if isinstance(batch, Batch) else places[batch.present[part]],
            ranks.count * total,
        )
    return inputs.contiguous(memory_format=torch.channels_last), *others


def check_steps(job: Job, found: list[Tensor], state: TrainState, epoch: int, step: int) -> float:
    """Add the losses since the last check to the sum; returns their mean, nan of no steps.

    `found` is what `train_step` returned, `step` the last one's number in its epoch. Raises DivergedError for a loss
    or gradient that is not finite: clipping divides by the gradient's norm, so one nan becomes all weights.
    """
    ours = torch.stack(found).double().cpu().numpy() if found else np.empty((0, 2))
    sums = job.ranks.sum(ours)
    for number, values in enumerate(sums.tolist()):
        for name, value in zip(("loss", "gradient's norm"), values, strict=True):
            if not math.isfinite(value):
                bad = step + 2 - len(found) + number  # from 1, as the progress bar counts
                raise DivergedError(
                    f"the {name} is {value} at epoch {epoch + 1}, step {bad}; try a lower --lr"
                )
        state.loss_sum += values[0]
    found.clear()
    return float(sums[:, 0].mean()) if len(sums) else math.nan


def evaluate_state(job: Job, state: TrainState, dev: Selected, steps: int, log: Log) -> None:
    """Score the averaged weights on dev, add a line to metrics.jsonl, keep the best weights."""
    job.ranks.align_buffers(state.ema)
    scored, _ = score_split(job, state.ema, dev, job.manifest.pixels)
    report = report_auroc(job.config.labels, *scored[:3])
    score = choice_score(report)
    if score is None:
        raise DataError(no_choice(job))  # now that unusable images are left out
    epoch = round(state.done / steps, 4)
    line: dict[str, Any] = {"epoch": epoch, "step": state.done}
    line["train_loss"] = state.loss_sum / (state.done - state.evaluated)
    line |= {name: value for name, value in report.items() if name.endswith("_auroc")}
    state.history.append(line | {"labels": {label: row["auroc"] for label, row in report["labels"].items()}})
    state.evaluated, state.loss_sum = state.done, 0.0
    is_best = score > state.best
    state.best = max(score, state.best)
    if job.ranks.is_first:
        if is_best or job.config.keep == "last":
            save_best(job, state.ema.state_dict(), epoch, score)
            (job.run / CALIBRATION).unlink(missing_ok=True)  # of the weights before
        # Rewritten from the checkpoint's own history, so that steps run again are not listed twice.
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_atomically(job.run / "metrics.jsonl", lines.encode())
    log("dev/macro_auroc", score, state.done)
    note = "  (best)" if is_best else ""
    click.echo(f"Epoch {epoch:g}: dev macro AUROC {score:.4f}{note}", err=True)


def is_out_of_patience(config: Config, state: TrainState) -> bool:
    """Whether the last `patience` evaluations were none better than the best before them."""
    if config.patience is None:
        return False
    scores = [choice_score(line) or 0.0 for line in state.history]
    return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= config.patience


def choice_score(report: Mapping[str, Any]) -> float | None:
    """The macro AUROC a checkpoint is chosen by: over the labels with 10 positives or more, if there are any.

    On the real dev split these are all labels; on a small one the others would add chance alone.
    """
    score: float | None = report["macro10_auroc"]
    return report["macro_auroc"] if score is None else score


def start_state(job: Job, labels: Labels, rows: Rows) -> TrainState:
    """The state before the first step."""
    config = job.config
    torch.manual_seed(config.seed)
    network = build_network(config.arch, output_count(config), config.pretrained)
    if job.init is not None:
        fresh = load_initial(network, job.init)
        click.echo(f"{job.init}: loaded; fresh: {', '.join(fresh) or 'nothing'}", err=True)
    network = fuse(network, config).to(job.device).to(memory_format=torch.channels_last)
    target, mask = (torch.from_numpy(array[rows]) for array in labels)
    loss: nn.Module
    if config.loss == "aucm":
        loss = AUCMarginLoss(target, mask)
    else:
        weights = positive_weights(target, mask) if config.pos_weight else None
        loss = MaskedLoss(three_class_columns(config), weights)
    ema = copy.deepcopy(network).requires_grad_(False)
    forward = job.ranks.average_gradients(network, config.sync_bn)
    return TrainState(
        network,
        loss.to(job.device),
        ema,
        build_optimizer(network, config.lr, config.weight_decay),
        torch.amp.GradScaler(job.device.type, enabled=job.precision == torch.float16),
        str(job.precision).removeprefix("torch."),
        job.ranks.count,
        torch.compile(forward) if config.compile else forward,
    )


def teacher_digest(teacher: Path, shards: str) -> str:
    """sha256 of a run's scores of train. Raises DataError with the command that writes them."""
    try:
        return hashlib.sha256((teacher / TEACHER_SCORES).read_bytes()).hexdigest()
    except FileNotFoundError:
        options = f"--shards {redact(shards)} --run {teacher}"
        if (teacher / "best.pt").exists():
            missing, command = TEACHER_SCORES, f"python train.py evaluate {options} --split train"
        else:
            missing, command = "best.pt", f"python train.py {options} --uncertain ignore"
        raise DataError(f"{teacher}: no {missing}; first run: {command}") from None


def check_pattern(text: str) -> None:
    """Raise DataError for what is not a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise DataError(f"'{text}' is not a regular expression: {error}") from None


class ByteSize(click.ParamType[int]):
    """Bytes, as 500MB, 20GB or 1.5TB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])B", str(value))
        if match is None:
            self.fail(f"'{value}' is not like 500MB, 20GB or 1.5TB", param, ctx)
        return int(float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]])


class LabelNames(click.ParamType[tuple[str, ...]]):
    """Names of labels, separated by commas; in the order of LABELS."""

    name = "labels"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """The names."""
        names = [name.strip() for name in str(value).split(",")]
        for name in names:
            if name not in LABELS:
                self.fail(f"'{name}' is none of {', '.join(LABELS)}", param, ctx)
        return tuple(label for label in LABELS if label in names)


class TrainByDefault(click.Group):
    """A group whose command `train` needs not be named, and is the only one for several ranks."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `train` in front of options."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        if args and args[0] != "train" and "RANK" in os.environ:
            raise click.UsageError(f"{args[0]} is for one process: start it without torchrun")
        return super().parse_args(ctx, args)


def data_options(function: Callable[..., int]) -> Callable[..., int]:
    """The options that say where shards are, for every command that reads them."""
    options = [
        click.option("--shards", default="shards", help="Folder of shards, or its URL: https://… or s3://…."),
        click.option(
            "--cache",
            type=click.Path(path_type=Path),
            default=Path(".cache"),
            help="Where shards of a URL are kept, shared by all runs.",
        ),
        click.option(
            "--cache-size", type=ByteSize(), default="20GB", help="The least recently used ones go."
        ),
        run_option,
        workers_option,
    ]
    for option in reversed(options):
        function = option(function)
    return function


POLICY = Checked(parse_uncertain_policy)
run_option = click.option("--run", type=click.Path(path_type=Path), required=True, help="Folder of the run.")
workers_option = click.option(
    "--workers",
    default=share_of_cores,
    type=click.IntRange(1),
    show_default="cores",
    help="Decoding threads.",
)


@click.group(cls=TrainByDefault)
def main() -> None:
    """Train, sweep, evaluate, predict, export. Without a command's name: train."""


@main.command(
    "train", epilog="Example: python train.py --shards shards --run runs/first --lr 1e-4 --weight-decay 1e-2"
)
@data_options
@click.option("--arch", default="resnet50", type=click.Choice(ARCHITECTURES))
@click.option(
    "--pretrained", is_flag=True, help="Start from torchvision's ImageNet weights (downloads them)."
)
@click.option(
    "--init",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True),
    help="Start from these weights, or those of a run.",
)
@click.option("--lr", default=1e-4, type=Number(0, min_open=True), help="Peak learning rate.")
@click.option("--weight-decay", default=1e-2, type=Number(0), help="AdamW's.")
@click.option("--batch-size", default=64, type=click.IntRange(2))
@click.option("--accumulate", default=1, type=click.IntRange(1), help="Compute a batch in so many parts.")
@click.option("--epochs", default=5, type=click.IntRange(1))
@click.option("--image-size", default=320, type=click.IntRange(32), help="Side of the square input, pixels.")
@click.option("--amp", default="auto", type=click.Choice(["auto", "bf16", "fp16", "off"]))
@click.option("--compile", is_flag=True, help="Compile the network by torch.compile.")
@click.option("--sync-bn", is_flag=True, help="torchrun: BatchNorm over the whole batch, not a rank's part.")
@click.option("--ema", default=0.999, type=Number(0, 1), help="Decay of the averaged weights.")
@click.option("--fusion", type=click.Choice(FUSIONS), help="Learn studies, and pool their views so.")
@click.option("--freeze", is_flag=True, help="fusion: keep the weights of --init; train what is new.")
@click.option(
    "--keep", default="best", type=click.Choice(["best", "last"]), help="Weights to keep, by dev macro AUROC."
)
@click.option(
    "--augment", default="affine", type=click.Choice(AUGMENTATIONS), help="crop: affine, and random crops."
)
@click.option("--loss", default="bce", type=click.Choice(LOSSES), help="aucm: the AUC margin loss.")
@click.option("--pos-weight", is_flag=True, help="Weigh positives by how rare they are in train.")
@click.option("--uncertain", metavar="POLICY", type=POLICY, show_default="the shards'", help=UNCERTAIN_HELP)
@click.option(
    "--blank",
    metavar="POLICY",
    type=Checked(check_blank_policy),
    show_default="the shards'",
    help=BLANK_HELP,
)
@click.option(
    "--teacher", metavar="RUN", type=click.Path(path_type=Path), help="selftrained: learn from its scores."
)
@click.option("--strict", is_flag=True, help="Refuse labels with one class in train instead of warning.")
@click.option("--labels", type=LabelNames(), metavar="A,B", show_default="all 14", help="Learn these alone.")
@click.option("--views", default="all", type=click.Choice(VIEWS), help="Of those that the shards hold.")
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Use these images alone: sex=Female, age>=60, Edema=1.",
)
@click.option("--limit", type=click.IntRange(1), help="At most so many images of train, whole patients.")
@click.option(
    "--dev",
    type=Number(0, 1, min_open=True, max_open=True),
    show_default=f"{HELD_OUT:g} where the shards have no dev split",
    help="Share of train's patients to choose the checkpoint by.",
)
@click.option(
    "--balance",
    metavar="LABEL",
    type=click.Choice(LABELS),
    help="Draw its positives as often as its negatives.",
)
@click.option(
    "--max-bad",
    default=0.0,
    type=Number(0, 1),
    help="Share of images that may be damaged: left out. Of each rank, and each part of an epoch between evaluations.",
)
@click.option("--eval-every", type=click.IntRange(1), metavar="STEPS", show_default="once per epoch")
@click.option(
    "--patience", type=click.IntRange(1), help="Stop after so many evaluations without a better one."
)
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--wandb", metavar="PROJECT", help="Send the logs to Weights & Biases too.")
def train_command(**options: Any) -> int:
    """Train a network on shards; the same command continues an interrupted run."""
    with join_ranks() as ranks:
        return train(make_job(StopFlag(), ranks, **options))


def make_job(
    stop: StopFlag,
    ranks: Ranks,
    shards: str,
    cache: Path,
    cache_size: int,
    run: Path,
    workers: int,
    uncertain: str | None,
    blank: str | None,
    teacher: Path | None,
    init: Path | None,
    strict: bool,
    labels: tuple[str, ...] | None,
    dev: float | None,
    wandb: str | None,
    **options: Any,
) -> Job:
    """The job that the options of `train` ask for. Raises DataError and UsageError for unusable ones."""
    folder, remote = find_shards(shards, cache, cache_size)
    manifest = read_manifest(folder)
    uncertain = uncertain or manifest.policies["uncertain"]
    if "selftrained" not in parse_uncertain_policy(uncertain).values() and teacher:
        raise click.UsageError(f"--teacher is for the policy selftrained; --uncertain is {uncertain}")
    if "dev" not in manifest.splits:
        dev = dev or HELD_OUT
    elif dev is not None:
        images = manifest.splits["dev"].samples
        raise click.UsageError(
            f"--dev is for shards without a dev split; {redact(shards)} have one, of {images:,} images"
        )
    if init is not None and init.is_dir():
        init = init / "best.pt"
    config = Config(
        **options,
        uncertain=uncertain,
        blank=check_blank_policy(blank or manifest.policies["blank"]),
        manifest=manifest_digest(folder),
        teacher=teacher_digest(teacher, shards) if teacher else None,
        init=hashlib.sha256(init.read_bytes()).hexdigest() if init else None,
        labels=labels or LABELS,
        dev=dev,
    )
    try:
        check_config(config, ranks)
    except SettingError as error:
        raise click.UsageError(str(error)) from None
    device = choose_device(config.amp)
    return Job(
        config, folder, remote, run, manifest, *device, workers, teacher, init, strict, stop, wandb, ranks
    )


class Values(click.ParamType[tuple[Any, ...]]):
    """One or more values of an option, separated by spaces or commas, without repetitions."""

    name = "values"

    def __init__(self, one: click.ParamType[Any]) -> None:
        self.one = one

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The values in the order given."""
        words = str(value).split() if self.one is POLICY else re.split(r"[\s,]+", str(value).strip())
        if not words or words == [""]:
            self.fail("no value", param, ctx)
        return tuple(dict.fromkeys(self.one.convert(word, param, ctx) for word in words))


@main.command(
    "sweep",
    context_settings={"ignore_unknown_options": True},
    epilog='Example: python train.py sweep --sweep runs/sweep --lr "1e-4 1e-3" --weight-decay "1e-4 1e-2" --epochs 3',
)
@click.option(
    "--sweep", "folder", type=click.Path(path_type=Path), required=True, help="Folder of the sweep."
)
@click.option(
    "--lr", default="1e-4", type=Values(Number(0, min_open=True)), help="Values, as in the example."
)
@click.option("--weight-decay", default="1e-2", type=Values(Number(0)))
@click.option("--batch-size", default="64", type=Values(click.IntRange(2)))
@click.option("--arch", default="resnet50", type=Values(click.Choice(ARCHITECTURES)))
@click.option("--uncertain", type=Values(POLICY), show_default="the shards'")
@click.option(
    "--sampler", default="grid", type=click.Choice(["grid", "tpe"]), help="tpe: search between the values."
)
@click.option("--trials", type=click.IntRange(1), help="tpe: how many.")
@click.option(
    "--pruner",
    default="none",
    type=click.Choice(["none", "median", "halving"]),
    help="Ends poor trials early.",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="Of every trial, and of the search.")
@click.option(
    "--storage",
    metavar="URL",
    help="A database for processes on several machines.  [default: SQLite in the folder]",
)
@click.option(
    "--grace", default=120, type=click.IntRange(3), help="Seconds until a silent process loses its trial."
)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def sweep_command(
    folder: Path,
    sampler: str,
    trials: int | None,
    pruner: str,
    seed: int,
    storage: str | None,
    grace: int,
    options: tuple[str, ...],
    **values: tuple[Any, ...] | None,
) -> int:
    """Train with all combinations of values, or search between them; all OPTIONS of `train` are allowed.

    Every trial is a run as `train` makes it. The same command continues a sweep; at the same time, it shares it.
    """
    try:
        from model.runs import sweep as s
        from model.runs.sweep_report import write_sweep_report
    except ImportError as error:
        raise DataError(f"{error.name} is missing: pip install '.[sweep]'") from None
    if sampler == "tpe" and trials is None:
        raise click.UsageError("--sampler tpe needs --trials")
    if sampler == "grid" and trials is not None:
        raise click.UsageError("--trials needs --sampler tpe: a grid has as many as combinations")
    if any(re.match("--run(=|$)", option) for option in options):
        raise click.UsageError("--run is for one run: those of a sweep are in its folder, by --sweep")
    stop = StopFlag()

    def make(point: Mapping[str, Any], run: Path) -> Job:
        given = {**point, "seed": seed, "run": run}
        words = [
            str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)
        ]
        return make_job(stop, ALONE, **train_command.make_context("train", [*options, *words]).params)

    tried = {name: given for name, given in values.items() if given is not None}
    unused = folder / "trials" / "unused"
    point = {name: given[0] for name, given in tried.items()}
    first = make(point, unused)
    # A value that does not go with the options is refused before any point is trained.
    for name, given in tried.items():
        for value in given[1:]:
            make({**point, name: value}, unused)
    shared = {name: value for name, value in asdict(first.config).items() if name not in tried}
    epochs = first.config.epochs
    sweep = s.Sweep(folder, tried, shared, sampler, trials or 0, pruner, epochs, seed, grace, storage)

    started = False

    def train_point(point: Mapping[str, Any], run: Path, watch: s.Watch) -> s.Outcome | None:
        nonlocal started
        started = True
        job = make(point, run)
        torch.compiler.reset()  # it gives up after several networks in one process
        gc.collect()  # a trial that failed is held by its traceback, and so is its memory
        torch.cuda.empty_cache()
        with contextlib.redirect_stdout(io.StringIO()):  # the table of a run is in its report
            code = train(job, lambda history: watch([summarise(line) for line in history]))
        if code:
            return None
        try:
            return s.Outcome(**measure_run(job))
        except InterruptedEvaluationError:
            return None

    try:
        done = s.run_sweep(sweep, train_point, stop)
    except BaseException:
        if started:  # an error in one trial: what the others came to is worth a report
            write_sweep_report(sweep, s.list_trials(sweep))
        raise
    found = s.list_trials(sweep)
    write_sweep_report(sweep, found)
    complete, failed = (sum(trial.state == state for trial in found) for state in ("complete", "failed"))
    of_failed = f", {failed} failed" if failed else ""
    click.echo(f"{folder / 'report.html'}: {complete} trials complete{of_failed}")
    return stop.code if not done else 1 if failed and not complete else 0


def summarise(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a sweep keeps of an evaluation; `score` is what trials are compared by."""
    kept = ("epoch", "train_loss", "macro_auroc", "macro10_auroc")
    return {name: line[name] for name in kept} | {"score": choice_score(line)}


@main.command("evaluate", epilog="Example: python train.py evaluate --run runs/first --split valid")
@data_options
@click.option("--split", default="valid", help="Of the shards, which may be others than the run's.")
@click.option(
    "--against",
    multiple=True,
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Compare with its scores; a run by studies with those of several.",
)
@click.option("--sensitivity", default=0.9, type=Number(0, 1), help="That a threshold is to reach on dev.")
@click.option(
    "--study", default="max", type=click.Choice(["max", "mean"]), help="A study's score, from its views'."
)
@click.option(
    "--where",
    multiple=True,
    metavar="CONDITION",
    help="Score these images instead of those chosen by the run's own conditions: sex=Male.",
)
@click.option("--views", type=click.Choice(VIEWS), show_default="the run's", help="Score these views.")
@click.option("--shared-images", is_flag=True, help="Go on where the run trained on some of the images.")
def evaluate_command(
    shards: str,
    cache: Path,
    cache_size: int,
    run: Path,
    workers: int,
    split: str,
    against: tuple[Path, ...],
    sensitivity: float,
    study: str,
    where: tuple[str, ...],
    views: str | None,
    shared_images: bool,
) -> int:
    """Score the run's best checkpoint on a split.

    The run's own --where and --views choose the images, unless others are given: train on one sex, score the other.
    """
    folder, remote = find_shards(shards, cache, cache_size)
    config, stop = read_config(run), StopFlag()
    device = choose_device(config.amp)
    job = Job(config, folder, remote, run, read_manifest(folder), *device, workers, None, None, False, stop)
    chosen_by = (*where, *([] if views is None else [f"{views} views"]))
    scored = replace(job, config=replace(config, where=where or config.where, views=views or config.views))
    try:
        others = find_scores(job, split, against)
        shared = check_evaluation(scored, split, others, shared_images)
        found = score_best(scored, split)
        results = {split: evaluate(job, split, found, others, sensitivity, study, chosen_by, shared)}
    except InterruptedEvaluationError:
        return stop.code
    print_evaluations({split: results[split][0]})
    print_comparison(results[split][0])
    result = name_result(job, split, chosen_by)
    compared = name_comparison(result, others)
    write_report(scored, f"report-{compared}.html", results)
    for file in (f"scores-{result}.arrow", f"evaluation-{compared}.json", f"report-{compared}.html"):
        click.echo(f"{run / file}: written")
    return 0


@main.command("predict", epilog="Example: python train.py predict --run runs/first --out scores.csv films/")
@run_option
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="CSV to write.")
@click.option("--strict", is_flag=True, help="Exit with 3 where an image cannot be read.")
@click.option(
    "--group-by",
    metavar="REGEX",
    type=Checked(check_pattern),
    help="Files in whose paths it finds the same text are one study.  [default: those of a folder]",
)
@workers_option
def predict_command(
    run: Path, images: tuple[Path, ...], out: Path, strict: bool, group_by: str | None, workers: int
) -> int:
    """Score IMAGES (JPEG or PNG files, or folders of them) by the run's best checkpoint.

    A run by studies scores the images of a study together: those of a folder, or as --group-by says.
    """
    files = [file for path in images for file in find_images(path)]
    for path in images:
        for suffix, count in count_others(path).items():
            click.echo(f"{path}: {count:,} {suffix} files skipped: only JPEG and PNG can be read", err=True)
    if any(out.exists() and file.samefile(out) for file in files):
        raise click.UsageError(f"--out {out} is one of the images")
    check_folder(out)
    if not files:
        raise DataError(f"{', '.join(map(str, images))}: no .jpg, .jpeg or .png file")
    config = read_config(run)
    if config.fusion is None:
        if group_by is not None:
            raise click.UsageError(f"--group-by is for runs by studies; {run} learnt single images")
        samples = {str(file): [file] for file in files}
    else:
        samples = group_files(files, group_by)
    scores, bad = score_files(run, config, list(samples.values()), workers)
    for file, reason in bad:
        click.echo(f"{file}: {reason}", err=True)
    if len(bad) == len(files):
        kept = f"{out} is left as it was" if out.exists() else f"{out} is not written"
        raise DataError(f"none of {len(files):,} images can be read; {kept}")
    cells = [["" if math.isnan(score) else f"{score:.6f}" for score in row] for row in scores.tolist()]
    heading = ["study" if config.fusion else "file", *config.labels]
    write_csv(out, [heading, *([name, *row] for name, row in zip(samples, cells, strict=True))])
    of_studies = f" in {len(samples):,} studies" if config.fusion else ""
    click.echo(f"{out}: scores of {len(files) - len(bad):,} images{of_studies}, {len(bad):,} unusable")
    return 3 if strict and bad else 0


def check_folder(out: Path) -> None:
    """Raise DataError where a file cannot be written for want of a folder: before the work, not after it."""
    if not out.absolute().parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}")


def group_files(files: Iterable[Path], pattern: str | None) -> dict[str, list[Path]]:
    """The files of each study, by its name: their folder, or the text that the pattern finds in their paths.

    Raises DataError where the pattern finds nothing, or more files than a study has views.
    """
    studies: dict[str, list[Path]] = {}
    for file in files:
        match = None if pattern is None else re.search(pattern, str(file))
        if pattern is not None and match is None:
            raise DataError(f"{file}: --group-by '{pattern}' is not in its path")
        studies.setdefault(str(file.parent) if match is None else match[0], []).append(file)
    for name, views in studies.items():
        if len(views) > MOST_VIEWS:
            how = "a study's images must lie in a folder of their own, or name it by --group-by"
            raise DataError(f"{name}: {len(views)} images, of a study there are at most {MOST_VIEWS}; {how}")
    return studies


@main.command("export", epilog="Example: python train.py export --run runs/first --out model.onnx")
@run_option
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help=".onnx or .pt2")
def export_command(run: Path, out: Path) -> int:
    """Write the run's best network for other programs: uint8 images [B, 1, S, S] in, scores [B, L] out.

    Of the L labels that the run has learnt, in their usual order.
    """
    config = read_config(run)
    check_folder(out)
    if config.fusion:
        raise DataError(f"{run}: a network over studies cannot be exported, only one for images")
    network, best = load_best(run, config, torch.device("cpu"))
    scorer = Scorer(network, learnt_columns(config), best["pixels"]["mean"], best["pixels"]["std"])
    try:
        difference = export_scorer(scorer, config.image_size, out)
    except ValueError as error:
        raise DataError(str(error)) from None
    click.echo(f"{out}: checked, within {difference:.1e} of the eager network's logits")
    click.echo(f"its scores: {', '.join(config.labels)}")
    return 0


def find_shards(shards: str, cache: Path, cache_size: int) -> tuple[Path, Remote | None]:
    """The folder of manifest and tables, and where the tars are if those are at a URL."""
    if not is_url(shards):
        return Path(shards), None
    remote = Remote(shards, Cache(cache, cache_size))
    return remote.mirror(), remote


def find_images(path: Path) -> list[Path]:
    """The file itself, or the image files below a folder, sorted."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def count_others(path: Path) -> dict[str, int]:
    """How many files of each other suffix are below a folder; none for a file."""
    others = (file.suffix.lower() for file in path.rglob("*") if file.is_file())
    counts = Counter(suffix or "other" for suffix in others if suffix not in IMAGE_SUFFIXES)
    return dict(sorted(counts.items()))


if __name__ == "__main__":
    run_command(main)
