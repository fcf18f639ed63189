"""BRAX, the example of a set to add, examples/sets/brax.py: registered and run on a small folder."""

import runpy
from pathlib import Path

import pytest

from pipeline.manifest import read_manifest
from pipeline.sources import sets
from tests.conftest import REPOSITORY, run_pipeline
from tests.layouts import copy_tables, draw, list_rows, read_rows
from tests.pipeline.etl.test_model import shard_here


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder of BRAX, whose module has been registered."""
    brax = runpy.run_path(str(REPOSITORY / "examples" / "sets" / "brax.py"))["SET"]
    for known in (sets.SETS, sets.KNOWN):
        monkeypatch.setitem(known, "brax", brax)
    # Processes of their own would not know the set: what they do is done in this one.
    shard_here(monkeypatch)
    home = tmp_path / "brax"
    copy_tables("brax", home)
    for number, row in enumerate(read_rows("brax/master_spreadsheet_update.csv")):
        draw(home / row["PngPath"], number)
    return home


def test_the_example_makes_shards(folder: Path) -> None:
    out = folder.parent / "out"
    run_pipeline("shards", folder, out, "--size", 32, "--views", "all", "--dev", 0, "--workers", 1)
    assert read_manifest(out).dataset["title"] == "BRAX"
    assert [line.partition(" ")[2].partition(" ")[2] for line in list_rows(folder)] == [
        "p1 1 frontal Male 85 PA .....+........",
        "p1 1 lateral Male 85 None .....+........",
        "p1 2 other Male 85 None .....?........",
        "p2 1 frontal Female 40 AP +.............",
        "p3 1 frontal Other None AP .....-........",
    ]
    run_pipeline("verify", out, "--deep")


def test_a_path_that_leads_out_is_named(folder: Path) -> None:
    table = folder / "master_spreadsheet_update.csv"
    table.write_text(table.read_text().replace("Anonymized_PNGs/p2", "Anonymized_PNGs/../p2"))
    failed = run_pipeline("shards", folder, folder.parent / "out", code=1)
    where = f"{table}, line 5, column PngPath: 'Anonymized_PNGs/../p2/3.png'"
    assert failed.stderr.splitlines()[-1] == f"Error: {where} is not a path below SOURCE to a PNG"
