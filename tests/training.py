"""Small training runs in this process, for tests of what a run writes and of what follows it."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from model import networks, ranks
from model.checkpoint import load_checkpoint
from model.ranks import Stopped
from model.runs import results
from model.runs.commands import main
from model.runs.config import Config, Setup
from model.runs.folder import begin_run
from model.runs.run import Run, open_run
from pipeline.console import run_command
from pipeline.measure import belief
from tests.conftest import call

SMALL: dict[str, Any] = {"arch": "rescnn", "lr": 1e-3, "batch_size": 16, "epochs": 2, "image_size": "32"}
SMALL |= {"amp": "off", "ema": 0.9}
# The same of one epoch, to type.
WORDS: tuple[object, ...] = tuple(
    "--arch rescnn --image-size 32 --epochs 1 --batch-size 16 --amp off --workers 2".split()
)


# The types of fixtures: make_run, command, capsys, monkeypatch
MakeRun = Callable[..., Run]
Command = Callable[..., int]
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


class Late(list[int]):
    """The codes of signals: that of SIGTERM, from the n-th time on that they are looked at."""

    def __init__(self, looks: int) -> None:
        super().__init__([143])
        self.looks = looks

    def __bool__(self) -> bool:
        self.looks -= 1
        return self.looks <= 0


def stop_after(looks: int, begin: Callable[[], object]) -> None:
    """Begin something that is stopped by SIGTERM the n-th time that it looks for a signal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "_codes", Late(looks))
        with pytest.raises(Stopped) as stopped:
            begin()
    assert stopped.value.code == 143


def train_until(looks: int, run: Run) -> None:
    """Train until the n-th look for a signal: before each step, before each batch that is scored, and after these."""
    stop_after(looks, lambda: train.train(run))


@contextmanager
def narrow_networks() -> Iterator[None]:
    """rescnn with a hundredth of its weights: what these tests ask of a network, any network does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "ResCNN", partial(networks.ResCNN, widths=(16, 32)))
        yield


@contextmanager
def quick_ends() -> Iterator[None]:
    """No page and no boosted trees, which take longest at the end of a run; `make soak` has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "render_report", lambda *_: "a page")
        patch.setattr(belief, "predict", lambda covariates, *_: np.nan_to_num(covariates[:, 0]))
        patch.setattr(ranks, "listen", lambda: None)
        yield


def run_train(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command `python train.py`, in this process."""
    return call(partial(run_command, main, train.train), "train.py", *arguments)


def call_train(*words: object) -> int:
    """`python train.py` in this process."""
    with quick_ends():
        return main.main([str(word) for word in words], standalone_mode=False, obj=train.train) or 0


def open_small_run(shards: Path | Sequence[Path], folder: Path, **changes: Any) -> Run:
    """A small run that has begun; keyword arguments change its configuration, or are for its setup."""
    folders = [shards] if isinstance(shards, Path) else shards
    inputs = {name: changes.pop(name) for name in ("teacher", "init", "strict") if name in changes}
    setup = Setup(shards=tuple(map(str, folders)), workers=2, **inputs)
    run = open_run(Config(**SMALL | changes), setup, folder)
    begin_run(run.folder, run.config)
    return run


def read_events(folder: Path) -> EventAccumulator:
    """The curves in TensorBoard's events."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: weights, averages, optimizer, position, and every number of the metrics."""
    for name in ("last.pt", "best.pt"):
        saved = [load_checkpoint(folder / name) for folder in (run, other)]
        for key in "images precision dataset outputs terms seen arch image_size".split():  # texts, or with texts
            first, second = (str(checkpoint.pop(key, None)) for checkpoint in saved)
            assert first == second
        torch.testing.assert_close(*saved, rtol=0, atol=0)
    for name in ("metrics.jsonl", "evaluation-dev.json", "evaluation-valid.json", "scores-valid.arrow"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
