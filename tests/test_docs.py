"""What the pages show runs: their shell and Python blocks, typed as they stand there, after `make train`.

A block runs in `make test`; with `<!-- docs-check -->` on the line above it, in `make docs-check`, as it takes longer;
and with `<!-- not run: why -->` nowhere, but its commands and options must exist. It runs in what `make train` leaves,
with the data of `<!-- needs ~/films -->`. Output is ```text, or ```console, where lines with a $ are commands.
"""

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib
import pytest

from model.runs.commands import main as train
from pipeline.cli import cli as pipeline
from pipeline.synthetic.sample import write_sample
from tests.conftest import REPOSITORY, default_options, make_shards, start
from tests.layouts import draw, write_nih

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# Of small runs, instead of make's own.
SETTINGS = {"ARCH": "rescnn", "SIZE": "128", "BATCH": "16", "EPOCHS": "1", "DEV": "0.2"}
PROGRAMS = ("pipeline", "python", "torchrun", "dask", "docker")


class Block(NamedTuple):
    """A fenced block of a page, and what the comment above it says."""

    page: str
    line: int
    language: str
    code: str
    note: str

    @property
    def needs(self) -> list[str]:
        """Data that the block needs beside what `make train` leaves."""
        _, _, names = self.note.partition("needs ")
        return [name.removeprefix("~/") for name in names.split(", ") if name]

    @property
    def commands(self) -> str:
        """The lines that a shell runs."""
        typed = (line[2:] for line in self.code.splitlines() if line.startswith("$ "))
        return "\n".join(typed) if self.language == "console" else self.code


