"""What is typed reaches the commands; bad use ends in one line and an exit code, and writes nothing.

The tables are calls.txt, of make, and refusals.txt, of the messages of each command.
"""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Shards, run_pipeline, start
from tests.training import run_train


def read_table(section: str) -> list[str]:
    """The lines of a section of refusals.txt."""
    _, _, rest = (REPOSITORY / "tests" / "refusals.txt").read_text().partition(f"[{section}]\n")
    return rest.partition("\n\n")[0].splitlines()


def fill(line: str, **folders: Path) -> tuple[list[str], int, str]:
    """The words that are typed, the exit code, and the message."""
    typed, code, message = line.format(**folders).split(" > ")
    return shlex.split(typed), int(code), message


@pytest.mark.parametrize("line", read_table("pipeline"))
def test_pipeline_refuses(chexpert: Path, tmp_path: Path, line: str) -> None:
    words, code, message = fill(line, data=chexpert, out=tmp_path / "out")
    failed = run_pipeline(*words, code=code)
    assert message in failed.stderr.splitlines()[-1]
    assert not {"Traceback", "s3cret"} & set(re.findall(r"\w+", failed.stderr))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("line", read_table("train"))
def test_train_refuses(sample_shards: Shards, tmp_path: Path, line: str) -> None:
    (film := tmp_path / "film.jpg").touch()
    words, code, message = fill(line, shards=sample_shards[0], run=tmp_path / "run", film=film)
    failed = run_train(*words)
    assert (failed.returncode, message in failed.stderr.splitlines()[-1]) == (code, True), failed.stderr
    assert not (tmp_path / "run").exists()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An environment that is older than the lock is not installed anew amid a test.
    return start("make", "--no-print-directory", "-o", ".venv/installed", *arguments)


@pytest.mark.parametrize("call", (REPOSITORY / "tests" / "calls.txt").read_text().splitlines()[1:])
def test_settings_reach_the_commands(call: str) -> None:
    typed, _, expected = call.format(home=Path.home()).partition(" > ")
    dry = make("-n", *shlex.split(typed))
    assert dry.returncode == 0
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    assert expected in " ".join(f"{' '.join(shlex.split(line))} ;" for line in lines)


def test_policies_are_the_shards_own_unless_set_by_hand() -> None:
    assert "train.py" in make("-n", "train").stdout
    assert "--uncertain" not in make("-n", "train", "OUT=there", "DATA=here").stdout.split("train.py")[1]


def test_data_is_looked_at_again_where_there_are_shards(tmp_path: Path) -> None:
    """By `pipeline shards`, which refuses those of other data, and leaves finished ones alone."""
    (tmp_path / "manifest.json").touch()
    assert "pipeline shards" not in make("-n", "train", f"OUT={tmp_path}").stdout
    assert f'pipeline shards "here" {tmp_path} ' in make("-n", "train", f"OUT={tmp_path}", "DATA=here").stdout


def test_make_alone_lists_targets() -> None:
    listed = [line.split()[0] for line in make().stdout.splitlines() if line.startswith("  ")]
    assert listed[:3] == ["help", "setup", "shards"]
    assert listed[-1] == "clean"


@pytest.mark.parametrize("line", read_table("make"))
def test_make_refuses(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.json").touch()
    words, code, message = fill(line, out=tmp_path / "out", finished=tmp_path)
    failed = make(*words)
    assert (failed.returncode, message in failed.stderr.splitlines()[0]) == (code, True), failed.stderr
