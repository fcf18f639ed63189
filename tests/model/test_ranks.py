"""Training by torchrun: real processes, with gloo between them (make test-cluster)."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import train
from pipeline.manifest import Manifest, read_table
from pipeline.measure.scores import read_scores
from tests.conftest import ROUNDS, default_options, make_shards
from tests.swift import free_ports
from tests.training import assert_same_run

pytestmark = pytest.mark.cluster
REPOSITORY = Path(train.__file__).parent
OPTIONS = ["--arch", "rescnn", "--image-size", "32", "--workers", "1"]


def start(ranks: int, script: str, *arguments: object) -> "subprocess.Popen[str]":
    """`torchrun --nproc-per-node RANKS script arguments`, or without torchrun for 0 ranks."""
    command: list[object] = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--"]
    command += [REPOSITORY / script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]", seconds: float = 120) -> tuple[int, str]:
    """The exit code, and what was said."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


@pytest.mark.parametrize(("loss", "augment"), [("bce", "crop"), ("aucm", "none")])
def test_any_number_of_ranks_sees_the_same_batches_and_learns_the_same(
    sample_shards: tuple[Path, Manifest], tmp_path: Path, loss: str, augment: str
) -> None:
    """1 × 64, 2 × 32 and 4 × 16 images, 20 steps; a mask with holes, so that ranks have unequal cells.

    The margin loss without augmentation: how float32 rounds a resampled image depends on how many are resampled
    at once, and the loss has gradients so near to zero that Adam makes whole steps of the difference.
    """
    options = [*OPTIONS, "--shards", sample_shards[0], "--run", "unused", "--batch-size", 64]
    options += ["--blank", "ignore", "--lr", 1e-3, "--augment", augment, "--loss", loss]
    found = {}
    for ranks in (0, 2, 4):
        out = tmp_path / str(ranks)
        code, said = finish(start(ranks, "tests/ranks_worker.py", out, 20, *options))
        assert code == 0, said
        found[ranks] = [np.load(out / f"{rank}.npz") for rank in range(max(ranks, 1))]
    (alone,) = found[0]
    assert alone["rows"].shape == (20, 64)
    assert len(set(alone["losses"].round(3))) > 10  # it learns
    for ranks in (2, 4):
        together = np.concatenate([of_rank["rows"] for of_rank in found[ranks]], axis=1)
        assert together.tolist() == alone["rows"].tolist()
        for of_rank in found[ranks]:
            np.testing.assert_allclose(of_rank["gradients"], alone["gradients"], rtol=0, atol=1e-5)
            np.testing.assert_allclose(of_rank["losses"], alone["losses"], rtol=0, atol=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("round_", ROUNDS)
def test_a_lost_rank_ends_all_and_the_same_command_continues_exactly(
    sample_shards: tuple[Path, Manifest],
    tmp_path: Path,
    round_: int,
    record_property: Callable[[str, object], None],
) -> None:
    def begin(run: str) -> "subprocess.Popen[str]":
        options = f"--shards {sample_shards[0]} --batch-size 8 --epochs 4 --accumulate 2".split()
        return start(2, "train.py", *OPTIONS, *options, "--run", tmp_path / run)

    whole = begin("whole")
    code, said = finish(whole)
    assert code == 0, said
    assert said.count("Epoch 1: dev AUROC ") == 1  # of the first rank alone

    parts = begin("parts")
    while not (tmp_path / "parts" / "last.pt").exists():
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(parts.pid)], capture_output=True, text=True, check=True)
    time.sleep(random.Random(round_).random())
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    record_property("survived", "SIGKILL of a rank")
    killed = time.monotonic()
    code, said = finish(parts)
    assert code == 1
    assert "Error: rank 0: another rank is lost: " in said
    assert time.monotonic() - killed < 60
    parts = begin("parts")
    epochs = (tmp_path / "parts" / "metrics.jsonl").read_text().count("\n")
    while (tmp_path / "parts" / "metrics.jsonl").read_text().count("\n") == epochs:
        time.sleep(0.05)
    parts.send_signal(signal.SIGUSR1)
    code, said = finish(parts)
    assert code != 0
    assert "stopped and saved; the same command continues" in said
    code, said = finish(begin("parts"))
    assert code == 0, said
    assert re.search("continuing after step", said)

    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    # What the ranks scored together is what one process finds.
    keys = read_table(sample_shards[0], sample_shards[1].split("valid"))["key"]
    scores = read_scores(tmp_path / "whole" / "scores-valid.arrow", keys)
    code, said = finish(
        start(0, "train.py", "evaluate", "--shards", sample_shards[0], "--run", tmp_path / "whole")
    )
    assert code == 0, said
    np.testing.assert_allclose(
        scores, read_scores(tmp_path / "whole" / "scores-valid.arrow", keys), atol=1e-6
    )


@pytest.mark.parametrize("field", ["policy", "dev", "--epochs", "--lr", "--seed"])
def test_ranks_that_differ_all_end_and_name_the_field(
    shards: tuple[Path, Manifest], chexpert: Path, tmp_path: Path, field: str
) -> None:
    """The command typed on two hosts, with a difference; each rank connects to the first as under torchrun."""
    other = tmp_path / "other"
    if field == "dev":
        make_shards(chexpert, other, default_options(dev=0.5))
    else:
        shutil.copytree(shards[0], other)
    if field == "policy":
        text = (other / "manifest.json").read_text()
        (other / "manifest.json").write_text(text.replace('"blank": "zeros"', '"blank": "ignore"', 1))
    (port,) = free_ports(1)
    processes = []
    for rank, folder in enumerate((shards[0], other)):
        values = {"--epochs": "1", "--lr": "0.001", "--seed": "0"}
        if rank and field in values:
            values[field] = "0.5" if field == "--lr" else "3"
        words = [REPOSITORY / "train.py", *OPTIONS, "--shards", folder, "--run", tmp_path / f"run{rank}"]
        words += [
            "--batch-size",
            "8",
            "--uncertain",
            "ignore",
            *(word for pair in values.items() for word in pair),
        ]
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *map(str, words)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    name = {"policy": "shards", "dev": "shards"}.get(field, field.removeprefix("--"))
    remedy = "start every rank by the same command, with the same shards and packages"
    for code, said in map(finish, processes):
        assert code == 1
        assert re.search(rf"Error: rank 1 has {name} \S+ and rank 0 has \S+: {remedy}\n$", said), said
    assert not [*tmp_path.glob("run*")]


def test_what_several_ranks_cannot_do_is_refused(
    sample_shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    options = ["--shards", sample_shards[0], "--run", tmp_path / "run", *OPTIONS]
    code, said = finish(start(2, "train.py", *options, "--batch-size", 9))
    assert code == 1
    assert (
        "Error: --batch-size 9 for --accumulate 1 on each of 2 ranks: the parts must be equal, of 2 images or more"
        in said
    )
    code, said = finish(start(1, "train.py", "evaluate", *options[:4]))
    assert code == 1
    assert "Error: evaluate is for one process: start it without torchrun" in said
    assert not (tmp_path / "run").exists()
