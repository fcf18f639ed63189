"""The folder of a run: how its files, which docs/train.md lists, are written and read."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.augment import equalize
from model.checkpoint import CheckpointError, Entry, load_checkpoint, refused, save_checkpoint
from model.names import own_input
from model.networks import StudyNetwork, weights_terms
from model.optim import scheduled_lr
from model.ranks import Ranks
from model.runs.config import Config, read_config
from model.runs.run import Run
from pipeline.base.errors import DataError, describe_difference, needs
from pipeline.base.files import named_writes, write_atomically, write_json
from pipeline.base.store import read_bytes
from pipeline.console import say, say_once
from pipeline.manifest import find_restriction
from pipeline.stream.batches import Unusable
from pipeline.stream.cache import redact

PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "simplejpeg", "opencv-python-headless", "pillow")
Log = Callable[[str, float, int], None]  # name of a curve, value, step


@dataclass
class TrainState:
    """Everything that last.pt restores; epoch, schedule and augmentation follow from `done`."""

    network: nn.Module
    loss: nn.Module
    ema: nn.Module  # averaged weights, used for evaluation
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    precision: str  # of autocast, as `--amp auto` resolves on this device
    ranks: int  # number that train it
    forward: Callable[..., Tensor]  # the network, averaging gradients over ranks, perhaps compiled
    bad: Unusable  # images of train
    seen: Sequence[Entry] = ()  # images and patients that the weights learn from
    # Of the batches since the last check: scores, target and mask of each part; loss and gradient norm of each, [2].
    recent: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    done: int = 0  # steps, of all epochs
    evaluated: int = 0  # steps that were done at the last evaluation
    loss_sum: float = 0.0  # over the steps since then
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    MODULES = ("network", "loss", "ema", "optimizer", "scaler", "bad")
    VALUES = ("done", "evaluated", "loss_sum", "best", "history")

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {name: getattr(self, name).state_dict() for name in self.MODULES}
        state |= {name: getattr(self, name) for name in self.VALUES}
        state["random"] = {"cpu": torch.get_rng_state()}  # of the default generators, which layers may use
        if torch.cuda.is_available():
            state["random"]["cuda"] = torch.cuda.get_rng_state()
        save_checkpoint(path, state | {"precision": self.precision, "ranks": self.ranks})

    def restore(self, path: Path, ranks: Ranks) -> None:
        """Read the checkpoint.

        Raises CheckpointError if it is damaged, or from another run, precision or number of ranks: BatchNorm and
        stochastic depth see only a rank's part of a batch, so the number of ranks changes the result.
        """
        instead = f", or start another `run` with `init` {path.parent}" if path.with_name("best.pt").exists() else ""
        remedy = f"; remove it to train from the beginning{instead}"
        saved = load_checkpoint(path, ranks, remedy)
        how = "continue as before, or choose another `run`"
        if saved["precision"] != self.precision:
            differs = f"trained in {saved['precision']}, `amp` is {self.precision} on this device"
            raise CheckpointError(f"{path}: {differs}: {how}")
        if saved["ranks"] != self.ranks:
            raise CheckpointError(f"{path}: trained on {saved['ranks']} ranks, not {self.ranks}: {how}")
        with refused(path, remedy):
            for name in self.MODULES:
                getattr(self, name).load_state_dict(saved[name])
            for name in self.VALUES:
                if not isinstance(saved[name], type(getattr(self, name))):
                    raise TypeError(f"{name} is {saved[name]!r}")
                setattr(self, name, saved[name])
            torch.set_rng_state(saved["random"]["cpu"])
            if "cuda" in saved["random"] and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["random"]["cuda"])


def fuse(network: nn.Module, config: Config) -> nn.Module:
    """A run's network, from a network for images; equalizes its input first if the run is or was `robust`."""
    if config.equalize:
        network.register_forward_pre_hook(lambda _, inputs: (equalize(inputs[0]), *inputs[1:]))
    return network if config.fusion is None else StudyNetwork(network, config.fusion, config.freeze)


def begin_run(folder: Path, config: Config, steps: int = 0) -> Config:
    """Make the run's folder; returns its configuration.

    A run that has done all of its epochs, of `steps` each, may get more; reports their learning rate. Raises DataError
    if it has not done them, or with the difference if the folder has another configuration.
    """
    if (folder / "config.json").exists():
        before = read_config(folder)
        if config == before:
            return before
        if config.epochs <= before.epochs or replace(config, epochs=before.epochs) != before:
            own = asdict(before)
            difference = describe_difference(own, asdict(config) | {"extended": before.extended}, own)
            how = "choose another `run` (in make: RUN=)"
            raise DataError(f"{folder} is a run of another configuration: {difference}; {how}")
        done = load_checkpoint(folder / "last.pt").get("done")
        if done != before.epochs * steps:
            how = f"can be raised after all {before.epochs} are done; its last step is {done:,}"
            raise DataError(f"{folder}: `epochs` {how}")
        last = scheduled_lr(config.lr, done - 1, done)
        first = scheduled_lr(config.lr, done, config.epochs * steps)
        say(
            f"{folder}: {before.epochs} epochs ended at a learning rate of {last:.2g}; the next follow the schedule of "
            f"{config.epochs} from {first:.2g} down, so the result is not that of {config.epochs} epochs at once"
        )
        (folder / "model-card.md").unlink(missing_ok=True)  # which marks a finished run
        config = replace(config, extended=(*before.extended, before.epochs))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))
    return config


