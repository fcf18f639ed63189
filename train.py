"""Train a network on shards. The commands, which `model/runs/commands.py` and `score_commands.py` define:

    python -m train --shards shards --run runs/first --lr 1e-4        train, or resume exactly
    python -m train sweep --sweep runs/sweep --lr "1e-4 1e-3"         a run for each value
    python -m train evaluate --run runs/first --split valid           score its best checkpoint on a split
    python -m train predict --run runs/first --out scores.csv images  score image files

`torchrun --nproc-per-node 8 -- train.py …` trains on 8 GPUs: every rank takes its slice of the same batches. These, and
augmentations, are functions of (seed, epoch, step). docs/train.md lists the files of a run folder.
"""

import importlib
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C in the seconds that the imports take: no traceback. `run_command` puts the usual handler back.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

# Set before importing torch, which reads it once: OpenMP's threads spin while they wait for each other, so with other
# load on the cores, training on a CPU slows down to a tenth. With a short spin it slows down to half, and loses 15 % on
# idle cores.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

if __name__ == "__main__":
    # Not at the end: a mistyped option should fail before the imports below, which take seconds. A command that trains
    # gets `train` from this module, imported by name.
    from model.runs.commands import main
    from pipeline.console import run_command

    run_command(main, lambda *given: importlib.import_module("train").train(*given))

import contextlib
import copy
import json
import math
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.augment import augment, normalize
from model.losses import AUCMarginLoss, MaskedLoss, label_scores, positive_weights
from model.names import AUGMENTATIONS
from model.networks import begin_training
from model.optim import build_optimizer, scheduled_lr, set_lr, update_average
from model.predict import DivergedError, explain_memory, measure_recent, network_inputs, to_device
from model.ranks import Stopped
from model.runs.config import describe_step, is_reported, name_choice, say_finished
from model.runs.folder import Log, TrainState, begin_run, describe_software, open_events, record_environment
from model.runs.overlap import Seen, list_seen
from model.runs.predictor import forget_calibration, save_best, score_split, start_network
from model.runs.results import choice_score, finish_run
from model.runs.run import Data, Run, no_choice, open_training, read_batches
from pipeline.base.errors import DataError
from pipeline.base.files import claimed, sync_folder, write_atomically
from pipeline.console import progress_bar, say, say_once, show_left
from pipeline.labels import LABELS
from pipeline.measure.delong import report_auroc
from pipeline.measure.evaluation import MEANS
from pipeline.measure.metrics import cross_entropy
from pipeline.stream.batches import Batch, BatchStream
from pipeline.stream.plan import plan_training

CLIP_NORM = 1.0
CHECK_STEPS = 20  # how often the loss is read back: each read waits for the device
SAVE_SECONDS = 300.0  # a killed run loses little more work than this

# ---------------------------------------------------------------------------------------------------------------------
# The run: settings, data, network, loop


def train(run: Run) -> None:
    """Train to the end, or resume the run. Raises DataError for unusable input, and Stopped."""
    # Each rank computes this from a separate copy of the shards and the code; nothing is exchanged.
    run.ranks.compare({"shards": run.shards.digest} | asdict(run.config) | describe_software(run))
    seen = list_seen(run, ("train", "dev"))
    data = open_training(run)
    state = start_state(run, data, seen)
    with contextlib.ExitStack() as stack:
        if run.ranks.is_first:
            run.folder.mkdir(parents=True, exist_ok=True)  # only now: a run that fails to start leaves no folder
            stack.enter_context(claimed(run.folder))
            run = replace(run, config=begin_run(run.folder, run.config, data.steps))
            record_environment(run)
        start = run.start.path if run.start else "its published weights" if run.config.pretrained else "random weights"
        together = f", {run.ranks.count} ranks" if run.ranks.joined else ""
        say(f"{run.config.arch} from {start} on {run.device.type}, {state.precision}{together}")
        if not resume(run, state, data.steps):
            train_epochs(run, state, data)


