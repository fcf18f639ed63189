"""Bad use ends in one line and an exit code, and writes nothing: the table of messages of each command."""

import re
import shlex
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
    assert failed.returncode == code
    assert message in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", read_table("make"))
def test_make_refuses(tmp_path: Path, line: str) -> None:
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "manifest.json").touch()
    words, code, message = fill(line, out=tmp_path / "out", finished=tmp_path / "finished")
    failed = start("make", "--no-print-directory", "-o", ".venv/installed", *words)
    assert failed.returncode == code
    assert message in failed.stderr.splitlines()[0]
