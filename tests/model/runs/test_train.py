import copy
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from torch import nn
from torchvision.ops import stochastic_depth

import train
from model import ranks
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from model.networks import build_network
from model.optim import scheduled_lr
from model.predict import DivergedError, MemoryExhaustedError, measure_recent
from model.ranks import Ranks, Stopped, listen
from model.runs import folder, predictor, results
from model.runs.config import Assessment, Config, read_config
from model.runs.predictor import of_run, score_split
from model.runs.results import evaluate
from model.runs.run import Run, draw_weights, open_rows, open_training, training_labels
from pipeline import DataError, console
from pipeline.base.files import claimed, hash_file
from pipeline.labels import LABELS, hash_fraction
from pipeline.manifest import Manifest, read_table, write_manifest
from pipeline.measure.evaluate import Scored, calibrate
from pipeline.measure.evaluation import OWN, Evaluation, read_evaluation
from pipeline.measure.scores import write_scores
from pipeline.policies import evaluation_targets
from pipeline.stream.dataset import Shards
from tests.conftest import flip
from tests.training import Late, assert_same_run, stop_after, train_until


def test_a_dev_too_small_to_choose_by_is_said(
    make_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "finish_run", lambda job: {})
    monkeypatch.setattr(train, "say_once", console.say)  # whatever other tests have said
    job = make_job("run", epochs=1)
    train.train(job)
    few = f"{job.shards}: no label has 10 patients of each class on dev, so the choice of checkpoint is arbitrary; "
    assert few in capsys.readouterr().err


def test_a_run_writes_what_it_promises(trained: Run) -> None:
    promised = "best.pt calibration.json config.json environment.jsonl evaluation-dev.json evaluation-valid.json "
    promised += "last.pt metrics.jsonl model-card.md report.html scores-dev.arrow scores-valid.arrow tensorboard"
    assert sorted(path.name for path in trained.folder.iterdir()) == promised.split()
    lines = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    report = read_evaluation(trained.folder / "evaluation-dev.json")
    assert report.labels == list(LABELS)
    aurocs = {label: report.get("auroc", label).value for label in LABELS}
    defined = [value for value in aurocs.values() if value is not None]
    assert report.get("auroc", "macro").value == pytest.approx(sum(defined) / len(defined))
    # best.pt is the better of the two epochs, and what the report was made of
    best = max(lines, key=lambda line: results.choice_score(line, "all") or 0)
    assert load_checkpoint(trained.folder / "best.pt")["epoch"] == best["epoch"]
    assert aurocs == best["labels"]


def test_interrupted_and_continued_equals_uninterrupted(make_job: Callable[..., Run], whole: Path) -> None:
    """Stopped before the first step, in an epoch, in dev's scoring and after it, in the second epoch, in the last
    scoring of dev and of valid."""
    for looks in (1, 6, 2, 2, 5, 6, 6):
        train_until(looks, make_job("parts"))
    train.train(make_job("parts"))
    assert_same_run(make_job("parts").folder, whole)


@pytest.mark.parametrize(("policy", "outputs"), [("zeros", 14), ("multiclass", 28), ("best,Edema=multiclass", 15)])
def test_policies_train_and_their_scores_give_the_reported_auroc(
    make_job: Callable[..., Run], policy: str, outputs: int
) -> None:
    job = make_job("run", uncertain=policy, epochs=1)
    train.train(job)
    assert load_checkpoint(job.folder / "best.pt")["weights"]["head.2.weight"].shape == (outputs, 32)
    for name in ("dev", "valid"):
        table = read_table(job.shards.folders[0].path, job.manifest.split(name))
        scores = pa.ipc.open_file(job.folder / f"scores-{name}.arrow").read_all()
        assert scores["key"].equals(table["key"])
        target, mask = evaluation_targets(table, "zeros")
        report = read_evaluation(job.folder / f"evaluation-{name}.json")
        assert report.get("auroc", "macro").value is not None
        for column, label in enumerate(LABELS):
            used = mask[:, column]
            auroc = report.get("auroc", label).value
            if auroc is not None:
                expected = roc_auc_score(target[used, column], scores[label].to_numpy()[used])
                assert auroc == pytest.approx(expected, abs=1e-6)


def evaluate_train(job: Run) -> Evaluation:
    predictor = of_run(job)
    return evaluate(job, predictor, predictor.score(job, "train"), Assessment(split="train"))


def test_a_student_learns_its_teachers_scores_of_the_uncertain_cells(make_job: Callable[..., Run]) -> None:
    """Of what it learns alone: the teacher has scores of no other image."""
    selected = {"where": ("sex=Female",), "limit": 40, "labels": ("Edema",), "epochs": 1}
    teacher = make_job("teacher", uncertain="ignore", **selected)
    train.train(teacher)
    report = evaluate_train(teacher)
    assert read_evaluation(teacher.folder / "evaluation-train.json") == report

    as_student = {"uncertain": "selftrained", "teacher": teacher.folder} | selected
    student = make_job("student", **as_student)
    file = teacher.folder / "scores-train.arrow"
    assert student.config.teacher == hashlib.sha256(file.read_bytes()).hexdigest()
    chosen = open_rows(student, "train")
    target, mask = training_labels(student, chosen)
    taught = pa.ipc.open_file(file).read_all()
    scores = taught.to_pandas().set_index("key")
    table = chosen.split.table.to_pandas().iloc[chosen.rows]
    expected = table.Edema.where(table.Edema != -1, table.key.map(scores.Edema)).fillna(0)
    column = LABELS.index("Edema")
    np.testing.assert_array_equal(target[chosen.rows, column], expected.astype(np.float32))
    assert (table.Edema == -1).any()
    assert mask.any(axis=0).tolist() == [label == "Edema" for label in LABELS]

    train.train(student)
    train_until(2, make_job("parts", **as_student))
    train.train(make_job("parts", **as_student))
    assert_same_run(student.folder.with_name("parts"), student.folder)
    # another teacher's scores are another configuration
    write_scores(file, taught, ["Edema"], 1 - scores[["Edema"]].to_numpy())
    with pytest.raises(DataError, match=r"run of another configuration: teacher is [0-9a-f]{64}, not [0-9a-f]"):
        make_job("student", **as_student)


