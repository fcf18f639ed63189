import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.manifest import Manifest
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
RELIABILITY = REPOSITORY / "docs" / "reliability.md"


def test_its_python_runs(
    shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(shards[0].parent)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert "\n0 (8, 1, 224, 224) (8, 14) 0." in capsys.readouterr().out


def test_its_commands_for_ones_own_chexpert_run(chexpert: Path, tmp_path: Path) -> None:
    """As they stand there, with the home folder and the settings of a small run in the environment."""
    (block,) = re.findall(r"```\n(make shards DATA=~.*?)```", README.read_text(), re.DOTALL)
    shutil.copytree(chexpert / "valid", tmp_path / "films")
    settings = {"OUT": tmp_path / "out", "RUN": tmp_path / "run", "SIZE": 32, "ARCH": "rescnn"}
    settings |= {"EPOCHS": 1, "BATCH": 8, "DEV": 0.3, "HOME": tmp_path, "LR": "", "WD": ""}
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")
    }
    environment |= {name: str(value) for name, value in settings.items() if value != ""}
    ran = subprocess.run(
        ["bash", "-ec", block], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert f"{tmp_path / 'out'}: all is well" in ran.stdout
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "predictions.csv").read_text().count("\n") == 13  # 12 films


def test_no_block_leaves_settings_behind_for_the_next() -> None:
    pages = (README, REPOSITORY / "docs" / "results.md")
    blocks = [
        block for page in pages for block in page.read_text().split("```")[1::2] if "\nexport " in block
    ]
    assert len(blocks) == 2
    for block in blocks:
        ran = subprocess.run(
            ["bash", "-c", f'make() {{ :; }}\n{re.sub(r".venv/bin/.*", ":", block)}\necho "[$OUT]"'],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"]},
        )
        assert ran.stdout == "[]\n"


def test_every_test_that_reliability_names_exists() -> None:
    named = re.findall(r"(tests/[\w/]*test_\w+\.py)(?:::(\w+))?", RELIABILITY.read_text())
    assert len(named) > 150
    for file, test in named:
        assert not test or f"\ndef {test}(" in (REPOSITORY / file).read_text(), (file, test)


def test_every_name_that_contributing_points_to_exists() -> None:
    """A row of the table names one module, and what to change in it."""
    rows = [line.split(" | ") for line in CONTRIBUTING.read_text().splitlines() if re.match(r"\| an? ", line)]
    assert len(rows) == 5
    for _, module, change, _ in rows:
        source = (REPOSITORY / module.strip("`")).read_text()
        for name in set(re.findall(r"`([A-Za-z_][\w.]*)`", change)):
            assert re.search(rf"^ *(def |class |){name.split('.')[-1]}\b", source, re.MULTILINE), name


def test_every_target_that_the_documents_name_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    documents = [README, RELIABILITY, *(REPOSITORY / "benchmarks").glob("*.md")]
    for document in documents:
        named = set(re.findall(r"(?:`|^|\n)make ([a-z][a-z0-9-]*)", document.read_text()))
        assert named <= targets, document
