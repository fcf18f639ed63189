"""Sharding that is killed at random moments, or stopped, and is started again."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.scale import descendants
from tests.conftest import PIPELINE, ROUNDS, hashes, run_pipeline

OPTIONS = ["--size", "64", "--samples-per-shard", "8", "--workers", "2", "--views", "all"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], float]:
    """A source, the hashes of its shards written undisturbed, and the seconds that took."""
    folder = tmp_path_factory.mktemp("kill")
    assert run_pipeline("sample", folder, "--images", 240).returncode == 0
    start = time.monotonic()
    assert run_pipeline("shards", folder, folder / "shards", *OPTIONS).returncode == 0
    return folder, hashes(folder / "shards"), time.monotonic() - start


@pytest.mark.soak
@pytest.mark.parametrize("round_", range(2 * len(ROUNDS)))
def test_killed_runs_resume_to_the_same_bytes(
    reference: tuple[Path, dict[str, str], float],
    tmp_path: Path,
    round_: int,
    record_property: Callable[[str, object], None],
) -> None:
    source, expected, seconds = reference
    dice = random.Random(round_)
    out = tmp_path / "out"
    command = [str(PIPELINE), "shards", str(source), str(out), *OPTIONS]
    victims = []
    for _ in range(3):  # two kills of the parent or of a worker, each at a random moment
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            time.sleep(dice.uniform(0, seconds))
            workers = descendants(process.pid)
            victim = dice.choice([process.pid, *workers, *workers])
            victims.append("SIGKILL of pipeline shards" if victim == process.pid else "SIGKILL of its worker")
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                victims.pop()
            process.communicate(timeout=60)
        finished = (out / "manifest.json").exists()
        if not finished:
            assert run_pipeline("stats", out).returncode != 0, "unfinished shards must not be readable"
    final = run_pipeline(*command[1:])
    assert final.returncode == 0, (victims, final.stderr)
    assert hashes(out) == expected, victims
    for name in victims:
        record_property("survived", name)


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_run_and_its_workers(
    reference: tuple[Path, dict[str, str], float], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    source, expected, _ = reference
    out = tmp_path / "out"
    command = [str(PIPELINE), "shards", str(source), str(out), *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("*.tar")):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)  # returns once the workers have closed stderr too
    assert process.returncode == code
    assert "Traceback" not in errors
    assert not (out / "manifest.json").exists()
    assert run_pipeline("shards", source, out, *OPTIONS).returncode == 0
    assert hashes(out) == expected
