"""Parameter values → trials, each an ordinary run, shared by any number of processes and machines.

In: the values, and a function that trains one point. Out: in FOLDER/trials a run folder per trial and beside it its
record (`Trial` as JSON). The records are all that processes share: Optuna proposes points with a study built from them
in memory. (Its own journal fixes a parameter's choices for good, so no value could be added to a sweep, and one damaged
line costs all trials.) Two locks, which the kernel releases when a process is killed:

*   A process begins a trial while it holds the lock of the sweep, so no point is begun twice.
*   It trains the trial while it holds the trial's lock. An unfinished trial whose lock is free was stopped or
    killed: the next process resumes it, exactly, in its run folder.

A trial's outcome is that of `train.py` with its options.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from model.predict import DivergedError, MemoryExhaustedError
from model.ranks import ALONE
from model.runs.config import name_choice
from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import locked, named_writes, read_object, write_json
from pipeline.console import count_of, say, say_once, show_left

Point = dict[str, Any]  # parameter → value
Figures = Mapping[str, float | None]  # of a finished run, by `results.measure_run`
TrainPoint = Callable[[Point, Path], Figures]
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
POLL = 1.0  # seconds between checks on other processes
PROPOSALS = 10  # by TPE, which repeats itself if parameters have few values
STATES = {"unfinished": TrialState.RUNNING, "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}


@dataclass
class Trial:
    """A trial of a sweep."""

    folder: Path  # run folder
    parameters: Point  # the varying ones
    number: int  # in order of start
    point: Point  # all parameters
    state: str = "unfinished"  # of STATES; failed by one of OUTCOMES
    error: str | None = None  # why it failed
    seconds: float | None = None  # of the last attempt
    figures: Figures = field(default_factory=dict)  # once it is complete

    @property
    def dev(self) -> float | None:
        """The AUROC that ranks trials, for the kept checkpoint."""
        return self.figures.get("dev_auroc")

    def write(self) -> None:
        """Write the record, next to the run folder."""
        hidden = ("folder", "parameters")
        record = {name: value for name, value in vars(self).items() if name not in hidden}
        write_json(self.folder.with_name(f"{self.folder.name}.json"), record)


@dataclass(frozen=True)
class Sweep:
    """The `values` to try for every parameter, and the `options` that all trials share."""

    folder: Path
    values: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    sampler: str
    trials: int  # for tpe; a grid has one per point

    @property
    def varying(self) -> list[str]:
        """The parameters with more than one value."""
        return [name for name, values in self.values.items() if len(values) > 1]

    @property
    def grid(self) -> list[Point]:
        """All combinations, in the order of the given values."""
        return [dict(zip(self.values, values, strict=True)) for values in itertools.product(*self.values.values())]

    @property
    def choice(self) -> str:
        """The criterion that ranks trials, in words, to be followed by AUROC."""
        return name_choice(self.options.get("choose_by", "all"))


def open_sweep(sweep: Sweep) -> None:
    """Make the folder. Raises DataError if it cannot be written, or has a sweep with other options."""
    path, options = sweep.folder / "sweep.json", json.loads(json.dumps(sweep.options))
    with named_writes(path):
        (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
    with locked(sweep.folder / ".lock"):
        earlier = read_object(path) if path.exists() else options
        if difference := describe_difference(earlier, options, options):
            raise DataError(f"{sweep.folder} is a sweep under other options: {difference}; choose another `sweep`")
        write_json(path, options)


def run_sweep(sweep: Sweep, train_point: TrainPoint) -> None:
    """Train points until all processes together have finished them. Raises Stopped.

    `train_point` trains a point in a run folder; raising one of OUTCOMES is an outcome too. Propagates its other
    errors.
    """
    while True:
        ALONE.agree()
        with ExitStack() as lock:
            with locked(sweep.folder / ".lock"):
                trial, busy = begin_trial(sweep, lock)
            if trial is not None:
                run_trial(sweep, trial, train_point)
                continue
        if not busy:
            break
        say_once(f"{sweep.folder}: waiting for the trials of other processes")
        time.sleep(POLL)
    if (count := len(list_trials(sweep))) < sweep.trials:
        say(f"{sweep.folder}: all points are tried: {count} trials, not {sweep.trials}")


def list_trials(sweep: Sweep) -> list[Trial]:
    """The trials of the sweep, by number. Raises DataError if a record is damaged."""
    trials = []
    for path in (sweep.folder / "trials").glob("*.json"):
        record = read_object(path)
        try:
            parameters = {name: record["point"][name] for name in sweep.varying}
            trials.append(Trial(path.with_suffix(""), parameters, **record))
        except (LookupError, TypeError):
            raise DataError(f"{path}: damaged; remove it: a finished run is not trained again") from None
    return sorted(trials, key=lambda trial: trial.number)


def rank(trials: Sequence[Trial]) -> list[Trial]:
    """Finished trials by dev, the best first; behind them the others by number."""
    return sorted(trials, key=lambda trial: (trial.dev is None, -(trial.dev or 0), trial.number))


def begin_trial(sweep: Sweep, lock: ExitStack) -> tuple[Trial | None, bool]:
    """Begin the next trial, or continue one, and enter its lock; under the lock of the sweep.

    Returns the trial, or None if no point is left, and whether other processes are training trials.
    """
    trials, points, busy = list_trials(sweep), sweep.grid, False
    if sweep.sampler == "tpe":
        # A search first resumes unfinished trials. Grid points are for parameters with few values.
        fresh = propose(sweep, trials) + points if len(trials) < sweep.trials else []
        points = [trial.point for trial in trials if trial.state == "unfinished"] + fresh
    for point in points:
        name = "-".join(f"{parameter}={point[parameter]}" for parameter in sweep.varying) or "only"
        folder = sweep.folder / "trials" / name.replace("/", "_")
        new = Trial(folder, {name: point[name] for name in sweep.varying}, len(trials), point)
        if next((trial for trial in trials if trial.point == point), new).state != "unfinished":
            continue
        try:
            # Next to the run folder, which has the trainer's lock.
            lock.enter_context(locked(folder.with_name(f"{folder.name}.lock"), wait=0))
        except TimeoutError:
            busy = True
            continue
        # Read again: it may have changed before the lock was free.
        trial = next((trial for trial in list_trials(sweep) if trial.point == point), new)
        if trial.state == "unfinished":
            trial.write()
            return trial, busy
        lock.close()
    return None, busy


def run_trial(sweep: Sweep, trial: Trial, train_point: TrainPoint) -> None:
    """Train the point of a trial that this process has begun, and record how it ended."""
    say(f"Trial {trial.number}: {', '.join(f'{name} {value}' for name, value in trial.parameters.items())}")
    start, ending = time.monotonic(), ""
    try:
        trial.figures = train_point(trial.point, trial.folder)
        trial.state, ending = "complete", f"dev AUROC {trial.dev:.4f} ({sweep.choice})"
    except OUTCOMES as error:
        trial.state, trial.error, ending = "failed", str(error), f"failed: {error}"
    finally:
        trial.seconds = time.monotonic() - start
        trial.write()
    # The time left is at the mean of finished trials, in one process.
    spent = [other.seconds or 0 for other in list_trials(sweep) if other.state != "unfinished"]
    left = (len(sweep.grid) if sweep.sampler == "grid" else sweep.trials) - len(spent)
    rest = f"; {count_of(left, 'trial')} to go{show_left(left * sum(spent) / len(spent))}" if left > 0 else ""
    say(f"Trial {trial.number}: {ending}{rest}")


def propose(sweep: Sweep, trials: Sequence[Trial]) -> list[Point]:
    """A new point from TPE, in a list; empty if TPE repeats itself.

    Floats range from the lowest to the highest value; other parameters take one of their values.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    varying = {name: sweep.values[name] for name in sweep.varying}
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(min(values), max(values), log=min(values) > 0)
        if all(isinstance(value, float) for value in values)
        else CategoricalDistribution(list(values))
        for name, values in varying.items()
    }
    # Seeded by the number of trials, so that a search repeats itself. Optuna takes 32 bits.
    seed = {**sweep.options, **sweep.grid[0]}["seed"]
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(trials)) % 2**32, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        with suppress(ValueError):  # values of an earlier command
            state, params = STATES[trial.state], {name: trial.point[name] for name in space}
            study.add_trial(optuna.create_trial(state=state, value=trial.dev, params=params, distributions=space))
    taken = [trial.point for trial in trials]
    for _ in range(PROPOSALS):
        point = {name: values[0] for name, values in sweep.values.items()}
        for name, value in study.ask(space).params.items():
            low, high = min(sweep.values[name]), max(sweep.values[name])
            point[name] = min(max(float(f"{value:.4g}"), low), high) if isinstance(value, float) else value
        if point not in taken:
            return [point]
    return []
