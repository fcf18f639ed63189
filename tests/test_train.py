import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.optim.swa_utils import AveragedModel

import train
from model.checkpoint import load_checkpoint
from pipeline import DataError
from pipeline.labels import LABELS, evaluation_targets
from pipeline.manifest import Manifest, manifest_digest, read_table
from pipeline.sample import write_sample
from pipeline.scores import read_scores, write_scores
from pipeline.stream import open_split
from tests.conftest import default_options, make_shards

REPOSITORY = Path(train.__file__).parent


@pytest.fixture(scope="module")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, images=160, seed=0, workers=2)
    options = default_options(size=64, samples_per_shard=40)
    return folder / "shards", make_shards(folder, folder / "shards", options, workers=2).manifest


class StopAfter(train.StopFlag):
    """Asks for a stop at the n-th time it is looked at."""

    def __init__(self, looks: int) -> None:
        self.code = 0
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.code = 143
        return self.code != 0


@pytest.fixture
def make_job(sample_shards: tuple[Path, Manifest], tmp_path: Path) -> Callable[..., train.Job]:
    """A small job on the sample; keyword arguments change its configuration."""
    shards, manifest = sample_shards

    def make(
        run: str,
        stop_after: int = 10**9,
        teacher: Path | None = None,
        strict: bool = False,
        **changes: Any,
    ) -> train.Job:
        config = train.Config(
            arch="rescnn",
            lr=1e-3,
            weight_decay=1e-2,
            batch_size=16,
            epochs=2,
            image_size=32,
            amp="off",
            ema=0.9,
            augment=True,
            uncertain="best",
            blank="zeros",
            seed=0,
            manifest=manifest_digest(shards),
            teacher=train.teacher_digest(teacher, shards) if teacher else None,
        )
        config = dataclasses.replace(config, **changes)
        train.open_run(tmp_path / run, config)
        device, precision = train.choose_device(config.amp)
        return train.Job(
            config,
            shards,
            tmp_path / run,
            manifest,
            device,
            precision,
            workers=2,
            teacher=teacher,
            strict=strict,
            stop=StopAfter(stop_after),
        )

    return make


