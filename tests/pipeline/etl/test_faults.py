"""Every write and fsync of sharding and of checkpoints fails once, with a full disk and with a broken one."""

import errno
import io
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import load_checkpoint, save_checkpoint
from pipeline import DataError
from pipeline.etl import shards as sharding
from tests.conftest import default_options, make_shards, write_chexpert
from tests.pipeline.etl.test_shards import hashes

# What the message says of each.
ERRORS = {errno.ENOSPC: "No space left on device; make room, and run it again", errno.EIO: "Input/output error"}


class Disk:
    """Counts what is asked of the disk when a file is written; the call number `fails` raises `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int = -1, error: int = 0) -> None:
        self.calls, self.fails, self.error = 0, fails, error
        disk, fsync, replace, opened = self, os.fsync, Path.replace, Path.open

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                disk.call()
                return super().write(data)

        def open_file(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode != "wb":
                return opened(path, mode, *arguments, **options)
            disk.call()
            return io.BufferedWriter(File(path, "w"))

        def count(function: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any) -> Any:
                disk.call()
                return function(*arguments)

            return counted

        monkeypatch.setattr(Path, "open", open_file)
        monkeypatch.setattr(Path, "replace", count(replace))
        monkeypatch.setattr(os, "fsync", count(fsync))

    def call(self) -> None:
        """One call more, which may be the one that fails."""
        self.calls += 1
        if self.calls - 1 == self.fails:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run here, one after the other, where the disk is watched."""

    def run_tasks(function: Callable[[Any], Any], tasks: Iterable[Any], *_: object) -> Generator[Any, None, None]:
        for task in tasks:
            yield function(task)

    monkeypatch.setattr(sharding, "run_tasks", run_tasks)
    monkeypatch.setattr(sharding, "run_alone", lambda function, task, _: function(task))


def test_sharding_survives_each_failure_of_the_disk(
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    source = tmp_path / "CheXpert-v1.0-small"
    write_chexpert(source, "train", range(1, 6))
    options = default_options(samples_per_shard=5)
    make_shards(source, tmp_path / "whole", options)
    expected = hashes(tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        make_shards(source, tmp_path / "counted", options)
    assert disk.calls > 50
    for number in range(disk.calls):
        for error in ERRORS:
            out = tmp_path / f"{number}-{error}"
            with monkeypatch.context() as patch:
                Disk(patch, number, error)
                with pytest.raises(DataError, match=rf"^{out}/.*: cannot be written: {ERRORS[error]}$"):
                    make_shards(source, out, options)
            assert not (out / "manifest.json").exists()
            assert not list(out.rglob("*.tmp"))
            make_shards(source, out, options)
            assert hashes(out) == expected
            record_property("survived", f"{errno.errorcode[error]} of pipeline shards")


def test_a_checkpoint_survives_each_failure_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        save_checkpoint(tmp_path / "counted.pt", {"step": 2, "weights": torch.zeros(100_000)})
    assert disk.calls > 5
    for number in range(disk.calls):
        for error in ERRORS:
            with monkeypatch.context() as patch:
                Disk(patch, number, error)
                with pytest.raises(DataError, match=rf"^{path}: cannot be written: {ERRORS[error]}$"):
                    save_checkpoint(path, {"step": 2, "weights": torch.zeros(100_000)})
            assert load_checkpoint(path) == {"step": 1}
            assert [file.name for file in tmp_path.glob(".*")] == []
            record_property("survived", f"{errno.errorcode[error]} of a checkpoint")
