"""Training by torchrun: real processes, with gloo between them (make test-cluster).

The last test has two hosts and an object store, by network namespaces. Root makes the second host and the link to it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import train
from pipeline.measure.scores import open_scores
from pipeline.stream.plan import plan_training
from pipeline.stream.samples import find_images, open_split
from tests.conftest import Round, Shards, default_options, flip, make_shards, write_chexpert
from tests.swift import KEY, SECRET, free_ports, run_swift
from tests.training import WORDS, assert_same_run, call_train

pytestmark = pytest.mark.cluster
REPOSITORY = Path(train.__file__).parent
OPTIONS = ["--arch", "rescnn", "--image-size", "32", "--workers", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES, LINKS = ("10.77.31.1", "10.77.31.2"), ("chest0", "chest1")  # of the two hosts


def spawn(*command: object, **options: Any) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | options.pop("variables", {})
    return subprocess.Popen(list(map(str, command)), env=environment, text=True, **options)


def start(ranks: int, script: str, *arguments: object) -> "subprocess.Popen[str]":
    """`torchrun --nproc-per-node RANKS script arguments`, or without torchrun for 0 ranks."""
    agent = ["--standalone", "--nproc-per-node", ranks, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--"]
    command = [*TORCHRUN, *agent] if ranks else [sys.executable]
    return spawn(*command, REPOSITORY / script, *arguments, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    """Standard error of a process that ends with this code."""
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == code, stderr
    return stderr


def make_other(folder: Path, **splits: range) -> Path:
    """Shards of other patients, under some of the sample's numbers."""
    for name, numbers in splits.items():
        write_chexpert(folder / "images", name, numbers)
    make_shards(folder / "images", folder / "shards", default_options(size=64), called="childrens")
    return folder / "shards"


@pytest.fixture
def teacher(sample_shards: Shards, tmp_path: Path) -> list[object]:
    """The options of a student of a run of one epoch."""
    run = tmp_path / "teacher"
    call_train("train", "--shards", sample_shards[0], "--run", run, *WORDS, "--uncertain", "ignore")
    call_train("evaluate", "--run", run, "--split", "train")
    return ["--uncertain", "selftrained", "--teacher", run]


@pytest.fixture
def other_hospital(tmp_path: Path) -> list[object]:
    """The options of a mix with shards of other patients under the same numbers."""
    shards = make_other(tmp_path / "hospital", train=range(1, 31), valid=range(40, 45))
    return ["--shards", shards, "--mix", "1,3"]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("shards --augment crop --batch-size 64", None),
        ("shards --loss aucm", None),
        ("studies --fusion mean", None),
        ("shards --balance Edema", None),
        ("shards", "other_hospital"),
        ("shards", "teacher"),
    ],
)
@pytest.mark.usefixtures("sample_shards")
def test_any_number_of_ranks_sees_the_same_batches_and_learns_the_same(
    sample: Path, tmp_path: Path, request: pytest.FixtureRequest, words: str, more: str | None
) -> None:
    """1 × 48 and 3 × 16 samples, or 1 × 64 and 4 × 16, 10 steps; a mask with holes, so that ranks have unequal cells.

    Most without augmentation: how float32 rounds a resampled image depends on how many are resampled at once, and
    where a gradient is nearly zero Adam makes whole steps of the difference. So rounding grows: after 20 steps of
    the AUC margin loss, from 4e-9 to .003.
    """
    folder, *changes = words.split()
    options = [*OPTIONS, "--shards", sample / folder, "--run", "unused", "--batch-size", 48, "--augment", "none"]
    options += ["--blank", "ignore", "--lr", 1e-3, *changes, *(request.getfixturevalue(more) if more else [])]
    count = 4 if "64" in changes else 3
    results = {}
    for ranks in (0, count):
        out = tmp_path / str(ranks)
        finish(start(ranks, "tests/ranks_worker.py", out, 10, *options))
        results[ranks] = [np.load(out / f"{rank}.npz") for rank in range(max(ranks, 1))]
    (alone,) = results[0]
    assert len(alone["rows"]) == 10
    assert len(set(alone["losses"].round(3))) > 5  # it learns
    together = np.concatenate([result["rows"] for result in results[count]], axis=1)
    assert together.tolist() == alone["rows"].tolist()
    for result in results[count]:
        for name, tolerance in {"gradients": 1e-5, "losses": 1e-4}.items():
            np.testing.assert_allclose(result[name], alone[name], rtol=0, atol=tolerance)
        # The final ones, but for the one in a hundred whose gradients are nearly zero.
        assert np.quantile(np.abs(result["weights"] - alone["weights"]), 0.99) < 1e-4


