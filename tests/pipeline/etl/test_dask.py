"""Sharding on a Dask cluster: a scheduler and workers in real processes on loopback (make test-cluster)."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from pipeline import DataError
from pipeline.etl.cluster import run_on_cluster
from tests.conftest import PIPELINE, REPOSITORY, Round, hashes, run_pipeline, write_chexpert
from tests.swift import free_ports

OPTIONS = ["--size", "48", "--dev", "0.3", "--samples-per-shard", "20", "--max-bad", "0.01"]

pytestmark = pytest.mark.cluster

connect: Any = Client  # which has no types
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a part of a cluster, `scheduler` or `worker URL`, that ends with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: object, cwd: Path = REPOSITORY) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "distributed.cli.dask_" + str(arguments[0]), *map(str, arguments[1:])]
        if arguments[0] == "worker":
            command += ["--nworkers", "1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=cwd))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()


def start_scheduler(start: Start) -> "tuple[str, subprocess.Popen[bytes]]":
    """Its address and process."""
    (port,) = free_ports(1)
    process = start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    return f"tcp://127.0.0.1:{port}", process


@pytest.fixture
def scheduler(start: Start) -> str:
    return start_scheduler(start)[0]


def wait_for_workers(scheduler: str) -> None:
    with connect(scheduler, set_as_default=False) as client:
        client.wait_for_workers(2)


def assert_warned(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "pipeline.etl.cluster")
    assert re.fullmatch(rf"worker tcp://\S+ {reason}; its tasks go to others", warning)


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    """A file that every worker has to see."""
    (tmp_path / "options.json").write_text("{}")
    return tmp_path / "options.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 frontals, and one CSV row without an image."""
    root = tmp_path_factory.mktemp("source") / "CheXpert-v1.0-small"
    write_chexpert(root, "train", range(1, 551))
    write_chexpert(root, "valid", range(551, 601))
    (root / "train" / "patient00007" / "study1" / "view1_frontal.jpg").unlink()
    return root


def count_finished(out: Path) -> int:
    """The shards whose records, which follow their tars, are written."""
    return len(list(out.glob(".partial/*.arrow")))


def shard_on(scheduler: str, source: Path, out: Path, *options: str, finished: int = 1) -> "subprocess.Popen[str]":
    """The command that shards on the cluster, with so many of its shards finished."""
    command = [PIPELINE, "shards", source, out, *OPTIONS, *options, "--scheduler", scheduler]
    run = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while count_finished(out) < finished:
        time.sleep(0.01)
        assert run.poll() is None
    return run


@pytest.mark.soak
def test_a_stopped_run_and_a_lost_worker_change_no_byte(
    start: Start, scheduler: str, source: Path, rounds: Iterator[Round]
) -> None:
    for round_ in rounds:
        dice, out, options = round_.dice, round_.folder / "cluster", round_.draw("dask")
        print(*options)
        workers = [start("worker", scheduler) for _ in range(dice.randint(2, 4))]
        for victim, number, code in ((None, signal.SIGTERM, 143), (dice.choice(workers), signal.SIGKILL, 3)):
            some = count_finished(out) + dice.randint(2, 6)  # one may have the reject, and is written again
            run = shard_on(scheduler, source, out, *options, "--strict", finished=some)
            (victim or run).send_signal(number)
            round_.survived(f"{number.name} of {'a Dask worker' if victim else 'pipeline shards on Dask'}")
            assert not (out / "manifest.json").exists()  # in the middle of the run
            stdout, stderr = run.communicate(timeout=120)
            assert run.returncode == code, stderr  # 3: --strict, and one reject
        assert " images were there already" in stdout
        assert "1,200 of 1,200 images" in stderr
        run_pipeline("shards", source, out.with_name("local"), *OPTIONS, *options)
        assert hashes(out) == hashes(out.with_name("local"))
        for worker in workers:
            worker.kill()
            worker.wait()


def test_a_lost_scheduler_is_named(start: Start, source: Path, tmp_path: Path) -> None:
    scheduler, process = start_scheduler(start)
    start("worker", scheduler)
    run = shard_on(scheduler, source, tmp_path / "out", finished=2)
    process.kill()
    _, stderr = run.communicate(timeout=60)
    reason = f"--scheduler {scheduler}: the connection was lost; the same command continues"
    assert (run.returncode, stderr.splitlines()[-1]) == (1, f"Error: {reason}")


def test_a_late_worker_that_differs_is_named_and_its_tasks_go_to_others(
    start: Start, scheduler: str, tmp_path: Path, witness: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of this project with a byte more: its worker joins while the first task runs."""
    other = tmp_path / "other"
    for name in ("pipeline", "tests"):
        shutil.copytree(REPOSITORY / name, other / name)
    with (other / "pipeline/images.py").open("a") as file:
        file.write("# changed\n")
    start("worker", scheduler)
    results = run_on_cluster(len, ["a"] * 200, scheduler, witness)
    assert next(results) == 1
    start("worker", scheduler, cwd=other)
    wait_for_workers(scheduler)
    assert list(results) == [1] * 199
    assert_warned(caplog, r"has sources of sha256 \w+, \w+ is needed: the bytes would differ")


def test_a_task_that_a_machine_fails_is_done_by_another(
    start: Start, scheduler: str, tmp_path: Path, witness: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start("worker", scheduler)
    start("worker", scheduler)
    wait_for_workers(scheduler)
    reasons = iter(["does not see /data/film.jpg"])  # of the first result alone
    assert list(run_on_cluster(str.upper, ["a"], scheduler, witness, lambda _: next(reasons, ""))) == ["A"]
    assert_warned(caplog, "does not see /data/film.jpg")
    failed = rf"worker tcp://\S+ failed: \[Errno 17\] File exists: '{tmp_path}'"
    with pytest.raises(DataError, match=rf"no fit worker is left: {failed}; {failed}$"):
        list(run_on_cluster(os.mkdir, [str(tmp_path)], scheduler, witness))


def test_a_cluster_that_cannot_work_is_named(
    start: Start, scheduler: str, witness: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start("worker", scheduler)
    assert sorted(run_on_cluster(len, ["a", "bcd"], scheduler, witness)) == [1, 3]
    unshared = Path("/proc/self/cmdline")  # which is another one in every process
    unseen = r"^`scheduler` tcp://.*: no fit worker is left: worker tcp://\S+ does not see /proc/self$"
    with pytest.raises(DataError, match=unseen):
        list(run_on_cluster(len, ["a"], scheduler, unshared))
    worker.kill()
    monkeypatch.setattr("pipeline.etl.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(DataError, match=r"^`scheduler` tcp://127.0.0.1:9: cannot be reached: "):
        list(run_on_cluster(len, ["a"], "tcp://127.0.0.1:9", witness))
