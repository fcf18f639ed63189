"""Exit codes and messages of the `pipeline` command."""

import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from pipeline.cli import COMMANDS
from tests.conftest import PIPELINE, Shards, start
from tests.conftest import run_pipeline as run


def test_sample_shards_and_stats_work_together(tmp_path: Path) -> None:
    run("sample", tmp_path, "--images", 40)
    made = run("shards", tmp_path, tmp_path / "out", "--size", 64, "--views", "all", "--workers", 2)
    assert made.stdout.splitlines()[-1].startswith(f"{tmp_path / 'out'}: written in ")
    assert "Sharding: 40 of 40 images" in made.stderr
    assert run("stats", tmp_path / "out").stdout.startswith("40 images, ")
    again = run("shards", tmp_path, tmp_path / "out", "--size", 64, "--views", "all")
    assert again.stdout.splitlines()[-1] == f"{tmp_path / 'out'}: complete already, nothing to do"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"Example: pipeline {command} " in run(command, "--help").stdout


def test_strict_exits_with_3_where_an_image_was_rejected(chexpert: Path, tmp_path: Path) -> None:
    (chexpert / "train/patient00002/study1/view1_frontal.jpg").unlink()
    command = ("shards", chexpert, tmp_path / "out", "--max-bad", 0.5, "--workers", 2)
    run(*command)
    again = run(*command, "--strict", code=3)
    assert f"rejected images: 1, see {tmp_path / 'out' / 'rejects.csv'}" in again.stdout.splitlines()


def test_labels_with_one_class_are_warned_about_and_refused_where_strict(chexpert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["shards", chexpert, out, *["--blank", "ignore", "--dev", "0", "--uncertain", "ignore,Edema=selftrained"]]
    rows = pd.read_csv(chexpert / "train.csv")
    rows = rows[rows["Frontal/Lateral"] == "Frontal"]
    edema = rows["Edema"].replace(1, 0)
    (chexpert / "train.csv").write_text(rows.assign(Edema=edema).to_csv(index=False))
    text = f"label Edema has 0 positives and {(edema == 0).sum()} negatives in train"
    refused = run(*command, "--strict", code=1)
    assert refused.stderr.splitlines()[-1] == f"Error: --strict: {text}; choose other policies"
    assert not (out / "manifest.json").exists()
    warned = run(*command)
    assert f"{text} by these policies: it cannot be learned" in warned.stderr.splitlines()
    again = run(*command)  # the shards are there, and so is what is wrong with them
    assert "complete already" in again.stdout
    assert f"{text} by these policies: it cannot be learned" in again.stderr.splitlines()
    refused = run(*command, "--strict", code=1)
    assert refused.stderr == f"Error: --strict: {text}; choose other policies\n"


def test_original_size_and_own_csvs_reach_the_library(chexpert: Path, tmp_path: Path) -> None:
    own = chexpert / "train.csv"
    options = ("--size", "original", "--split", f"mine={own}", "--root", chexpert, "--limit", 12)
    made = run("shards", chexpert, tmp_path / "out", *options)
    assert made.stdout.startswith("mine         12 images")
    with tarfile.open(tmp_path / "out" / "mine-000000.tar") as tar:
        image = Image.open(BytesIO(tar.extractfile(tar.next()).read()))  # type: ignore[arg-type, union-attr]
    assert image.size == (80, 64)


def test_a_locale_without_the_letters_of_a_name_is_named(chexpert: Path, tmp_path: Path) -> None:
    chexpert.rename(folder := tmp_path / "Röntgen")
    failed = start(PIPELINE, "shards", folder, tmp_path / "out", LC_ALL="C", PYTHONUTF8="0")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"Error: {tmp_path}/R\\udcc3\\udcb6ntgen/train/patient")
    assert failed.stderr.endswith(".jpg: not ascii, which the locale asks for; set LC_ALL=C.UTF-8\n")


def test_a_folder_whose_name_is_not_utf_8_is_named(chexpert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "films\udcff"
    chexpert.rename(folder)
    failed = run("shards", folder, tmp_path / "out", "--size", 64, code=1)
    shown = f"{tmp_path}/films\\udcff"
    assert failed.stderr.splitlines()[-1].startswith(f"Error: {shown}/train/patient")
    assert failed.stderr.endswith(".jpg: not UTF-8; rename that file or folder\n")
    assert "Traceback" not in failed.stderr
    failed = run("verify", folder, code=1)
    assert failed.stderr == (
        f"Error: {shown}: not a folder of shards (no manifest.json); write one with `pipeline shards`\n"
    )
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


def test_rejects_are_part_of_finished_shards(chexpert: Path, tmp_path: Path) -> None:
    image = chexpert / "valid/patient00019/study2/view1_frontal.jpg"
    content = image.read_bytes()
    image.unlink()
    command = ("shards", chexpert, tmp_path / "out", "--size", 48, "--max-bad", 0.5)
    run(*command)
    assert run(*command).stdout.splitlines()[-1] == f"{tmp_path / 'out'}: complete already, nothing to do"
    image.write_bytes(content)
    again = run(*command)
    assert "to try rejected images again, write to a new folder" in again.stdout.splitlines()


def test_a_dry_run_exits_as_the_run_would(chexpert: Path, tmp_path: Path) -> None:
    (chexpert / "train/patient00003/study2/view1_frontal.jpg").unlink()
    command = ("shards", chexpert, tmp_path / "out", "--dry-run")
    refused = run(*command, code=1)
    assert refused.stderr.splitlines()[-1] == ("Error: 1 of 40 images are missing, more than --max-bad 0.10%")
    run(*command, "--max-bad", 0.5)
    run(*command, "--max-bad", 0.5, "--strict", code=3)


def test_the_same_command_restores_what_verify_finds(chexpert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("shards", chexpert, out, "--size", 48)
    run(*command)
    (out / "dev-000000.tar").write_bytes(b"")
    assert "; to restore them, run the command that wrote them again\n" in run("verify", out, code=1).stderr
    assert run(*command).stdout.splitlines()[-1] == f"{out}: restored: dev-000000.tar"
    run("verify", out)


def test_each_command_ends_with_the_next_one(
    chexpert: Path, tmp_path: Path, shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = shards
    monkeypatch.delenv("MAKELEVEL", raising=False)  # of `make test`
    drawn, out = tmp_path / "drawn", tmp_path / "out"
    verify = f"pipeline verify {out} --deep"
    write = ("shards", chexpert, out, "--size", 48, "--dev", 0.3)
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
