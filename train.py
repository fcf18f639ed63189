"""Train a network on shards, or score a trained one: the one place where `pipeline` and `model` meet.

    python train.py --shards shards --run runs/first --lr 1e-4
    python train.py --shards shards --run runs/first --evaluate valid

A run folder holds config.json, metrics.jsonl (a line per evaluation), last.pt (all that a resume restores),
best.pt (the averaged weights with the best dev macro AUROC), and for every split that was scored
evaluation-<split>.json and scores-<split>.arrow. The same command on the same folder continues where it
stopped, exactly: batches and augmentations are functions of (seed, epoch, step).

Self-training (U-SelfTrained of Irvin et al., 2019) is three commands: a teacher that leaves uncertain cells
out, its scores of train, and a student whose uncertain targets they are:
    python train.py --run runs/teacher --uncertain ignore
    python train.py --run runs/teacher --evaluate train
    python train.py --run runs/student --uncertain selftrained --teacher runs/teacher
"""

import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from model.augment import augment, normalize
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model.evaluation import InterruptedEvaluationError, predict_scores
from model.losses import masked_loss
from model.metrics import Report, report_auroc
from model.networks import ARCHITECTURES, build_network
from pipeline import DataError
from pipeline.console import Advance, progress_bar, run_command
from pipeline.labels import (
    BLANK_HELP,
    LABELS,
    UNCERTAIN_HELP,
    check_blank_policy,
    describe_one_class,
    evaluation_targets,
    make_targets,
    one_class_labels,
    parse_uncertain_policy,
)
from pipeline.manifest import Manifest, manifest_digest, read_manifest, write_atomically
from pipeline.plan import training_steps
from pipeline.scores import read_scores, write_scores
from pipeline.stream import Batch, Labels, OpenSplit, open_split, stream_evaluation, stream_training

CLIP_NORM = 1.0
MAX_WARMUP_STEPS = 500
CHECK_STEPS = 20  # how often the loss is read back: each read waits for the device
EVALUATION_BATCH = 64  # images
TEACHER_SCORES = "scores-train.arrow"
SAVE_SECONDS = 300.0  # a killed run loses little more work than this


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's outcome, as config.json; defaults are those of `--help`."""

    arch: str
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    image_size: int
    amp: str
    ema: float
    augment: bool
    uncertain: str
    blank: str
    seed: int
    manifest: str  # its sha256, which stands for all of the data
    teacher: str | None = None  # sha256 of its scores, where a label is selftrained


@dataclass(frozen=True)
class Job:
    """What stays the same while a run trains or is scored."""

    config: Config
    shards: Path
    run: Path
    manifest: Manifest
    device: torch.device
    precision: torch.dtype  # of autocast; float32 means none
    workers: int
    teacher: Path | None  # the run whose scores selftrained labels learn from
    strict: bool  # refuse labels with one class instead of warning about them
    stop: "StopFlag"


@dataclass
class TrainState:
    """What last.pt restores, and nothing more: the schedule follows from the position."""

    network: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    loss_sum: float = 0.0  # over those batches
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    MODULES = ("network", "ema", "optimizer", "scaler")
    VALUES = ("epoch", "step", "loss_sum", "best", "history")

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        save_checkpoint(path, modules | {name: getattr(self, name) for name in self.VALUES})

    def restore(self, path: Path) -> None:
        """Read the checkpoint. Raises CheckpointError where it is damaged."""
        saved = load_checkpoint(path)
        for name in self.MODULES:
            getattr(self, name).load_state_dict(saved[name])
        for name in self.VALUES:
            setattr(self, name, saved[name])


class StopFlag:
    """Set by SIGINT or SIGTERM; the loop finishes its step, saves, and exits with `code`."""

    def __init__(self) -> None:
        self.code = 0
        signal.signal(signal.SIGINT, lambda *_: self._set(130))
        signal.signal(signal.SIGTERM, lambda *_: self._set(143))

    def _set(self, code: int) -> None:
        self.code = code

    def __call__(self) -> bool:
        return self.code != 0


