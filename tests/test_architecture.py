"""The rules of docs/architecture.md, read from the imports: arrows go down, and never round."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Shards, start

FILES = sorted([*REPOSITORY.glob("pipeline/**/*.py"), *REPOSITORY.glob("model/**/*.py"), REPOSITORY / "train.py"])

GROUND = {f"pipeline.{name}" for name in ("base", "identity", "labels", "images", "manifest")}
READING = {*GROUND, "pipeline.policies", "pipeline.measure"}
# The parts, and what each may import besides itself. A module belongs to the part with the longest name that fits.
ALLOWED = {
    "pipeline": {"pipeline.base", "pipeline.judging", "pipeline.stream"},
    "pipeline.__main__": {"pipeline.cli"},
    "pipeline.base": set(),
    "pipeline.identity": {"pipeline.base"},
    "pipeline.labels": {"pipeline.base"},
    "pipeline.containers": set(),
    "pipeline.dicom": {"pipeline.base", "pipeline.containers"},
    "pipeline.images": {"pipeline.containers", "pipeline.dicom"},
    "pipeline.manifest": {"pipeline.base", "pipeline.labels"},
    "pipeline.policies": {"pipeline.base", "pipeline.labels"},
    "pipeline.measure": {f"pipeline.{name}" for name in ("base", "identity", "labels", "manifest", "policies")},
    "pipeline.sources": READING,
    "pipeline.synthetic": {"pipeline.base", "pipeline.labels"},
    "pipeline.etl": {*READING, "pipeline.sources"},
    "pipeline.stream": READING,
    "pipeline.look": {*READING, "pipeline.stream"},
    "pipeline.judging": {*READING, "pipeline.sources", "pipeline.stream", "pipeline.look"},
    "pipeline.console": {"pipeline.base"},
    "pipeline.cli": {
        *READING,
        *(f"pipeline.{name}" for name in ("console", "sources", "synthetic", "etl", "stream", "look", "judging")),
    },
    "model": {"pipeline.base", "pipeline.labels"},
    "model.runs": {*READING, *(f"pipeline.{name}" for name in ("console", "stream", "look")), "model"},
    "train": {*READING, "pipeline.console", "pipeline.stream", "pipeline.look", "model", "model.runs"},
}
# Heavy packages, and the modules that may import them: all else starts fast, and works without them.
IMPORTERS = {
    "torch": ("model", "train", "pipeline.stream.loader"),
    "click": ("pipeline.cli", "pipeline.console", "model.runs.commands", "model.runs.score_commands"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


@cache
def parse(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text())


@cache
def imported(name: str) -> frozenset[str]:
    """The modules that a module imports, at its top or in a function; those of ours by their full names."""
    names: set[str] = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys() or {str(node.module)}
    return frozenset(names)


def part_of(name: str) -> str:
    return max((part for part in ALLOWED if f"{name}.".startswith(f"{part}.")), key=len)


@pytest.mark.parametrize("name", MODULES)
def test_arrows_go_down(name: str) -> None:
    part = part_of(name)
    parts = {part_of(other) for other in imported(name) & MODULES.keys()}
    assert parts - {part} - ALLOWED[part] == set()


def test_arrows_never_go_round() -> None:
    arrows = {name: imported(name) & MODULES.keys() for name in MODULES}
    while free := [name for name, others in arrows.items() if not others]:
        arrows = {name: others - set(free) for name, others in arrows.items() if name not in free}
    assert arrows == {}


@pytest.mark.parametrize("package", IMPORTERS)
def test_heavy_packages_stay_where_they_are_needed(package: str) -> None:
    importers = {name for name in MODULES if any(f"{other}.".startswith(f"{package}.") for other in imported(name))}
    allowed = tuple(f"{name}." for name in IMPORTERS[package])
    assert {name for name in importers if not f"{name}.".startswith(allowed)} == set()


def assert_light(absent: tuple[str, ...], lines: dict[str, int]) -> None:
    """Each line, in a process that cannot import those packages, ends with its code."""
    program = f"""
import os, runpy, signal, sys
sys.modules |= dict.fromkeys({absent!r})  # an import of them fails
codes = {{}}
for line in {list(lines)!r}:
    sys.argv = line.split()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    try:
        run = runpy.run_path if line.startswith("train.py") else runpy.run_module
        run(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        codes[line] = ended.code or 0
assert codes == {lines!r}, codes
assert "train.py" in sys.argv[0] or "pandas" not in sys.modules  # which pyarrow imports unless it is kept from it
"""
    ran = start(sys.executable, "-c", program)
    assert ran.returncode == 0, ran.stderr


def test_a_command_line_that_trains_nothing_does_not_wait_for_torch() -> None:
    lines = {"--help": 0, "train --help": 0, "--lrr 1": 2, "evaluate --rnu r": 2}
    lines |= dict.fromkeys(
        ("--shards no --run r", "evaluate --shards no --run r", "export --run r --out model.onnx"), 1
    )
    lines |= {"predict --run r --out scores.csv tests": 1, "localize --shards no --run r --boxes README.md": 1}
    lines |= {"embed rescnn --pretrained --shards no --out train.parquet": 1}
    absent = ("torch", "scipy.special", "scipy.optimize", "scipy.stats", "pandas", "matplotlib", "jinja2")
    assert_light(absent, {f"train.py {line}": code for line, code in lines.items()})


def test_a_command_that_draws_and_fits_nothing_does_not_wait_for_what_would(shards: Shards) -> None:
    assert_light(("numpy", "pyarrow", "cv2", "PIL", "rich"), {"pipeline --help": 0, "pipeline lookup": 2})
    lines = {f"stats {shards[0]}": 0, f"verify {shards[0]}": 0, "audit no": 2}
    absent = ("torch", "scipy.special", "scipy.optimize", "scipy.stats", "sklearn", "matplotlib", "jinja2")
    assert_light(absent, {f"pipeline {line}": code for line, code in lines.items()})


def test_no_module_or_class_shares_its_name_with_another() -> None:
    names: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            names.setdefault(name.rpartition(".")[2], []).append(name)
        for node in parse(name).body:
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, []).append(name)
    assert {name: places for name, places in names.items() if len(places) > 1} == {}