def describe_software(run: Run) -> dict[str, object]:
    """Software settings that must be the same on all ranks, in addition to the configuration."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:  # the commit of this checkout, with `-dirty` if files were changed
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        code = version("chexpert-pipeline")
    packages = PACKAGES if own_input(run.config.arch) is None else (*PACKAGES, "timm")
    versions = {name: version(name) for name in packages}
    return {"code": code, "python": platform.python_version(), "packages": versions, "precision": str(run.precision)}


def record_environment(run: Run) -> None:
    """Append this start's environment to environment.jsonl, which with config.json reproduces the run."""
    folder = run.folder
    line = describe_software(run) | {
        "command": [redact(word) for word in sys.argv],
        # Relative to the run, so that both can move together.
        "shards": [f.name if "://" in f.name else os.path.relpath(f.path, folder) for f in run.shards.folders],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": run.ranks.count,
    }
    path = folder / "environment.jsonl"
    before = read_bytes(path) if path.exists() else b""
    write_atomically(path, before + (json.dumps(line) + "\n").encode())


def send_curves(run: Run, stack: ExitStack) -> Log:
    """Mirror TensorBoard's events to Weights & Biases until the stack ends; returns what sends a value to MLflow.

    Each only if the setup asks; a resumed run keeps its identity there. Raises DataError if a package is missing.
    """
    folder, setup, terms = run.folder, run.setup, find_restriction(run.manifest.dataset)
    for name in ("wandb", "mlflow"):
        if terms and getattr(setup, name):
            sent = f"`{name}` sends settings and figures of this run to others"
            say_once(f"Warning: {sent}; make sure that the {terms} allows it")
    digest = hashlib.sha256(read_bytes(folder / "config.json")).hexdigest()[:8]
    identity = re.sub(r"[^\w.-]", "-", f"{folder.name}-{digest}")
    if setup.wandb:
        with needs("wandb"):
            import wandb
        options: dict[str, Any] = {"resume": "allow", "sync_tensorboard": True, "save_code": False, "dir": folder}
        wandb.init(project=setup.wandb, name=folder.name, id=identity, config=asdict(run.config), **options)
        stack.callback(wandb.finish)  # before the next trial of a sweep begins another
    if not setup.mlflow:
        return lambda name, value, step: None
    with needs("mlflow"):
        import mlflow
    mlflow.set_experiment(setup.mlflow)
    earlier = mlflow.search_runs(filter_string=f"attributes.run_name = '{identity}'", output_format="list")
    stack.enter_context(mlflow.start_run(earlier[0].info.run_id if earlier else None, run_name=identity))
    mlflow.log_params(asdict(run.config))
    return lambda name, value, step: mlflow.log_metric(name, value, step)


@contextmanager
def open_events(run: Run, done: int) -> Iterator[Log]:
    """A function that adds a value to TensorBoard's curves, without events after step `done`. Raises DataError."""
    if not run.ranks.is_first:
        yield lambda name, value, step: None
        return
    from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

    folder, hook = run.folder / "tensorboard", threading.excepthook

    def log(name: str, value: float, step: int) -> None:
        with named_writes(folder):
            events.add_scalar(name, value, step)
        send(name, value, step)

    with ExitStack() as stack:
        # Hide the traceback of TensorBoard's thread: logging the next value raises the same error.
        stack.callback(setattr, threading, "excepthook", hook)
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else hook(args)
        send = send_curves(run, stack)
        stack.enter_context(named_writes(folder))
        events = SummaryWriter(str(folder), purge_step=done + 1)
        stack.callback(events.close)
        yield log


def result_name(config: Config, digest: str, split: str) -> str:
    """The name of a run's results on a split, including the digest of shards other than the run's."""
    return split if digest == config.manifest else f"{split}-{digest[:8]}"


def describe_start(config: Mapping[str, Any]) -> str:
    """The weights that a run with this configuration starts from, and their terms."""
    if config.get("pretrained"):
        return weights_terms(config["arch"])
    return config["init_terms"] or "random weights"
