"""Sharding on a Dask cluster: a scheduler and workers in real processes on loopback (make test-cluster)."""

import os
import random
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
from tests.conftest import PIPELINE, REPOSITORY, ROUNDS, run_pipeline, write_chexpert
from tests.swift import free_ports

OPTIONS = ["--size", "48", "--dev", "0.3", "--samples-per-shard", "20"]

pytestmark = pytest.mark.cluster

Start = Callable[..., "subprocess.Popen[bytes]"]
connect: Any = Client  # which has no types


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


@pytest.fixture
def scheduler(start: Start) -> str:
    (port,) = free_ports(1)
    start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    return f"tcp://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 frontals, and one CSV row without an image."""
    root = tmp_path_factory.mktemp("source") / "CheXpert-v1.0-small"
    write_chexpert(root, "train", range(1, 551))
    write_chexpert(root, "valid", range(551, 601))
    (root / "train" / "patient00007" / "study1" / "view1_frontal.jpg").unlink()
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.soak
@pytest.mark.parametrize("round_", ROUNDS)
def test_a_lost_worker_changes_no_byte(
    start: Start,
    scheduler: str,
    source: Path,
    tmp_path: Path,
    round_: int,
    record_property: Callable[[str, object], None],
) -> None:
    local = run_pipeline("shards", source, tmp_path / "local", *OPTIONS, "--max-bad", 0.01)
    assert local.returncode == 0, local.stderr
    workers = [start("worker", scheduler) for _ in range(3)]
    command = [PIPELINE, "shards", source, tmp_path / "cluster", *OPTIONS, "--max-bad", "0.01", "--strict"]
    run = subprocess.Popen([*map(str, command), "--scheduler", scheduler], stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "cluster").glob("*.tar")):
        time.sleep(0.01)
        assert run.poll() is None
    time.sleep(random.Random(round_).random() / 10)
    workers[0].send_signal(signal.SIGKILL)
    record_property("survived", "SIGKILL of a Dask worker")
    assert not (tmp_path / "cluster" / "manifest.json").exists()  # in the middle of the run
    _, said = run.communicate(timeout=120)
    assert run.returncode == 3, said  # --strict, and one reject
    assert "1,200 of 1,200 images" in said
    assert files_of(tmp_path / "cluster") == files_of(tmp_path / "local")


def test_a_stopped_run_continues_on_a_cluster(start: Start, scheduler: str, source: Path, tmp_path: Path) -> None:
    start("worker", scheduler)
    words = [PIPELINE, "shards", source, tmp_path / "out", *OPTIONS, "--max-bad", "0.01"]
    command = [*map(str, words), "--scheduler", scheduler]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "out").glob("*.tar"))) < 3:
        time.sleep(0.01)
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 143
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert " images were there already" in again.stdout
    run_pipeline("shards", source, tmp_path / "local", *OPTIONS, "--max-bad", 0.01)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")


def test_a_lost_scheduler_is_named(start: Start, source: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard")
    start("worker", f"tcp://127.0.0.1:{port}")
    words = [PIPELINE, "shards", source, tmp_path / "out", *OPTIONS, "--max-bad", "0.01"]
    command = [*map(str, words), "--scheduler", f"tcp://127.0.0.1:{port}"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list((tmp_path / "out").glob("*.tar"))) < 2:
        time.sleep(0.01)
        assert run.poll() is None
    scheduler.kill()
    _, said = run.communicate(timeout=60)
    reason = f"--scheduler tcp://127.0.0.1:{port}: the connection was lost; the same command continues"
    assert (run.returncode, said.splitlines()[-1]) == (1, f"Error: {reason}")


def test_a_late_worker_that_differs_or_fails_is_named_and_its_tasks_go_to_others(
    start: Start, scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy of this project with a byte more: its worker joins while the first task runs."""
    witness, other = tmp_path / "options.json", tmp_path / "other"
    witness.write_text("{}")
    for name in ("pipeline", "tests"):
        shutil.copytree(REPOSITORY / name, other / name)
    with (other / "pipeline/images.py").open("a") as file:
        file.write("# changed\n")
    start("worker", scheduler)
    results = run_on_cluster(len, ["a"] * 200, scheduler, witness)
    assert next(results) == 1
    start("worker", scheduler, cwd=other)
    with connect(scheduler, set_as_default=False) as client:
        client.wait_for_workers(2)
    assert list(results) == [1] * 199
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "pipeline.etl.cluster")
    differs = r"worker tcp://\S+ has sources of sha256 \w+, \w+ is needed: the bytes would differ"
    assert re.fullmatch(f"{differs}; its tasks go to others", warning)


def test_a_task_that_a_machine_fails_is_done_by_another(
    start: Start, scheduler: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    witness = tmp_path / "options.json"
    witness.write_text("{}")
    start("worker", scheduler)
    start("worker", scheduler)
    with connect(scheduler, set_as_default=False) as client:
        client.wait_for_workers(2)
    assert list(run_on_cluster(str.upper, ["a"], scheduler, witness, blame_once())) == ["A"]
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "pipeline.etl.cluster")
    assert re.fullmatch(r"worker tcp://\S+ does not see /data/film.jpg; its tasks go to others", warning)
    failed = rf"worker tcp://\S+ failed: \[Errno 17\] File exists: '{tmp_path}'"
    with pytest.raises(DataError, match=rf"no fit worker is left: {failed}; {failed}$"):
        list(run_on_cluster(os.mkdir, [str(tmp_path)], scheduler, witness))


def blame_once() -> Callable[[str], str]:
    """Says of the first result that its worker does not see an image."""
    reasons = iter(["does not see /data/film.jpg"])
    return lambda result: next(reasons, "")


def test_a_cluster_that_cannot_work_is_named(
    start: Start, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = tmp_path / "options.json"
    witness.write_text("{}")
    worker = start("worker", scheduler)
    assert sorted(run_on_cluster(len, ["a", "bcd"], scheduler, witness)) == [1, 3]
    here_alone = Path("/proc/self/cmdline")  # which is another one in every process
    unseen = r"^`scheduler` tcp://.*: no fit worker is left: worker tcp://\S+ does not see /proc/self$"
    with pytest.raises(DataError, match=unseen):
        list(run_on_cluster(len, ["a"], scheduler, here_alone))
    worker.kill()
    monkeypatch.setattr("pipeline.etl.cluster.CONNECT_SECONDS", 0.5)
    with pytest.raises(DataError, match=r"^`scheduler` tcp://127.0.0.1:9: cannot be reached: "):
        list(run_on_cluster(len, ["a"], "tcp://127.0.0.1:9", witness))
