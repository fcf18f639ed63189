"""Exit codes and messages of the `pipeline` command."""

import shutil
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from pipeline.cli import COMMANDS
from tests.conftest import PIPELINE, Shards, refusal, start
from tests.conftest import run_pipeline as run


def test_sample_shards_and_stats_work_together(tmp_path: Path) -> None:
    run("sample", tmp_path, "--images", 40)
    written = run("shards", tmp_path, tmp_path / "out", "--size", 64, "--views", "all", "--workers", 2)
    assert written.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: written in ")
    assert "Sharding: 40 of 40 images" in written.stderr
    assert run("stats", tmp_path / "out").stdout.startswith("40 images, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"Example: pipeline {command} " in run(command, "--help").stdout


def test_a_missing_image_is_a_reject_of_finished_shards(chexpert: Path, tmp_path: Path) -> None:
    image, out = chexpert / "train/patient00003/study2/view1_frontal.jpg", tmp_path / "out"
    content = image.read_bytes()
    image.unlink()
    command = ("shards", chexpert, out, "--size", 48)
    refused = run(*command, "--dry-run", code=1)
    assert refused.stderr.splitlines()[-1] == "Error: 1 of 40 images are missing, more than --max-bad 0.10%"
    run(*command, "--max-bad", 0.5, "--dry-run", "--strict", code=3)
    run(*command, "--max-bad", 0.5)
    image.write_bytes(content)
    again = run(*command, "--max-bad", 0.5, "--strict", code=3).stdout.splitlines()
    rejects = f"rejected images: 1, see {out / 'rejects.csv'}"
    hint = "to try rejected images again, write to a new folder"
    assert again[-3:] == [rejects, hint, f"{out}: complete already, nothing to do"]
    (out / "dev-000000.tar").write_bytes(b"")
    assert "; to restore them, run the command that wrote them again\n" in run("verify", out, code=1).stderr
    assert run(*command, "--max-bad", 0.5).stdout.splitlines()[-1] == f"{out}: restored: dev-000000.tar"


def test_labels_with_one_class_are_warned_about_and_refused_if_strict(chexpert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["shards", chexpert, out, *"--blank ignore --dev 0 --uncertain ignore,Edema=selftrained".split()]
    rows = pd.read_csv(chexpert / "train.csv")
    rows = rows[rows["Frontal/Lateral"] == "Frontal"]
    edema = rows["Edema"].replace(1, 0)
    (chexpert / "train.csv").write_text(rows.assign(Edema=edema).to_csv(index=False))
    text = f"label Edema has 0 positives and {(edema == 0).sum()} negatives in train"
    for before, after in ((False, False), (True, True)):  # also if the shards exist
        assert (out / "manifest.json").exists() == before
        refused = run(*command, "--strict", code=1)
        assert refused.stderr.splitlines()[-1] == f"Error: --strict: {text}; choose other policies"
        assert (out / "manifest.json").exists() == after
        warned = run(*command)
        assert ("complete already" in warned.stdout) == before
        assert f"{text} by these policies: it cannot be learned" in warned.stderr.splitlines()


def test_original_size_and_own_csvs_reach_the_library(chexpert: Path, tmp_path: Path) -> None:
    own = chexpert / "train.csv"
    options = ("--size", "original", "--split", f"mine={own}", "--root", chexpert, "--limit", 12)
    made = run("shards", chexpert, tmp_path / "out", *options)
    assert made.stdout.startswith("mine         12 images")
    with tarfile.open(tmp_path / "out" / "mine-000000.tar") as tar:
        image = Image.open(BytesIO(tar.extractfile(tar.next()).read()))  # type: ignore[arg-type, union-attr]
    assert image.size == (80, 64)


def test_a_name_that_is_not_of_the_locale_or_not_utf_8_is_named(chexpert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chexpert, tmp_path / "Röntgen"))
    failed = start(PIPELINE, "shards", folder, tmp_path / "out", LC_ALL="C", PYTHONUTF8="0")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/R\\udcc3\\udcb6ntgen/train/patient")
    assert failed.stderr.endswith(".jpg: not ascii, which the locale asks for; set LC_ALL=C.UTF-8\n")
    folder, shown = chexpert.rename(tmp_path / "films\udcff"), f"{tmp_path}/films\\udcff"
    code, line = refusal("shards", folder, tmp_path / "out", "--size", 64)
    assert line.startswith(f"Error: {shown}/train/patient")
    assert (code, line.partition(".jpg: ")[2]) == (1, "not UTF-8; rename that file or folder")
    unknown = f"Error: {shown}: not a folder of shards (no manifest.json); write one with `pipeline shards`"
    assert refusal("verify", folder) == (1, unknown)
    drawn = run("sample", tmp_path / "new\udcff", "--images", 20)
    assert drawn.stdout == f"{tmp_path}/new\\udcff/CheXpert-v1.0-small: 20 synthetic images\n"


@pytest.mark.parametrize(
    ("program", "module", "errors"),
    [
        ("pipeline/__main__.py", "click", "Interrupted.\n"),
        ("pipeline/__main__.py", "pipeline.console", "Interrupted.\n"),
        ("train.py", "numpy", ""),
    ],
)
def test_ctrl_c_during_the_imports_is_no_traceback(program: str, module: str, errors: str) -> None:
    code = f"""
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
sys.argv = [{program!r}, "--help"]
runpy.run_path({program!r}, run_name="__main__")
"""
    ran = start(sys.executable, "-c", code)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", errors)


def test_each_command_ends_with_the_next_one(
    chexpert: Path, tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, drawn, out = shards[0], tmp_path / "drawn", tmp_path / "out"
    monkeypatch.delenv("MAKELEVEL", raising=False)  # of `make test`
    verify, write = f"pipeline verify {out} --deep", ("shards", chexpert, out, "--size", 48, "--dev", 0.3)
    for words, then in (
        (("sample", drawn, "--images", 20), f"pipeline shards {drawn} shards/drawn"),
        ((*write, "--dry-run"), f"pipeline shards {chexpert} {out} --size 48 --dev 0.3"),
        (write, verify),
        (write, verify),  # complete already
        (("verify", folder), f"pipeline audit {folder}"),
        (("stats", folder), f"pipeline audit {folder}"),
        (("audit", folder, "--no-images"), f"python -m train --shards {folder} --run RUN"),
        (("audit", chexpert), f"pipeline shards {chexpert} shards"),
    ):
        assert run(*words).stderr.splitlines()[-1] == f"next: {then}"
    for data in (("stats", folder, "--format", "json"), ("audit", folder, "--no-images", "--format", "json")):
        assert "next: " not in run(*data).stderr
    monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("MAKEFLAGS", f" -- OUT={folder} ARGS=--no-images")
    assert run("audit", folder, "--no-images").stderr.splitlines()[-1] == f"next: make train OUT={folder}"
