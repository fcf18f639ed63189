"""Runs that tests start from, each trained once; tests get copies."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from model.runs.run import Run
from tests.conftest import Shards
from tests.training import WORDS, Command, MakeRun, call_train, narrow_networks, open_small_run, quick_ends


@pytest.fixture(autouse=True, scope="module")
def quick_training() -> Iterator[None]:
    with narrow_networks(), quick_ends():
        yield


@pytest.fixture
def make_run(sample_shards: Shards, tmp_path: Path) -> MakeRun:
    """A small run on the sample, in a folder of that name; keyword arguments change its configuration."""

    def make(name: str, *, shards: Path = sample_shards[0], **changes: object) -> Run:
        return open_small_run(shards, tmp_path / name, **changes)

    return make


@pytest.fixture(scope="session")
def uninterrupted(sample_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that ended. Read it, and change nothing."""
    with narrow_networks(), quick_ends():
        run = open_small_run(sample_shards[0], tmp_path_factory.mktemp("uninterrupted") / "run")
        train.train(run)
    return run.folder


@pytest.fixture
def trained(uninterrupted: Path, make_run: MakeRun) -> Run:
    """A copy of that run."""
    run = make_run("trained")
    shutil.copytree(uninterrupted, run.folder, dirs_exist_ok=True)
    return run


@pytest.fixture(scope="session")
def one_epoch(sample_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, by the command. Read it, and change nothing."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with narrow_networks():
        assert call_train("train", "--shards", sample_shards[0], "--run", run, *WORDS) == 0
    return run


@pytest.fixture
def run(one_epoch: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_epoch, tmp_path / "run"))


@pytest.fixture
def command(sample_shards: Shards) -> Command:
    """`python train.py` with options for a small run on the sample; the arguments come on top."""

    def call(name: str, *arguments: object) -> int:
        shards = [] if "--shards" in arguments else ["--shards", sample_shards[0]]
        small = WORDS[:8] if name in ("train", "sweep") else ()
        return call_train(name, *shards, "--workers", 2, *small, *arguments)

    return call
