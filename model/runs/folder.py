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
from model.runs.config import Config, name_outputs, read_config
from model.runs.run import Run
from pipeline.base.errors import DataError, describe_difference, needs
from pipeline.base.files import named_writes, write_atomically, write_json
from pipeline.base.store import read_bytes
from pipeline.console import say, say_once
from pipeline.images import ImageOptions
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
        modules = {name: getattr(self, name).state_dict() for name in self.MODULES}
        values = {name: getattr(self, name) for name in self.VALUES}
        # The default generators, which layers may use.
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        how = {"random": random, "precision": self.precision, "ranks": self.ranks}
        save_checkpoint(path, modules | values | how)

    def restore(self, path: Path, ranks: Ranks) -> None:
        """Read the checkpoint.

        Raises CheckpointError if it is damaged, or from another run, precision or number of ranks: BatchNorm and
        stochastic depth see only a rank's part of a batch, so the number of ranks changes the result.
        """
        best = path.with_name("best.pt")
        instead = f", or start another `run` with `init` {path.parent}" if best.exists() else ""
        remedy = f"; remove it to train from the beginning{instead}"
        saved = load_checkpoint(path, ranks, remedy)
        how = "continue as before, or choose another `run`"
        if saved["precision"] != self.precision:
            raise CheckpointError(
                f"{path}: trained in {saved['precision']}, `amp` is {self.precision} on this device: {how}"
            )
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
    """A run's network, from a network for images; a run on images uses it unchanged.

    If the run is or was `robust`, the network always equalizes its input images first.
    """
    if config.equalize:
        network.register_forward_pre_hook(lambda _, inputs: (equalize(inputs[0]), *inputs[1:]))
    return network if config.fusion is None else StudyNetwork(network, config.fusion, config.freeze)


def begin_run(folder: Path, config: Config, steps: int = 0) -> Config:
    """Make the run's folder; returns its configuration.

    A run that has done all of its epochs, of `steps` each, may get more. Raises DataError, with the difference, if the
    folder has another configuration.
    """
    if (folder / "config.json").exists():
        before = read_config(folder)
        if config == before:
            return before
        if config.epochs > before.epochs and replace(config, epochs=before.epochs) == before:
            extend_run(folder, before, config.epochs, steps)
            config = replace(config, extended=(*before.extended, before.epochs))
        else:
            own = asdict(before)
            difference = describe_difference(own, asdict(config) | {"extended": before.extended}, own)
            raise DataError(
                f"{folder} is a run of another configuration: {difference}; choose another `run` (in make: RUN=)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", asdict(config))
    return config


def extend_run(folder: Path, config: Config, epochs: int, steps: int) -> None:
    """Report the learning rate of more epochs. Raises DataError if the run has not done those that it has."""
    done = load_checkpoint(folder / "last.pt").get("done")
    if done != config.epochs * steps:
        raise DataError(
            f"{folder}: `epochs` can be raised after all {config.epochs} are done; its last step is {done:,}"
        )
    then, now = (
        scheduled_lr(config.lr, step, total * steps) for step, total in ((done - 1, config.epochs), (done, epochs))
    )
    say(
        f"{folder}: {config.epochs} epochs ended at a learning rate of {then:.2g}; the next follow the schedule of "
        f"{epochs} from {now:.2g} down, so the result is not that of {epochs} epochs at once"
    )
    (folder / "model-card.md").unlink(missing_ok=True)  # which marks a finished run


