"""The disk fails at any call, once or for ever, or loses power: nothing half is believed, and the next try works."""

import errno
import hashlib
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pytest
import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from model.runs.sweep import Figures, Point, Sweep, list_trials, open_sweep, run_sweep
from pipeline import DataError
from pipeline.base.files import write_table
from pipeline.etl.shards import Execution, write_shards
from pipeline.etl.verify import verify_shards
from pipeline.measure.scores import open_scores
from pipeline.sources.sets import find_source
from tests.conftest import POLICIES, SEED, Shards, default_options, hashes, make_shards, write_chexpert
from tests.dicoms import make_dicom
from tests.pipeline.etl.test_model import read_train, shard_here
from tests.training import WORDS, assert_same_run, call_train, narrow_networks

# What the message says of each.
ERRORS = {errno.ENOSPC: "No space left on device; make room, and run it again", errno.EIO: "Input/output error"}
READS = ("open", "read", "stat", "scandir", "listdir")
WRITES = ("create", "write", "fsync", "replace")
OPTIONS = default_options(samples_per_shard=5)
STATE = {"step": 2, "weights": torch.zeros(100_000)}


Survived = Callable[[str], None]  # reports a fault that was survived

failed: list[Path] = []  # the files of the calls that failed


def watch(patch: pytest.MonkeyPatch, folder: Path, see: Callable[[str, str], int | None]) -> None:
    """Before each call on a file below the folder, `see` gets what is asked for, and the path.

    It may raise, or return the most bytes that are read or written.
    """

    def look(kind: str, place: Any) -> int | None:
        name = str(Path(f"/proc/self/fd/{place}").readlink()) if isinstance(place, int) else os.fsdecode(place)
        return see(kind, name) if name.startswith(f"{folder}/") else None

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[: look("write", self.name)])

        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[: look("read", self.name)]) or 0

        def readall(self) -> bytes:
            look("read", self.name)
            return super().readall()

    def open_file(place: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(place, int) or mode not in ("r", "rb", "wb") or not os.fsdecode(place).startswith(f"{folder}/"):
            return opened(place, mode, *arguments, **options)
        look("create" if mode == "wb" else "open", place)
        file = File(os.fsdecode(place), mode[0])
        if options.get("buffering") == 0:
            return file
        buffered = io.BufferedWriter(file) if mode == "wb" else io.BufferedReader(file)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def watched(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(place: Any = ".", *arguments: Any, **options: Any) -> Any:
            most = look(kind, place)
            if kind == "read" and most is not None:
                arguments = (min(most, arguments[0]), *arguments[1:])
            return function(place, *arguments, **options)

        return call

    opened = open
    for module in ("io", "builtins"):
        patch.setattr(f"{module}.open", open_file)
    for name in ("stat", "scandir", "listdir", "open", "read", "pread", "fsync", "replace", "unlink", "mkdir"):
        patch.setattr(os, name, watched(name.removeprefix("p"), getattr(os, name)))
    patch.setattr(pa, "memory_map", watched("open", pa.memory_map))


def fail(
    folder: Path, kinds: Sequence[str], number: int, work: Callable[[], Any], error: int = 0, times: int = 1
) -> int:
    """Do the work; its calls of these kinds from that number on fail so many times. Returns how many it made.

    If they fail more than once, no file can be removed after the first.
    """
    calls, begun = count(), False
    failed.clear()

    def see(kind: str, name: str) -> None:
        nonlocal begun
        now = kind in kinds and number <= next(calls) < number + times
        begun |= now
        if now or (begun and times > 1 and kind == "unlink"):
            failed.append(Path(name))
            # As Python does: only a call that gets a name has it in its error.
            raise OSError(error, os.strerror(error), *([] if kind in ("read", "write", "fsync") else [name]))

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder, see)
        work()
    return next(calls)


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Survived:
    return partial(record_property, "survived")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CheXpert, whose tasks run in this process, one after the other, where the disk is watched."""
    shard_here(monkeypatch)
    write_chexpert(tmp_path / "CheXpert-v1.0-small", "train", range(1, 6))
    return tmp_path / "CheXpert-v1.0-small"


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_sharding_survives_each_failed_write(source: Path, tmp_path: Path, every: int, survived: Survived) -> None:
    make_shards(source, tmp_path / "whole", OPTIONS)
    expected = hashes(tmp_path / "whole")
    calls = fail(tmp_path, WRITES, 10**9, lambda: make_shards(source, tmp_path / "counted", OPTIONS))
    assert calls > 50
    for number in range(0, calls, every):
        for error, reason in ERRORS.items():
            out = tmp_path / f"{number}-{error}"
            times = 10**9 if error == errno.EIO else 1  # room may be made, a broken disk stays so
            with pytest.raises(DataError, match=rf"^{out}(/.*)?: cannot be written: {reason}$"):
                fail(tmp_path, WRITES, number, lambda out=out: make_shards(source, out, OPTIONS), error, times)  # type: ignore[misc]
            # If the manifest is in place, the failed call syncs or tidies after it.
            assert not (out / "manifest.json").exists() or hashes(out).items() >= expected.items()
            assert times > 1 or not list(out.rglob("*.tmp"))
            make_shards(source, out, OPTIONS)
            # A disk that broke after the manifest keeps the lock's file: the folder is complete, and nothing claims it.
            assert hashes(out).items() - {(".lock", hashlib.sha256().hexdigest())} == expected.items()
            survived(f"{errno.errorcode[error]} of pipeline shards")


def test_a_checkpoint_survives_each_failed_write(tmp_path: Path, survived: Survived) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    calls = fail(tmp_path, WRITES, 10**9, lambda: save_checkpoint(tmp_path / "counted.pt", STATE))
    assert calls > 5
    for number in range(calls):
        for error, reason in ERRORS.items():
            with pytest.raises(DataError, match=rf"^{path}: cannot be written: {reason}$"):
                fail(tmp_path, WRITES, number, lambda: save_checkpoint(path, STATE), error, 10**9)
            assert load_checkpoint(path) == {"step": 1}
            survived(f"{errno.errorcode[error]} of a checkpoint")


FAILED_READS = [
    *product(["shards", "again", "foreign", "verify", "stream", "checkpoint", "scores"], [errno.EIO, errno.ENOENT]),
    *product(["predict", "finished"], [errno.EIO]),  # what is not there is not scored, or made anew
]


@pytest.mark.soak
@pytest.mark.parametrize("times", [1, 10**9])
@pytest.mark.parametrize(("command", "error"), FAILED_READS)
def test_each_failed_read_is_named_and_writes_nothing_wrong(
    source: Path, sample_shards: Shards, tmp_path: Path, command: str, error: int, times: int, survived: Survived
) -> None:
    out, path, run, tars = (tmp_path / name for name in ("out", "last.pt", "run", "tars"))
    scores = tmp_path.with_suffix(".csv")  # not watched
    make_shards(source, out, OPTIONS)
    expected = hashes(out)
    save_checkpoint(path, {"step": 1})
    tars.mkdir()
    shutil.copy(out / "train-000000.tar", tars)
    foreign = find_source(tars, {}, [], "webdataset", (("patient", "patient"), ("Edema", "labels.Edema")))
    training = ("train", "--shards", sample_shards[0], "--run", run, *WORDS)
    if command in ("predict", "finished"):
        call_train(*training)
        (source / "scan").write_bytes(make_dicom(np.zeros((64, 64), np.uint16)))

    def call(*words: object) -> list[str]:
        with redirect_stderr(io.StringIO()) as output, redirect_stdout(output):
            try:
                call_train(*words)
            except (DataError, OSError, click.ClickException) as failure:  # before it, lines name the files
                print(failure)
        return [output.getvalue(), *(file.read_text() for file in [scores] if file.exists())]

    tables = tmp_path / "a.csv", tmp_path / "a.arrow"
    tables[0].write_text("key,Edema\na,0.5\nb,0.25\n")
    write_table(tables[1], pa.table({"key": ["a", "b"], "Edema": [0.5, 0.25]}))
    works: dict[str, Callable[[], Any]] = {
        "shards": lambda: make_shards(source, tmp_path / "new", OPTIONS) and None,
        "again": lambda: make_shards(source, out, OPTIONS) and None,
        "verify": lambda: dict(verify_shards(out, deep=True, workers=1).problems),
        "stream": lambda: [array.tobytes() for array in read_train(out, 0)],
        "checkpoint": lambda: load_checkpoint(path),
        "foreign": lambda: write_shards(foreign, tmp_path / "new", OPTIONS, POLICIES, Execution(1, 0.0)) and None,
        "scores": lambda: [open_scores(file).values.tolist() for file in tables],
        "predict": lambda: call("predict", "--run", run, "--out", scores, source, "--workers", 1),
        "finished": lambda: call(*training),
    }
    work, results = works[command], list[Any]()
    result = work()
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, tmp_path, lambda *_: 100)
        assert work() == result  # short reads and writes change nothing
    for number in range(fail(tmp_path, READS, 10**9, work)):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        results.clear()
        try:
            fail(tmp_path, READS, number, lambda: results.append(work()), error, times)
        except (DataError, OSError, click.ClickException) as failure:  # commands print the file and reason of both
            results.append(str(failure))
        named = any(path.name in str(results[0]) or f"{path.parent}:" in str(results[0]) for path in failed)
        assert named or results[0] == result, (failed, results[0])
        assert {name: digest for name, digest in hashes(out).items() if name in expected} == expected
        assert work() == result
        survived(f"{errno.errorcode[error]} of reading ({command})")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lose_power(folder: Path, work: Callable[[], Any], most: int = 10**9) -> Iterator[int]:
    """Do the work; then, again and again, make of the folder what it may hold if the power fails meanwhile.

    That is what it held before one of the calls on it, where a file that was not synced is whole, empty or cut, and
    each name that was given or taken since its folder was synced may be as it was then; `most` of these at random.
    """
    firm, synced = read_files(folder), set[bytes]()
    states: dict[tuple[tuple[str, bytes], ...], None] = {}

    def keep(state: dict[str, bytes]) -> None:
        states[tuple(sorted(state.items()))] = None

    def see(kind: str, name: str) -> None:
        if kind not in ("write", "fsync", "replace", "unlink"):
            return
        files = read_files(folder)
        if kind == "fsync" and Path(name).is_dir():
            inside = {n for n in files.keys() | firm.keys() if folder / n == Path(name) / Path(n).name}
            firm.update({n: files[n] for n in inside & files.keys()})
            for n in inside - files.keys():
                del firm[n]
        elif kind == "fsync":
            synced.add(Path(name).read_bytes())
        known = synced | {*firm.values()}
        for share in (1, 0.5, 0):
            keep({n: data if data in known else data[: int(share * len(data))] for n, data in files.items()})
        for n in files.keys() | firm.keys():
            if files.get(n) != firm.get(n):
                keep({m: data for m, data in files.items() if m != n} | ({n: firm[n]} if n in firm else {}))

    with pytest.MonkeyPatch.context() as patch:
        watch(patch, folder.parent, lambda kind, name: see(kind, name) if name.startswith(str(folder)) else None)
        work()
        see("unlink", "")
    for number, state in enumerate(random.Random(SEED).sample([*states], min(most, len(states)))):
        shutil.rmtree(folder)
        for name, data in state:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        yield number


@pytest.mark.soak
@pytest.mark.parametrize("begun", [False, True])
def test_shards_survive_a_loss_of_power(source: Path, tmp_path: Path, begun: bool, survived: Survived) -> None:
    """While they are written, and while some are restored."""
    undisturbed, out = tmp_path / "whole", tmp_path / "out" / "shards"
    make_shards(source, undisturbed, OPTIONS)
    expected, arrays = hashes(undisturbed), [array.tobytes() for array in read_train(undisturbed, 0)]
    out.mkdir(parents=True)
    if begun:
        shutil.copytree(undisturbed, out, dirs_exist_ok=True)
        (out / "train-000000.tar").unlink()
        (out / "train.arrow").write_bytes(b"")
    for _ in lose_power(out, lambda: make_shards(source, out, OPTIONS)):
        with suppress(DataError):
            assert [array.tobytes() for array in read_train(out, 0)] == arrays
        make_shards(source, out, OPTIONS)
        assert {name: digest for name, digest in hashes(out).items() if not name.startswith(".")} == expected
        survived("loss of power in pipeline shards")


def test_a_checkpoint_survives_a_loss_of_power(tmp_path: Path, survived: Survived) -> None:
    path = tmp_path / "run" / "last.pt"
    path.parent.mkdir()
    save_checkpoint(path, {"step": 1})
    steps = []
    for _ in lose_power(path.parent, lambda: save_checkpoint(path, STATE)):
        steps.append(load_checkpoint(path)["step"])
        survived("loss of power in a checkpoint")
    assert set(steps) == {1, 2}


@pytest.mark.soak
def test_a_run_survives_a_loss_of_power(sample_shards: Shards, tmp_path: Path, survived: Survived) -> None:
    undisturbed, run = tmp_path / "whole", tmp_path / "home" / "run"
    words = ("train", "--shards", sample_shards[0], *WORDS, "--epochs", 2, "--eval-every", 4, "--ema", 0.5, "--run")
    run.mkdir(parents=True)
    with narrow_networks():
        call_train(*words, undisturbed)
        for number in lose_power(run, lambda: call_train(*words, run), most=40):
            print(number, sorted(path.name for path in run.iterdir()))
            call_train(*words, run)
            assert_same_run(run, undisturbed)
            survived("loss of power in train.py")


def train_point(point: Point, run: Path) -> Figures:
    run.mkdir(parents=True, exist_ok=True)
    (run / "log").write_text("trained")
    return {"dev_auroc": point["lr"]}


@pytest.mark.soak
def test_a_sweep_survives_a_loss_of_power(tmp_path: Path, survived: Survived) -> None:
    folder = tmp_path / "home" / "sweep"
    folder.mkdir(parents=True)
    sweep = Sweep(folder, {"lr": (0.1, 0.2)}, {"epochs": 1}, "grid", trials=0)

    def run() -> None:
        open_sweep(sweep)
        run_sweep(sweep, train_point)

    for _ in lose_power(folder, run):
        run()
        assert [(trial.dev, trial.state) for trial in list_trials(sweep)] == [(0.1, "complete"), (0.2, "complete")]
        survived("loss of power in a sweep")