def train(job: Job) -> int:
    """Train to the end, or continue; returns the exit code. Raises DataError for unusable input."""
    config, run, stop = job.config, job.run, job.stop
    if "dev" not in job.manifest.splits:
        raise DataError(
            f"{job.shards}: no dev split to choose a checkpoint by; shard train.csv with --dev > 0"
        )
    split = open_split(job.shards, job.manifest, "train")
    dev = open_split(job.shards, job.manifest, "dev")
    steps = training_steps(split.table.num_rows, config.batch_size)
    if steps == 0:
        raise DataError(f"{job.shards}: {split.table.num_rows} train samples are less than one batch")
    labels = training_labels(job, split)
    open_run(run, config)  # only now: a run that cannot start leaves no folder

    state = start_state(job)
    click.echo(f"{config.arch} on {job.device.type}, {str(job.precision).removeprefix('torch.')}", err=True)
    if (run / "last.pt").exists():
        state.restore(run / "last.pt")
        done = state.epoch * steps + state.step
        click.echo(f"{run}: continuing after step {done:,} of {config.epochs * steps:,}", err=True)
    while state.epoch < config.epochs:
        batches = stream_training(
            split,
            labels,
            size=config.image_size,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=state.epoch,
            start_step=state.step,
            threads=job.workers,
        )
        train_epoch(job, state, batches, steps)
        if not stop():
            try:
                evaluate_epoch(job, state, dev)
            except InterruptedEvaluationError:
                pass  # all steps of the epoch are done: a resume begins with the evaluation
            else:
                state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
        state.save(run / "last.pt")
        if stop():
            click.echo(f"{run}: stopped and saved; the same command continues", err=True)
            return stop.code
    print_reports({name: evaluate(job, name) for name in ("dev", "valid") if name in job.manifest.splits})
    return 0


def training_labels(job: Job, split: OpenSplit) -> Labels:
    """Targets and masks of train by the run's policies; warns of labels with one class.

    Raises DataError for them where the job is strict, and for a teacher that is missing or unusable.
    """
    config = job.config
    scores = None if job.teacher is None else read_scores(job.teacher / TEACHER_SCORES, split.table["key"])
    policy = parse_uncertain_policy(config.uncertain)
    labels = Labels(*make_targets(split.table, policy, config.blank, config.seed, scores))
    lacking = describe_one_class(one_class_labels(labels.target, labels.mask))
    if lacking and job.strict:
        raise DataError(f"--strict: {'; '.join(lacking)}")
    for text in lacking:
        click.echo(f"{text}: it cannot be learnt", err=True)
    return labels


