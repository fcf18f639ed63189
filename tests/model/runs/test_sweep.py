"""The engine with a function that trains in no time, and the command with the trainer."""

import csv
import dataclasses
import itertools
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import train
from model.predict import DivergedError, MemoryExhaustedError
from model.ranks import Stopped
from model.runs import sweep as sweeps
from model.runs.run import Run
from model.runs.sweep import Figures, Point, Sweep, TrainPoint, Trial, begin_trial, list_trials, open_sweep, run_sweep
from pipeline import DataError
from pipeline.labels import LABELS
from pipeline.measure.evaluation import read_evaluation
from tests.conftest import Capture, Round, refused
from tests.training import Command, call_train, stop_after

LR, WD = (1e-4, 1e-3, 1e-2), (1e-5, 0.0)
MANY = [round(1e-3 * step, 6) for step in range(1, 13)]


def make_sweep(folder: Path, **changes: Any) -> Sweep:
    values = {"lr": LR, "weight_decay": WD, "arch": ("rescnn",)}
    sweep = Sweep(folder, values, {"epochs": 4, "seed": 0}, "grid", trials=0)
    return dataclasses.replace(sweep, **changes)


def score(point: Point) -> float:
    """Best at the second learning rate."""
    return float(0.9 - abs(point["lr"] - 1e-3) - point["weight_decay"])


def train_point(point: Point, run: Path) -> Figures:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "log").open("a") as log:
        log.write("trained\n")
    return {"dev_auroc": score(point), "train_auroc": 0.95}


def run(sweep: Sweep, train: TrainPoint = train_point) -> None:
    open_sweep(sweep)
    run_sweep(sweep, train)