def start_state(run: Run, data: Data, seen: Seen = ()) -> TrainState:
    """The state before the first step: network, loss, average and optimizer."""
    config = run.config
    torch.manual_seed(config.seed)
    network = start_network(run).to(run.device).to(memory_format=torch.channels_last)
    target, mask = (torch.from_numpy(array[data.train.rows]) for array in data.labels)
    weights = positive_weights(target, mask) if config.pos_weight else None
    loss = AUCMarginLoss(target, mask) if config.loss == "aucm" else MaskedLoss(config.three_class, weights)
    # From here on, all ranks have the first rank's weights. Evaluations use the average, which begins as a copy.
    forward = run.ranks.average_gradients(network, config.sync_bn)
    return TrainState(
        network,
        loss.to(run.device),
        copy.deepcopy(network).requires_grad_(False),
        build_optimizer(network, config.lr, config.weight_decay, config.layer_decay),
        torch.amp.GradScaler(run.device.type, enabled=run.precision == torch.float16),
        str(run.precision).removeprefix("torch."),
        run.ranks.count,
        torch.compile(forward) if config.compile else forward,
        data.train.bad,
        seen,
    )


def resume(run: Run, state: TrainState, steps: int) -> bool:
    """Resume from last.pt, if it exists; returns whether nothing is left to do. `steps` is the number per epoch."""
    folder, total = run.folder, run.config.epochs * steps
    if not run.ranks.first((folder / "last.pt").exists()):
        if run.ranks.is_first:
            forget_calibration(folder)  # from training whose last.pt was removed
        return False
    state.restore(folder / "last.pt", run.ranks)
    if state.done < total and not is_out_of_patience(run, state):
        say(f"{folder}: continuing after step {state.done:,} of {total:,}")
        return False
    say_finished(folder, state.done)
    return run.ranks.first(is_reported(folder))