def test_self_training_says_which_command_is_missing(
    command: Callable[..., int], sample_shards: tuple[Path, Manifest], one_epoch: Path, tmp_path: Path
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    as_student = ("--run", student, "--uncertain", "best,Edema=selftrained")
    options = f"--shards {sample_shards[0]} --run {teacher}"

    def refuse(*arguments: object) -> str:
        with pytest.raises(DataError) as caught:
            command("train", *arguments)
        return str(caught.value)

    assert refuse(*as_student, "--teacher", teacher) == (
        f"{teacher}: no best.pt; first run: python -m train {options} --uncertain ignore"
    )
    shutil.copytree(one_epoch, teacher)
    assert refuse(*as_student, "--teacher", teacher) == (
        f"{teacher}: no scores-train.arrow; first run: python -m train evaluate {options} --split train"
    )
    assert not student.exists()  # nothing that failed is in the way of what works


def test_labels_with_one_class_are_named_and_refused_where_strict(
    make_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job("run", blank="ignore", epochs=1)
    healthy = pc.sum(read_table(job.shards.folders[0].path, job.manifest.split("train"))["No Finding"]).as_py()
    open_training(job)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be learned" in line]
    assert lines[0] == f"label No Finding has {healthy} positives and 0 negatives in train: it cannot be learned"
    with pytest.raises(DataError) as caught:
        open_training(make_job("run", blank="ignore", epochs=1, strict=True))
    assert str(caught.value) == "`strict`: " + "; ".join(line.removesuffix(": it cannot be learned") for line in lines)


def test_two_processes_do_not_train_one_run(make_job: Callable[..., Run]) -> None:
    job = make_job("run", epochs=1)
    (job.folder / "config.json").unlink()
    message = rf"^{job.folder}: another process is writing to it; wait for it, or stop it$"
    with claimed(job.folder), pytest.raises(DataError, match=message):
        train.train(job)
    assert not (job.folder / "last.pt").exists()
    assert not (job.folder / "config.json").exists()  # which may be of another configuration


def test_a_run_continues_in_the_precision_and_on_the_ranks_it_began_with(make_job: Callable[..., Run]) -> None:
    """`--amp auto` is bf16, fp16 or off, as the device can; BatchNorm's statistics are of a rank's part of a batch."""
    job = make_job("run")
    train_until(3, job)
    path = job.folder / "last.pt"
    whole = load_checkpoint(path)
    for change, reason in {
        ("precision", "bfloat16"): "trained in bfloat16, `amp` is float32 on this device",
        ("ranks", 2): "trained on 2 ranks, not 1",
    }.items():
        save_checkpoint(path, whole | dict([change]))
        with pytest.raises(CheckpointError) as caught:
            train.train(job)
        assert str(caught.value) == f"{path}: {reason}: continue as before, or choose another `run`"


def test_a_rank_that_torchrun_did_not_start_is_refused(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # as some schedulers set it
    with pytest.raises(
        DataError, match=r"^RANK is in the environment and LOCAL_RANK is not: start with torchrun, or unset RANK$"
    ):
        command("train", "--run", tmp_path / "run")


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
FULL_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("error", "changes", "remedy"),
    [
        (GPU_FULL, {}, "`accumulate` 2 computes the same batch in 2 parts"),
        (GPU_FULL, {"accumulate": 3, "batch_size": 24}, "`accumulate` 4 computes the same batch in 4 parts"),
        (FULL_MEMORY, {"accumulate": 8}, "choose a smaller `batch_size` or `image_size`"),
        (FULL_MEMORY, {"loss": "aucm"}, "choose a smaller `batch_size` or `image_size`"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_helps(
    make_job: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    error: RuntimeError,
    changes: dict[str, Any],
    remedy: str,
) -> None:
    job = make_job("run", **changes)
    monkeypatch.setattr(torch.Tensor, "backward", Mock(side_effect=error))
    with pytest.raises(MemoryExhaustedError) as caught:
        train.train(job)
    step = f"`batch_size` {job.config.batch_size} `accumulate` {job.config.accumulate} `image_size` 32"
    assert str(caught.value) == f"out of memory in a step with {step}; {remedy}"


@pytest.mark.parametrize(
    ("changes", "looks", "message"),
    [
        ({}, 10**9, r"the loss is (nan|inf) at epoch 1, step \d+; try a lower `lr`"),
        ({}, 2, "the weights are not finite after step 1; try a lower `lr`"),  # stopped before the next loss
        ({"eval_every": 1, "ema": 0.0}, 10**9, "the network's scores are not finite; train with a lower `lr`, or .*"),
    ],
)
def test_what_an_absurd_rate_makes_infinite_is_named_and_not_saved(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], looks: int, message: str
) -> None:
    job = make_job("run", lr=1e30, **changes)
    monkeypatch.setattr(ranks, "_codes", Late(looks))
    with pytest.raises(DivergedError, match=f"^{message}$"):
        train.train(job)
    assert not (job.folder / "last.pt").exists()


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """At that step nan is the gradient of the stem's weights; the loss stays finite."""
    backward = iter(range(1, 10**9))

    def build(*arguments: Any) -> torch.nn.Module:
        network = build_network(*arguments)
        weight = network.get_parameter("stem.0.weight")
        weight.register_hook(lambda gradient: gradient * math.nan if next(backward) == step else gradient)
        return network

    monkeypatch.setattr(train, "build_network", build)


@pytest.mark.parametrize(("check_steps", "looks", "saved"), [(2, 10**9, 2), (20, 5, None)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_saved(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, check_steps: int, looks: int, saved: int | None
) -> None:
    """Also where a stop comes between two looks at the losses."""
    message = r"^the gradient's norm is nan at epoch 1, step 3; try a lower `lr`$"
    with monkeypatch.context() as patched:
        patched.setattr(train, "CHECK_STEPS", check_steps)
        patched.setattr(train, "SAVE_SECONDS", -1.0)
        poison(patched, 3)
        patched.setattr(ranks, "_codes", Late(looks))
        with pytest.raises(DivergedError, match=message):
            train.train(make_job("run", epochs=1))
    last = make_job("run", epochs=1).folder / "last.pt"
    assert last.exists() == (saved is not None)
    if saved is not None:
        kept = load_checkpoint(last)
        assert kept["done"] == saved
        assert all(value.isfinite().all() for value in kept["network"].values())
        whole = make_job("whole", epochs=1)
        train.train(make_job("run", epochs=1))
        train.train(whole)
        assert_same_run(last.parent, whole.folder)


def test_a_step_that_the_scaler_skips_is_no_divergence(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2)
    job = make_job("run")
    data = open_training(job)
    state = train.start_state(job, data)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = next(iter(train.stream_epoch(job, data, 0)))
    _, norm = train.train_step(job, state, batch, batch.mask.sum())
    given = [parameter.grad for parameter in state.network.parameters() if parameter.grad is not None]
    clipped = torch.cat([gradient.flatten() for gradient in given]).norm()
    assert clipped == pytest.approx(min(1.0, float(norm)), rel=1e-4)
    before = copy.deepcopy(state.network.state_dict())
    loss, norm = train.train_step(job, state, batch, batch.mask.sum())
    assert loss.isfinite()
    assert norm == 0
    assert state.scaler.get_scale() == 2.0**9
    for name, parameter in state.network.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    "change",
    [
        *({"amp": "bf16"}, {"augment": "none"}, {"augment": "crop"}, {"uncertain": "ignore"}, {"blank": "ignore"}),
        *({"loss": "aucm"}, {"pos_weight": True}, {"weight_decay": 0.5}, {"ema": 0.0}, {"accumulate": 2}),
        *({"layer_decay": 0.5}, {"seed": 1}),
    ],
)
def test_options_change_the_result(make_job: Callable[..., Run], whole: Path, change: dict[str, Any]) -> None:
    changed = make_job("changed", **change)
    train_until(12, changed)  # in the second epoch
    ours, theirs = (json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (whole, changed.folder))
    # The loss as well: with some processors' rounding, every AUROC of so few images stays as it was.
    assert (ours["train_loss"], ours["labels"]) != (theirs["train_loss"], theirs["labels"])
    if change.keys() & {"amp", "accumulate"}:
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.02)


def test_a_run_learns_and_is_measured_on_what_was_selected(make_job: Callable[..., Run]) -> None:
    job = make_job("run", epochs=1, where=("sex=Female", "age>=40"), labels=("Edema", "Pleural Effusion"))
    train.train(job)
    report = read_evaluation(job.folder / "evaluation-valid.json")
    table = read_table(job.shards.folders[0].path, job.manifest.split("valid"))
    facts = table.select(["key", "patient", "study", "sex", "age"]).to_pandas()
    chosen = (facts.sex == "Female") & (facts.age >= 40)
    scores = pa.ipc.open_file(job.folder / "scores-valid.arrow").read_all()
    assert scores["key"].to_pylist() == facts.key[chosen].tolist()
    assert tuple(report.labels) == job.config.labels == ("Edema", "Pleural Effusion")
    target, mask = evaluation_targets(table, "zeros")
    column = LABELS.index("Pleural Effusion")
    used = mask[:, column] & chosen.to_numpy()
    expected = roc_auc_score(target[used, column], scores["Pleural Effusion"].to_numpy()[used[chosen]])
    assert report.get("auroc", "Pleural Effusion").value == pytest.approx(expected, abs=1e-6)
    assert read_config(job.folder) == job.config
    card = (job.folder / "model-card.md").read_text()
    studies = facts[chosen].drop_duplicates(["patient", "study"]).groupby("patient").size()
    assert f"| valid | {chosen.sum()} | {studies.sum()} | {len(studies)} |" in card
    assert "A network that scores 2 findings on chest" in card


def test_a_selection_without_valid_is_said_before_the_first_step(
    make_job: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job("other")
    patients = read_table(job.shards.folders[0].path, job.manifest.split("valid"))["patient"].unique().to_pylist()
    job = make_job("run", epochs=1, where=tuple(f"patient!={patient}" for patient in patients))
    train.train(job)
    said = capsys.readouterr().err
    images = re.search(
        rf"^valid: condition 'patient!={patients[-1]}' leaves none of \d+ images, whose values are "
        rf"{patients[-1]}: the report is without valid$",
        said,
        re.MULTILINE,
    )
    assert images is not None
    assert images.end() < said.index("Epoch 1")
    assert (job.folder / "evaluation-dev.json").exists()
    assert not (job.folder / "evaluation-valid.json").exists()
    card = (job.folder / "model-card.md").read_text()
    assert "| dev |" in card
    assert "| valid |" not in card
    assert results.measure_run(job)["valid_auroc"] is None


def test_shards_without_a_dev_split_are_trained_on_with_patients_held_out(
    command: Callable[..., int], sample_shards: tuple[Path, Manifest], one_epoch: Path, tmp_path: Path
) -> None:
    assert read_config(one_epoch).dev is None  # whose shards have a dev split
    folder, manifest = sample_shards
    undivided = tmp_path / "undivided"
    undivided.mkdir()
    for path in folder.glob("[tv]*"):
        shutil.copy(path, undivided)
    splits = {name: split for name, split in manifest.splits.items() if name != "dev"}
    write_manifest(undivided, dataclasses.replace(manifest, splits=splits))
    run = tmp_path / "run"
    own = ("--shards", undivided, "--run", run)
    options = (*own, "--seed", 3, "--dev", 0.2)
    assert command("train", *options) == 0
    table = pa.ipc.open_file(undivided / "train.arrow").read_all().to_pandas()
    held = table.patient.map(lambda patient: hash_fraction("dev", 3, patient) < 0.2)
    assert 0 < held.sum() < len(held) / 2

    def scored(split: str) -> list[str]:
        return list(pa.ipc.open_file(run / f"scores-{split}.arrow").read_all()["key"].to_pylist())

    assert scored("dev") == table.key[held].tolist()
    dev = (run / "evaluation-dev.json").read_bytes()
    (run / "evaluation-dev.json").unlink()
    (run / "calibration.json").unlink()
    for split in ("train", "dev", "valid"):
        assert command("evaluate", *own, "--split", split) == 0
    assert scored("train") == table.key[~held].tolist()
    assert (run / "evaluation-dev.json").read_bytes() == dev
    card = (run / "model-card.md").read_text()
    assert f"| train | {(~held).sum()} |" in card
    assert f"| dev | {held.sum()} |" in card
    with pytest.raises(DataError, match=r"run of another configuration: dev is 0.2, not 0.05"):
        command("train", *own, "--seed", 3, "--lr", 1e-4)  # the default share
    message = f"^{undivided}: `dev` 1e-09 leaves no patient of train for dev; raise it$"
    with pytest.raises(DataError, match=message):
        command("train", "--shards", undivided, "--run", tmp_path / "none", "--dev", 1e-9)
    message = r"^--seed decides what dev's AUROC is of, .*: give one value, or shards with a dev split$"
    with pytest.raises(click.UsageError, match=message):  # each seed would hold out others
        command("sweep", "--shards", undivided, "--sweep", tmp_path / "none", "--seed", "0 1")


def test_limit_and_balance_choose_what_an_epoch_draws(make_job: Callable[..., Run]) -> None:
    job = make_job("run", limit=40, balance="Support Devices", epochs=1, batch_size=4)
    chosen = open_rows(job, "train")
    table = chosen.split.table.take(chosen.rows)
    whole = open_rows(make_job("whole"), "train")
    assert 30 < len(chosen.rows) <= 40
    patients = table["patient"].to_pylist()
    others = whole.split.table.to_pandas().drop(index=chosen.rows).patient
    assert not set(patients) & set(others)  # whole patients
    labels = training_labels(job, chosen)
    weights = draw_weights("Support Devices", [], labels, chosen)
    positive = labels.target[chosen.rows, LABELS.index("Support Devices")] >= 0.5
    assert weights[positive].sum() == pytest.approx(weights[~positive].sum())
    train.train(job)
    over = draw_weights("Support Devices", ["sex", "projection"], labels, chosen)
    strata = table.select(["sex", "projection"]).to_pandas().fillna("blank")
    sums = strata.assign(positive=positive, weight=over)[over > 0].groupby(["sex", "projection", "positive"])
    np.testing.assert_allclose(*sums.weight.sum().unstack().to_numpy().T)
    wrong = make_job("wrong", balance="Support Devices", balance_over=("sex", "hospital"))
    expected = r"^`balance` Support Devices `balance_over` sex,hospital: no column 'hospital'; there are key, "
    with pytest.raises(DataError, match=expected):
        train.train(wrong)
    with pytest.raises(DataError, match=r"^`balance` No Finding: no negatives to balance in train$"):
        train.train(make_job("other", balance="No Finding", blank="ignore"))


def test_damaged_images_end_the_run_unless_they_are_allowed(make_job: Callable[..., Run], tmp_path: Path) -> None:
    shards = Path(shutil.copytree(make_job("other").shards.folders[0].path, tmp_path / "shards"))
    job = dataclasses.replace(make_job("run", epochs=1), shards=Shards(shards))
    split = open_rows(job, "dev").split
    path = shards / split.shards[split.shard[3]].shard.file
    flip(path, split.offset[3] + 100)
    message = f"{path.name}: sample {split.table['key'][3]}: its bytes do not match the checksum in the index"
    for max_bad in (0.0, 0.05):  # of 14 images one is more
        with pytest.raises(DataError, match=f"^{message}$"):
            train.train(dataclasses.replace(job, config=dataclasses.replace(job.config, max_bad=max_bad)))
        shutil.rmtree(job.folder)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, max_bad=0.1))
    train.train(job)
    scored = pa.ipc.open_file(job.folder / "scores-dev.arrow").read_all()["key"].to_pylist()
    assert scored == [key for row, key in enumerate(split.table["key"].to_pylist()) if row != 3]
    assert load_checkpoint(job.folder / "last.pt")["bad"] == {"rows": []}  # of train


def test_a_batch_in_parts_gives_the_same_gradients(make_job: Callable[..., Run]) -> None:
    """With a network without BatchNorm, whose statistics are those of a part."""
    weights = []
    for accumulate in (1, 4):
        job = make_job(f"run{accumulate}", accumulate=accumulate, amp="off")
        data = open_training(job)
        state = train.start_state(job, data)
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 32, len(LABELS)))
        state.network, state.forward, state.ema = network, network, copy.deepcopy(network)
        state.optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        batch = next(iter(train.stream_epoch(job, data, 0)))
        batch.mask[3:9] = False  # parts with different numbers of cells
        train.train_step(job, state, batch, batch.mask.sum())
        weights.append(network.get_parameter("1.weight").detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("loss", ["bce", pytest.param("aucm", marks=pytest.mark.soak)])
def test_what_draws_or_remembers_resumes_exactly_between_evaluations(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """A network with stochastic depth, which draws, and a loss that remembers."""

    def build(*arguments: Any) -> nn.Module:
        network = build_network(*arguments)
        network.register_forward_hook(lambda of, _, logits: stochastic_depth(logits, 0.2, "row", of.training))
        return network

    for module in (train, predictor):
        monkeypatch.setattr(module, "build_network", build)
    options = {"epochs": 1, "eval_every": 4, "batch_size": 12, "loss": loss}
    whole = make_job("whole", **options)
    train.train(whole)
    train_until(3, make_job("parts", **options))
    train_until(4, make_job("parts", **options))
    train.train(make_job("parts", **options))
    assert_same_run(whole.folder.with_name("parts"), whole.folder)
    lines = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(4, 0.5), (8, 1.0)]


@pytest.mark.soak  # compiles for seconds
def test_a_compiled_network_learns_the_same(make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured and differentiated by torch.compile, without the minute that its C++ compiler takes."""
    calls = Mock(side_effect=partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", calls)
    plain, compiled = make_job("plain", epochs=1), make_job("compiled", epochs=1, compile=True)
    train.train(plain)
    train.train(compiled)
    ours, theirs = (json.loads((job.folder / "metrics.jsonl").read_text()) for job in (plain, compiled))
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.01)
    assert load_checkpoint(plain.folder / "best.pt")["weights"].keys() == (
        load_checkpoint(compiled.folder / "best.pt")["weights"].keys()
    )
    assert calls.call_count == 1


def test_patience_ends_a_run_that_gets_no_better(make_job: Callable[..., Run]) -> None:
    job = make_job("run", epochs=50, lr=1e-9, ema=1.0, eval_every=1, patience=3)  # the average stays as it is
    train.train(job)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    scores = [results.choice_score(line, "all") for line in lines]
    assert len(scores) < 50
    assert scores.index(max(scores)) == len(scores) - 4  # type: ignore[type-var]


@pytest.fixture
def random_dev(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of dev during training that are random numbers: which evaluation is best depends on no processor."""
    evaluations = itertools.count()

    def draw(*arguments: Any) -> tuple[Scored, pa.Table]:
        scored, table = score_split(*arguments)
        scores = np.random.default_rng(next(evaluations)).random(scored.scores.shape)
        return scored._replace(scores=scores), table

    monkeypatch.setattr(train, "score_split", draw)


@pytest.mark.usefixtures("random_dev")
def test_a_checkpoint_is_chosen_by_the_labels_asked_for(
    make_job: Callable[..., Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("run", epochs=2, eval_every=1, choose_by="Support Devices,Edema")
    left: list[float] = []

    def show_left(seconds: float) -> str:
        left.append(seconds)
        return f"; {len(left)}"

    monkeypatch.setattr(train, "show_left", show_left)
    train.train(job)
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    scores = [(line["labels"]["Edema"] + line["labels"]["Support Devices"]) / 2 for line in lines]
    macro = [results.choice_score(line, "all") for line in lines]
    best = load_checkpoint(job.folder / "best.pt")
    assert best["dev_auroc"] == max(scores)
    assert best["epoch"] == lines[scores.index(max(scores))]["epoch"]
    assert scores.index(max(scores)) != macro.index(max(macro))  # type: ignore[type-var]
    said = f": dev AUROC {max(scores):.4f} (Edema, Support Devices)  (best); {scores.index(max(scores)) + 1}\n"
    assert said in capsys.readouterr().err
    assert len(left) == len(lines)
    assert [seconds > 0 for seconds in left] == [True] * (len(lines) - 1) + [False]  # of the time for all epochs
    events = EventAccumulator(str(job.folder / "tensorboard"))
    events.Reload()
    for tag, expected in {"dev/choice_auroc": scores, "dev/macro_auroc": macro}.items():
        assert [point.value for point in events.Scalars(tag)] == pytest.approx(expected)
    card = (job.folder / "model-card.md").read_text()
    assert "The checkpoint is the one with the best AUROC on dev: Edema, Support Devices." in card
    figures = results.measure_run(job)
    assert figures["same_labels"] == 2
    dev = read_evaluation(job.folder / "evaluation-dev.json")
    aurocs = [dev.get("auroc", label).value or 0 for label in ("Edema", "Support Devices")]
    assert figures["dev_auroc"] == figures["dev_same_auroc"] == pytest.approx(sum(aurocs) / 2)


@pytest.mark.parametrize(
    ("choose_by", "expected", "waits"),
    [
        ("all", [0.9, 0.8, 0.7], True),
        ("competition", [0.5, 0.6, 0.7], False),
        ("Edema", [0.3, 0.8, 0.5], False),
        ("Edema,Fracture", [None] * 3, True),
    ],
)
def test_a_choice_is_the_mean_over_its_labels_and_patience_waits_for_it(
    choose_by: str, expected: list[float | None], waits: bool
) -> None:
    others = {"Atelectasis": 0.5, "Cardiomegaly": 0.5, "Consolidation": 0.5, "Fracture": None}
    history = [
        {"macro10_auroc": macro, "labels": {**others, "Edema": edema, "Pleural Effusion": effusion}}
        for macro, edema, effusion in ((0.9, 0.3, 0.7), (0.8, 0.8, 0.7), (0.7, 0.5, 1.5))
    ]
    assert [results.choice_score(line, choose_by) for line in history] == pytest.approx(expected)
    config = Config(patience=2, choose_by=choose_by)
    assert train.is_out_of_patience(config, Mock(history=history)) == waits


def test_a_run_starts_from_the_weights_it_is_given(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("train", "--run", tmp_path / "first", "--lr", 1e-2) == 0
    best = tmp_path / "first" / "best.pt"
    assert command("train", "--run", tmp_path / "second", "--init", best.parent, "--lr", 1e-12, "--seed", 1) == 0
    assert re.search(rf"{best}: loaded \d+ tensors; fresh: nothing\n", capsys.readouterr().err)
    ours, theirs = (load_checkpoint(tmp_path / run / "best.pt")["weights"] for run in ("first", "second"))
    torch.testing.assert_close(ours["head.2.weight"], theirs["head.2.weight"])
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"not weights of this network"):
        command("train", "--run", tmp_path / "third", "--init", best, "--arch", "resnet18")


def test_logs_say_what_the_run_did_and_with_what(make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--shards", "https://me:secret@host/set?token=secret"])
    job = make_job("run", epochs=1)
    train.train(job)
    events = EventAccumulator(str(job.folder / "tensorboard"))
    events.Reload()
    line = json.loads((job.folder / "metrics.jsonl").read_text())
    (auroc,) = events.Scalars("dev/macro_auroc")
    (loss,) = events.Scalars("train/loss")
    assert (auroc.step, loss.step) == (line["step"], line["step"])
    assert auroc.value == pytest.approx(results.choice_score(line, "all"))
    for split in ("dev", "valid"):
        found = read_evaluation(job.folder / f"evaluation-{split}.json")
        aurocs = {label: found.get("auroc", label).value for label in found.labels}
        defined = {label: value for label, value in aurocs.items() if value is not None}
        curves = {label: events.Scalars(f"auroc_{split}/{label}") for label in defined}
        assert {label: curve.value for label, (curve,) in curves.items()} == pytest.approx(defined)
        assert {curve.step for (curve,) in curves.values()} == {line["step"]}
        tags = {tag for tag in events.Tags()["scalars"] if tag.startswith(f"auroc_{split}/")}
        assert tags == {f"auroc_{split}/{label}" for label in defined}  # no curve of one with one class
    assert "dev/choice_auroc" not in events.Tags()["scalars"]
    assert loss.value == pytest.approx(line["train_loss"])
    (dev_loss,) = events.Scalars("dev/loss")
    scored = of_run(job).score(job, "dev").images
    truth, score = (array[scored.mask] for array in (scored.target, scored.scores))
    assert line["dev_loss"] == pytest.approx(log_loss(truth, score)) == pytest.approx(dev_loss.value)
    (recent,) = events.Scalars("train/macro_auroc")
    assert 0.3 < recent.value < 0.8  # an untrained network's, of a few images
    environment = json.loads((job.folder / "environment.jsonl").read_text())
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["code"]
    assert environment["command"] == ["train.py", "--shards", "https://host/set"]


def test_the_auroc_of_train_is_over_the_batches_since_the_last_check() -> None:
    """Against scikit-learn, over the labels with both classes."""
    random = torch.Generator().manual_seed(0)
    scores, target, chance = (torch.rand(80, 3, generator=random) for _ in range(3))
    target[::7, 0], target[:, 2] = -1, 1.0  # uncertain as a class; one class
    mask = chance > 0.3
    recent = [(scores[rows], target[rows], mask[rows]) for rows in (slice(50), slice(50, 80))]
    used = (mask & (target >= 0)).T
    expected = [roc_auc_score(target[used[n], n] >= 0.5, scores[used[n], n]) for n in range(2)]
    assert measure_recent(recent, ranks.ALONE) == pytest.approx(np.mean(expected))
    recent.append((scores, target, torch.zeros_like(mask)))
    assert math.isnan(measure_recent(recent, ranks.ALONE))


def test_a_finished_run_gets_more_epochs(
    command: Callable[..., int], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, new = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "new"
    before = (run / "metrics.jsonl").read_text()
    steps = json.loads(before)["step"]

    def extend(folder: Path, epochs: int = 3) -> int:
        return command("train", "--run", folder, "--amp", "off", "--epochs", epochs)

    assert extend(run) == 0
    now = f"{scheduled_lr(1e-4, steps, 3 * steps):.2g}"
    warning = f"the next follow the schedule of 3 from {now} down, so the result is not that of 3 epochs at once"
    assert warning in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text().startswith(before)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rates = {point.step: point.value for point in events.Scalars("train/lr")}
    lasts = [(steps, 1), (2 * steps, 3), (3 * steps, 3)]
    assert rates == pytest.approx({last: scheduled_lr(1e-4, last - 1, total * steps) for last, total in lasts})
    config = read_config(run)
    assert (config.epochs, config.extended) == (3, (1,))
    assert extend(run) == 0
    again = f"{run}: finished, after step {3 * steps}; to train further, raise --epochs, or start another --run with"
    assert f"{again} --init {run}\n" in capsys.readouterr().err
    with pytest.raises(DataError, match="another configuration: epochs is 3, not 2"):
        extend(run, 2)
    # Stopped in between, it resumes exactly; what has not done its epochs gets no more.
    stop_after(3, lambda: extend(other))
    stop_after(3, lambda: extend(new, 2))
    assert extend(other) == 0
    assert_same_run(other, run)
    with pytest.raises(DataError, match=rf"^{new}: `epochs` can be raised after all 2 are done; its last step is"):
        extend(new)


def test_the_curve_of_the_loss_is_of_the_steps_since_its_last_point(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for every in (1, 4):
        monkeypatch.setattr(train, "CHECK_STEPS", every)
        job = make_job(f"every{every}", epochs=1)
        train.train(job)
        events = EventAccumulator(str(job.folder / "tensorboard"))
        events.Reload()
        curves.append({point.step: point.value for point in events.Scalars("train/loss")})
    each, windows = curves
    assert list(each) == [1, 2, 3, 4, 5, 6]
    expected = {4: sum(each[step] for step in (1, 2, 3, 4)) / 4, 6: (each[5] + each[6]) / 2}
    assert windows == pytest.approx(expected)
    assert json.loads((job.folder / "metrics.jsonl").read_text())["train_loss"] == pytest.approx(sum(each.values()) / 6)


def test_a_full_disk_under_tensorboard_is_named_in_one_line(
    make_job: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job, full = make_job("run", epochs=1), Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    message = f"^{job.folder / 'tensorboard'}: cannot be written: No space left on device; make room, and run it again$"
    with monkeypatch.context() as patch:
        for name in ("write", "append"):
            patch.setattr(LocalFileSystem, name, full)
        with pytest.raises(DataError, match=message):
            train.train(job)
    assert "Traceback" not in capfd.readouterr().err
    train.train(job)


def test_wandb_and_mlflow_get_the_curves_of_a_run_and_of_its_resumption(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, wandb = tmp_path / "my run", Mock()
    mlflow = Mock(start_run=Mock(side_effect=lambda *_, **__: nullcontext()))
    mlflow.search_runs.side_effect = [[], [Mock(info=Mock(run_id="the first"))]]
    monkeypatch.setattr(folder, "find_restriction", lambda dataset: f"License of {tmp_path}")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for _ in range(2):  # begun and continued
        assert command("train", "--run", run, "--wandb", "films", "--mlflow", "studies") == 0
        (run / "report.html").unlink()  # as if it had been stopped before its report
    err = capfd.readouterr().err
    for option in ("--wandb", "--mlflow"):
        warning = f"Warning: {option} sends settings and figures of this run to others; make sure that the License of "
        assert err.count(f"{warning}{tmp_path} allows it\n") == 1
    first, second = wandb.init.call_args_list
    assert first == second
    given, identity = first.kwargs, f"my-run-{hash_file(run / 'config.json')[:8]}"
    assert (given["project"], given["id"], given["dir"], given["sync_tensorboard"]) == ("films", identity, run, True)
    assert json.loads(json.dumps(given["config"])) == json.loads((run / "config.json").read_text())
    mlflow.set_experiment.assert_called_with("studies")
    assert mlflow.start_run.call_args_list == [call(run_id, run_name=identity) for run_id in (None, "the first")]
    assert mlflow.search_runs.call_args.kwargs["filter_string"] == f"attributes.run_name = '{identity}'"
    assert mlflow.log_params.call_args.args[0] == given["config"]
    line = json.loads((run / "metrics.jsonl").read_text())
    assert call("dev/loss", line["dev_loss"], line["step"]) in mlflow.log_metric.call_args_list
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(DataError, match=rf"^{name} is missing: pip install 'chexpert-pipeline\[{name}\]'$"):
            command("train", "--run", run, f"--{name}", "films")


def test_thresholds_and_studies_are_as_asked_for(command: Callable[..., int], trained: Run) -> None:
    path = trained.folder / "evaluation-valid.json"
    first = read_evaluation(path)
    assert command("evaluate", "--run", trained.folder, "--sensitivity", 0.5, "--study", "mean") == 0
    second = read_evaluation(path)
    dev = of_run(trained).score(trained, "dev").images
    written = json.loads((trained.folder / "calibration.json").read_text())
    assert written == json.loads(json.dumps(calibrate(LABELS, dev, 0.5, "mean")))
    limits = [list(one.select(metric="threshold", group="sensitivity", level="image")) for one in (first, second)]
    assert limits[0] != limits[1]
    assert [row.value for row in limits[1]] == [
        written["image"][label]["thresholds"]["sensitivity"] for label in LABELS
    ]
    assert second.get("auroc", "macro") == first.get("auroc", "macro")
    assert command("evaluate", "--run", trained.folder) == 0
    assert read_evaluation(path) == first


def test_results_on_other_shards_leave_the_runs_own_alone(
    command: Callable[..., int], trained: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = {path: path.read_bytes() for path in trained.folder.iterdir() if path.is_file()}
    others = tmp_path / "others"
    shutil.copytree(trained.shards.folders[0].path, others)
    with (others / "manifest.json").open("a") as file:
        file.write("\n")
    assert command("evaluate", "--run", trained.folder, "--shards", others) == 0
    result = f"valid-{hash_file(others / 'manifest.json')[:8]}"
    new = {path.name for path in trained.folder.iterdir() if path.is_file() and path not in own}
    assert new == {f"evaluation-{result}.json", f"scores-{result}.arrow", f"report-{result}.html"}
    assert {path: path.read_bytes() for path in own} == own
    evaluation = read_evaluation(trained.folder / f"evaluation-{result}.json")
    plain = read_evaluation(trained.folder / "evaluation-valid.json")
    assert "own" not in plain.head
    assert evaluation.get("auroc_difference", "Edema", group=OWN).value == 0  # the same images
    assert evaluation.get("auroc", "Edema", group=OWN).value == plain.get("auroc", "Edema").value
    assert "AUROC on these images and on the run's own valid" in capfd.readouterr().out
    (trained.folder / "evaluation-valid.json").unlink()
    assert command("evaluate", "--run", trained.folder, "--shards", others) == 0
    path, run = trained.folder / "evaluation-valid.json", trained.folder
    note = f"{path} is missing, so there is no comparison with it; first run: python -m train evaluate --run {run}"
    assert f"{note}\n" in capfd.readouterr().err
    path.write_text('{"labels": {}}')
    with pytest.raises(DataError, match=f"^{path}: not an evaluation: 'rows'; write it again"):
        command("evaluate", "--run", trained.folder, "--shards", others)
    with pytest.raises(DataError, match=f"^{others}: thresholds are chosen on dev of the shards that"):
        command("evaluate", "--run", trained.folder, "--shards", others, "--sensitivity", 0.8)


def test_runs_with_other_policies_are_measured_on_the_same_cells(make_job: Callable[..., Run], whole: Path) -> None:
    other = make_job("other", epochs=1, uncertain="ones", blank="ignore")
    train.train(other)
    counts = []
    for run in (whole, other.folder):
        rows = list(read_evaluation(run / "evaluation-dev.json").select(metric="auroc", level="image", group=None))
        counts.append({row.label: (row.positives, row.negatives) for row in rows})
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "foonet"}, "'foonet' is not one of 'resnet18', "),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"labels": ["Edema", "Hope"]}, "labels is ('Edema', 'Hope')"),
        ({"uncertain": "perhaps"}, "uncertain policy 'perhaps' is unknown"),
        ({"epochs": None}, "epochs is None"),
        ({"limit": 2.5}, "limit is 2.5"),
        ({"fusion": "sum"}, "fusion is 'sum'"),
    ],
)
def test_a_configuration_that_no_run_has_is_named(
    make_job: Callable[..., Run], change: dict[str, Any], message: str
) -> None:
    path = make_job("run").folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        read_config(path.parent)
    assert str(caught.value).startswith(f"{path}: damaged, or of another version: {message}")


@pytest.mark.parametrize(("name", "key"), [("best.pt", "pixels"), ("last.pt", "scaler")])
def test_checkpoints_that_do_not_fit_their_run_are_named(
    command: Callable[..., int], trained: Run, name: str, key: str
) -> None:
    whole = load_checkpoint(trained.folder / name)
    for damaged, reason in (
        ({other: value for other, value in whole.items() if other != key}, f"'{key}'"),
        (whole | {"weights": {}, "network": {}}, "Error(s) in loading state_dict for ResCNN"),
        (whole | {"pixels": {"mean": 0, "std": "wide"}, "done": "now"}, ""),
    ):
        save_checkpoint(trained.folder / name, damaged)
        with pytest.raises(CheckpointError) as caught:
            command("evaluate", "--run", trained.folder) if name == "best.pt" else train.train(trained)
        assert str(caught.value).startswith(f"{trained.folder / name}: does not fit this run's configuration: {reason}")


def test_a_damaged_last_checkpoint_comes_with_what_to_do(
    command: Callable[..., int], make_job: Callable[..., Run]
) -> None:
    job = make_job("run", epochs=1)
    train_until(2, job)
    path = job.folder / "last.pt"
    whole = path.read_bytes()
    remedy = "remove it to train from the beginning"
    for instead in ("", f", or start another `run` with `init` {job.folder}"):
        for content in (whole[:-100], b""):
            path.write_bytes(content)
            with pytest.raises(CheckpointError) as caught:
                train.train(make_job("run", epochs=1))
            assert str(caught.value) == (f"{path}: damaged, or not a checkpoint of this program; {remedy}{instead}")
        if not instead:
            path.unlink()  # as it says
            train.train(make_job("run", epochs=1))


@pytest.mark.parametrize("name", ["calibration.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ['{"epoch": 1', "[1]", "[" * 100_000])
def test_damaged_results_are_named(command: Callable[..., int], trained: Run, name: str, content: str) -> None:
    (trained.folder / name).write_text(content)
    with pytest.raises(DataError, match=f"^{trained.folder / name}: damaged: "):
        command("evaluate", "--run", trained.folder)


def test_a_signal_is_kept_while_a_rank_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Ranks):
        def gather(self, *values: float) -> npt.NDArray[np.float64]:
            handlers[signal.SIGTERM](15, None)  # after the rank has sent that it has none
            return super().gather(*values)

    handlers: dict[int, Callable[..., None]] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(ranks, "_codes", [])
    listen()
    assert Waiting().agree(5).tolist() == [5]
    with pytest.raises(Stopped) as stopped:
        Ranks().agree(5)
    assert stopped.value.code == 143


def test_the_average_begins_with_the_weights_of_the_first_rank(make_job: Callable[..., Run]) -> None:
    class Second(Ranks):
        def average_gradients(self, network: torch.nn.Module, sync_bn: bool) -> torch.nn.Module:
            network.load_state_dict({name: value * 0 for name, value in network.state_dict().items()})
            return network

    job = dataclasses.replace(make_job("run"), ranks=Second())
    state = train.start_state(job, open_training(job))
    assert not any(weight.any() for weight in state.ema.parameters())


def test_thresholds_go_with_the_weights_they_were_chosen_for(trained: Run) -> None:
    old = trained.folder / "calibration.json"
    (trained.folder / "last.pt").unlink()
    train_until(10, trained)
    assert not old.exists()


@pytest.mark.usefixtures("random_dev")
def test_the_last_weights_are_kept_where_that_is_asked_for(make_job: Callable[..., Run]) -> None:
    job = make_job("run", keep="last", epochs=1, eval_every=2)
    train.train(job)
    ema = load_checkpoint(job.folder / "last.pt")["ema"]
    kept = load_checkpoint(job.folder / "best.pt")
    scores = [json.loads(line)["macro_auroc"] for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert scores[-1] < max(scores)  # or the test would show nothing
    assert kept["dev_auroc"] == pytest.approx(scores[-1])
    assert all(torch.equal(kept["weights"][name], value) for name, value in ema.items())
    assert "The checkpoint is the one of the last evaluation." in (job.folder / "model-card.md").read_text()
