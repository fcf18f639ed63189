"""docs/mistakes.md: each mistake is made, and prints what the page says."""

import re
import shlex
import shutil
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from model import ranks
from model.ranks import Stopped
from pipeline.base.files import claimed
from tests.conftest import REPOSITORY, default_options, make_shards, run_pipeline, start, write_chexpert
from tests.training import WORDS, Late, call_train, narrow_networks, quick_ends, run_train

PAGE = REPOSITORY / "docs" / "mistakes.md"
# Of a small run, instead of make's own; what a row types comes on top.
SETTINGS = {"ARCH": "rescnn", "SIZE": "32", "BATCH": "8", "EPOCHS": "1", "DEV": "0.3", "LR": "1e-3", "WORKERS": "1"}
FEW = ("--batch-size", 8, "--lr", 1e-3, "--workers", 1, "--amp", "auto")


class Mistake(NamedTuple):
    """A row of the page."""

    name: str
    typed: str
    message: str
    code: str
    remedy: str


ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
MISTAKES = [Mistake(*(cell.strip().strip("`") for cell in row)) for row in ROWS if row[0] != "mistake"]


def type_in(line: str, folder: Path) -> tuple[int, str]:
    """What a user types in the folder. make itself runs; what it starts is then run in this process."""
    words = shlex.split(line)
    if words[0] == "make":
        command = ["make", "--no-print-directory", "-f", REPOSITORY / "Makefile", *words[1:]]
        made = start(*command, cwd=folder, **SETTINGS)
        started = folder / "started"
        calls = [part.split("\0") for part in started.read_text().split("\0\n")[:-1]] if started.exists() else []
        code, output = made.returncode, made.stdout + made.stderr
    else:
        code, output, calls = 0, "", [words[2 * (words[0] == "python") :]]
    for program, *arguments in calls:
        if code == 0:
            ran = run_pipeline(*arguments, code=None) if program == "pipeline" else run_train(*arguments)
            code, output = ran.returncode, output + ran.stderr + ran.stdout
    return code, output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the page types in: data sets, shards, runs; tests get copies."""
    folder = tmp_path_factory.mktemp("world")
    chexpert = folder / "CheXpert-v1.0-small"
    write_chexpert(chexpert, "train", range(1, 17))
    write_chexpert(chexpert, "valid", range(17, 21))
    make_shards(chexpert, folder / "shards", default_options(size=32, max_pixels=50_000_000, samples_per_shard=1000))
    write_chexpert(folder / "other", "train", range(31, 35))
    for name, tables in {"tables-alone": ("train", "valid"), "valid-alone": ("valid",)}.items():
        (folder / name).mkdir()
        for table in tables:
            shutil.copy(chexpert / f"{table}.csv", folder / name)
    shutil.copytree(chexpert / "valid", folder / "valid-alone" / "valid")
    for name in ("films", "notes", "runs/begun", "runs/busy", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    (folder / "notes" / "read me.txt").touch()
    for name in ("requirements.lock", "pyproject.toml", ".venv/installed"):
        (folder / name).touch()
    for name, first in {"pipeline": "pipeline\\0", "python": ""}.items():
        program = folder / ".venv" / "bin" / name
        note = f"printf '{first}' >> started\nprintf '%s\\0' \"$@\" >> started\necho >> started\n"
        program.write_text(f"#!/bin/sh\n{note}")
        program.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def runs(world: Path) -> Path:
    """The runs of the page: one that ended, one that was stopped, one that has just begun."""
    with pytest.MonkeyPatch.context() as patch, narrow_networks(), quick_ends():
        for name, looks in {"first": 10**9, "killed": 2}.items():  # before the second step
            patch.setattr(ranks, "_codes", Late(looks))
            with suppress(Stopped):
                call_train("train", "--shards", world / "shards", "--run", world / "runs" / name, *WORDS, *FEW)
    shutil.copy(world / "runs" / "first" / "config.json", world / "runs" / "begun")
    return world / "runs"


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_each_mistake_prints_what_the_page_says(
    mistake: Mistake, world: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(world, tmp_path / "world"))
    monkeypatch.chdir(folder)
    if "timm" in mistake.name:
        monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    busy = claimed(folder / "runs" / "busy") if "second process" in mistake.name else nullcontext()
    with narrow_networks(), quick_ends(), busy:
        code, output = type_in(mistake.typed, folder)
    pattern = ".*".join(re.escape(part) for part in mistake.message.split("…"))
    assert any(re.fullmatch(pattern, line) for line in output.splitlines()), output
    assert code == int(mistake.code)


def test_the_page_has_them_all() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 20
