"""Sharding that is killed at random moments, or stopped, and is started again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.scale import descendants
from tests.conftest import PIPELINE, Round, hashes, run_pipeline
from tests.layouts import SETS

OPTIONS = ["--size", "64", "--samples-per-shard", "8", "--workers", "2", "--views", "all"]
FIELDS = "patient=patient,study=study,view=view,Edema=labels.Edema"  # in the JSON of our own tars


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Folders, with what tells the command how to read them: a sample, its shards as foreign tars, and six sets."""
    home = tmp_path_factory.mktemp("sources")
    run_pipeline("sample", home / "sample", "--images", 120)
    run_pipeline("shards", home / "sample", home / "shards", *OPTIONS)
    (home / "tars").mkdir()
    for tar in (home / "shards").glob("*.tar"):
        tar.rename(home / "tars" / tar.name)
    for name, write in SETS.items():
        write(home / name)
    foreign = [str(home / "tars"), "--set", "webdataset", "--columns", FIELDS]
    return [[str(home / "sample")], foreign, *([str(home / name)] for name in SETS)]


def disturb(command: list[str], out: Path, shards: int, round_: Round) -> None:
    """Run the command, which writes so many shards, and kill or stop it or a worker after one of them."""
    dice, before = round_.dice, len(list(out.glob("*.tar")))
    enough = dice.randint(min(before + 1, shards), shards)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and len(list(out.glob("*.tar"))) < enough:
            time.sleep(0.002)
        time.sleep(dice.choice([0, 0.1]) * dice.random())
        number, workers = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), []
        is_begun = len(list(out.glob("*.tar"))) > before  # before that, a signal ends Python as it starts
        if number == signal.SIGKILL and dice.random() < 0.5:
            workers = descendants(process.pid)
        with suppress(ProcessLookupError):
            os.kill(dice.choice(workers or [process.pid]), number)
            round_.survived(f"{number.name} of {'its worker' if workers else 'pipeline shards'}")
        _, errors = process.communicate(timeout=60)  # returns once the workers have closed stderr too
    if is_begun and number != signal.SIGKILL:
        assert process.returncode in (0, 128 + number, -number), errors  # the last as Python ends, without handlers
        assert "Traceback" not in errors
    if not (out / "manifest.json").exists():
        run_pipeline("stats", out, code=1)  # unfinished shards are not read


@pytest.mark.soak
def test_killed_runs_resume_to_the_same_bytes(rounds: Iterator[Round], sources: list[list[str]]) -> None:
    for round_ in rounds:
        dice, out = round_.dice, round_.folder / "out"
        source, *how = dice.choice([*sources, *3 * sources[:2]])
        options = round_.draw("shards")
        print(source, *how, *options)
        run_pipeline("shards", source, round_.folder / "whole", *how, *options, "--workers", 1)
        command = [str(PIPELINE), "shards", source, str(out), *how, *options, "--workers"]
        for _ in range(dice.randint(1, 3)):
            disturb([*command, str(dice.randint(1, 3))], out, len(list(round_.folder.glob("whole/*.tar"))), round_)
        run_pipeline(*command[1:], 2)
        (out / ".lock").unlink(missing_ok=True)  # of a process that was killed behind its manifest
        assert hashes(out) == hashes(round_.folder / "whole")
        run_pipeline("verify", out, "--deep")


def test_a_signal_ends_the_run_and_its_workers(tmp_path: Path) -> None:
    source, out = tmp_path / "sample", tmp_path / "out"
    run_pipeline("sample", source, "--images", 240)
    command = [str(PIPELINE), "shards", str(source), str(out), *OPTIONS]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("*.tar")):
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)  # returns once the workers have closed stderr too
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert not (out / "manifest.json").exists()
    run_pipeline("shards", source, out, *OPTIONS)
    run_pipeline("shards", source, tmp_path / "whole", *OPTIONS)
    assert hashes(out) == hashes(tmp_path / "whole")
