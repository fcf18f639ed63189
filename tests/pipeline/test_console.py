"""What commands have in common: signals, progress, the next command."""

import sys
import time
from pathlib import Path

import pytest

from pipeline import console
from tests.conftest import PIPELINE, start

SWALLOWED = """
import os, signal
from pipeline import console

signal.signal(signal.SIGTERM, console._terminate)

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(10_000):
            pass

with console.progress_bar("Working", "images") as advance:
    Finalized()
    print("still here", flush=True)
    advance(1, 2)
print("too far")
"""


def test_a_sigterm_that_a_finalizer_swallows_ends_the_next_progress() -> None:
    done = start(sys.executable, "-c", SWALLOWED)
    assert (done.returncode, done.stdout) == (143, "still here\n")
    assert "Exception ignored" in done.stderr


def test_time_left_is_said_from_a_minute_on() -> None:
    lines = {59: "", 60: "  1 min left", 5399: "  90 min left", 5400: "  1.5 h left", 36000: "  10.0 h left"}
    assert {seconds: console.show_left(seconds) for seconds in lines} == lines


def test_plain_progress_says_the_time_left_at_the_pace_of_this_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    with console.progress_bar("Working", "images") as advance:
        for seconds, done in ((1, 100), (21, 200)):
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: begin + seconds)
            advance(done, 1000, "fast")
    assert capsys.readouterr().err == "Working: 200 of 1,000 images  fast  3 min left\n"


def test_the_next_command_can_be_typed_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PIPELINE.parents[2])
    for path, program in ((PIPELINE.parent, "pipeline"), (tmp_path, PIPELINE.relative_to(Path.cwd()))):
        monkeypatch.setenv("PATH", str(path))  # the second is an environment that is not activated
        console.say_next("pipeline", "verify", "my shards", "--deep")
        assert capsys.readouterr().err == f"next: {program} verify 'my shards' --deep\n"


FULL_SHM = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'


@pytest.mark.parametrize(
    ("shell", "words", "error"),
    [
        (["sh", "-c", 'ulimit -n 8; exec "$@"'], ["shards", "CheXpert-v1.0-small", "out"],
         "Too many open files; raise the limit, as by ulimit -n 4096"),
        (["sh", "-c", 'ulimit -v 600000; exec "$@"'], ["stats", "shards"],
         "not enough memory: the limit (ulimit -v) is 600,000 kB; raise it to 3,145,728"),
        (["sh", "-c", 'exec "$@" > /dev/full'], ["stats", "shards"],
         "stdout: No space left on device; make room, and run it again"),
        (["unshare", "-m", "sh", "-c", FULL_SHM], ["shards", "CheXpert-v1.0-small", "out"],
         "/dev/shm: No space left on device; make room, and run it again"),  # noqa: S108
    ],
)  # fmt: skip
def test_what_the_machine_lacks_is_named_on_one_line(
    shards: object, chexpert: Path, tmp_path: Path, shell: list[str], words: list[str], error: str
) -> None:
    if shell[0] == "unshare" and start("unshare", "-m", "true").returncode:
        pytest.skip("only root makes namespaces")
    done = start(*shell, "sh", PIPELINE, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, f"Error: {error}\n")


@pytest.mark.parametrize(
    "error", [MemoryError("x"), ImportError("libarrow.so: failed to map segment from shared object")]
)
def test_too_little_memory_is_named(error: Exception) -> None:
    remedy = "raise the limit (ulimit -v), or use a larger machine"
    assert console._describe(error) == f"not enough memory: {error}; {remedy}"
    assert console._describe(KeyError("x")) == ""