def train_epoch(job: Job, state: TrainState, batches: Iterable[Batch], steps: int) -> None:
    """Run the remaining steps of an epoch, or as far as the stop flag lets it.

    Raises DataError, naming the step, for a loss that is not finite.
    """
    config, device = job.config, job.device
    mean, std = job.manifest.pixels["mean"], job.manifest.pixels["std"]
    columns = three_class_columns(config)
    three_class = torch.tensor(columns, device=device) if columns else None
    state.network.train()
    losses: list[Tensor] = []
    images, waited, start = 0, 0.0, time.perf_counter()
    saved = start
    iterator = iter(batches)
    with progress_bar(f"Epoch {state.epoch + 1}/{config.epochs}", "steps") as advance:
        while not job.stop():
            asked = time.perf_counter()
            batch = next(iterator, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            inputs, target, mask = (
                to_device(array, device) for array in (batch.images, batch.target, batch.mask)
            )
            if config.augment:
                inputs = augment(inputs, mean, std, config.seed, state.epoch, state.step)
            else:
                inputs = normalize(inputs, mean, std)
            inputs = inputs.contiguous(memory_format=torch.channels_last)

            lr = scheduled_lr(config.lr, state.epoch * steps + state.step, config.epochs * steps)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            with torch.autocast(device.type, job.precision, enabled=job.precision != torch.float32):
                logits = state.network(inputs)
            loss = masked_loss(logits, target, mask, three_class)
            state.optimizer.zero_grad()
            state.scaler.scale(loss).backward()
            state.scaler.unscale_(state.optimizer)  # so that what is clipped are the gradients themselves
            nn.utils.clip_grad_norm_(state.network.parameters(), CLIP_NORM)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.ema.update_parameters(state.network)

            losses.append(loss.detach())
            images += len(inputs)
            state.step += 1
            if state.step % CHECK_STEPS == 0 or state.step == steps:
                check_losses(losses, state)
                now = time.perf_counter()
                note = f"loss {state.loss_sum / state.step:.4f}  {images / (now - start):,.0f} images/s"
                advance(state.step, steps, f"{note}  data wait {waited / (now - start):.0%}")
                if now - saved > SAVE_SECONDS:
                    state.save(job.run / "last.pt")
                    saved = now
    check_losses(losses, state)


def check_losses(losses: list[Tensor], state: TrainState) -> None:
    """Add the losses since the last check to the epoch's sum. Raises DataError where one is not finite."""
    for number, value in enumerate(torch.stack(losses).tolist() if losses else []):
        if not math.isfinite(value):
            step = state.step - len(losses) + number
            raise DataError(f"the loss is {value} at epoch {state.epoch + 1}, step {step}; try a lower --lr")
        state.loss_sum += value
    losses.clear()


def evaluate_epoch(job: Job, state: TrainState, dev: OpenSplit) -> None:
    """Score the averaged weights on dev, add a line to metrics.jsonl, keep the best weights."""
    _, report = score_split(job, state.ema.module, dev, job.manifest.pixels)
    score = choice_score(report)
    if score is None:
        raise DataError(
            f"{job.shards}: no label of dev has both classes to choose a checkpoint by; raise --dev"
        )
    line = {"epoch": state.epoch + 1, "train_loss": state.loss_sum / state.step} | {
        name: report[name] for name in ("macro_auroc", "macro10_auroc", "mean5_auroc")
    }
    state.history.append(line | {"labels": {label: row["auroc"] for label, row in report["labels"].items()}})
    if score > state.best:
        state.best = score
        position = {"epoch": state.epoch + 1, "dev_auroc": score}
        weights = {"weights": state.ema.module.state_dict(), "pixels": dict(job.manifest.pixels)}
        save_checkpoint(job.run / "best.pt", weights | position)
    # Rewritten from the checkpoint's own history, so that an epoch run again is not listed twice.
    lines = "".join(json.dumps(line) + "\n" for line in state.history)
    write_atomically(job.run / "metrics.jsonl", lines.encode())
    best = "  (best)" if score == state.best else ""
    click.echo(f"Epoch {state.epoch + 1}: dev macro AUROC {score:.4f}{best}", err=True)


def choice_score(report: Report) -> float | None:
    """The macro AUROC a checkpoint is chosen by: over the labels with 10 positives or more, if there are any.

    On the real dev split these are all labels; on a small one the others would add chance alone.
    """
    return report["macro_auroc"] if report["macro10_auroc"] is None else report["macro10_auroc"]


def evaluate(job: Job, name: str) -> Report:
    """Score best.pt on a split of any shards; writes its scores and evaluation into the run."""
    best = load_checkpoint(job.run / "best.pt")
    network = new_network(job.config)
    network.load_state_dict(best["weights"])
    network.to(job.device).to(memory_format=torch.channels_last)
    split = open_split(job.shards, job.manifest, name)
    scores, report = score_split(job, network, split, best["pixels"])
    write_scores(job.run / f"scores-{name}.arrow", split.table, scores)
    write_atomically(job.run / f"evaluation-{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def score_split(
    job: Job, network: nn.Module, split: OpenSplit, pixels: Mapping[str, float]
) -> tuple[npt.NDArray[np.float32], Report]:
    """A network's scores [N, 14] of every sample of a split, and their AUROC without the uncertain cells."""
    labels = Labels(*evaluation_targets(split.table, job.config.blank))
    batches = stream_evaluation(
        split, labels, size=job.config.image_size, batch_size=EVALUATION_BATCH, threads=job.workers
    )

    def images(advance: Advance) -> Iterator[Tensor]:
        done = 0
        for batch in batches:
            yield to_device(batch.images, job.device)
            done += len(batch.images)
            advance(done, split.table.num_rows)

    with progress_bar(f"Scoring {split.name}", "images") as advance:
        scores = predict_scores(
            network,
            len(LABELS),
            images(advance),
            pixels["mean"],
            pixels["std"],
            job.precision,
            should_stop=job.stop,
        )
    return scores, report_auroc(LABELS, scores, labels.target, labels.mask)


def start_state(job: Job) -> TrainState:
    """The state before the first step."""
    config = job.config
    torch.manual_seed(config.seed)
    network = new_network(config).to(job.device).to(memory_format=torch.channels_last)
    # Decay belongs on matrices and kernels; norms and biases must be free to scale.
    decayed = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    ema = AveragedModel(network, multi_avg_fn=warming_average(config.ema), use_buffers=True)
    scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == torch.float16)
    return TrainState(network, ema, optimizer, scaler)


