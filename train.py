"""Train a network on shards. The commands, which `model/runs/commands.py` and `use.py` define:

    python -m train --shards shards --run runs/first --lr 1e-4        train, or continue where it stopped
    python -m train sweep --sweep runs/sweep --lr "1e-4 1e-3"         a run for each value
    python -m train evaluate --run runs/first --split valid           score its best checkpoint on a split
    python -m train predict --run runs/first --out scores.csv films   score image files
    python -m train export --run runs/first --out model.onnx          for other programs (.onnx or .pt2)
    python -m train inputs --out inputs.png                           draw what training makes of the images
    python -m train embed runs/first --out train.parquet              embeddings of a split, for other models

`torchrun --nproc-per-node 8 -- train.py …` trains on 8 GPUs: every rank takes its slice of the same batches.

A run folder's files are listed in docs/train.md. The same command on the same folder continues where it stopped,
exactly: batches and augmentations are functions of (seed, epoch, step).
"""

import importlib
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

if __name__ == "__main__":
    # Here, and not at the end: the imports below take seconds, which a mistyped option should not wait for. A command
    # that trains gets `train` of this module, imported under its own name.
    from model.runs.commands import main
    from pipeline.console import run_command

    run_command(main, lambda *given: importlib.import_module("train").train(*given))

import contextlib
import copy
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from model.augment import augment, normalize
from model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_state,
    refused,
    restore_random_state,
    save_checkpoint,
)
from model.frozen import begin_training, freeze
from model.losses import AUCMarginLoss, MaskedLoss, positive_weights
from model.names import AUGMENTATIONS
from model.networks import build_network, load_initial
from model.optim import build_optimizer, scheduled_lr, set_lr, update_average
from model.predict import DivergedError, InterruptedEvaluationError, explain_memory
from model.ranks import Ranks
from model.runs.config import (
    Config,
    can_divide,
    is_reported,
    name_choice,
    name_outputs,
    parse_choice,
    three_class_columns,
)
from model.runs.folder import (
    describe_software,
    follow_by_wandb,
    fuse,
    open_run,
    record_environment,
    save_best,
)
from model.runs.job import (
    Job,
    Selected,
    agree,
    network_inputs,
    open_rows,
    read_batches,
    to_device,
)
from model.runs.overlap import list_seen
from model.runs.predictor import forget_calibration, score_split
from model.runs.results import choice_score, finish_run
from model.runs.targets import check_reported, no_choice, training_labels, training_weights
from pipeline.base.errors import DataError
from pipeline.base.files import claimed, named_writes, write_atomically
from pipeline.console import progress_bar, say, say_once, show_left
from pipeline.labels import LABELS
from pipeline.measure.evaluation import MEANS
from pipeline.measure.metrics import cross_entropy, report_auroc
from pipeline.stream.batches import Batch, BatchStream, Labels, Unusable
from pipeline.stream.plan import Rows, Weights, plan_training, training_steps

if TYPE_CHECKING:
    from model.recent import RecentAUROC

CLIP_NORM = 1.0
# The layers of stochastic depth, torchvision's and timm's, and the attribute with their probability.
DEPTHS = {"StochasticDepth": "p", "DropPath": "drop_prob"}
CHECK_STEPS = 20  # how often the loss is read back: each read waits for the device
SAVE_SECONDS = 300.0  # a killed run loses little more work than this
Log = Callable[[str, float, int], None]  # name of a curve, value, step


@dataclass
class TrainState:
    """What last.pt restores, and nothing more: epoch, schedule and augmentation follow from `done`."""

    network: nn.Module
    loss: nn.Module
    ema: nn.Module  # the averaged weights, which are evaluated
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str  # of autocast, as `--amp auto` resolves on this device
    ranks: int  # that train it now
    forward: Callable[..., Tensor]  # the network, averaging gradients over ranks, perhaps compiled
    auroc: "RecentAUROC"  # of the batches since the last check
    done: int = 0  # steps, of all epochs
    evaluated: int = 0  # steps that were done at the last evaluation
    loss_sum: float = 0.0  # over the steps since then
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    bad: Unusable = field(default_factory=Unusable)  # images of train

    MODULES = ("network", "loss", "ema", "optimizer", "scaler", "bad")
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
        instead = f", or start another `run` with `init` {path.parent}" if best.exists() else ""
        remedy = f"; remove it to train from the beginning{instead}"
        saved = load_checkpoint(path, ranks, remedy)
        before = saved["precision"]
        if before != self.precision:
            how = "continue on such a device as before, or choose another `run`"
            raise CheckpointError(
                f"{path}: trained in {before}, `amp` is {self.precision} on this device: {how}"
            )
        with refused(path, remedy):
            for name in self.MODULES:
                getattr(self, name).load_state_dict(saved[name])
            for name in self.VALUES:
                if not isinstance(saved[name], type(getattr(self, name))):
                    raise TypeError(f"{name} is {saved[name]!r}")
                setattr(self, name, saved[name])
            restore_random_state(saved["random"])
            return int(saved["ranks"])


