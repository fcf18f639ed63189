"""The folder of a run: how its files, which docs/train.md lists, are written and read."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.augment import equalize
from model.checkpoint import load_checkpoint, save_checkpoint
from model.fusion import StudyNetwork
from model.names import own_input
from model.networks import weights_terms
from model.optim import scheduled_lr
from model.runs.config import Config, name_outputs, read_config
from model.runs.job import Job
from pipeline.base.errors import DataError, describe_difference, needs
from pipeline.base.files import write_atomically, write_json
from pipeline.console import say, say_once
from pipeline.images import ImageOptions
from pipeline.manifest import find_restriction
from pipeline.stream.cache import redact

PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "simplejpeg", "opencv-python-headless", "pillow")
AS_IT_IS = ImageOptions(size=None, square="no", encoding="png", quality=95, max_pixels=50_000_000)


def fuse(network: nn.Module, config: Config) -> nn.Module:
    """The network of a run by studies, made of one for images; the same one for a run by images.

    One that is, or was, `robust` equalizes its films first, wherever it is used.
    """
    if config.equalize:
        network.register_forward_pre_hook(lambda _, inputs: (equalize(inputs[0]), *inputs[1:]))
    return network if config.fusion is None else StudyNetwork(network, config.fusion, config.freeze)


def open_run(run: Path, config: Config, steps: int = 0) -> Config:
    """Create the run folder, or open it; returns the configuration in it.

    A run that has done all of its epochs, of `steps` each, may get more. Raises DataError, with the difference, where
    the folder has another configuration.
    """
    if (run / "config.json").exists():
        before = read_config(run)
        config = replace(config, extended=before.extended)
        if config.epochs <= before.epochs or replace(config, epochs=before.epochs) != before:
            if difference := describe_difference(asdict(before), asdict(config), asdict(config)):
                raise DataError(
                    f"{run} is a run of another configuration: {difference}; choose another `run` (in make: RUN=)"
                )
            return config
        config = _extend(run, config, before.epochs, steps)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", asdict(config))
    return config


def _extend(run: Path, config: Config, epochs: int, steps: int) -> Config:
    """The configuration of a run that goes on after its last epoch; says at what learning rate."""
    done = load_checkpoint(run / "last.pt").get("done")
    if done != epochs * steps:
        raise DataError(
            f"{run}: `epochs` can be raised after all {epochs} are done; its last step is {done:,}"
        )
    rates = (
        scheduled_lr(config.lr, step, total * steps)
        for step, total in ((done - 1, epochs), (done, config.epochs))
    )
    then, now = (f"{rate:.2g}" for rate in rates)
    say(
        f"{run}: {epochs} epochs ended at a learning rate of {then}; the next follow the schedule of {config.epochs} "
        f"from {now} down, so the result is not that of {config.epochs} epochs at once"
    )
    (run / "model-card.md").unlink(missing_ok=True)  # by which a finished run is known
    return replace(config, extended=(*config.extended, epochs))


def describe_software(job: Job) -> dict[str, object]:
    """What must be the same on all ranks, besides the configuration, so that they train one network."""
    packages = PACKAGES if own_input(job.config.arch) is None else (*PACKAGES, "timm")
    return {
        "code": describe_code(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "precision": str(job.precision),
    }


def record_environment(job: Job) -> None:
    """Add a line on what this start runs with to environment.jsonl: with config.json it reproduces the run."""
    line = describe_software(job) | {
        "command": [redact(word) for word in sys.argv],
        # Relative to the run, so that both can move together.
        "shards": [
            one.name if "://" in one.name else os.path.relpath(one.path, job.run)
            for one in job.shards.folders
        ],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "ranks": job.ranks.count,
    }
    path = job.run / "environment.jsonl"
    before = path.read_bytes() if path.exists() else b""
    write_atomically(path, before + (json.dumps(line) + "\n").encode())


@contextmanager
def follow_by_wandb(job: Job) -> Iterator[None]:
    """Let Weights & Biases, if it was asked for, read what goes to TensorBoard; a run continues as the same there.

    Raises DataError where it is missing.
    """
    if job.setup.wandb is None:
        yield
        return
    with needs("wandb"):
        import wandb
    if terms := find_restriction(job.manifest.dataset):
        say_once(
            f"Warning: `wandb` sends settings and figures of this run to others; make sure that the {terms} allows it"
        )
    digest = hashlib.sha256((job.run / "config.json").read_bytes()).hexdigest()[:8]
    wandb.init(
        project=job.setup.wandb,
        name=job.run.name,
        id=f"{job.run.name}-{digest}",
        resume="allow",
        dir=job.run,
        config=asdict(job.config),
        sync_tensorboard=True,
        save_code=False,
    )
    try:
        yield
    finally:
        wandb.finish()  # before the next trial of a sweep begins another


def result_name(config: Config, digest: str, split: str) -> str:
    """What a run's scores of a split are named by: of shards other than its own also by their digest."""
    return split if digest == config.manifest else f"{split}-{digest[:8]}"


def describe_start(config: Mapping[str, Any]) -> str:
    """The weights that a run of this configuration starts from, and on what terms."""
    if config["pretrained"]:
        return weights_terms(config["arch"])
    return config["init_terms"] or "random weights"


def describe_code() -> str:
    """The commit of this checkout, with `-dirty` where files were changed; else the package's version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return version("chexpert-pipeline")


def save_best(job: Job, weights: Mapping[str, Tensor], epoch: float, score: float) -> None:
    """Write best.pt: all that scoring an image needs but the architecture, which config.json has."""
    # Shards that others wrote do not say how: their images are taken as they are.
    said = {name: job.manifest.options[name] for name in AS_IT_IS._fields if name in job.manifest.options}
    images = AS_IT_IS._asdict() | said
    about = {"epoch": epoch, "dev_auroc": score, "images": images, "pixels": dict(job.pixels)}
    about |= {"dataset": dict(job.manifest.dataset), "equalize": job.config.equalize, "seen": list(job.seen)}
    about["outputs"] = name_outputs(job.config)
    title, terms = (job.manifest.dataset.get(name, "not stated") for name in ("title", "license"))
    about["terms"] = f"{describe_start(asdict(job.config))}; trained on {title}: {terms}"
    save_checkpoint(job.run / "best.pt", {"weights": dict(weights), **about})
