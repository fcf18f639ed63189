"""The Makefile: what a user types reaches the commands."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, start


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # An environment that is older than the lock is not installed anew amid a test.
    return start("make", "--no-print-directory", "-o", ".venv/installed", *arguments)


CALLS = (REPOSITORY / "tests" / "calls.txt").read_text().splitlines()[1:]


@pytest.mark.parametrize("call", CALLS)
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