def train(job: Job, watch: Callable[[list[dict[str, Any]]], None] = lambda history: None) -> int:
    """Train to the end, or continue; returns the exit code. Raises DataError for unusable input.

    `watch` gets all evaluations so far after each one is saved; what it raises ends the run there.
    """
    config, run = job.config, job.run
    job.ranks.compare({"shards": job.shards.digest} | asdict(config) | describe_software(job))
    if "dev" not in job.manifest.splits and config.dev is None:
        raise DataError(f"{job.shards}: no dev split to choose a checkpoint by; hold one out by `dev`")
    train, dev = open_rows(job, "train"), open_rows(job, "dev")
    check_reported(job, dev)
    job = replace(job, seen=list_seen(job, [("train", train), ("dev", dev)]))
    steps = training_steps(len(train.rows), config.batch_size)
    if steps == 0:
        most = len(train.rows) // 2 * 2
        how = f"choose one of {most} or less" if most else "there must be 2 or more"
        raise DataError(
            f"{job.shards}: {len(train.rows)} train {config.units} are less than one batch of `batch_size` "
            f"{config.batch_size}: {how}"
        )
    labels = training_labels(job, train)
    weights = training_weights(job, labels, train)
    state = start_state(job, labels, train.rows)
    state.bad = train.bad
    if not job.ranks.is_first:
        return train_epochs(job, state, (train, dev), labels, weights, watch)
    run.mkdir(parents=True, exist_ok=True)  # only now: a run that cannot start leaves no folder
    with claimed(run):
        job = replace(job, config=open_run(run, config, steps))
        record_environment(job)
        return train_epochs(job, state, (train, dev), labels, weights, watch)


