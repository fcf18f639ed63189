"""Sharding, reading and repairing in any order, with kills and damage between, against a model of what is there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pipeline import DataError, open_shards
from pipeline.etl import shards as etl
from pipeline.etl.verify import verify_shards
from tests.conftest import default_options, hashes, make_shards, write_chexpert

OPTIONS = [default_options(samples_per_shard=5), default_options(samples_per_shard=3, size=32)]


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


def shard_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process do the tasks of sharding, one after the other."""
    monkeypatch.setattr(etl, "run_alone", lambda function, task, _: function(task))
    monkeypatch.setattr(etl, "run_tasks", lambda function, tasks, *_: (function(task) for task in tasks))


def read_train(folder: Path, step: int) -> list[Any]:
    stream = open_shards(folder)["train"].batches(4, 32, epoch=0)
    stream.load_state_dict({"step": min(step, len(stream))})
    return [array for batch in stream for array in (batch.images, batch.target, batch.mask)]


@contextmanager
def kill_at(number: int | None) -> Iterator[None]:
    """Kill what runs before the n-th file appears under its name."""
    replace, moves = Path.replace, count()

    def move(path: Path, target: Path) -> None:
        if next(moves) == number:
            raise Killed
        replace(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", move)
        yield


class Folder(RuleBasedStateMachine):
    """A folder of shards. The model is whose shards it holds, and what an undisturbed run writes by those options."""

    home: Path  # the source, and `0` and `1`: shards of it by each of OPTIONS
    started: list[bytes]  # options.json of an unfinished run by each
    expected: list[dict[str, str]]  # hashes of the finished shards

    def __init__(self) -> None:
        super().__init__()
        self.out = Path(tempfile.mkdtemp(dir=self.home))
        self.finished: int | None = None  # by which options; None without a manifest

    def teardown(self) -> None:
        shutil.rmtree(self.out)

    @property
    def written(self) -> dict[str, str]:
        """The hashes of all but what is needed to resume."""
        return {name: digest for name, digest in hashes(self.out).items() if not name.startswith((".partial", ".lock"))}

    @property
    def owner(self) -> int | None:
        """Whose shards they are; None if nothing says so any more."""
        file = self.out / ".partial" / "options.json"
        begun = file.read_bytes() if file.exists() else b""
        return self.started.index(begun) if self.finished is None and begun in self.started else self.finished

    @property
    def damaged(self) -> set[str]:
        """The files of finished shards that are not as they should be."""
        now, expected = self.written, self.expected[self.finished or 0]
        return {name for name, digest in expected.items() if now.get(name) != digest}

    @rule(which=st.sampled_from([0, 0, 1]), kill=st.none() | st.integers(0, 20), workers=st.integers(1, 3))
    def shard(self, which: int, kill: int | None, workers: int) -> None:
        is_finished, before = self.finished is not None, self.written
        times = {name: self.out.joinpath(name).stat().st_mtime_ns for name in before if is_finished}
        owner = self.owner if is_finished or any(self.out.glob("*.tar")) else which
        with kill_at(kill):
            if owner != which:
                with suppress(Killed), pytest.raises(DataError, match=r"holds other shards|not written by this"):
                    make_shards(self.home / "source", self.out, OPTIONS[which], workers=workers)
                assert self.written == before
                return
            with suppress(Killed):
                made = make_shards(self.home / "source", self.out, OPTIONS[which], workers=workers)
                expected = self.expected[which]
                lost = sorted(name for name in expected if is_finished and before.get(name) != expected[name])
                assert (list(made.restored), made.is_new) == (lost, not is_finished)
                assert lost or all(self.out.joinpath(name).stat().st_mtime_ns == times[name] for name in times)
                assert hashes(self.out) == expected
        self.finished = which if (self.out / "manifest.json").exists() else None

    @precondition(lambda self: bool(hashes(self.out)))
    @rule(data=st.data(), how=st.sampled_from(["remove", "empty", "cut", "flip"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        file = data.draw(st.sampled_from(sorted(path for path in self.out.rglob("*") if path.is_file())))
        content = file.read_bytes()
        if how == "remove" or file.name == "manifest.json":  # a forged manifest is a matter of test_hostile
            file.unlink()
        elif content:
            place = data.draw(st.integers(0, len(content) - 1))
            changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            file.write_bytes({"empty": b"", "cut": content[:place], "flip": changed}[how])
        if file.name == "manifest.json":
            self.finished = None

    @rule()
    def verify(self) -> None:
        if self.finished is not None:
            assert set(verify_shards(self.out, deep=False, workers=1).problems) == self.damaged
        else:
            with pytest.raises(DataError, match=r"no manifest.json"):
                verify_shards(self.out, deep=False, workers=1)

    @rule(step=st.integers(0, 3))
    def stream(self, step: int) -> None:
        """What is read is right, if it is read at all."""
        damaged = self.damaged
        with suppress(DataError):
            expected = read_train(self.home / str(self.finished or 0), step)
            for array, wanted in zip(read_train(self.out, step), expected, strict=True):
                np.testing.assert_array_equal(array, wanted)
            return
        assert damaged


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    write_chexpert(home / "source", "train", range(1, 8))
    for number, options in enumerate(OPTIONS):
        make_shards(home / "source", home / str(number), options)
    return home


@pytest.mark.parametrize("examples", [15, pytest.param(300, marks=pytest.mark.soak)])
def test_a_folder_does_what_the_model_does(home: Path, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_here(monkeypatch)
    for number, options in enumerate(OPTIONS):
        with kill_at(3), suppress(Killed):  # after two plans and options.json
            make_shards(home / "source", home / f"begun{number}", options)
    begun = [home / f"begun{number}" / ".partial" / "options.json" for number in range(len(OPTIONS))]
    expected = [hashes(home / str(number)) for number in range(len(OPTIONS))]
    for name, value in {"home": home, "expected": expected, "started": [file.read_bytes() for file in begun]}.items():
        monkeypatch.setattr(Folder, name, value, raising=False)
    how = settings(
        max_examples=examples,
        stateful_step_count=12,
        derandomize=examples < 100,
        deadline=None,
        phases=[Phase.generate],  # to shrink what fails takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Folder, settings=how)