@pytest.fixture
def other(sample_shards: Shards, tmp_path: Path) -> Path:
    """Shards of other patients, and a run to start from."""
    make_other(tmp_path, train=range(1, 31))
    finish(start(0, "train.py", "--shards", sample_shards[0], "--run", tmp_path / "first", *WORDS))
    return tmp_path


def disturb(process: "subprocess.Popen[str]", run: Path, evaluations: int, ranks: int, round_: Round) -> int:
    """Kill or stop a training, or one of its ranks, soon after so many evaluations. Returns the exit code."""
    choice = round_.dice.choice
    number = choice([signal.SIGKILL, signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM, *[signal.SIGINT][ranks:]])

    def count_lines(name: str) -> int:
        return (run / name).read_text().count("\n") if (run / name).exists() else 0

    starts = count_lines("environment.jsonl")
    while count_lines("environment.jsonl") == starts or count_lines("metrics.jsonl") < evaluations:
        if process.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(round_.dice.random() / 5)
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        one_rank = ranks and number == signal.SIGKILL
        os.kill(int(choice(children[-ranks:])) if one_rank else process.pid, number)
    began = time.monotonic()
    _, stderr = process.communicate(timeout=600)
    if (code := process.returncode) == 0:
        return 0
    if number == signal.SIGKILL:
        assert code == (1 if ranks else -number), stderr
        assert not ranks or re.search(r"Error: rank \d: another rank is lost: ", stderr), stderr
        assert time.monotonic() - began < 200  # seconds; to wait for a lost one would take five minutes
    else:
        assert ranks or code == (130 if number == signal.SIGINT else 143), stderr
        assert f"{run}: stopped and saved; the same command continues\n" in stderr, stderr
    round_.survived(f"{number.name} of {'a rank' if ranks else 'train.py'}")
    return code


@pytest.mark.soak
def test_a_killed_or_stopped_run_continues_exactly(sample: Path, other: Path, rounds: Iterator[Round]) -> None:
    for round_ in rounds:
        dice, run, undisturbed, ranks = round_.dice, round_.folder / "run", round_.folder / "undisturbed", 0
        while True:
            options = round_.draw("train", sample=sample, other=other)
            with suppress(click.UsageError):  # what does not go together
                call_train("train", *options, "--run", run, "--check")
                break
        print(ranks := dice.choice([0, 0, 2]), "ranks:", *options)  # with three, a resumed one rounds otherwise
        begin = partial(start, ranks, "train.py", *options, "--run")
        assert finish(begin(undisturbed)).count("Epoch 1: dev AUROC ") == 1  # of the first rank alone
        evaluations = (undisturbed / "metrics.jsonl").read_text().count("\n")
        for _ in range(dice.randint(1, 3)):
            if disturb(begin(run), run, dice.randrange(evaluations), ranks, round_) == 0:
                break
        finish(begin(run))
        assert_same_run(run, undisturbed)
        # A finished run is recognized without what takes long to import, unless it has weights to read.
        slow = ["scipy.stats", "matplotlib", *([] if "--init" in options else ["torch"])]
        program = f"import runpy, sys; sys.modules |= dict.fromkeys({slow}); "
        program += "runpy.run_path('train.py', run_name='__main__')"
        again = spawn(sys.executable, "-c", program, *options, "--run", run, cwd=REPOSITORY, stderr=subprocess.PIPE)
        assert f"{run}: finished, after step " in again.communicate(timeout=600)[1]
        # What the ranks scored together is what one process finds.
        scores = open_scores(run / "scores-valid.arrow").values
        finish(start(0, "train.py", "evaluate", "--run", run))
        np.testing.assert_allclose(scores, open_scores(run / "scores-valid.arrow").values, atol=1e-6)