def find_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    fences = re.finditer(r"^(?:<!-- (.*) -->\n)?```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    lines = {fence: text.count("\n", 0, fence.start()) + 1 for fence in fences}
    return [Block(page.stem, line, fence[2], fence[3], fence[1] or "") for fence, line in lines.items()]


BLOCKS = [block for page in PAGES for block in find_blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("", "console")]
RUNNABLE = [block for block in BLOCKS if block.language in ("", "python")]
SHORT = [block for block in RUNNABLE if not block.note or block.note.startswith("needs ")]
LONG = [block for block in RUNNABLE if block.note.startswith("docs-check")]


def name(block: Block) -> str:
    return f"{block.page}-{block.line}"


def test_every_block_runs_or_says_why_not() -> None:
    assert len(SHORT) >= 5
    assert len(LONG) > 10
    for block in BLOCKS:
        assert block.language in ("", "python", "console", "text"), name(block)
        runs = re.fullmatch(r"|docs-check|(docs-check, )?needs .+", block.note)
        assert runs or re.match(r"not run: \w+", block.note), name(block)
        assert block.language in ("", "python", "text") or not runs, name(block)
        if block.language == "python":
            compile(block.code, name(block), "exec")


def test_the_table_of_extras_has_each_of_them() -> None:
    page = (REPOSITORY / "docs" / "getting-started.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:about )?[\d,]+ MB \| [^|]+ \|$", page, re.MULTILINE)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert rows == list(project["optional-dependencies"])


def make_clone(home: Path) -> None:
    """What make takes for a clone with an installed environment."""
    for file in ("requirements.lock", "pyproject.toml", ".venv/installed"):
        (home / file).touch()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, which is also the home, with `make train`'s sample and its shards, of fewer images; tests get copies."""
    home = tmp_path_factory.mktemp("docs")
    (home / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (home / ".venv" / part.name).symlink_to(part)
    makefile = (REPOSITORY / "Makefile").read_text()
    for variable, value in SETTINGS.items():
        makefile = re.sub(rf"\b{variable}=[\w.-]+", f"{variable}={value}", makefile)
    (home / "Makefile").write_text(makefile)
    (home / "train.py").symlink_to(REPOSITORY / "train.py")
    make_clone(home)
    source = write_sample(home / "sample", images=200, laterals=0.4, valid=0.4)
    make_shards(source, home / "shards" / "sample", default_options(size=128, views="frontal", dev=0.2))
    return home


@pytest.fixture(scope="session")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the sample's run: all that `make train` leaves."""
    home = Path(shutil.copytree(world, tmp_path_factory.mktemp("trained") / "docs", symlinks=True))
    type_in(["make", "train"], home)
    assert (home / "runs" / "sample" / "report.html").exists()
    return home


@pytest.fixture(scope="session")
def needed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that blocks need beside."""
    folder = tmp_path_factory.mktemp("needed")
    shutil.copytree(world / "sample" / "CheXpert-v1.0-small", folder / "CheXpert-v1.0-small")
    tars = shutil.ignore_patterns("*.json", "*.arrow", "valid*")
    shutil.copytree(world / "shards" / "sample", folder / "wds", ignore=tars)
    write_nih(folder / "nih")
    (folder / "nih" / "Data_Entry_2017_v2020.csv").rename(folder / "Data_Entry_2017_v2020.csv")
    rows = ["Image,MRN,Years,edema,fluid"]
    for number in range(8):
        draw(folder / "films" / f"{number}.png", number)
        rows.append(f"{number}.png,{number},50,{number % 2},{number % 3 % 2}")
    (folder / "films" / "films.csv").write_text("\n".join(rows))
    book = pytest.importorskip("openpyxl").Workbook()
    book.active.append(["PATIENT", "PRIMARY_RACE"])
    for number in range(1, 400):
        book.active.append([number, ("White", "Black")[number % 5 == 0]])
    book.save(folder / "CHEXPERT DEMO.xlsx")
    return folder


def type_in(command: list[str], home: Path) -> None:
    """Run a command in that folder, whose .venv is activated."""
    path = os.pathsep.join([str(home / ".venv" / "bin"), os.environ["PATH"]])
    ran = start(*command, cwd=home, HOME=str(home), PATH=path, MPLCONFIGDIR=matplotlib.get_configdir())
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.parametrize("block", [*SHORT, *(pytest.param(block, marks=pytest.mark.docs) for block in LONG)], ids=name)
def test_a_block_runs(block: Block, request: pytest.FixtureRequest, needed: Path, tmp_path: Path) -> None:
    home = tmp_path / "docs"
    shutil.copytree(request.getfixturevalue("trained" if block in LONG else "world"), home, symlinks=True)
    for path in block.needs:
        copy = shutil.copytree if (needed / path).is_dir() else shutil.copy
        copy(needed / path, home / path)
    type_in([*(["python", "-c"] if block.language == "python" else ["bash", "-ec"]), block.code], home)


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose programs write down how they were called, and do nothing but pretend to write shards."""
    home = tmp_path_factory.mktemp("recorder")
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / "Makefile").symlink_to(REPOSITORY / "Makefile")
    make_clone(home)
    for program in PROGRAMS:
        stub = home / ".venv" / "bin" / program
        # In a single write: a program behind & runs beside the next one.
        note = f'printf \'%s\\n\' "$(printf \'%s\\037\' {program} "$@")" >> "$TYPED"'
        stub.write_text(f'#!/bin/sh\n{note}\n[ "$1" != shards ] || {{ mkdir -p "$3"; touch "$3/manifest.json"; }}\n')
        stub.chmod(0o755)
    (home / "shards" / "sample").mkdir(parents=True)
    (home / "shards" / "sample" / "manifest.json").touch()
    return home


def check_options(group: click.Group, words: list[str]) -> None:
    """Raise UsageError for a command, an option or a value that there is not; whether a path exists does not matter."""
    context = click.Context(group, info_name=group.name, **group.context_settings)
    if words[0] == "--help":
        return
    words = ["train", *words] if words[0].startswith("-") else words
    command = group.get_command(context, words[0])
    assert command is not None, words[0]
    inner = click.Context(command, context, command.name)
    given, _, _ = command.make_parser(inner).parse_args(words[1:])
    for option in command.params:
        value = given.get(option.name)
        if isinstance(option.type, click.Choice | click.IntRange | click.FloatRange) and value is not None:
            option.type_cast_value(inner, value)


@pytest.mark.parametrize("block", SHELL, ids=name)
def test_the_commands_and_options_of_a_block_exist(block: Block, recorder: Path, tmp_path: Path) -> None:
    typed = tmp_path / "typed"
    typed.touch()
    path = f"{recorder / '.venv' / 'bin'}:{os.environ['PATH']}"
    ran = start("bash", "-ec", block.commands, cwd=recorder, TYPED=str(typed), PATH=path)
    assert ran.returncode == 0, ran.stderr
    calls = [line.split("\037")[:-1] for line in typed.read_text().splitlines()]
    assert calls
    for program, *words in calls:
        if program == "pipeline":
            check_options(pipeline, words)
        elif words[:2] == ["-m", "train"]:
            check_options(train, words[2:])
        elif "train.py" in words:
            check_options(train, words[words.index("train.py") + 1 :])
