import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import DataError
from pipeline.base.workers import report_item, run_alone, run_tasks
from tests.conftest import REPOSITORY, refused, start

Task = tuple[Path, int]


def square(task: Task) -> int:
    report_item()
    return task[1] ** 2


def die_once(task: Task) -> int:
    if task[1] == 5 and not (task[0] / "died").exists():
        (task[0] / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return square(task)


def always_die(task: Task) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fail(task: Task) -> int:
    raise DataError(f"task {task[1]} failed")


def sleep_in_steps(task: Task) -> int:
    (task[0] / f"pid-{os.getpid()}").touch()
    for _ in range(600):
        time.sleep(0.05)
        report_item()
    return 0


@pytest.mark.parametrize(("function", "workers"), [(square, 1), (square, 3), (die_once, 2)])
def test_every_task_is_done_once_and_counted(tmp_path: Path, function: Callable[[Task], int], workers: int) -> None:
    """Also if a worker is killed."""
    ticks: list[int] = []
    results = list(run_tasks(function, [(tmp_path, number) for number in range(20)], workers, ticks.append))
    assert sorted(results) == [number**2 for number in range(20)]
    assert ticks == sorted(ticks)
    assert ticks[-1] == 20 or (function is die_once and ticks[-1] < 20)  # what is done again is not counted again


def test_an_error_and_a_task_that_kills_its_worker_twice_reach_the_caller(tmp_path: Path) -> None:
    killed = f"{(tmp_path, 5)}: its process was killed; is there enough memory?"
    for function, message in ((always_die, killed), (fail, "task 5 failed")):
        with refused(message):
            list(run_tasks(function, [(tmp_path, 5)], 2))
        with refused(message):
            run_alone(function, (tmp_path, 5))


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.base.workers import run_tasks; "
        "from tests.pipeline.base.test_workers import sleep_in_steps; "
        "list(run_tasks(sleep_in_steps, [(Path(sys.argv[1]), 0), (Path(sys.argv[1]), 1)], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY)
    deadline = time.monotonic() + 30
    while len(workers := list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2
    pids = [int(path.name.removeprefix("pid-")) for path in workers]
    blocked = [Path(f"/proc/{pid}/status").read_text().split("SigBlk:")[1].split()[0] for pid in pids]
    assert all(int(mask, 16) >> signal.SIGINT - 1 & 1 for mask in blocked)  # Ctrl-C reaches the parent alone
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}/stat").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()]


@pytest.mark.parametrize(
    "run", ["run_tasks(sleep_in_steps, [(folder, 0), (folder, 1)], 2)", "run_threads(time.sleep, [1] * 3, 2)"]
)
def test_a_signal_while_results_are_waited_for_leaves_no_lock_behind(tmp_path: Path, run: str) -> None:
    """As if it came just when the last lock was taken: by an exception there, the pool would never end."""
    program = f"""
import os, signal, sys, threading, time
from concurrent.futures import Future, _base
from pathlib import Path
from pipeline.base.workers import run_tasks, run_threads
from tests.pipeline.base.test_workers import sleep_in_steps

def interrupted(take):
    def take_and_interrupt(self, *_):
        take(self)
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1_000_000):  # the handler runs between two of these
            pass
    return take_and_interrupt

_base._AcquireFutures.__enter__ = interrupted(_base._AcquireFutures.__enter__)
Future.result = interrupted(lambda future: future._condition.acquire())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
threading.Thread(target=time.sleep, args=[60], daemon=True).start()
folder = Path({str(tmp_path)!r})
list({run})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=60, capture_output=True)
    assert ended.returncode == 143, ended.stderr


@pytest.mark.soak
def test_a_long_tmpdir_is_no_matter(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    code = (
        "import tempfile; from pathlib import Path; from pipeline.base.workers import run_alone; "
        "from tests.pipeline.base.test_workers import square; "
        "print(run_alone(square, (Path(), 7)), tempfile.gettempdir())"
    )
    run = start(sys.executable, "-c", code, TMPDIR=str(folder))
    assert (run.returncode, run.stdout) == (0, f"49 {folder}\n"), run.stderr