def train_epochs(run: Run, state: TrainState, data: Data) -> None:
    """Alternate training and evaluation from step `state.done` on, then report. Raises Stopped after saving."""
    config, steps = run.config, data.steps
    total, every = config.epochs * steps, config.eval_every or steps
    began, resumed = time.perf_counter(), state.done
    with open_events(run, state.done) as log:
        try:
            while True:
                # First, because a stop may have interrupted the evaluation.
                due = state.done % steps == 0 or state.done % steps % every == 0
                if due and state.evaluated < state.done:
                    line = evaluate_state(run, state, data, log)
                    pace = (time.perf_counter() - began) / max(state.done - resumed, 1)  # including the scoring
                    say(line + show_left(pace * (total - state.done)))
                    save_state(run, state)
                if state.done == total or is_out_of_patience(run, state):
                    break
                epoch, step = divmod(state.done, steps)
                train_steps(run, state, data, epoch * steps + min(steps, (step // every + 1) * every), log)
            evaluations = finish_run(run)
        except Stopped:
            if state.done > state.evaluated:  # else last.pt is complete, and reporting has used random numbers
                check_losses(run, state, steps)  # since the last check
                save_state(run, state)
            say(f"{run.folder}: stopped and saved; the same command continues")
            raise
        if valid := evaluations.get("valid"):  # best.pt, once: not used for any choice
            for label in valid.labels:
                if (auroc := valid.get("auroc", label).value) is not None:
                    log(f"auroc_valid/{label}", auroc, state.done)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def train_steps(run: Run, state: TrainState, data: Data, end: int, log: Log) -> None:
    """Train up to step `end`, in the same epoch. Raises Stopped between steps, and DivergedError."""
    config, steps = run.config, data.steps
    epoch, first = divmod(state.done, steps)
    batches = stream_epoch(run, data, epoch)
    batches.load_state_dict({"step": first})
    iterator = iter(batches)
    begin_training(state.network)
    images, waited, start = 0, 0.0, time.perf_counter()
    saved = start
    with progress_bar(f"Epoch {epoch + 1}/{config.epochs}", "steps") as advance:
        while state.done < end:
            asked = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - asked
            # A rank's loss is weighted by the share of these cells in its slice.
            (cells,) = run.ranks.agree(batch.mask.sum())
            lr = scheduled_lr(config.lr, state.done, config.epochs * steps)
            set_lr(state.optimizer, lr)
            with explain_memory(*describe_step(config, run.ranks)):
                state.losses.append(train_step(run, state, batch, cells))
            images += len(batch.images) * run.ranks.count
            state.done += 1
            if state.done % steps % CHECK_STEPS == 0 or state.done == end:
                loss = check_losses(run, state, steps)
                now = time.perf_counter()
                rate, wait = images / (now - start), waited / (now - start)
                curves = {"loss": loss, "lr": lr, "images_per_s": rate, "data_wait": wait}
                curves["macro_auroc"] = measure_recent(state.recent, run.ranks)
                for name, value in curves.items():
                    log(f"train/{name}", value, state.done)
                note = f"loss {loss:.4f}  {rate:,.0f} images/s  data wait {wait:.0%}"
                advance(state.done - epoch * steps, steps, note)
                if now - saved > SAVE_SECONDS:
                    save_state(run, state)
                    saved = now


def stream_epoch(run: Run, data: Data, epoch: int) -> BatchStream:
    """Slices of an epoch's batches, for this rank."""
    config, ranks = run.config, run.ranks
    order = (data.train.samples, config.batch_size, config.seed, epoch)
    plan = partial(plan_training, *order, weights=data.weights, rank=ranks.rank, ranks=ranks.count)
    return read_batches(run, data.train, data.labels, plan)


def train_step(run: Run, state: TrainState, batch: Batch, cells: float) -> Tensor:
    """One update of the weights; returns this rank's part of the loss and the norm of the whole batch's gradient, [2].

    The device may still be computing both. The norm is 0 for a step that the scaler skips: in half precision, with
    too large a factor, gradients that are not finite are expected, and never reach the weights.
    `cells` is how many cells of the mask are set in the whole batch, of which `batch` is this rank's slice.
    """
    config, device, ranks = run.config, run.device, run.ranks
    state.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    # In parts, if a batch does not fit in memory: weighting parts by their cells gives the gradients of the batch.
    samples = len(batch.target)
    size = samples // config.accumulate
    for start in range(0, samples, size):
        part = batch.part(start, start + size)
        inputs = training_inputs(run, part, ranks.rank * samples + start, ranks.count * samples)
        target, mask = (to_device(array, device) for array in (part.target, part.mask))
        with ranks.exchange(state.forward, start + size == samples):
            with torch.autocast(device.type, run.precision, enabled=run.precision != torch.float32):
                logits = state.forward(*inputs)
            state.recent.append((label_scores(logits[:, : len(LABELS)]).detach(), target, mask))
            loss = state.loss(logits, target, mask) * (mask.sum() / max(cells, 1))
            state.scaler.scale(loss * ranks.count).backward()  # which takes the mean over ranks, not the sum
        total += loss.detach()
    state.scaler.unscale_(state.optimizer)  # so that the true gradients are clipped
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), CLIP_NORM)
    if state.scaler.is_enabled():
        (skipped,) = state.scaler._found_inf_per_device(state.optimizer).values()
        norm = torch.where(skipped > 0, 0.0, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    update_average(state.ema, state.network, config.ema, state.done)
    return torch.stack([total, norm])


def training_inputs(run: Run, batch: Batch, first: int, samples: int) -> tuple[Tensor, ...]:
    """Normalized, augmented inputs of part of a batch: its first sample is number `first` of `samples` on all ranks."""
    config, scale = run.config, (run.pixels["mean"], run.pixels["std"])
    by_study = config.fusion is not None
    images, *views = network_inputs(run.device, by_study, batch.images, batch.present, batch.projection)
    if config.augment == "none":
        inputs = normalize(images, *scale)
    else:
        # Every place in the whole batch has separate random draws, even if it holds no image.
        most, key = batch.step.rows.shape[1], (config.seed, *batch.step[:2])
        places = (first + batch.sample) * most + batch.place
        inputs = augment(images, *scale, key, AUGMENTATIONS[config.augment], places, samples * most)
    return inputs.contiguous(memory_format=torch.channels_last), *views


def check_losses(run: Run, state: TrainState, steps: int) -> float:
    """Add the losses since the last check to the sum; returns their mean over these steps, nan if there are none.

    Raises DivergedError if a loss or gradient is not finite: clipping divides by the gradient's norm, so one nan would
    spread to all weights.
    """
    pending = torch.stack(state.losses) if state.losses else torch.empty(0, 2)
    sums = run.ranks.sum(pending.double().cpu().numpy())
    for number, values in enumerate(sums.tolist(), state.done - len(sums)):
        for name, value in zip(("loss", "gradient's norm"), values, strict=True):
            if not math.isfinite(value):
                epoch, step = divmod(number, steps)  # both from 0; the progress bar counts from 1
                raise DivergedError(f"the {name} is {value} at epoch {epoch + 1}, step {step + 1}; try a lower `lr`")
        state.loss_sum += values[0]
    state.losses.clear()
    return float(sums[:, 0].mean()) if len(sums) else math.nan


def save_state(run: Run, state: TrainState) -> None:
    """Write last.pt, the same for all ranks. Raises DivergedError if the last step has ruined the weights."""
    weights = torch.stack(torch._foreach_norm(list(state.network.parameters())))
    if not weights.isfinite().all():
        raise DivergedError(f"the weights are not finite after step {state.done:,}; try a lower `lr`")
    state.bad.update(run.ranks.unite(state.bad.rows))
    if run.ranks.is_first:
        sync_folder(run.folder)  # best.pt and metrics.jsonl, before a checkpoint that counts on them
        state.save(run.folder / "last.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations


def evaluate_state(run: Run, state: TrainState, data: Data, log: Log) -> str:
    """Score the averaged weights on dev, add a line to metrics.jsonl, and keep the best weights; returns a summary."""
    run.ranks.align_buffers(state.ema)
    scored, _ = score_split(run, state.ema, data.dev, run.pixels)
    report = report_auroc(run.config.labels, *scored[:4])
    epoch = round(state.done / data.steps, 4)
    line: dict[str, Any] = {"epoch": epoch, "step": state.done}
    line |= {"train_loss": state.loss_sum / (state.done - state.evaluated), "dev_loss": cross_entropy(*scored[:3])}
    line |= {name: value for name, value in report.items() if name.endswith("_auroc")}
    line["labels"] = {label: row["auroc"] for label, row in report["labels"].items()}
    chosen = run.config.choose_by
    score, macro = choice_score(line, chosen), choice_score(line, "all")
    if score is None or macro is None:  # without the unusable images
        raise DataError(no_choice(run, [label for label, auroc in line["labels"].items() if auroc is None]))
    state.history.append(line)
    state.evaluated, state.loss_sum = state.done, 0.0
    is_best = score > state.best
    state.best = max(score, state.best)
    if run.ranks.is_first:
        if is_best or run.config.keep == "last":
            forget_calibration(run.folder)  # of the previous weights
            save_best(run, state.seen, state.ema.state_dict(), epoch, score)
        # Rewritten from the checkpoint's history, so that repeated steps are not listed twice.
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_atomically(run.folder / "metrics.jsonl", lines.encode())
    log("dev/loss", line["dev_loss"], state.done)
    log("dev/macro_auroc", macro, state.done)
    if chosen != "all":
        log("dev/choice_auroc", score, state.done)
    for label, auroc in line["labels"].items():
        if auroc is not None:
            log(f"auroc_dev/{label}", auroc, state.done)
    name = name_choice(chosen)
    if chosen == "all" and line["macro10_auroc"] is None:
        name = MEANS["macro"]
        few = "no label has 10 patients of each class on dev, so the choice of checkpoint is arbitrary"
        say_once(f"{run.shards}: {few}; raise `dev`")
    return f"Epoch {epoch:g}: dev AUROC {score:.4f} ({name}){'  (best)' if is_best else ''}"


def is_out_of_patience(run: Run, state: TrainState) -> bool:
    """Whether none of the last `patience` evaluations beat the best one before them."""
    scores = [choice_score(line, run.config.choose_by) or 0.0 for line in state.history]
    if run.config.patience is None or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= run.config.patience
