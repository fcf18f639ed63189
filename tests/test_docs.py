"""What the pages show runs: their shell and Python blocks, typed as they stand there, in a folder with small data.

A block runs in `make test`; with `<!-- docs-check -->` on the line above it, in `make docs-check`, as it takes longer;
and with `<!-- not run: why -->` nowhere, but its commands and options must exist. Output is ```text, or
```console, where lines with a $ are commands.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib
import pytest

from model.runs.commands import main as train
from pipeline.cli import cli as pipeline
from pipeline.etl.shards import Execution, write_shards
from pipeline.sources.sets import find_source
from pipeline.synthetic.sample import write_sample
from tests.conftest import POLICIES, REPOSITORY, default_options, make_shards, write_chexpert
from tests.layouts import draw, write_mimic, write_nih
from tests.training import call_train

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# Of small runs, instead of make's own.
SETTINGS = {"ARCH": "rescnn", "SIZE": "64", "BATCH": "16", "EPOCHS": "1", "DEV": "0.2", "WORKERS": "1"}
SMALL = ["--arch", "rescnn", "--image-size", "64", "--batch-size", "16", "--epochs", "1", "--workers", "1"]
PROGRAMS = ("pipeline", "python", "torchrun", "dask")


class Block(NamedTuple):
    """A fenced block of a page, and what the comment above it says."""

    page: str
    line: int
    language: str
    code: str
    note: str

    @property
    def commands(self) -> str:
        """The lines that a shell runs."""
        typed = (line[2:] for line in self.code.splitlines() if line.startswith("$ "))
        return "\n".join(typed) if self.language == "console" else self.code


def find_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^(?:<!-- (.*) -->\n)?```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [
        Block(page.stem, text.count("\n", 0, match.start()) + 1, match[2], match[3], match[1] or "")
        for match in found
    ]


BLOCKS = [block for page in PAGES for block in find_blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("", "console")]
RUNNABLE = [block for block in BLOCKS if block.language in ("", "python")]
SHORT = [block for block in RUNNABLE if not block.note]
LONG = [block for block in RUNNABLE if block.note == "docs-check"]


def name(block: Block) -> str:
    return f"{block.page}-{block.line}"


def test_every_block_runs_or_says_why_not() -> None:
    assert len(SHORT) > 10
    assert len(LONG) > 10
    for block in BLOCKS:
        assert block.language in ("", "python", "console", "text"), name(block)
        assert block.note in ("", "docs-check") or re.match(r"not run: \w+", block.note), name(block)
        assert block.language in ("", "python", "text") or block.note not in ("", "docs-check"), name(block)


def test_the_table_of_extras_has_each_of_them() -> None:
    page = (REPOSITORY / "docs" / "getting-started.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (?:about )?[\d,]+ MB \| [^|]+ \|$", page, re.MULTILINE)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert rows == list(project["optional-dependencies"])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, which is also the home, with the data that the pages speak of; tests get copies."""
    home = tmp_path_factory.mktemp("docs")
    (home / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (home / ".venv" / part.name).symlink_to(part)
    for link in ("Makefile", "train.py"):
        (home / link).symlink_to(REPOSITORY / link)
    for file in ("requirements.lock", "pyproject.toml", ".venv/installed"):
        (home / file).touch()
    source = write_sample(home, images=200, laterals=0.4, valid=0.4)
    make_shards(source, home / "shards", default_options(size=64, views="all", dev=0.2, samples_per_shard=40))
    shutil.copy(source / "train.csv", home)
    shutil.copytree(
        home / "shards", home / "wds", ignore=shutil.ignore_patterns("*.json", "*.arrow", "valid*")
    )
    write_nih(home / "nih")
    (home / "nih" / "Data_Entry_2017_v2020.csv").rename(home / "Data_Entry_2017_v2020.csv")
    write_mimic(home / "mimic-cxr-jpg")
    write_chexpert(home / "childrens-films", "train", range(1, 9))
    rows = ["Image,MRN,Years,edema,fluid"]
    for number in range(8):
        draw(home / "films" / f"{number}.png", number)
        rows.append(f"{number}.png,{number},50,{number % 2},{number % 3 % 2}")
    (home / "films" / "films.csv").write_text("\n".join(rows))
    book = pytest.importorskip("openpyxl").Workbook()
    book.active.append(["PATIENT", "PRIMARY_RACE"])
    for number in range(1, 400):
        book.active.append([number, ("White", "Black")[number % 2]])
    book.save(home / "CHEXPERT DEMO.xlsx")
    return home


@pytest.fixture(scope="session")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with runs a, b and c, and with shards of other patients."""
    home = Path(shutil.copytree(world, tmp_path_factory.mktemp("trained") / "docs", symlinks=True))
    own = home / "CheXpert-v1.0-small"
    other = write_sample(home / "other", images=200, seed=1, laterals=0.4, valid=0.4)
    for place, source in {"a": own, "b": other, "nih": own, "children": other, "other": other}.items():
        named = find_source(source, {}, [], called=place)
        options = default_options(size=64, dev=0.2, samples_per_shard=40)
        write_shards(named, home / "shards" / place, options, POLICIES, Execution(1, 0.0))
    for seed, run in enumerate("abc"):
        call_train("train", "--shards", home / "shards", "--run", home / "runs" / run, "--seed", seed, *SMALL)
    return home


def run_block(block: Block, home: Path) -> None:
    """Type a block in that folder."""
    if re.search(r"\bpipeline shards \S+ shards( |$)|^make shards (?!.*OUT=)", block.code, re.MULTILINE):
        shutil.rmtree(home / "shards")  # which it writes
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    path = os.pathsep.join([str(home / ".venv" / "bin"), os.environ["PATH"]])
    set_here = {"HOME": str(home), "PATH": path, "MPLCONFIGDIR": matplotlib.get_configdir()}
    command = ["python", "-c"] if block.language == "python" else ["bash", "-ec"]
    ran = subprocess.run(
        [*command, block.code],
        cwd=home,
        env=kept | SETTINGS | set_here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


@pytest.mark.parametrize("block", SHORT, ids=name)
def test_a_block_runs(block: Block, world: Path, tmp_path: Path) -> None:
    run_block(block, Path(shutil.copytree(world, tmp_path / "docs", symlinks=True)))


@pytest.mark.docs
@pytest.mark.parametrize("block", LONG, ids=name)
def test_a_longer_block_runs(block: Block, trained: Path, tmp_path: Path) -> None:
    run_block(block, Path(shutil.copytree(trained, tmp_path / "docs", symlinks=True)))


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose programs write down how they were called, and do nothing but pretend to write shards."""
    home = tmp_path_factory.mktemp("recorder")
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / "Makefile").symlink_to(REPOSITORY / "Makefile")
    for file in ("requirements.lock", "pyproject.toml", ".venv/installed"):
        (home / file).touch()
    for program in PROGRAMS:
        stub = home / ".venv" / "bin" / program
        stub.write_text(
            # In a single write: a program behind & runs beside the next one.
            f'#!/bin/sh\nprintf \'%s\\n\' "$(printf \'%s\\037\' {program} "$@")" >> "$TYPED"\n'
            '[ "$1" != shards ] || { mkdir -p "$3"; touch "$3/manifest.json"; }\n'
        )
        stub.chmod(0o755)
    for folder in ("shards", "shards/nih", "shards/other"):
        (home / folder).mkdir()
        (home / folder / "manifest.json").touch()
    return home


def check_options(group: click.Group, words: list[str]) -> None:
    """Raise UsageError for a command, an option or a value that there is not; whether a path exists does not matter."""
    context = click.Context(group, info_name=group.name, **group.context_settings)
    if words[0].startswith("-"):
        words = words if words[0] == "--help" else ["train", *words]
    if words[0] == "--help":
        return
    command = group.commands[words[0]]
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
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    set_here = {"TYPED": str(typed), "PATH": f"{recorder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", "-ec", block.commands],
        cwd=recorder,
        env=kept | set_here,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    calls = [line.split("\037")[:-1] for line in typed.read_text().splitlines()]
    assert calls
    for program, *words in calls:
        if program == "pipeline":
            check_options(pipeline, words)
        elif "train.py" in words:
            check_options(train, words[words.index("train.py") + 1 :])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=name)
def test_python_that_does_not_run_here_compiles(block: Block) -> None:
    compile(block.code, name(block), "exec")
