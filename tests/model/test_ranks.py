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
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

import train
from pipeline.manifest import Manifest, read_table
from pipeline.measure.scores import read_scores
from pipeline.stream.plan import plan_training
from pipeline.stream.samples import find_images, open_split
from tests.conftest import ROUNDS, default_options, flip, make_shards, write_chexpert
from tests.swift import free_ports
from tests.training import WORDS, assert_same_run, call_train

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


@pytest.fixture
def teacher(sample_shards: tuple[Path, Manifest], tmp_path: Path) -> list[object]:
    """The options of a student of a run of one epoch."""
    run = tmp_path / "teacher"
    call_train("train", "--shards", sample_shards[0], "--run", run, *WORDS, "--uncertain", "ignore")
    call_train("evaluate", "--run", run, "--split", "train")
    return ["--uncertain", "selftrained", "--teacher", run]


@pytest.fixture
def other_hospital(tmp_path: Path) -> list[object]:
    """The options of a mix with shards of other patients under the same numbers."""
    write_chexpert(tmp_path / "films", "train", range(1, 31))
    write_chexpert(tmp_path / "films", "valid", range(40, 45))
    make_shards(tmp_path / "films", tmp_path / "other", default_options(size=64), called="childrens")
    return ["--shards", tmp_path / "other", "--mix", "1,3"]


@pytest.mark.parametrize(
    ("folder", "options", "more"),
    [
        ("shards", "--augment crop --batch-size 64", None),
        ("shards", "--loss aucm", None),
        ("studies", "--fusion mean", None),
        ("shards", "--balance Edema", None),
        ("shards", "", "other_hospital"),
        ("shards", "", "teacher"),
    ],
)
def test_any_number_of_ranks_sees_the_same_batches_and_learns_the_same(
    sample: Path,
    sample_shards: object,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    folder: str,
    options: str,
    more: str | None,
) -> None:
    """1 × 48 and 3 × 16 samples, or 1 × 64 and 4 × 16, 10 steps; a mask with holes, so that ranks have unequal cells.

    Most without augmentation: how float32 rounds a resampled image depends on how many are resampled at once, and
    where a gradient is nearly zero Adam makes whole steps of the difference. So rounding grows: after 20 steps of
    the AUC margin loss, from 4e-9 to .003.
    """
    words = [*OPTIONS, "--shards", sample / folder, "--run", "unused", "--batch-size", 48, "--augment", "none"]
    words += ["--blank", "ignore", "--lr", 1e-3, *options.split()]
    words += request.getfixturevalue(more) if more else []
    count = 4 if "64" in options else 3
    found = {}
    for ranks in (0, count):
        out = tmp_path / str(ranks)
        code, said = finish(start(ranks, "tests/ranks_worker.py", out, 10, *words), 300)
        assert code == 0, said
        found[ranks] = [np.load(out / f"{rank}.npz") for rank in range(max(ranks, 1))]
    (alone,) = found[0]
    assert len(alone["rows"]) == 10
    assert len(set(alone["losses"].round(3))) > 5  # it learns
    together = np.concatenate([of_rank["rows"] for of_rank in found[count]], axis=1)
    assert together.tolist() == alone["rows"].tolist()
    for of_rank in found[count]:
        for name, tolerance in {"gradients": 1e-5, "losses": 1e-4}.items():
            np.testing.assert_allclose(of_rank[name], alone[name], rtol=0, atol=tolerance)
        # The final ones, but for the one in a hundred whose gradients are nearly zero.
        assert np.quantile(np.abs(of_rank["weights"] - alone["weights"]), 0.99) < 1e-4


@pytest.mark.soak
@pytest.mark.parametrize("round_", ROUNDS)
def test_a_lost_rank_ends_all_and_the_same_command_continues_exactly(
    sample_shards: tuple[Path, Manifest], tmp_path: Path, round_: int, record_property: Callable[[str, object], None]
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
    code, said = finish(start(0, "train.py", "evaluate", "--shards", sample_shards[0], "--run", tmp_path / "whole"))
    assert code == 0, said
    np.testing.assert_allclose(scores, read_scores(tmp_path / "whole" / "scores-valid.arrow", keys), atol=1e-6)


@pytest.mark.parametrize("field", ["policy", "dev", "--epochs", "--lr", "--seed"])
def test_ranks_that_differ_all_end_and_name_the_field(
    shards: tuple[Path, Manifest], chexpert: Path, tmp_path: Path, field: str
) -> None:
    """The command typed on two hosts, with a difference: two agents of torchrun on loopback."""
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
        agent = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank, "--master-addr", "127.0.0.1"]
        words = [*OPTIONS, "--shards", folder, "--run", tmp_path / f"run{rank}", "--batch-size", 8]
        words += ["--uncertain", "ignore", *chain(*values.items())]
        command = [sys.executable, "-m", "torch.distributed.run", *agent, "--master-port", port, "--"]
        command += [REPOSITORY / "train.py", *words]
        processes.append(subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True))
    name = {"policy": "shards", "dev": "shards"}.get(field, field.removeprefix("--"))
    remedy = "start every rank by the same command, with the same shards and packages"
    for code, said in map(finish, processes):
        assert code == 1
        assert re.search(rf"Error: rank 1 has {name} \S+ and rank 0 has \S+: {remedy}\n", said), said
    assert not [*tmp_path.glob("run*")]


def test_what_several_ranks_cannot_do_is_refused(sample_shards: tuple[Path, Manifest], tmp_path: Path) -> None:
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


def test_unusable_images_are_one_budget_of_all_ranks(sample_shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    """One image of each rank's first batch is damaged, and one is allowed."""
    folder = Path(shutil.copytree(sample_shards[0], tmp_path / "shards"))
    split = open_split(*sample_shards, "train")
    for rank in (0, 1):
        step = next(plan_training(find_images(split), 8, seed=0, epoch=0, rank=rank, ranks=2))
        row = int(step.images[0])
        path = folder / split.shards[split.shard[row]].shard.file
        flip(path, split.offset[row] + 100)
    options = ["--shards", folder, "--run", tmp_path / "run", *OPTIONS, "--batch-size", 8, "--epochs", 1]
    code, said = finish(start(2, "train.py", *options, "--max-bad", 1.5 / len(split.shard)))
    assert code == 1
    assert "Error: 2 images cannot be used, more than 1 (--max-bad)\n" in said, said