def train_epochs(
    job: Job,
    state: TrainState,
    selected: tuple[Selected, Selected],
    labels: Labels,
    weights: Weights | None,
    watch: Callable[[list[dict[str, Any]]], None],
) -> int:
    """Continue from last.pt, train on the first of `selected` to the end, and evaluate; returns the exit code."""
    config, run, (train, dev) = job.config, job.run, selected
    steps = training_steps(len(train.rows), config.batch_size)
    together = f", {job.ranks.count} ranks" if job.ranks.joined else ""
    say(f"{config.arch} on {job.device.type}, {state.precision}{together}")
    total, every = config.epochs * steps, config.eval_every or steps
    if job.ranks.gather((run / "last.pt").exists())[0, 0]:
        before = state.restore(run / "last.pt", job.ranks)
        if state.done == total or is_out_of_patience(config, state):
            say(
                f"{run}: finished, after step {state.done:,} of {total:,}; to train further, raise `epochs`, or start "
                f"another `run` with `init` {run}"
            )
            if job.ranks.gather(is_reported(run))[0, 0]:
                return 0
        else:
            check_ranks(job, state, before)
            say(f"{run}: continuing after step {state.done:,} of {total:,}")
    elif job.ranks.is_first:
        forget_calibration(run)  # of training whose last.pt was removed: this run has no report yet
    began, before = time.perf_counter(), state.done
    with open_events(job, state.done) as log:
        while True:
            due = state.done % steps == 0 or state.done % steps % every == 0
            if state.evaluated < state.done and due:
                try:
                    line = evaluate_state(job, state, dev, steps, log)
                except InterruptedEvaluationError:
                    return stop_run(job, state)  # a resume begins with this evaluation
                pace = (time.perf_counter() - began) / max(state.done - before, 1)  # with the scoring
                say(line + show_left(pace * (total - state.done)))
                save_state(job, state)
                watch(state.history)
            if state.done == total or is_out_of_patience(config, state):
                break
            epoch, step = divmod(state.done, steps)
            batches = stream_epoch(job, train, labels, weights, epoch)
            batches.load_state_dict({"step": step})
            train_steps(job, state, batches, epoch, min(steps, (step // every + 1) * every), steps, log)
            if agree(job)[0]:
                return stop_run(job, state)
        try:
            found = finish_run(job)
        except InterruptedEvaluationError:
            return say_stopped(job)
        if "valid" in found:  # of best.pt, once: no choice is made by it
            valid = found["valid"]
            log_labels(
                log, "valid", {name: valid.get("auroc", name).value for name in valid.labels}, state.done
            )
    return 0


def log_labels(log: Log, split: str, labels: Mapping[str, float | None], step: int) -> None:
    """Add the AUROC of each label that has one to its curve."""
    for label, auroc in labels.items():
        if auroc is not None:
            log(f"auroc_{split}/{label}", auroc, step)


def check_ranks(job: Job, state: TrainState, before: int) -> None:
    """Say that a run continues on a different number of ranks.

    Raises CheckpointError where that changes what it learns: where a layer sees only its rank's part of a batch.
    """
    now = job.ranks.count
    if before == now:
        return
    begin_training(state.network)
    trained = [module for module in state.network.modules() if module.training]
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trained)
    reasons = {
        "BatchNorm's statistics are of a rank's part of a batch": norms and not job.config.sync_bn,
        "stochastic depth is drawn for a rank's part of a batch": any(
            (getattr(module, DEPTHS.get(type(module).__name__, ""), None) or 0) > 0 for module in trained
        ),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise CheckpointError(
            f"{job.run / 'last.pt'}: trained on {before} ranks, and {now} here would learn otherwise: {reason}; "
            f"continue on {before}, or choose another `run`"
        )
    say(f"{job.run}: begun on {before} ranks, continuing on {now}: the same but for rounding")


def stream_epoch(
    job: Job, train: Selected, labels: Labels, weights: Weights | None, epoch: int
) -> BatchStream:
    """The slices for this rank of the batches of an epoch."""
    plan = partial(
        plan_training,
        train.samples,
        job.config.batch_size,
        job.config.seed,
        epoch,
        weights=weights,
        rank=job.ranks.rank,
        ranks=job.ranks.count,
    )
    return read_batches(job, train, labels, plan)


def stop_run(job: Job, state: TrainState) -> int:
    """Save and announce it; returns the exit code."""
    save_state(job, state)
    return say_stopped(job)


def save_state(job: Job, state: TrainState) -> None:
    """Write last.pt, which is the same on all ranks: their generators have drawn the same numbers.

    Raises DivergedError where the last step, after which no loss was looked at, has ruined the weights.
    """
    weights = torch.stack(torch._foreach_norm(list(state.network.parameters())))
    if not weights.isfinite().all():
        raise DivergedError(f"the weights are not finite after step {state.done:,}; try a lower `lr`")
    state.bad.update(job.ranks.unite(state.bad.rows))
    if job.ranks.is_first:
        state.save(job.run / "last.pt")


@contextlib.contextmanager
def open_events(job: Job, done: int) -> Iterator[Log]:
    """A function that adds a value to a curve in TensorBoard's events; drops the events after step `done`.

    Raises DataError, naming their folder, where they cannot be written.
    """
    if not job.ranks.is_first:
        yield lambda name, value, step: None
        return
    folder = job.run / "tensorboard"
    with follow_by_wandb(job), quiet_writer():
        with named_writes(folder):
            events = SummaryWriter(str(folder), purge_step=done + 1)

        def log(name: str, value: float, step: int) -> None:
            with named_writes(folder):
                events.add_scalar(name, value, step)

        try:
            yield log
        finally:
            with named_writes(folder):
                events.close()


@contextlib.contextmanager
def quiet_writer() -> Iterator[None]:
    """Print no traceback of TensorBoard's thread: what it fails with, the next value is refused with."""
    usual = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            usual(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = usual


def say_stopped(job: Job) -> int:
    """Say how to continue; returns the exit code, which is the same on all ranks."""
    say(f"{job.run}: stopped and saved; the same command continues")
    return int(agree(job)[0])


def train_steps(
    job: Job,
    state: TrainState,
    batches: Iterable[Batch],
    epoch: int,
    end: int,
    steps: int,
    log: Log,
) -> None:
    """Run the steps of an epoch up to `end`, or until the stop flag is set.

    Raises DivergedError, naming the step, for a loss or gradient that is not finite.
    """
    config = job.config
    begin_training(state.network)
    found: list[Tensor] = []
    images, waited, start = 0, 0.0, time.perf_counter()
    saved = start
    iterator = iter(batches)
    with progress_bar(f"Epoch {epoch + 1}/{config.epochs}", "steps") as advance:
        for step in range(state.done % steps, end):
            asked = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - asked
            stop, cells = agree(job, batch.mask.sum())
            if stop:
                break
            lr = scheduled_lr(config.lr, state.done, config.epochs * steps)
            set_lr(state.optimizer, lr)
            with explain_memory(*describe_step(job)):
                found.append(train_step(job, state, batch, cells))
            images += len(batch.images) * job.ranks.count
            state.done += 1
            if (step + 1) % CHECK_STEPS == 0 or step + 1 == end:
                loss = check_steps(job, found, state, epoch, step)
                now = time.perf_counter()
                rate, wait = images / (now - start), waited / (now - start)
                curves = {"loss": loss, "lr": lr, "images_per_s": rate, "data_wait": wait}
                for name, value in (curves | {"macro_auroc": state.auroc.compute()}).items():
                    log(f"train/{name}", value, state.done)
                note = f"loss {loss:.4f}  {rate:,.0f} images/s  data wait {wait:.0%}"
                advance(step + 1, steps, note)
                if now - saved > SAVE_SECONDS:
                    save_state(job, state)
                    saved = now
        check_steps(job, found, state, epoch, (state.done - 1) % steps)  # those before a stop


def describe_step(job: Job) -> tuple[str, str]:
    """What a step holds in memory, and how to hold less: for a step that runs out of memory."""
    config = job.config
    size = config.image_size
    doing = f"in a step with `batch_size` {config.batch_size} `accumulate` {config.accumulate} `image_size` {size}"
    parts = next(
        (
            parts
            for exponent in range(config.batch_size.bit_length())
            if (parts := 2**exponent) > config.accumulate and can_divide(config.batch_size, parts, job.ranks)
        ),
        None,
    )
    if parts is None or config.loss == "aucm":  # which is of a whole batch
        return doing, "choose a smaller `batch_size` or `image_size`"
    return doing, f"`accumulate` {parts} computes the same batch in {parts} parts"


def train_step(job: Job, state: TrainState, batch: Batch, cells: float) -> Tensor:
    """One update of the weights; returns this rank's part of the loss and the norm of the whole batch's gradient, [2].

    The device may still be computing both. The norm is 0 for a step that the scaler skips: in half precision, with
    too large a factor, gradients that are not finite are expected, and never reach the weights.
    `cells` is how many cells of the mask are set in the whole batch, of which `batch` is this rank's slice.
    """
    config, device, ranks = job.config, job.device, job.ranks
    state.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    # In parts, where a batch does not fit the device: each is weighted by its cells, so the gradients are the batch's.
    samples = len(batch.target)
    size = samples // config.accumulate
    for start in range(0, samples, size):
        part = batch.part(start, start + size)
        inputs = training_inputs(job, part, ranks.rank * samples + start, ranks.count * samples)
        target, mask = (to_device(array, device) for array in (part.target, part.mask))
        with ranks.exchange(state.forward, start + size == samples):
            with torch.autocast(device.type, job.precision, enabled=job.precision != torch.float32):
                logits = state.forward(*inputs)
            state.auroc.update(logits, target, mask)
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


def training_inputs(job: Job, batch: Batch, first: int, samples: int) -> tuple[Tensor, ...]:
    """What the network takes of a part of a batch, normalized and augmented, on the device.

    `first` is the position of the part's first sample in the whole batch of all ranks, of `samples`.
    """
    config, pixels = job.config, job.pixels
    images, *views = network_inputs(config, job.device, batch.images, batch.present, batch.projection)
    if config.augment == "none":
        inputs = normalize(images, pixels["mean"], pixels["std"])
    else:
        # Every place of the whole batch has its own draws, whether an image fills it or not.
        most = batch.step.rows.shape[1]
        inputs = augment(
            images,
            pixels["mean"],
            pixels["std"],
            config.seed,
            *batch.step[:2],
            AUGMENTATIONS[config.augment],
            (first + batch.sample) * most + batch.place,
            samples * most,
        )
    return inputs.contiguous(memory_format=torch.channels_last), *views


def check_steps(job: Job, found: list[Tensor], state: TrainState, epoch: int, step: int) -> float:
    """Add the losses since the last check to the sum; returns their mean, nan if there are none.

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
                    f"the {name} is {value} at epoch {epoch + 1}, step {bad}; try a lower `lr`"
                )
        state.loss_sum += values[0]
    found.clear()
    return float(sums[:, 0].mean()) if len(sums) else math.nan


def evaluate_state(job: Job, state: TrainState, dev: Selected, steps: int, log: Log) -> str:
    """Score the averaged weights on dev, add a line to metrics.jsonl, keep the best weights; returns it in words."""
    job.ranks.align_buffers(state.ema)
    scored, _ = score_split(job, state.ema, dev, job.pixels)
    report = report_auroc(job.config.labels, *scored[:4])
    epoch = round(state.done / steps, 4)
    line: dict[str, Any] = {"epoch": epoch, "step": state.done}
    line["train_loss"] = state.loss_sum / (state.done - state.evaluated)
    line["dev_loss"] = cross_entropy(*scored[:3])
    line |= {name: value for name, value in report.items() if name.endswith("_auroc")}
    line["labels"] = {label: row["auroc"] for label, row in report["labels"].items()}
    chosen = job.config.choose_by
    score, macro = (choice_score(line, labels) for labels in (chosen, "all"))
    if score is None or macro is None:  # now that unusable images are left out
        raise DataError(
            no_choice(job, [label for label in parse_choice(chosen) if line["labels"][label] is None])
        )
    state.history.append(line)
    state.evaluated, state.loss_sum = state.done, 0.0
    is_best = score > state.best
    state.best = max(score, state.best)
    if job.ranks.is_first:
        if is_best or job.config.keep == "last":
            save_best(job, state.ema.state_dict(), epoch, score)
            forget_calibration(job.run)  # of the weights before
        # Rewritten from the checkpoint's own history, so that steps run again are not listed twice.
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_atomically(job.run / "metrics.jsonl", lines.encode())
    log("dev/loss", line["dev_loss"], state.done)
    log("dev/macro_auroc", macro, state.done)
    if chosen != "all":
        log("dev/choice_auroc", score, state.done)
    log_labels(log, "dev", line["labels"], state.done)
    name = name_choice(chosen)
    if chosen == "all" and line["macro10_auroc"] is None:
        name = MEANS["macro"]
        few = "no label has 10 patients of each class on dev, so chance chooses the checkpoint"
        say_once(f"{job.shards}: {few}; raise `dev`")
    return f"Epoch {epoch:g}: dev AUROC {score:.4f} ({name}){'  (best)' if is_best else ''}"


def is_out_of_patience(config: Config, state: TrainState) -> bool:
    """Whether none of the last `patience` evaluations beat the best one before them."""
    if config.patience is None:
        return False
    scores = [choice_score(line, config.choose_by) or 0.0 for line in state.history]
    return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= config.patience


def start_state(job: Job, labels: Labels, rows: Rows) -> TrainState:
    """The state before the first step."""
    from model.recent import RecentAUROC  # here, because torchmetrics takes seconds to import

    config = job.config
    torch.manual_seed(config.seed)
    outputs = name_outputs(config)
    network = build_network(config.arch, len(outputs), config.pretrained)
    if job.start is not None:
        say(f"{job.start.path}: {load_initial(network, job.start, outputs)}")
    if config.freeze:
        freeze(network)
    network = fuse(network, config).to(job.device).to(memory_format=torch.channels_last)
    target, mask = (torch.from_numpy(array[rows]) for array in labels)
    loss: nn.Module
    if config.loss == "aucm":
        loss = AUCMarginLoss(target, mask)
    else:
        weights = positive_weights(target, mask) if config.pos_weight else None
        loss = MaskedLoss(three_class_columns(config), weights)
    forward = job.ranks.average_gradients(
        network, config.sync_bn
    )  # now all ranks have the first one's weights
    ema = copy.deepcopy(network).requires_grad_(False)
    return TrainState(
        network,
        loss.to(job.device),
        ema,
        build_optimizer(network, config.lr, config.weight_decay, config.layer_decay),
        torch.amp.GradScaler(job.device.type, enabled=job.precision == torch.float16),
        str(job.precision).removeprefix("torch."),
        job.ranks.count,
        torch.compile(forward) if config.compile else forward,
        RecentAUROC(len(LABELS), job.device),
    )