@pytest.mark.parametrize("field", ["policy", "dev", "--epochs", "--lr", "--seed"])
def test_ranks_that_differ_all_end_and_name_the_field(
    shards: Shards, chexpert: Path, tmp_path: Path, field: str
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
        command = [*TORCHRUN, *agent, "--master-port", port, "--", REPOSITORY / "train.py", *words]
        processes.append(spawn(*command, stderr=subprocess.PIPE))
    name = {"policy": "shards", "dev": "shards"}.get(field, field.removeprefix("--"))
    remedy = "start every rank by the same command, with the same shards and packages"
    for stderr in [finish(process, 1) for process in processes]:
        assert re.search(rf"Error: rank 1 has {name} \S+ and rank 0 has \S+: {remedy}\n", stderr), stderr
    assert not [*tmp_path.glob("run*")]


def test_what_several_ranks_cannot_do_is_refused(sample_shards: Shards, tmp_path: Path) -> None:
    options = ["--shards", sample_shards[0], "--run", tmp_path / "run", *OPTIONS]
    batch = "--batch-size 9 for --accumulate 1 on each of 2 ranks: the parts must be equal, of 2 images or more"
    assert f"Error: {batch}" in finish(start(2, "train.py", *options, "--batch-size", 9), 1)
    stderr = finish(start(1, "train.py", "evaluate", *options[:4]), 1)
    assert "Error: evaluate is for one process: start it without torchrun" in stderr
    assert not (tmp_path / "run").exists()


def test_unusable_images_are_one_budget_of_all_ranks(sample_shards: Shards, tmp_path: Path) -> None:
    """One image of each rank's first batch is damaged, and one is allowed."""
    folder = Path(shutil.copytree(sample_shards[0], tmp_path / "shards"))
    split = open_split(*sample_shards, "train")
    for rank in (0, 1):
        step = next(plan_training(find_images(split), 8, seed=0, epoch=0, rank=rank, ranks=2))
        row = int(step.images[0])
        flip(folder / split.shards[split.shard[row]].shard.file, split.offset[row] + 100)
    options = ["--shards", folder, "--run", tmp_path / "run", *OPTIONS, "--batch-size", 8, "--epochs", 1]
    stderr = finish(start(2, "train.py", *options, "--max-bad", 1.5 / len(split.shard)), 1)
    assert "Error: 2 images cannot be used, more than 1 (--max-bad)\n" in stderr


def ip(*arguments: str, on: tuple[str, ...] = ()) -> None:
    subprocess.run([*on, "ip", *arguments], check=True)


@pytest.fixture
def second_host() -> Iterator[tuple[str, ...]]:
    """What runs a command on the second host."""
    with subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) as sleeper:
        try:
            time.sleep(0.5)
            second = ("nsenter", "--target", str(sleeper.pid), "--net")
            ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1], "netns", str(sleeper.pid))
            for address, link, on in zip(ADDRESSES, LINKS, ((), second), strict=True):
                ip("address", "add", f"{address}/24", "dev", link, on=on)
                ip("link", "set", link, "up", on=on)
            ip("link", "set", "lo", "up", on=second)
            yield second
        finally:
            sleeper.kill()  # the link goes with its end


@pytest.mark.skipif("SWIFT_BIN" not in os.environ, reason="needs Swift: make test-cluster")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
def test_a_cut_link_changes_nothing(
    second_host: tuple[str, ...], sample_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_swift(Path(os.environ["SWIFT_BIN"]).absolute(), tmp_path / "swift", ADDRESSES[0]) as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.makedirs("chest")
        store.put(f"{sample_shards[0]}/", "s3://chest/shards", recursive=True)

        def begin(run: str) -> list["subprocess.Popen[str]"]:
            (port,) = free_ports(1)
            processes = []
            for host, on in enumerate(((), second_host)):
                # Neither address is what the machine's name resolves to, by which torchrun would know.
                agent = ["--rdzv-conf", f"is_host={1 - host}", "--rdzv-endpoint", f"{ADDRESSES[0]}:{port}"]
                agent += ["--rdzv-backend", "c10d", "--local-addr", ADDRESSES[host]]
                agent += ["--nnodes", "2", "--nproc-per-node", "1", "--", train.__file__]
                words = ["--shards", "s3://chest/shards", "--cache", tmp_path / f"cache-{run}-{host}"]
                words += ["--run", tmp_path / f"host{host}" / run, "--arch", "rescnn", "--image-size", 64]
                words += ["--batch-size", 8, "--epochs", 8, "--workers", 1]
                variables = {"GLOO_SOCKET_IFNAME": LINKS[host]}
                processes.append(spawn(*on, *TORCHRUN, *agent, *words, variables=variables))
            return processes

        assert [process.wait(timeout=300) for process in begin("undisturbed")] == [0, 0]
        undisturbed, cut = tmp_path / "host0" / "undisturbed", tmp_path / "host0" / "cut"

        processes = begin("cut")
        while not (cut / "metrics.jsonl").exists():
            time.sleep(0.1)
        epochs = (cut / "metrics.jsonl").read_text().count("\n")
        ip("link", "set", LINKS[0], "down")
        time.sleep(20)
        assert (cut / "metrics.jsonl").read_text().count("\n") <= epochs + 1  # it had to wait
        ip("link", "set", LINKS[0], "up")
        codes = [process.wait(timeout=300) for process in processes]
        if codes != [0, 0]:
            assert [process.wait(timeout=300) for process in begin("cut")] == [0, 0]
        assert_same_run(cut, undisturbed)
        assert not (tmp_path / "host1").exists()  # the second host writes nothing