def test_a_grid_trains_every_combination_once(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    run(sweep)
    first, *_ = trials = list_trials(sweep)
    points = [{"lr": lr, "weight_decay": wd} for lr, wd in itertools.product(LR, WD)]
    assert [trial.parameters for trial in trials] == points  # arch does not vary
    figures = [{"dev_auroc": score(point), "train_auroc": 0.95} for point in points]
    assert [(trial.state, trial.figures) for trial in trials] == [("complete", each) for each in figures]
    assert first.folder == tmp_path / "trials" / "lr=0.0001-weight_decay=1e-05"
    assert {trial.folder for trial in trials} == {path for path in (tmp_path / "trials").iterdir() if path.is_dir()}
    run(sweep)  # nothing is left to do
    assert list_trials(sweep) == trials
    assert (first.folder / "log").read_text() == "trained\n"


def test_values_can_be_added_and_other_options_are_refused(tmp_path: Path) -> None:
    run(make_sweep(tmp_path, values={"lr": LR[:1], "weight_decay": WD}))
    wider = make_sweep(tmp_path, values={"lr": LR, "weight_decay": WD})
    run(wider)
    assert [trial.parameters for trial in list_trials(wider)] == wider.grid
    with refused(f"{tmp_path} is a sweep under other options: epochs is 4, not 5; choose another `sweep`"):
        run(make_sweep(tmp_path, options={"epochs": 5, "seed": 0}))


def test_a_stopped_trial_is_done_again_and_a_diverged_one_is_not(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    calls: list[Point] = []

    def stop_and_fail(point: Point, run: Path) -> Figures:
        calls.append(point)
        if len(calls) == 3:
            raise Stopped(143)
        if point["lr"] == 1e-2:
            raise (DivergedError("the loss is nan") if point["weight_decay"] else MemoryExhaustedError("out of memory"))
        return train_point(point, run)

    with pytest.raises(Stopped):
        run(sweep, stop_and_fail)
    run(sweep, stop_and_fail)
    assert Counter(point["lr"] for point in calls) == {1e-4: 2, 1e-3: 3, 1e-2: 2}
    outcomes = [(trial.state, trial.error) for trial in list_trials(sweep)]
    assert outcomes == [("complete", None)] * 4 + [("failed", "the loss is nan"), ("failed", "out of memory")]


@pytest.mark.parametrize("error", [DataError("the disk is full"), ValueError("a defect")])
def test_an_error_ends_the_sweep_and_its_trial_is_done_again(tmp_path: Path, error: Exception) -> None:
    sweep = make_sweep(tmp_path)
    with refused(str(error), type(error)):
        run(sweep, Mock(side_effect=error))
    run(sweep)
    assert [trial.state for trial in list_trials(sweep)] == ["complete"] * 6


def test_a_process_waits_for_the_others_until_it_is_stopped(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, values={"lr": (1e-3,), "weight_decay": (0.0,)})
    open_sweep(sweep)
    with ExitStack() as lock:
        assert begin_trial(sweep, lock)[0] is not None
        stop_after(2, lambda: run(sweep))
        assert [trial.state for trial in list_trials(sweep)] == ["unfinished"]
    run(sweep)  # without its lock, the trial has lost its process
    assert [(trial.number, trial.state) for trial in list_trials(sweep)] == [(0, "complete")]


def test_a_lost_trial_of_a_value_that_was_taken_back_is_left_alone(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, values={"lr": LR[:2]})
    open_sweep(sweep)
    with ExitStack() as lock:
        begin_trial(sweep, lock)
    run(make_sweep(tmp_path, values={"lr": LR[1:2]}), lambda *_: {"dev_auroc": 0.5})
    outcomes = [(trial.state, trial.point["lr"]) for trial in list_trials(sweep)]
    assert outcomes == [("unfinished", 1e-4), ("complete", 1e-3)]


@pytest.mark.soak
def test_a_search_stays_between_the_values_and_repeats_itself(tmp_path: Path) -> None:
    values: dict[str, tuple[object, ...]] = {"lr": (1e-4, 1e-2), "weight_decay": (0.0, 0.1)}
    values |= {"arch": ("rescnn", "resnet18"), "seed": (2**63 - 1,)}
    tried = []
    for name in ("a", "b"):
        sweep = make_sweep(tmp_path / name, sampler="tpe", trials=15, values=values, options={"epochs": 4})
        run(sweep)
        tried.append([(trial.parameters, trial.dev) for trial in list_trials(sweep)])
    assert tried[0] == tried[1]
    points = [point for point, _ in tried[0]]
    assert len(points) == len({tuple(point.values()) for point in points}) == 15
    assert all(1e-4 <= point["lr"] <= 1e-2 and 0 <= point["weight_decay"] <= 0.1 for point in points)
    assert {point["arch"] for point in points} == {"rescnn", "resnet18"}
    more = dataclasses.replace(sweep, trials=17)
    run(more)
    assert [(trial.parameters, trial.dev) for trial in list_trials(more)][:15] == tried[0]
    assert len(list_trials(more)) == 17


@pytest.mark.parametrize("text", ["{", "{}", '{"point": {"lr": 1, "weight_decay": 0}, "color": "red"}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    sweep = make_sweep(tmp_path)
    open_sweep(sweep)
    record = sweep.folder / "trials" / "lr=0.1.json"
    record.write_text(text)
    with pytest.raises(DataError, match=f"^{re.escape(str(record))}: damaged"):
        list_trials(sweep)


def test_a_search_ends_when_its_points_are_used_up(tmp_path: Path, capsys: Capture) -> None:
    values = {"batch_size": (16, 32), "arch": ("rescnn", "resnet18"), "lr": (1e-3,), "weight_decay": (0.0,)}
    sweep = make_sweep(tmp_path, sampler="tpe", trials=860, values=values)
    run(sweep)
    points = [tuple(trial.parameters.values()) for trial in list_trials(sweep)]
    assert sorted(points) == list(itertools.product((16, 32), ("rescnn", "resnet18")))
    assert f"{sweep.folder}: all points are tried: 4 trials, not 860" in capsys.readouterr().err


def join(workers: list[ForkProcess]) -> list[int | None]:
    for worker in workers:
        worker.join(timeout=240)
    return [worker.exitcode for worker in workers]


def start_workers(sweep: Sweep, seconds: float, count: int) -> list[ForkProcess]:
    def slow(point: Point, run: Path) -> Figures:
        time.sleep(seconds)
        return train_point(point, run)

    # Forked, because to import torch takes longer than the sweep.
    workers = [get_context("fork").Process(target=run, args=(sweep, slow)) for _ in range(count)]
    for worker in workers:
        worker.start()
    return workers


@pytest.mark.soak
def test_processes_killed_and_restarted_train_every_point_once(rounds: Iterator[Round]) -> None:
    for round_ in rounds:
        dice, folder = round_.dice, round_.folder / "sweep"
        trials = dice.choice([0, 0, dice.randint(2, 9)])
        values: dict[str, tuple[object, ...]] = {"lr": tuple(dice.sample(MANY, dice.randint(2, 6)))}
        values |= {"weight_decay": WD[: dice.randint(1, 2)], "arch": ("rescnn", "resnet18")[: dice.randint(1, 2)]}
        sweep = make_sweep(folder, values=values, sampler="tpe" if trials else "grid", trials=trials)
        seconds, kills = dice.choice([0, 0.02, 0.15]), 0
        print(f"{values}, {trials} trials of {seconds} s")
        for _ in range(dice.randint(0, 4)):
            workers = start_workers(sweep, seconds, dice.randint(1, 3))
            while not (folder / "trials").exists() and any(worker.is_alive() for worker in workers):
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.4))
            for worker in dice.sample(workers, dice.randint(0, len(workers))):
                worker.kill()
            codes = join(workers)
            assert set(codes) <= {0, -signal.SIGKILL}
            kills += codes.count(-signal.SIGKILL)
        assert join(start_workers(sweep, seconds, 3)) == [0, 0, 0]
        points = {tuple(trial.point.values()): trial for trial in list_trials(sweep)}
        assert len(points) == len(list_trials(sweep)) == (trials or len(sweep.grid))
        assert all(trials or trial.point in sweep.grid for trial in points.values())
        for trial in points.values():
            assert (trial.state, trial.dev) == ("complete", score(trial.point))
        trained = [len((trial.folder / "log").read_text().splitlines()) for trial in points.values()]
        assert min(trained) == 1
        assert sum(trained) <= len(trained) + kills  # what a killed process had trained and not recorded
        for _ in range(kills):
            round_.survived("SIGKILL of a sweep's process")


def test_trials_are_the_runs_that_train_makes(command: Command, tmp_path: Path, capsys: Capture) -> None:
    sweep, png, given = tmp_path / "sweep", tmp_path / "png", ("--augment", "none")
    words = ("--sweep", sweep, "--lr", "1e-3 1e-2", "--seed", "3 4", "--weight-decay", "0.01", "--png", png)
    assert command("sweep", *words, *given) == 0
    output = capsys.readouterr()
    for number, rest in ((0, r"; 3 trials to go(  .* left)?"), (3, "")):
        assert re.search(rf"^Trial {number}: dev AUROC 0\.\d{{4}} \(.*\){rest}$", output.err, re.MULTILINE)
    rows = {(row["lr"], row["seed"]): row for row in csv.DictReader((sweep / "sweep.csv").read_text().splitlines())}
    assert list(rows) == list(itertools.product(("0.001", "0.01"), "34"))
    dev = {point: float(row["dev_auroc"]) for point, row in rows.items()}
    ranked = [rows[point] for point in sorted(rows, key=lambda point: -dev[point])]
    counted, *table = output.out.splitlines()
    assert [line.split()[1] for line in table if re.match(r"│\s+\d", line)] == [row["number"] for row in ranked]
    assert counted == f"{sweep / 'report.html'}: 4 trials complete"
    assert f"trial {ranked[0]['number']} is the best: {sweep / 'trials' / ranked[0]['run']}" in table
    assert command("train", "--run", tmp_path / "run", "--lr", "1e-2", "--seed", 3, *given) == 0
    trial = sweep / "trials" / "lr=0.01-seed=3"
    for name in ("config.json", "metrics.jsonl", "evaluation-valid.json", "scores-dev.arrow"):
        assert (trial / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    (line,) = (trial / "metrics.jsonl").read_text().splitlines()
    row = rows["0.01", "3"]
    assert float(row["dev_auroc"]) == pytest.approx(json.loads(line)["macro_auroc"], abs=1e-6)
    evaluations = [read_evaluation(trial / f"evaluation-{split}.json") for split in ("dev", "valid")]
    some = [label for label in LABELS if not evaluations[0].get("auroc", label).few] or LABELS
    same = [label for label in some if None not in {each.get("auroc", label).value for each in evaluations}]
    assert int(row["same_labels"]) == len(same)  # all of them have both classes in train
    for evaluation, name in zip(evaluations, ("dev_same_auroc", "valid_auroc"), strict=True):
        mean = sum(evaluation.get("auroc", label).value or 0 for label in same) / len(same)
        assert float(row[name]) == pytest.approx(mean, abs=1e-6)
    assert float(row["valid_low"]) < float(row["valid_auroc"]) < float(row["valid_high"])
    # Settings by their mean over seeds, and the ensemble of the best one's runs.
    means = {lr: (dev[lr, "3"] + dev[lr, "4"]) / 2 for lr in ("0.001", "0.01")}
    best, other = sorted(means, key=lambda lr: -means[lr])
    low, high = sorted((dev[best, "3"], dev[best, "4"]))
    page = (sweep / "report.html").read_text()
    cells = f"<td>2</td><td>{means[best]:.3f}</td><td>{(high - low) / 2**0.5:.3f}</td>"
    cells += f"<td>{low:.3f} to {high:.3f}</td><td>–</td>"
    assert f"<tr><th>learning rate {best}</th>{cells}" in page
    assert f"<td>{means[best] - means[other]:.3f} " in page.split(f"<th>learning rate {other}</th>")[1]
    folders = " ".join(f"--run {sweep / 'trials' / row['run']}" for row in ranked if row["lr"] == best)
    ensemble = f"evaluate {folders} --out {sweep / 'ensemble'}"
    assert output.err.endswith(f"next: python -m train {ensemble}\n")
    assert f"<code>python -m train {ensemble}</code>" in page
    assert {path.name for path in png.iterdir()} == {"dev-auroc-by-lr.png", "learning-curves.png"}
    with pytest.raises(DataError, match=r"augment is none, not affine; choose another `sweep`$"):
        command("sweep", *words)


def test_settings_are_compared_as_runs_are(command: Command, trained: Run, run: Path) -> None:
    """With `evaluate --against`, whose differences are paired by patient."""
    trials = [
        Trial(each, {"epochs": n}, n, {}, "complete", figures={"dev_auroc": 0.9 - n / 10})
        for n, each in enumerate((trained.folder, run))
    ]
    best, other = sweeps.compare_settings(trained, trials)
    assert [setting.name for setting in (best, other)] == ["epochs 0", "epochs 1"]
    assert command("evaluate", "--run", trained.folder, "--split", "dev", "--against", run) == 0
    evaluation = read_evaluation(trained.folder / f"evaluation-dev-against-{run.name}.json")
    row = evaluation.get("auroc_difference", evaluation.best_mean(), scorer=str(run))
    assert other.less == pytest.approx({"value": row.value, "low": row.low, "high": row.high})


def test_an_error_in_one_trial_leaves_a_report_of_the_others(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_all = train.train

    def fail(run: Run) -> None:
        if run.config.lr == 1e-2:
            raise DataError("the disk is full")
        train_all(run)

    monkeypatch.setattr(train, "train", fail)
    with refused("the disk is full"):
        command("sweep", "--sweep", tmp_path, "--lr", "1e-3 1e-2", "--augment", "none")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["lr"] for row in rows if row["state"] == "complete"] == ["0.001"]
    assert (tmp_path / "report.html").exists()


def test_options_can_be_checked_before_there_are_shards(tmp_path: Path) -> None:
    for name, option in (("train", "--run"), ("sweep", "--sweep")):
        assert call_train(name, "--shards", "nowhere", option, tmp_path / "new", "--lr", 1e-3, "--check") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_whose_trials_all_diverge_has_failed(command: Command, tmp_path: Path, capsys: Capture) -> None:
    assert command("sweep", "--sweep", tmp_path, "--lr", "1e30") == 1
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'report.html'}: 0 trials complete, 1 failed\n"
    assert "Trial 0: failed: the " in output.err
    assert command("sweep", "--sweep", tmp_path, "--lr", "1e30") == 1  # and is not tried again
    assert "Trial 0" not in capsys.readouterr().err