@pytest.fixture
def command(sample_shards: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python train.py` with options for a small run, in this process, whose signals it leaves alone."""
    monkeypatch.setattr(train, "StopFlag", lambda: StopAfter(10**9))

    def call(*arguments: object) -> int:
        options = ["--shards", sample_shards[0], "--arch", "rescnn", "--image-size", 32, "--epochs", 1]
        options += ["--batch-size", 16, "--workers", 2]
        return int(train.main.main([str(part) for part in (*options, *arguments)], standalone_mode=False))

    return call


def run_train(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def assert_same_run(run: Path, other: Path) -> None:
    """Bitwise: weights, averages, optimiser, position, and every number of the metrics."""
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(run / name), load_checkpoint(other / name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name in ("metrics.jsonl", "evaluation-dev.json", "evaluation-valid.json", "scores-valid.arrow"):
        assert (run / name).read_bytes() == (other / name).read_bytes()


def test_a_run_writes_what_it_promises(make_job: Callable[..., train.Job]) -> None:
    job = make_job("run")
    assert train.train(job) == 0
    assert sorted(path.name for path in job.run.iterdir()) == [
        "best.pt",
        "config.json",
        "evaluation-dev.json",
        "evaluation-valid.json",
        "last.pt",
        "metrics.jsonl",
        "scores-dev.arrow",
        "scores-valid.arrow",
    ]
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    report = json.loads((job.run / "evaluation-dev.json").read_text())
    assert list(report["labels"]) == list(LABELS)
    defined = {label: row["auroc"] for label, row in report["labels"].items() if row["auroc"] is not None}
    assert report["macro_auroc"] == pytest.approx(sum(defined.values()) / len(defined))
    assert report["skipped"] == [label for label in LABELS if label not in defined]
    # best.pt is the better of the two epochs, and what the report was made of
    best = max(lines, key=lambda line: train.choice_score(line) or 0)
    assert load_checkpoint(job.run / "best.pt")["epoch"] == best["epoch"]
    assert {label: row["auroc"] for label, row in report["labels"].items()} == best["labels"]


# 5 steps per epoch, each looked at once, then the end of the epoch, the evaluation's batch, and the save
@pytest.mark.parametrize("looks", [1, 4, 6, 7, 8, 9, 13, 15])
def test_interrupted_and_continued_equals_uninterrupted(
    make_job: Callable[..., train.Job], looks: int, sample_shards: tuple[Path, Manifest]
) -> None:
    whole = make_job("whole")
    assert train.train(whole) == 0
    assert train.train(make_job("parts", stop_after=looks)) == 143
    assert train.train(make_job("parts", stop_after=5)) == 143  # and once more
    assert train.train(make_job("parts")) == 0
    assert_same_run(make_job("parts").run, whole.run)


@pytest.mark.parametrize(
    "change", [{"uncertain": "multiclass"}, {"uncertain": "best,Edema=multiclass", "amp": "bf16"}]
)
def test_three_classes_interrupted_and_continued_equal_uninterrupted(
    make_job: Callable[..., train.Job], change: dict[str, str]
) -> None:
    whole = make_job("whole", **change)
    assert train.train(whole) == 0
    assert train.train(make_job("parts", stop_after=4, **change)) == 143
    assert train.train(make_job("parts", **change)) == 0
    assert_same_run(whole.run.with_name("parts"), whole.run)


@pytest.mark.parametrize(
    ("policy", "outputs"),
    [("ignore", 14), ("zeros", 14), ("ones", 14), ("multiclass", 28), ("best,Edema=multiclass", 15)],
)
def test_policies_train_and_their_scores_give_the_reported_auroc(
    make_job: Callable[..., train.Job], policy: str, outputs: int
) -> None:
    job = make_job("run", uncertain=policy, epochs=1)
    assert train.train(job) == 0
    assert load_checkpoint(job.run / "best.pt")["weights"]["head.2.weight"].shape == (outputs, 256)
    for name in ("dev", "valid"):
        table = read_table(job.shards, job.manifest.split(name))
        scores = pa.ipc.open_file(job.run / f"scores-{name}.arrow").read_all()
        assert scores["key"].equals(table["key"])
        target, mask = evaluation_targets(table, "zeros")
        report = json.loads((job.run / f"evaluation-{name}.json").read_text())
        assert len(report["skipped"]) < len(LABELS)
        for column, label in enumerate(LABELS):
            used = mask[:, column]
            auroc = report["labels"][label]["auroc"]
            if auroc is not None:
                expected = roc_auc_score(target[used, column], scores[label].to_numpy()[used])
                assert auroc == pytest.approx(expected, abs=1e-6)


def test_a_student_learns_its_teachers_scores_of_the_uncertain_cells(
    make_job: Callable[..., train.Job],
) -> None:
    teacher = make_job("teacher", uncertain="ignore", epochs=1)
    assert train.train(teacher) == 0
    report = train.evaluate(teacher, "train")
    assert json.loads((teacher.run / "evaluation-train.json").read_text()) == report

    student = make_job("student", uncertain="selftrained", teacher=teacher.run)
    split = open_split(student.shards, student.manifest, "train")
    target, mask = train.training_labels(student, split)
    scores = read_scores(teacher.run / "scores-train.arrow", split.table["key"])
    states = np.column_stack([pc.fill_null(split.table[label], 0).to_numpy() for label in LABELS])
    assert (states == -1).any()
    assert mask.all()
    np.testing.assert_array_equal(target, np.where(states == -1, scores, states))

    assert train.train(student) == 0
    assert train.train(make_job("parts", 4, teacher.run, uncertain="selftrained")) == 143
    assert train.train(make_job("parts", teacher=teacher.run, uncertain="selftrained")) == 0
    assert_same_run(student.run.with_name("parts"), student.run)
    # another teacher's scores are another configuration
    write_scores(teacher.run / "scores-train.arrow", split.table, 1 - scores)
    with pytest.raises(
        DataError, match=r"run of another configuration: teacher is [0-9a-f]{64} there and [0-9a-f]"
    ):
        make_job("student", uncertain="selftrained", teacher=teacher.run)


def test_self_training_says_which_command_is_missing(
    command: Callable[..., int], sample_shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    as_student = ("--run", student, "--uncertain", "best,Edema=selftrained")
    python = f"python train.py --shards {sample_shards[0]} --run {teacher}"

    def refuse(*arguments: object) -> str:
        with pytest.raises(DataError) as caught:
            command(*arguments)
        return str(caught.value)

    assert refuse(*as_student) == (
        "label Edema is selftrained: it needs a --teacher, a run that was scored on train"
    )
    assert refuse(*as_student, "--teacher", teacher) == (
        f"{teacher}: no best.pt; first run: {python} --uncertain ignore"
    )
    assert command("--run", teacher, "--uncertain", "ignore") == 0
    assert refuse(*as_student, "--teacher", teacher) == (
        f"{teacher}: no scores-train.arrow; first run: {python} --evaluate train"
    )
    assert command("--run", teacher, "--evaluate", "train") == 0
    file = teacher / "scores-train.arrow"
    whole = file.read_bytes()
    table = pa.ipc.open_file(file).read_all()
    scores = np.column_stack([table[label].to_numpy() for label in LABELS])
    write_scores(file, table.slice(1), scores[1:])
    assert refuse(*as_student, "--teacher", teacher) == (
        f"{file}: no scores of 1 of {table.num_rows} images, such as {table['key'][0]}; they are of other shards"
    )
    with pytest.raises(click.UsageError) as caught:
        command("--run", student, "--teacher", teacher)
    assert str(caught.value) == "--teacher is for the policy selftrained; --uncertain is best"
    assert not student.exists()  # nothing that failed is in the way of what works

    file.write_bytes(whole)
    assert command(*as_student, "--teacher", teacher) == 0
    assert train.read_config(student).teacher == hashlib.sha256(whole).hexdigest()


def test_labels_with_one_class_are_named_and_refused_where_strict(
    make_job: Callable[..., train.Job], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job("run", blank="ignore", epochs=1)
    healthy = pc.sum(read_table(job.shards, job.manifest.split("train"))["No Finding"]).as_py()
    assert train.train(job) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be learnt" in line]
    assert (
        lines[0] == f"label No Finding has {healthy} positives and 0 negatives in train: it cannot be learnt"
    )
    with pytest.raises(DataError) as caught:
        train.train(make_job("run", blank="ignore", epochs=1, strict=True))
    assert str(caught.value) == "--strict: " + "; ".join(
        line.removesuffix(": it cannot be learnt") for line in lines
    )


def test_another_seed_is_another_run(make_job: Callable[..., train.Job]) -> None:
    first, second = make_job("a", epochs=1), make_job("b", epochs=1, seed=1)
    train.train(first)
    train.train(second)
    weights = [load_checkpoint(job.run / "last.pt")["network"]["head.2.weight"] for job in (first, second)]
    assert not torch.equal(*weights)


def test_another_configuration_is_refused_by_name(make_job: Callable[..., train.Job]) -> None:
    make_job("run")
    with pytest.raises(
        DataError, match=r"run is a run of another configuration: lr is 0.001 there and 0.1 here; ch"
    ):
        make_job("run", lr=0.1)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    make_job: Callable[..., train.Job],
) -> None:
    job = make_job("run", lr=1e30)
    with pytest.raises(DataError, match=r"^the loss is (nan|inf) at epoch 1, step \d+; try a lower --lr$"):
        train.train(job)
    assert not (job.run / "last.pt").exists()


@pytest.mark.parametrize(
    "change", [{"amp": "bf16"}, {"augment": False}, {"uncertain": "ignore"}, {"blank": "ignore"}]
)
def test_options_change_the_result(make_job: Callable[..., train.Job], change: dict[str, Any]) -> None:
    plain, changed = make_job("plain", epochs=1), make_job("changed", epochs=1, **change)
    assert train.train(plain) == train.train(changed) == 0
    ours, theirs = (
        json.loads((job.run / "metrics.jsonl").read_text())["train_loss"] for job in (plain, changed)
    )
    assert ours != theirs
    if "amp" in change:
        assert ours == pytest.approx(theirs, rel=0.02)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [train.scheduled_lr(1.0, step, 1000) for step in range(1000)]
    assert rates[0] == 0.01
    assert rates[99] == 1.0 == max(rates)
    assert rates[550] == pytest.approx(0.5)
    assert rates[-1] < 1e-5
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert train.scheduled_lr(1.0, 499, 100_000) == 1.0  # the warm-up ends after 500 steps


def test_average_follows_its_formula() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    average = AveragedModel(network, multi_avg_fn=train.warming_average(0.5))
    expected = 0.0
    for step in range(12):
        value = float(step)
        torch.nn.init.constant_(network.weight, value)
        average.update_parameters(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.state_dict()["module.weight"].item() == pytest.approx(expected)


def test_command_line_trains_continues_after_sigterm_and_evaluates(
    sample_shards: tuple[Path, Manifest], tmp_path: Path
) -> None:
    shards, _ = sample_shards
    options = ["--shards", shards, "--arch", "rescnn", "--batch-size", 4, "--epochs", 3, "--image-size", 64]
    options += ["--lr", "1e-3", "--workers", 2]
    run = tmp_path / "run"
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, options), "--run", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (run / "best.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert errors.endswith(f"{run}: stopped and saved; the same command continues\n")
    continued = run_train(*options, "--run", run)
    assert continued.returncode == 0, continued.stderr
    assert f"{run}: continuing after step " in continued.stderr
    assert run_train(*options, "--run", tmp_path / "whole").returncode == 0
    assert_same_run(run, tmp_path / "whole")

    before = (run / "evaluation-valid.json").read_text()
    (run / "evaluation-valid.json").unlink()
    scored = run_train("--shards", shards, "--run", run, "--evaluate", "valid")
    assert scored.returncode == 0, scored.stderr
    assert "Cardiomegaly" in scored.stdout
    assert (run / "evaluation-valid.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--run", "{run}"],
            1,
            "Error: {run}: no manifest.json, so no finished shards; write them with `pipeline",
        ),
        (
            ["--shards", "{shards}", "--run", "{run}", "--evaluate", "valid"],
            1,
            "Error: {run}: no config.json, so not",
        ),
        (
            ["--shards", "{shards}", "--run", "{run}", "--amp", "fp16"],
            1,
            "Error: --amp fp16 needs a GPU; use bf16",
        ),
        (
            ["--shards", "{shards}", "--run", "{run}", "--batch-size", "999"],
            1,
            "samples are less than one batch",
        ),
        (
            ["--shards", "{shards}", "--run", "{run}", "--uncertain", "perhaps"],
            1,
            "Error: uncertain policy 'perhaps'",
        ),
        (
            ["--shards", "{shards}", "--run", "{run}", "--arch", "vgg"],
            2,
            "'vgg' is not one of 'resnet18', 'resnet34'",
        ),
        (["--shards", "{shards}"], 2, "Missing option '--run'."),
    ],
)
def test_bad_use_is_one_line_and_an_exit_code(
    sample_shards: tuple[Path, Manifest], tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    names = {"run": tmp_path / "run", "shards": sample_shards[0]}
    filled = [text.format(**names) for text in arguments]
    if "--shards" not in filled:
        filled += ["--shards", str(tmp_path / "run")]
    failed = run_train(*filled)
    assert (failed.returncode, "Traceback" in failed.stderr) == (code, False)
    assert message.format(**names) in failed.stderr.splitlines()[-1]