def new_network(config: Config) -> nn.Module:
    """A freshly initialised network with a logit per label, and one more per label with three classes."""
    return build_network(config.arch, len(LABELS) + len(three_class_columns(config)))


def three_class_columns(config: Config) -> list[int]:
    """The columns of the labels that have uncertain as a class of its own."""
    policy = parse_uncertain_policy(config.uncertain)
    return [column for column, label in enumerate(LABELS) if policy[label] == "multiclass"]


def warming_average(decay: float) -> Any:
    """An exponential average whose decay grows with the updates, so that short runs forget their start."""

    def update(averages: Any, values: Any, updates: Tensor | int) -> None:
        count = int(updates)
        get_ema_multi_avg_fn(min(decay, (1 + count) / (10 + count)))(averages, values, updates)

    return update


def scheduled_lr(peak: float, step: int, total: int) -> float:
    """Linear warm-up over a tenth of the run, at most 500 steps, then a cosine to zero."""
    warmup = min(MAX_WARMUP_STEPS, max(1, total // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def choose_device(amp: str) -> tuple[torch.device, torch.dtype]:
    """The GPU where there is one, and the precision of autocast there (float32: no autocast).

    `auto`: bf16 where the GPU has it, else fp16; off on a CPU, where it is slower. Raises DataError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if amp == "fp16" and device.type == "cpu":
        raise DataError("--amp fp16 needs a GPU; use bf16 or off on this machine")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def to_device(array: Any, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def open_run(run: Path, config: Config) -> None:
    """Create the run folder. Raises DataError, with the difference, where it has another configuration."""
    if (run / "config.json").exists():
        there = asdict(read_config(run))
        for name, here in asdict(config).items():
            if there[name] != here:
                difference = f"{name} is {there[name]} there and {here} here"
                raise DataError(
                    f"{run} is a run of another configuration: {difference}; choose another --run"
                )
        return
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(run / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())


def read_config(run: Path) -> Config:
    """The configuration of a run. Raises DataError where the folder holds none."""
    path = run / "config.json"
    try:
        return Config(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise DataError(f"{run}: no config.json, so not a run folder") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged, or of another version: {error}") from error


def teacher_digest(teacher: Path, shards: Path) -> str:
    """sha256 of a run's scores of train. Raises DataError with the command that writes them."""
    try:
        return hashlib.sha256((teacher / TEACHER_SCORES).read_bytes()).hexdigest()
    except FileNotFoundError:
        command = f"python train.py --shards {shards} --run {teacher}"
        if (teacher / "best.pt").exists():
            missing, command = TEACHER_SCORES, f"{command} --evaluate train"
        else:
            missing, command = "best.pt", f"{command} --uncertain ignore"
        raise DataError(f"{teacher}: no {missing}; first run: {command}") from None


def print_reports(reports: dict[str, Report]) -> None:
    """A table of AUROC per label, with the positives and negatives behind each, for one or more splits."""
    table = Table(title="AUROC", title_justify="left")
    table.add_column("label")
    for split in reports:
        table.add_column(split, justify="right")
        table.add_column("pos / neg", justify="right")
    for label in LABELS:
        results = [report["labels"][label] for report in reports.values()]
        cells = [
            (show(result["auroc"]), f"{result['positives']} / {result['negatives']}") for result in results
        ]
        table.add_row(label, *(text for cell in cells for text in cell))
    table.add_section()
    means = {
        "macro": "macro_auroc",
        "macro, ≥ 10 positives": "macro10_auroc",
        "mean of competition's 5": "mean5_auroc",
    }
    for title, name in means.items():
        values = [(show(report[name]), "") for report in reports.values()]  # type: ignore[literal-required]
        table.add_row(title, *(text for cell in values for text in cell))
    Console().print(table)


def show(value: float | None) -> str:
    """A figure with three places; an undefined one as a dash."""
    return "–" if value is None else f"{value:.3f}"


@click.command(
    epilog="Example: python train.py --shards shards --run runs/first --lr 1e-4 --weight-decay 1e-2"
)
@click.option("--shards", type=click.Path(path_type=Path), default=Path("shards"), help="Folder of shards.")
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Folder of this run.")
@click.option(
    "--evaluate", "split", metavar="SPLIT", help="Score the run's best checkpoint on SPLIT instead."
)
@click.option("--arch", default="resnet50", type=click.Choice(ARCHITECTURES))
@click.option("--lr", default=1e-4, type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--weight-decay", default=1e-2, type=click.FloatRange(0), help="AdamW's.")
@click.option("--batch-size", default=64, type=click.IntRange(2))
@click.option("--epochs", default=5, type=click.IntRange(1))
@click.option("--image-size", default=320, type=click.IntRange(32), help="Side of the square input, pixels.")
@click.option("--amp", default="auto", type=click.Choice(["auto", "bf16", "fp16", "off"]))
@click.option("--ema", default=0.999, type=click.FloatRange(0, 1), help="Decay of the averaged weights.")
@click.option("--augment/--no-augment", default=True, help="Random affine maps, brightness, contrast.")
@click.option("--uncertain", metavar="POLICY", show_default="the shards'", help=UNCERTAIN_HELP)
@click.option("--blank", metavar="POLICY", show_default="the shards'", help=BLANK_HELP)
@click.option(
    "--teacher", metavar="RUN", type=click.Path(path_type=Path), help="selftrained: learn from its scores."
)
@click.option("--strict", is_flag=True, help="Refuse labels with one class in train instead of warning.")
@click.option("--seed", default=0, type=click.IntRange(0))
@click.option("--workers", default=os.cpu_count, type=click.IntRange(1), show_default="cores")
def main(
    shards: Path,
    run: Path,
    split: str | None,
    uncertain: str | None,
    blank: str | None,
    teacher: Path | None,
    strict: bool,
    workers: int,
    **options: Any,
) -> int:
    """Train a network on shards; the same command continues an interrupted run."""
    manifest = read_manifest(shards)
    if split is None:
        uncertain = uncertain or manifest.policies["uncertain"]
        if "selftrained" not in parse_uncertain_policy(uncertain).values() and teacher:
            raise click.UsageError(f"--teacher is for the policy selftrained; --uncertain is {uncertain}")
        config = Config(
            **options,
            uncertain=uncertain,
            blank=check_blank_policy(blank or manifest.policies["blank"]),
            manifest=manifest_digest(shards),
            teacher=teacher_digest(teacher, shards) if teacher else None,
        )
    else:
        config = read_config(run)
    stop = StopFlag()
    job = Job(config, shards, run, manifest, *choose_device(config.amp), workers, teacher, strict, stop)
    try:
        if split is None:
            return train(job)
        print_reports({split: evaluate(job, split)})
    except InterruptedEvaluationError:
        return stop.code
    except CheckpointError as error:
        raise DataError(str(error)) from error
    return 0


if __name__ == "__main__":
    run_command(main)
