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
import pytest
import torch
from pandas import read_feather as read_frame
from sklearn.metrics import log_loss, roc_auc_score
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
from model.runs.results import evaluate, read_history
from model.runs.run import Run, open_rows, open_training, training_weights
from pipeline import DataError, console
from pipeline.base.files import claimed, hash_file
from pipeline.labels import LABELS, hash_fraction
from pipeline.manifest import read_table, write_manifest
from pipeline.measure.evaluate import Scored, calibrate
from pipeline.measure.evaluation import OWN, read_evaluation
from pipeline.measure.scores import write_scores
from pipeline.policies import evaluation_targets
from pipeline.stream import dataset
from tests.conftest import Shards, flip, refused
from tests.training import Capture, Command, Late, MakeRun, Patch, assert_same_run, read_events, stop_after, train_until


def test_a_run_writes_what_it_promises(trained: Run) -> None:
    promised = "best.pt calibration.json config.json environment.jsonl evaluation-dev.json evaluation-valid.json "
    promised += "last.pt metrics.jsonl model-card.md report.html scores-dev.arrow scores-valid.arrow tensorboard"
    assert sorted(path.name for path in trained.folder.iterdir()) == promised.split()
    lines = read_history(trained.folder)
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


def test_interrupted_and_continued_equals_uninterrupted(make_run: MakeRun, uninterrupted: Path) -> None:
    """Stopped before the first step, in an epoch, in dev's scoring and after it, in the second epoch, in the last
    scoring of dev and of valid."""
    for looks in (1, 6, 2, 2, 5, 6, 6):
        train_until(looks, make_run("parts"))
    train.train(make_run("parts"))
    assert_same_run(make_run("parts").folder, uninterrupted)


def test_a_student_learns_its_teachers_scores_of_the_uncertain_cells(make_run: MakeRun) -> None:
    """Of what it learns alone: the teacher has scores of no other image."""
    selected = {"where": ("sex=Female",), "limit": 40, "labels": ("Edema",), "epochs": 1}
    teacher = make_run("teacher", uncertain="ignore", **selected)
    train.train(teacher)
    model = of_run(teacher)
    report = evaluate(teacher, model, model.score(teacher, "train"), Assessment(split="train"))
    assert read_evaluation(teacher.folder / "evaluation-train.json") == report

    as_student = {"uncertain": "selftrained", "teacher": teacher.folder} | selected
    student, file = make_run("student", **as_student), teacher.folder / "scores-train.arrow"
    assert student.config.teacher == hashlib.sha256(file.read_bytes()).hexdigest()
    chosen, _, (target, mask), *_ = open_training(student)
    taught = pa.ipc.open_file(file).read_all()
    scores = taught.to_pandas().set_index("key")
    table = chosen.split.table.to_pandas().iloc[chosen.rows]
    expected = table.Edema.where(table.Edema != -1, table.key.map(scores.Edema)).fillna(0)
    np.testing.assert_array_equal(target[chosen.rows, LABELS.index("Edema")], expected.astype(np.float32))
    assert (table.Edema == -1).any()
    assert mask.any(axis=0).tolist() == [label == "Edema" for label in LABELS]

    train.train(student)
    train_until(2, make_run("parts", **as_student))
    train.train(make_run("parts", **as_student))
    assert_same_run(student.folder.with_name("parts"), student.folder)
    # another teacher's scores are another configuration
    write_scores(file, taught, ["Edema"], 1 - scores[["Edema"]].to_numpy())
    with pytest.raises(DataError, match=r"run of another configuration: teacher is [0-9a-f]{64}, not [0-9a-f]"):
        make_run("student", **as_student)