def describe_software(run: Run) -> dict[str, object]:
    """Software settings that must be the same on all ranks, in addition to the configuration."""
    packages = PACKAGES if own_input(run.config.arch) is None else (*PACKAGES, "timm")
    return {
        "code": describe_code(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "precision": str(run.precision),
    }


def record_environment(run: Run) -> None:
    """Append this start's environment to environment.jsonl, which with config.json reproduces the run."""
    # Relative to the run, so that both can move together.
    paths = {shards.name: os.path.relpath(shards.path, run.folder) for shards in run.shards.folders}
    shards = [name if "://" in name else path for name, path in paths.items()]
    line = describe_software(run) | {
        "command": [redact(word) for word in sys.argv],
        "shards": shards,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": run.ranks.count,
    }
    path = run.folder / "environment.jsonl"
    before = read_bytes(path) if path.exists() else b""
    write_atomically(path, before + (json.dumps(line) + "\n").encode())


@contextmanager
def send_curves(run: Run) -> Iterator[Log]:
    """If enabled, mirror TensorBoard's events to Weights & Biases; yields a function that sends a value to MLflow.

    In both, a resumed run keeps its identity. Raises DataError if a package is missing.
    """
    folder, setup, terms = run.folder, run.setup, find_restriction(run.manifest.dataset)
    for name in ("wandb", "mlflow"):
        if terms and getattr(setup, name):
            sent = f"`{name}` sends settings and figures of this run to others"
            say_once(f"Warning: {sent}; make sure that the {terms} allows it")
    digest = hashlib.sha256(read_bytes(folder / "config.json")).hexdigest()[:8]
    identity = re.sub(r"[^\w.-]", "-", f"{folder.name}-{digest}")
    settings: dict[str, Any] = {"config": asdict(run.config), "sync_tensorboard": True, "save_code": False}
    with ExitStack() as stack:
        if setup.wandb:
            with needs("wandb"):
                import wandb
            wandb.init(project=setup.wandb, name=folder.name, id=identity, resume="allow", dir=folder, **settings)
            stack.callback(wandb.finish)  # before the next trial of a sweep begins another
        if not setup.mlflow:
            yield lambda name, value, step: None
            return
        with needs("mlflow"):
            import mlflow
        mlflow.set_experiment(setup.mlflow)
        earlier = mlflow.search_runs(filter_string=f"attributes.run_name = '{identity}'", output_format="list")
        stack.enter_context(mlflow.start_run(earlier[0].info.run_id if earlier else None, run_name=identity))
        mlflow.log_params(asdict(run.config))
        yield mlflow.log_metric


@contextmanager
def open_events(run: Run, done: int) -> Iterator[Log]:
    """A function that adds a value to a curve in TensorBoard's events; drops the events after step `done`.

    Raises DataError, with the folder, if they cannot be written.
    """
    if not run.ranks.is_first:
        yield lambda name, value, step: None
        return
    from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

    folder, usual = run.folder / "tensorboard", threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            usual(args)

    def log(name: str, value: float, step: int) -> None:
        with named_writes(folder):
            events.add_scalar(name, value, step)
        send(name, value, step)

    # Hide the traceback of TensorBoard's thread: logging the next value raises the same error.
    threading.excepthook = hook
    try:
        with send_curves(run) as send, ExitStack() as stack:
            with named_writes(folder):
                events = SummaryWriter(str(folder), purge_step=done + 1)
                stack.enter_context(named_writes(folder))
                stack.callback(events.close)
            yield log
    finally:
        threading.excepthook = usual


def result_name(config: Config, digest: str, split: str) -> str:
    """The name of a run's results on a split, including the digest of shards other than the run's."""
    return split if digest == config.manifest else f"{split}-{digest[:8]}"


def describe_start(config: Mapping[str, Any]) -> str:
    """The weights that a run with this configuration starts from, and their terms."""
    if config.get("pretrained"):
        return weights_terms(config["arch"])
    return config["init_terms"] or "random weights"


def describe_code() -> str:
    """The commit of this checkout, with `-dirty` if files were changed; else the package's version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return version("chexpert-pipeline")


def save_best(run: Run, seen: Sequence[Entry], weights: Mapping[str, Tensor], epoch: float, score: float) -> None:
    """Write best.pt: everything needed to score images, except the settings in config.json."""
    images = {name: run.manifest.options[name] for name in ImageOptions._fields}
    about = {"epoch": epoch, "dev_auroc": score, "images": images, "pixels": dict(run.pixels)}
    about |= {"dataset": dict(run.manifest.dataset), "equalize": run.config.equalize, "seen": list(seen)}
    about |= {"arch": run.config.arch, "image_size": run.config.image_size, "outputs": name_outputs(run.config)}
    title, terms = (run.manifest.dataset.get(name, "not stated") for name in ("title", "license"))
    use = "calibrated" if run.config.adopted else "trained"
    about["terms"] = f"{describe_start(asdict(run.config))}; {use} on {title}: {terms}"
    save_checkpoint(run.folder / "best.pt", {"weights": dict(weights), **about})
