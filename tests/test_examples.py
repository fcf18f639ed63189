"""The examples: one that stops and resumes has the losses of one that never stopped, in every framework the same."""

import ast
import re
import sys
from pathlib import Path

import pytest

from pipeline.manifest import read_table
from tests.conftest import REPOSITORY, Shards, start

EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
SAVED = {"plain": 10, "with_accelerate": 10, "with_lightning": 10, "with_monai": 12}  # of 12 steps


def train(name: str, shards: Path, folder: Path, steps: int) -> list[str]:
    """The lines of the steps that the example trains for; on the CPU, where they are the same on every machine."""
    example = REPOSITORY / "examples" / f"{name}.py"
    ran = start(sys.executable, example, shards, folder, steps, cwd=shards.parent, CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 0, ran.stderr
    return re.findall(r"^step \d+: loss \d\.\d+$", ran.stdout, re.MULTILINE)


@pytest.fixture(scope="module")
def losses(sample_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What plain PyTorch has in 20 steps."""
    return train("plain", sample_shards[0], tmp_path_factory.mktemp("plain") / "new" / "state", 20)


@pytest.mark.examples
@pytest.mark.parametrize("name", SAVED)
def test_an_example_resumes_with_the_same_losses(
    name: str, sample_shards: Shards, losses: list[str], tmp_path: Path
) -> None:
    assert [line.split(":")[0] for line in losses] == [f"step {step}" for step in range(20)]
    assert len({line.split(": ")[1] for line in losses}) == 20
    assert train(name, sample_shards[0], tmp_path / "whole", 20) == losses
    assert train(name, sample_shards[0], tmp_path / "stopped", 12) == losses[:12]
    assert train(name, sample_shards[0], tmp_path / "stopped", 20) == losses[SAVED[name] :]


READ = """
import json, sys
import mlcroissant
described = mlcroissant.Dataset(jsonld=sys.argv[1])
assert not described.metadata.ctx.issues.errors
for sample in described.records("train-images"):
    print(sample["train-images/key"].decode(), min(sample["train-images/images"].size))
for sample in described.records("train-labels"):
    print(json.loads(sample["train-labels/labels"])["labels"]["Edema"])
"""


@pytest.mark.examples
def test_mlcroissant_reads_the_shards(sample_shards: Shards, tmp_path: Path) -> None:
    folder, manifest = sample_shards
    ran = start(sys.executable, "-c", READ, folder / "croissant.json", CROISSANT_CACHE=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    rows = read_table(folder, manifest.split("train")).to_pandas()
    expected = [*(rows["key"] + " 64"), *rows["Edema"].map({1: "1", 0: "0", -1: "-1"}).fillna("None")]
    assert sorted(ran.stdout.split("\n")[:-1]) == sorted(expected)


def test_every_example_is_short_tested_and_in_the_documentation() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(SAVED)
    for path in EXAMPLES:
        text = path.read_text()
        docstring = ast.parse(text).body[0]
        code = text.splitlines()[docstring.end_lineno :]
        assert len([line for line in code if line.strip()]) <= 25, path.name
        assert f"examples/{path.name}" in (REPOSITORY / "docs" / "library.md").read_text()