def test_self_training_names_the_missing_command(
    command: Command, sample_shards: Shards, one_epoch: Path, tmp_path: Path
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    words = ("train", "--run", student, "--uncertain", "best,Edema=selftrained", "--teacher", teacher)
    options = f"--shards {sample_shards[0]} --run {teacher}"
    with refused(f"{teacher}: no best.pt; first run: python -m train {options} --uncertain ignore"):
        command(*words)
    shutil.copytree(one_epoch, teacher)
    with refused(f"{teacher}: no scores-train.arrow; first run: python -m train evaluate {options} --split train"):
        command(*words)
    assert not student.exists()  # nothing that failed is in the way of what works


def test_labels_with_one_class_are_named_and_refused_if_strict(make_run: MakeRun, capsys: Capture) -> None:
    run = make_run("run", blank="ignore", epochs=1)
    train_table = read_table(run.shards.folders[0].path, run.manifest.split("train")).to_pandas()
    open_training(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be learned" in line]
    healthy = int(train_table["No Finding"].sum())
    assert lines[0] == f"label No Finding has {healthy} positives and 0 negatives in train: it cannot be learned"
    with refused("`strict`: " + "; ".join(line.removesuffix(": it cannot be learned") for line in lines)):
        open_training(make_run("run", blank="ignore", epochs=1, strict=True))


def test_two_processes_do_not_train_one_run(make_run: MakeRun) -> None:
    run = make_run("run", epochs=1)
    (run.folder / "config.json").unlink()
    with claimed(run.folder), refused(f"{run.folder}: another process is writing to it; wait for it, or stop it"):
        train.train(run)
    assert not (run.folder / "last.pt").exists()
    assert not (run.folder / "config.json").exists()  # which may be of another configuration


def test_a_run_continues_in_the_precision_and_on_the_ranks_it_began_with(make_run: MakeRun) -> None:
    """`--amp auto` is bf16, fp16 or off, as the device can; BatchNorm's statistics are of a rank's part of a batch."""
    run = make_run("run")
    train_until(3, run)
    path = run.folder / "last.pt"
    saved = load_checkpoint(path)
    for change, reason in {
        ("precision", "bfloat16"): "trained in bfloat16, `amp` is float32 on this device",
        ("ranks", 2): "trained on 2 ranks, not 1",
    }.items():
        save_checkpoint(path, saved | dict([change]))
        with refused(f"{path}: {reason}: continue as before, or choose another `run`", CheckpointError):
            train.train(run)


def test_a_rank_that_torchrun_did_not_start_is_refused(command: Command, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("RANK", "0")  # as some schedulers set it
    with refused("RANK is in the environment and LOCAL_RANK is not: start with torchrun, or unset RANK"):
        command("train", "--run", tmp_path / "run")


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
FULL_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
SMALLER = "choose a smaller `batch_size` or `image_size`"


@pytest.mark.parametrize(
    ("error", "changes", "remedy"),
    [
        (GPU_FULL, {}, "`accumulate` 2 computes the same batch in 2 parts"),
        (GPU_FULL, {"accumulate": 3, "batch_size": 24}, "`accumulate` 4 computes the same batch in 4 parts"),
        (FULL_MEMORY, {"accumulate": 8}, SMALLER),
        (FULL_MEMORY, {"loss": "aucm"}, SMALLER),
    ],
)
def test_too_little_memory_is_one_line_with_a_remedy(
    make_run: MakeRun, monkeypatch: Patch, error: RuntimeError, changes: dict[str, Any], remedy: str
) -> None:
    run = make_run("run", **changes)
    monkeypatch.setattr(torch.Tensor, "backward", Mock(side_effect=error))
    step = f"`batch_size` {run.config.batch_size} `accumulate` {run.config.accumulate} `image_size` 32"
    with refused(f"out of memory in a step with {step}; {remedy}", MemoryExhaustedError):
        train.train(run)


@pytest.mark.parametrize(
    ("changes", "looks", "message"),
    [
        ({}, 10**9, r"the loss is (nan|inf) at epoch 1, step \d+; try a lower `lr`"),
        ({}, 2, "the weights are not finite after step 1; try a lower `lr`"),  # stopped before the next loss
        ({"eval_every": 1, "ema": 0.0}, 10**9, "the network's scores are not finite; train with a lower `lr`, or .*"),
    ],
)
def test_what_an_absurd_rate_makes_infinite_is_named_and_not_saved(
    make_run: MakeRun, monkeypatch: Patch, changes: dict[str, Any], looks: int, message: str
) -> None:
    run = make_run("run", lr=1e30, **changes)
    monkeypatch.setattr(ranks, "_codes", Late(looks))
    with pytest.raises(DivergedError, match=f"^{message}$"):
        train.train(run)
    assert not (run.folder / "last.pt").exists()


def poison(monkeypatch: Patch, step: int) -> None:
    """At that step nan is the gradient of the stem's weights; the loss stays finite."""
    backward = iter(range(1, 10**9))

    def build(*arguments: Any) -> nn.Module:
        network = build_network(*arguments)
        weight = network.get_parameter("stem.0.weight")
        weight.register_hook(lambda gradient: gradient * math.nan if next(backward) == step else gradient)
        return network

    monkeypatch.setattr(predictor, "build_network", build)


@pytest.mark.parametrize(("check_steps", "looks", "saved"), [(2, 10**9, 2), (20, 5, None)])
def test_a_gradient_that_is_not_finite_stops_the_run_before_its_weights_are_saved(
    make_run: MakeRun, monkeypatch: Patch, check_steps: int, looks: int, saved: int | None
) -> None:
    """Also where a stop comes between two looks at the losses."""
    run = make_run("run", epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "CHECK_STEPS", check_steps)
        patch.setattr(train, "SAVE_SECONDS", -1.0)
        poison(patch, 3)
        patch.setattr(ranks, "_codes", Late(looks))
        with refused("the gradient's norm is nan at epoch 1, step 3; try a lower `lr`", DivergedError):
            train.train(run)
    last = run.folder / "last.pt"
    assert last.exists() == (saved is not None)
    if saved is not None:
        checkpoint = load_checkpoint(last)
        assert checkpoint["done"] == saved
        assert all(value.isfinite().all() for value in checkpoint["network"].values())
        other = make_run("other", epochs=1)
        train.train(run)
        train.train(other)
        assert_same_run(run.folder, other.folder)


def test_a_step_that_the_scaler_skips_is_no_divergence(make_run: MakeRun, monkeypatch: Patch) -> None:
    poison(monkeypatch, 2)
    run = make_run("run")
    data = open_training(run)
    state = train.start_state(run, data)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    batch = next(iter(train.stream_epoch(run, data, 0)))
    _, norm = train.train_step(run, state, batch, batch.mask.sum())
    gradients = [parameter.grad.flatten() for parameter in state.network.parameters() if parameter.grad is not None]
    assert torch.cat(gradients).norm() == pytest.approx(min(1.0, float(norm)), rel=1e-4)
    before = copy.deepcopy(state.network.state_dict())
    loss, norm = train.train_step(run, state, batch, batch.mask.sum())
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
def test_options_change_the_result(make_run: MakeRun, uninterrupted: Path, change: dict[str, Any]) -> None:
    changed = make_run("changed", **change)
    train_until(12, changed)  # in the second epoch
    before, after = (read_history(path)[0] for path in (uninterrupted, changed.folder))
    # The loss as well: with some processors' rounding, every AUROC of so few images stays as it was.
    assert (before["train_loss"], before["labels"]) != (after["train_loss"], after["labels"])
    if change.keys() & {"amp", "accumulate"}:
        assert before["train_loss"] == pytest.approx(after["train_loss"], rel=0.02)


@pytest.mark.parametrize(("policy", "outputs"), [("zeros", 14), ("multiclass", 28), ("best,Edema=multiclass", 15)])
def test_a_run_learns_and_is_measured_on_what_was_selected(make_run: MakeRun, policy: str, outputs: int) -> None:
    labels, where = ("Edema", "Pleural Effusion"), ("sex=Female", "age>=40")
    run = make_run("run", epochs=1, where=where, labels=labels, uncertain=policy)
    train.train(run)
    assert load_checkpoint(run.folder / "best.pt")["weights"]["head.2.weight"].shape == (outputs, 32)
    for split in ("dev", "valid"):
        report = read_evaluation(run.folder / f"evaluation-{split}.json")
        assert tuple(report.labels) == run.config.labels == labels
        table = read_table(run.shards.folders[0].path, run.manifest.split(split))
        facts, scores = table.to_pandas(), read_frame(run.folder / f"scores-{split}.arrow")
        chosen = ((facts.sex == "Female") & (facts.age >= 40)).to_numpy()
        assert scores["key"].tolist() == facts.key[chosen].tolist()
        target, mask = (cells[chosen] for cells in evaluation_targets(table, "zeros"))
        for label in labels:
            used, auroc = mask[:, LABELS.index(label)], report.get("auroc", label).value
            if auroc is not None:
                expected = roc_auc_score(target[used, LABELS.index(label)], scores[label][used])
                assert auroc == pytest.approx(expected, abs=1e-6)
    assert report.get("auroc", "Pleural Effusion").value is not None
    assert read_config(run.folder) == run.config
    card = (run.folder / "model-card.md").read_text()
    studies = facts[chosen].drop_duplicates(["patient", "study"]).groupby("patient").size()
    assert f"| valid | {chosen.sum()} | {studies.sum()} | {len(studies)} |" in card
    assert "A network that scores 2 findings on chest" in card


def test_a_selection_without_valid_is_reported_before_the_first_step(make_run: MakeRun, capsys: Capture) -> None:
    other = make_run("other")
    patients = read_table(other.shards.folders[0].path, other.manifest.split("valid"))["patient"].unique().to_pylist()
    run = make_run("run", epochs=1, where=tuple(f"patient!={patient}" for patient in patients))
    train.train(run)
    last, stderr = patients[-1], capsys.readouterr().err
    none = rf"^valid: condition 'patient!={last}' leaves none of \d+ images, whose values are {last}: "
    warning = re.search(f"{none}the report is without valid$", stderr, re.MULTILINE)
    assert warning is not None
    assert warning.end() < stderr.index("Epoch 1")
    assert (run.folder / "evaluation-dev.json").exists()
    assert not (run.folder / "evaluation-valid.json").exists()
    card = (run.folder / "model-card.md").read_text()
    assert "| dev |" in card
    assert "| valid |" not in card
    assert results.measure_run(run)["valid_auroc"] is None


def test_shards_without_a_dev_split_are_trained_on_with_patients_held_out(
    command: Command, sample_shards: Shards, one_epoch: Path, tmp_path: Path
) -> None:
    assert read_config(one_epoch).dev is None  # whose shards have a dev split
    source, manifest = sample_shards
    undivided, run = tmp_path / "undivided", tmp_path / "run"
    undivided.mkdir()
    for path in source.glob("[tv]*"):
        shutil.copy(path, undivided)
    splits = {name: split for name, split in manifest.splits.items() if name != "dev"}
    write_manifest(undivided, dataclasses.replace(manifest, splits=splits))
    words = ("--shards", undivided, "--run", run)
    assert command("train", *words, "--seed", 3, "--dev", 0.2) == 0
    table = read_frame(undivided / "train.arrow")
    held = table.patient.map(lambda patient: hash_fraction("dev", 3, patient) < 0.2)
    assert 0 < held.sum() < len(held) / 2
    assert read_frame(run / "scores-dev.arrow")["key"].tolist() == table.key[held].tolist()
    dev = (run / "evaluation-dev.json").read_bytes()
    (run / "evaluation-dev.json").unlink()
    (run / "calibration.json").unlink()
    for split in ("train", "dev", "valid"):
        assert command("evaluate", *words, "--split", split) == 0
    assert read_frame(run / "scores-train.arrow")["key"].tolist() == table.key[~held].tolist()
    assert (run / "evaluation-dev.json").read_bytes() == dev
    card = (run / "model-card.md").read_text()
    assert f"| train | {(~held).sum()} |" in card
    assert f"| dev | {held.sum()} |" in card
    with pytest.raises(DataError, match=r"run of another configuration: dev is 0.2, not 0.05"):
        command("train", *words, "--seed", 3, "--lr", 1e-4)  # the default share
    with refused(f"{undivided}: `dev` 1e-09 leaves no patient of train for dev; raise it"):
        command("train", "--shards", undivided, "--run", tmp_path / "none", "--dev", 1e-9)
    message = r"^--seed decides what dev's AUROC is of, .*: give one value, or shards with a dev split$"
    with pytest.raises(click.UsageError, match=message):  # each seed would hold out others
        command("sweep", "--shards", undivided, "--sweep", tmp_path / "none", "--seed", "0 1")


def test_limit_and_balance_choose_what_an_epoch_draws(make_run: MakeRun) -> None:
    run = make_run("run", limit=40, balance="Support Devices", epochs=1, batch_size=4)
    chosen, _, labels, weights, _ = open_training(run)
    assert weights is not None
    table = chosen.split.table.take(chosen.rows).to_pandas()
    others = chosen.split.table.to_pandas().drop(index=chosen.rows).patient
    assert 30 < len(chosen.rows) <= 40
    assert not set(table.patient) & set(others)  # patients are in or out as a whole
    positive = labels.target[chosen.rows, LABELS.index("Support Devices")] >= 0.5
    assert weights[positive].sum() == pytest.approx(weights[~positive].sum())
    train.train(run)
    config = dataclasses.replace(run.config, balance_over=("sex", "projection"))
    over = training_weights(dataclasses.replace(run, config=config), labels, chosen)
    assert over is not None
    strata = table[["sex", "projection"]].fillna("blank").assign(positive=positive, weight=over)[over > 0]
    sums = strata.groupby(["sex", "projection", "positive"]).weight.sum()
    np.testing.assert_allclose(*sums.unstack().to_numpy().T)
    expected = r"^`balance` Support Devices `balance_over` sex,hospital: no column 'hospital'; there are key, "
    with pytest.raises(DataError, match=expected):
        open_training(make_run("wrong", balance="Support Devices", balance_over=("sex", "hospital")))
    with refused("`balance` No Finding: no negatives to balance in train"):
        open_training(make_run("other", balance="No Finding", blank="ignore"))


def test_damaged_images_end_the_run_unless_they_are_allowed(make_run: MakeRun, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(make_run("other").shards.folders[0].path, tmp_path / "shards"))
    run = dataclasses.replace(make_run("run", epochs=1), shards=dataset.Shards(shards))
    split = open_rows(run, "dev").split
    path = shards / split.shards[split.shard[3]].shard.file
    flip(path, split.offset[3] + 100)
    for max_bad in (0.0, 0.05):  # of 14 images one is more
        message = f"{path.name}: sample {split.table['key'][3]}: its bytes do not match the checksum in the index"
        with refused(message):
            train.train(dataclasses.replace(run, config=dataclasses.replace(run.config, max_bad=max_bad)))
        shutil.rmtree(run.folder)
    train.train(dataclasses.replace(run, config=dataclasses.replace(run.config, max_bad=0.1)))
    keys = split.table["key"].to_pylist()
    assert read_frame(run.folder / "scores-dev.arrow")["key"].tolist() == keys[:3] + keys[4:]
    assert load_checkpoint(run.folder / "last.pt")["bad"] == {"rows": []}  # of train


def test_a_batch_in_parts_gives_the_same_gradients(make_run: MakeRun) -> None:
    """With a network without BatchNorm, whose statistics are those of a part."""
    weights = []
    for accumulate in (1, 4):
        run = make_run(f"run{accumulate}", accumulate=accumulate, amp="off")
        data = open_training(run)
        state = train.start_state(run, data)
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, len(LABELS)))
        state.network, state.forward, state.ema = network, network, copy.deepcopy(network)
        state.optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        batch = next(iter(train.stream_epoch(run, data, 0)))
        batch.mask[3:9] = False  # parts with different numbers of cells
        train.train_step(run, state, batch, batch.mask.sum())
        weights.append(network.get_parameter("1.weight").detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("loss", ["bce", pytest.param("aucm", marks=pytest.mark.soak)])
def test_what_draws_or_remembers_resumes_exactly_between_evaluations(
    make_run: MakeRun, monkeypatch: Patch, loss: str
) -> None:
    """A network with stochastic depth, which draws, and a loss that remembers."""

    def build(*arguments: Any) -> nn.Module:
        network = build_network(*arguments)
        network.register_forward_hook(lambda module, _, logits: stochastic_depth(logits, 0.2, "row", module.training))
        return network

    monkeypatch.setattr(predictor, "build_network", build)
    options = {"epochs": 1, "eval_every": 4, "batch_size": 12, "loss": loss}
    run = make_run("run", **options)
    train.train(run)
    train_until(3, make_run("parts", **options))
    train_until(4, make_run("parts", **options))
    train.train(make_run("parts", **options))
    assert_same_run(run.folder.with_name("parts"), run.folder)
    assert [(line["step"], line["epoch"]) for line in read_history(run.folder)] == [(4, 0.5), (8, 1.0)]


@pytest.mark.soak  # compiles for seconds
def test_a_compiled_network_learns_the_same(make_run: MakeRun, monkeypatch: Patch) -> None:
    """Captured and differentiated by torch.compile, without the minute that its C++ compiler takes."""
    calls = Mock(side_effect=partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", calls)
    plain, compiled = runs = [make_run(f"run{number}", epochs=1, compile=number == 1) for number in range(2)]
    train.train(plain)
    assert not calls.called
    train.train(compiled)
    assert calls.call_count == 1
    losses = [read_history(run.folder)[0]["train_loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    names, others = (load_checkpoint(run.folder / "best.pt")["weights"].keys() for run in runs)
    assert names == others


def test_patience_ends_a_run_that_gets_no_better(make_run: MakeRun) -> None:
    run = make_run("run", epochs=50, lr=1e-9, ema=1.0, eval_every=1, patience=3)  # the average stays as it is
    train.train(run)
    scores = [results.choice_score(line, "all") or 0 for line in read_history(run.folder)]
    assert len(scores) < 50
    assert scores.index(max(scores)) == len(scores) - 4


@pytest.fixture
def random_dev(monkeypatch: Patch) -> None:
    """Scores of dev during training that are random numbers: which evaluation is best depends on no processor."""
    evaluations = itertools.count()

    def draw(*arguments: Any) -> tuple[Scored, pa.Table]:
        scored, table = score_split(*arguments)
        scores = np.random.default_rng(next(evaluations)).random(scored.scores.shape)
        return scored._replace(scores=scores), table

    monkeypatch.setattr(train, "score_split", draw)


@pytest.mark.usefixtures("random_dev")
def test_a_checkpoint_is_chosen_by_the_labels_asked_for(make_run: MakeRun, capsys: Capture, monkeypatch: Patch) -> None:
    run = make_run("run", epochs=2, eval_every=1, choose_by="Support Devices,Edema")
    show_left = Mock(side_effect=(f"; {number}" for number in itertools.count(1)))
    monkeypatch.setattr(train, "show_left", show_left)
    train.train(run)
    lines = read_history(run.folder)
    scores = [(line["labels"]["Edema"] + line["labels"]["Support Devices"]) / 2 for line in lines]
    macro = [results.choice_score(line, "all") or 0 for line in lines]
    best, first = load_checkpoint(run.folder / "best.pt"), scores.index(max(scores))
    assert best["dev_auroc"] == max(scores)
    assert best["epoch"] == lines[first]["epoch"]
    assert first != macro.index(max(macro))
    printed = f": dev AUROC {max(scores):.4f} (Edema, Support Devices)  (best); {first + 1}\n"
    assert printed in capsys.readouterr().err
    left = [shown.args[0] > 0 for shown in show_left.call_args_list]
    assert left == [True] * (len(lines) - 1) + [False]  # of the time for all epochs
    events = read_events(run.folder)
    for tag, expected in {"dev/choice_auroc": scores, "dev/macro_auroc": macro}.items():
        assert [point.value for point in events.Scalars(tag)] == pytest.approx(expected)
    card = (run.folder / "model-card.md").read_text()
    assert "The checkpoint is the one with the best AUROC on dev: Edema, Support Devices." in card
    figures = results.measure_run(run)
    assert figures["same_labels"] == 2
    dev = read_evaluation(run.folder / "evaluation-dev.json")
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
    run = Mock(config=Config(patience=2, choose_by=choose_by))
    assert train.is_out_of_patience(run, Mock(history=history)) == waits


def test_a_run_starts_from_the_weights_it_is_given(command: Command, tmp_path: Path, capsys: Capture) -> None:
    assert command("train", "--run", tmp_path / "first", "--lr", 1e-2) == 0
    best = tmp_path / "first" / "best.pt"
    assert command("train", "--run", tmp_path / "second", "--init", best.parent, "--lr", 1e-12, "--seed", 1) == 0
    assert re.search(rf"{best}: loaded \d+ tensors; fresh: nothing\n", capsys.readouterr().err)
    heads = [load_checkpoint(tmp_path / run / "best.pt")["weights"]["head.2.weight"] for run in ("first", "second")]
    torch.testing.assert_close(*heads)
    with pytest.raises(CheckpointError, match=r"not weights of this network"):
        command("train", "--run", tmp_path / "third", "--init", best, "--arch", "resnet18")


def test_logs_tell_what_the_run_did_and_with_what(make_run: MakeRun, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(train, "say_once", console.say)  # whatever other tests have printed
    monkeypatch.setattr(sys, "argv", ["train.py", "--shards", "https://me:secret@host/set?token=secret"])
    run = make_run("run", epochs=1)
    train.train(run)
    few = f"{run.shards}: no label has 10 patients of each class on dev, so the choice of checkpoint is arbitrary; "
    assert few in capsys.readouterr().err
    events, (line,) = read_events(run.folder), read_history(run.folder)
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {points[-1].step for points in curves.values()} == {line["step"]}
    values = {tag: points[-1].value for tag, points in curves.items()}
    assert values["dev/macro_auroc"] == pytest.approx(results.choice_score(line, "all"))
    assert "dev/choice_auroc" not in values
    for split in ("dev", "valid"):
        evaluation = read_evaluation(run.folder / f"evaluation-{split}.json")
        aurocs = {f"auroc_{split}/{label}": evaluation.get("auroc", label).value for label in evaluation.labels}
        own = {tag: value for tag, value in values.items() if tag.startswith(f"auroc_{split}/")}
        assert own == pytest.approx({tag: value for tag, value in aurocs.items() if value is not None})
    assert values["train/loss"] == pytest.approx(line["train_loss"])
    scored = of_run(run).score(run, "dev").images
    truth, score = (array[scored.mask] for array in (scored.target, scored.scores))
    assert line["dev_loss"] == pytest.approx(log_loss(truth, score)) == pytest.approx(values["dev/loss"])
    assert 0.3 < values["train/macro_auroc"] < 0.8  # an untrained network's, of a few images
    environment = json.loads((run.folder / "environment.jsonl").read_text())
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


def test_a_finished_run_gets_more_epochs(command: Command, run: Path, tmp_path: Path, capsys: Capture) -> None:
    other, new = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "new"
    before = (run / "metrics.jsonl").read_text()
    steps = json.loads(before)["step"]

    def extend(path: Path, epochs: int = 3) -> int:
        return command("train", "--run", path, "--amp", "off", "--epochs", epochs)

    assert extend(run) == 0
    now = f"{scheduled_lr(1e-4, steps, 3 * steps):.2g}"
    warning = f"the next follow the schedule of 3 from {now} down, so the result is not that of 3 epochs at once"
    assert warning in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text().startswith(before)
    rates = {point.step: point.value for point in read_events(run).Scalars("train/lr")}
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


def test_the_curve_of_the_loss_is_of_the_steps_since_its_last_point(make_run: MakeRun, monkeypatch: Patch) -> None:
    curves = []
    for every in (1, 4):
        monkeypatch.setattr(train, "CHECK_STEPS", every)
        run = make_run(f"every{every}", epochs=1)
        train.train(run)
        curves.append({point.step: point.value for point in read_events(run.folder).Scalars("train/loss")})
    each, windows = curves
    assert list(each) == [1, 2, 3, 4, 5, 6]
    assert windows == pytest.approx({4: sum(each[step] for step in (1, 2, 3, 4)) / 4, 6: (each[5] + each[6]) / 2})
    assert read_history(run.folder)[0]["train_loss"] == pytest.approx(sum(each.values()) / 6)


def test_a_full_disk_under_tensorboard_is_named_in_one_line(
    make_run: MakeRun, monkeypatch: Patch, capfd: Capture
) -> None:
    run, full = make_run("run", epochs=1), Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with monkeypatch.context() as patch:
        for name in ("write", "append"):
            patch.setattr(LocalFileSystem, name, full)
        path = run.folder / "tensorboard"
        with refused(f"{path}: cannot be written: No space left on device; make room, and run it again"):
            train.train(run)
    assert "Traceback" not in capfd.readouterr().err
    train.train(run)


def test_wandb_and_mlflow_get_the_curves_of_a_run_and_of_its_resumption(
    command: Command, monkeypatch: Patch, tmp_path: Path, capfd: Capture
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
    options, identity = first.kwargs, f"my-run-{hash_file(run / 'config.json')[:8]}"
    named = {"project": "films", "id": identity, "dir": run, "sync_tensorboard": True}
    assert options | named == options
    assert json.loads(json.dumps(options["config"])) == json.loads((run / "config.json").read_text())
    mlflow.set_experiment.assert_called_with("studies")
    assert mlflow.start_run.call_args_list == [call(run_id, run_name=identity) for run_id in (None, "the first")]
    assert mlflow.search_runs.call_args.kwargs["filter_string"] == f"attributes.run_name = '{identity}'"
    assert mlflow.log_params.call_args.args[0] == options["config"]
    (line,) = read_history(run)
    assert call("dev/loss", line["dev_loss"], line["step"]) in mlflow.log_metric.call_args_list
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with refused(f"{name} is missing: pip install 'chexpert-pipeline[{name}]'"):
            command("train", "--run", run, f"--{name}", "films")


def test_thresholds_and_studies_are_as_asked_for(command: Command, trained: Run) -> None:
    path = trained.folder / "evaluation-valid.json"
    first = read_evaluation(path)
    assert command("evaluate", "--run", trained.folder, "--sensitivity", 0.5, "--study", "mean") == 0
    second = read_evaluation(path)
    dev = of_run(trained).score(trained, "dev").images
    written = json.loads((trained.folder / "calibration.json").read_text())
    assert written == json.loads(json.dumps(calibrate(LABELS, dev, 0.5, "mean")))
    before, after = (
        [row.value for row in evaluation.select(metric="threshold", group="sensitivity", level="image")]
        for evaluation in (first, second)
    )
    assert before != after == [written["image"][label]["thresholds"]["sensitivity"] for label in LABELS]
    assert second.get("auroc", "macro") == first.get("auroc", "macro")
    assert command("evaluate", "--run", trained.folder) == 0
    assert read_evaluation(path) == first


def test_results_on_other_shards_leave_the_runs_own_alone(
    command: Command, trained: Run, tmp_path: Path, capfd: Capture
) -> None:
    run, others, path = trained.folder, tmp_path / "others", trained.folder / "evaluation-valid.json"
    own = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    shutil.copytree(trained.shards.folders[0].path, others)
    with (others / "manifest.json").open("a") as file:
        file.write("\n")
    words = ("evaluate", "--run", run, "--shards", others)
    assert command(*words) == 0
    name = f"valid-{hash_file(others / 'manifest.json')[:8]}"
    new = {path.name for path in run.iterdir() if path.is_file() and path not in own}
    assert new == {f"evaluation-{name}.json", f"scores-{name}.arrow", f"report-{name}.html"}
    assert {path: path.read_bytes() for path in own} == own
    evaluation, plain = read_evaluation(run / f"evaluation-{name}.json"), read_evaluation(path)
    assert "own" not in plain.head
    assert evaluation.get("auroc_difference", "Edema", group=OWN).value == 0  # the same images
    assert evaluation.get("auroc", "Edema", group=OWN).value == plain.get("auroc", "Edema").value
    assert "AUROC on these images and on the run's own valid" in capfd.readouterr().out
    path.unlink()
    assert command(*words) == 0
    note = f"{path} is missing, so there is no comparison with it; first run: python -m train evaluate --run {run}"
    assert f"{note}\n" in capfd.readouterr().err
    path.write_text('{"labels": {}}')
    with pytest.raises(DataError, match=f"^{path}: not an evaluation: 'rows'; write it again"):
        command(*words)
    with pytest.raises(DataError, match=f"^{others}: thresholds are chosen on dev of the shards that"):
        command(*words, "--sensitivity", 0.8)


def test_runs_with_other_policies_are_measured_on_the_same_cells(make_run: MakeRun, uninterrupted: Path) -> None:
    other = make_run("other", epochs=1, uncertain="ones", blank="ignore")
    train.train(other)
    counts = []
    for run in (uninterrupted, other.folder):
        rows = read_evaluation(run / "evaluation-dev.json").select(metric="auroc", level="image", group=None)
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
def test_a_configuration_that_no_run_has_is_named(run: Path, change: dict[str, Any], message: str) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=re.escape(f"{path}: damaged, or of another version: {message}")):
        read_config(run)


@pytest.mark.parametrize(("name", "key"), [("best.pt", "pixels"), ("last.pt", "scaler")])
def test_checkpoints_that_do_not_fit_their_run_are_named(command: Command, trained: Run, name: str, key: str) -> None:
    path = trained.folder / name
    saved = load_checkpoint(path)
    for damaged, reason in (
        ({other: value for other, value in saved.items() if other != key}, f"'{key}'"),
        (saved | {"weights": {}, "network": {}}, "Error(s) in loading state_dict for ResCNN"),
        (saved | {"pixels": {"mean": 0, "std": "wide"}, "done": "now"}, ""),
    ):
        save_checkpoint(path, damaged)
        message = re.escape(f"{path}: does not fit this run's configuration: {reason}")
        with pytest.raises(CheckpointError, match=f"^{message}"):
            command("evaluate", "--run", trained.folder) if name == "best.pt" else train.train(trained)


def test_a_damaged_last_checkpoint_comes_with_what_to_do(make_run: MakeRun) -> None:
    run = make_run("run", epochs=1)
    train_until(2, run)
    path = run.folder / "last.pt"
    content, remedy = path.read_bytes(), "remove it to train from the beginning"
    for instead in ("", f", or start another `run` with `init` {run.folder}"):
        for damaged in (content[:-100], b""):
            path.write_bytes(damaged)
            with refused(f"{path}: damaged, or not a checkpoint of this program; {remedy}{instead}", CheckpointError):
                train.train(run)
        if not instead:
            path.unlink()  # as the message says
            train.train(run)


@pytest.mark.parametrize("name", ["calibration.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ['{"epoch": 1', "[1]", "[" * 100_000])
def test_damaged_results_are_named(command: Command, trained: Run, name: str, content: str) -> None:
    (trained.folder / name).write_text(content)
    with pytest.raises(DataError, match=f"^{trained.folder / name}: damaged: "):
        command("evaluate", "--run", trained.folder)


def test_a_signal_is_kept_while_a_rank_waits_for_another(monkeypatch: Patch) -> None:
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


def test_the_average_begins_with_the_weights_of_the_first_rank(make_run: MakeRun) -> None:
    class Second(Ranks):
        def average_gradients(self, network: nn.Module, sync_bn: bool) -> nn.Module:
            network.load_state_dict({name: value * 0 for name, value in network.state_dict().items()})
            return network

    run = dataclasses.replace(make_run("run"), ranks=Second())
    state = train.start_state(run, open_training(run))
    assert not any(weight.any() for weight in state.ema.parameters())


def test_thresholds_go_with_the_weights_they_were_chosen_for(trained: Run) -> None:
    (trained.folder / "last.pt").unlink()
    train_until(10, trained)
    assert not (trained.folder / "calibration.json").exists()


@pytest.mark.usefixtures("random_dev")
def test_the_last_weights_are_kept_if_asked_for(make_run: MakeRun) -> None:
    run = make_run("run", keep="last", epochs=1, eval_every=2)
    train.train(run)
    ema, best = load_checkpoint(run.folder / "last.pt")["ema"], load_checkpoint(run.folder / "best.pt")
    scores = [line["macro_auroc"] for line in read_history(run.folder)]
    assert scores[-1] < max(scores)  # or the test would show nothing
    assert best["dev_auroc"] == pytest.approx(scores[-1])
    assert all(torch.equal(best["weights"][name], value) for name, value in ema.items())
    assert "The checkpoint is the one of the last evaluation." in (run.folder / "model-card.md").read_text()
