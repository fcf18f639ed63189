"""Runs that tests start from, each trained once; tests get copies."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from model.runs.run import Run
from tests.conftest import Shards
from tests.training import WORDS, call_train, narrow_networks, open_small_job, quick_ends

Make = Callable[..., Run]
Command = Callable[..., int]


@pytest.fixture(autouse=True, scope="module")
def quick_training() -> Iterator[None]:
    with narrow_networks(), quick_ends():
        yield


@pytest.fixture
def make_job(sample_shards: Shards, tmp_path: Path) -> Make:
    """A small job on the sample, in a folder of that name; keyword arguments change its configuration."""

    def make(run: str, *, shards: Path = sample_shards[0], **changes: object) -> Run:
        return open_small_job(shards, tmp_path / run, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def whole(sample_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small job that nothing interrupted. Read it, and change nothing."""
    with narrow_networks(), quick_ends():
        job = open_small_job(sample_shards[0], tmp_path_factory.mktemp("whole") / "run")
        train.train(job)
    return job.folder


@pytest.fixture
def trained(whole: Path, make_job: Callable[..., Run]) -> Run:
    """The job of such a run, in a folder of one's own."""
    job = make_job("trained")
    shutil.copytree(whole, job.folder, dirs_exist_ok=True)
    return job


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
