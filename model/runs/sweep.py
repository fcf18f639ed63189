"""Parameter values → trials, each an ordinary run, shared by any number of processes and machines.

In: the values, and a function that trains one point. Out: in FOLDER/trials a run folder per trial and beside it its
record (`Trial` as JSON); sweep.csv and report.html. The records are all that processes share: Optuna proposes and
prunes with a study built from them in memory. (Its own journal fixes a parameter's choices for good, so no value
could be added to a sweep, and one damaged line costs all trials.) Two locks, which the kernel releases when a process
is killed:

*   A process begins a trial while it holds the lock of the sweep, so no point is begun twice.
*   It trains the trial while it holds the trial's lock. An unfinished trial whose lock is free was stopped or
    killed: the next process resumes it, exactly, in its run folder.

A trial's outcome is that of `train.py` with its options. Pruning compares a trial with earlier ones, so only pruning
depends on their order.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
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
History = list[tuple[float, float]]  # at each evaluation: epoch, and the AUROC on dev that ranks trials
Watch = Callable[[History], None]
Figures = Mapping[str, float | None]  # of a finished run, by `results.measure_run`
TrainPoint = Callable[[Point, Path, Watch], Figures]
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
POLL = 1.0  # seconds between checks on other processes
PROPOSALS = 10  # by TPE, which repeats itself if parameters have few values
STATES = {
    "unfinished": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,  # by one of OUTCOMES
}


@dataclass
class Trial:
    """A trial of a sweep."""

    run: Path  # run folder
    parameters: Point  # the varying ones
    number: int  # in order of start
    point: Point  # all parameters
    state: str = "unfinished"  # of STATES
    error: str | None = None  # why it failed
    seconds: float | None = None  # of the last attempt
    history: History = field(default_factory=list)
    figures: Figures = field(default_factory=dict)  # once it is complete

    @property
    def dev(self) -> float | None:
        """The AUROC that ranks trials, for the kept checkpoint."""
        return self.figures.get("dev_auroc")

    @property
    def epochs(self) -> float | None:
        """The number of finished epochs."""
        return self.history[-1][0] if self.history else None

    @property
    def record(self) -> Path:
        """The file of its record."""
        return self.run.with_name(f"{self.run.name}.json")

    def lock(self) -> AbstractContextManager[None]:
        """The trial's lock, next to its run folder, which has the trainer's. Raises TimeoutError if it is held."""
        return locked(self.run.with_name(f"{self.run.name}.lock"), wait=0)

    def write(self) -> None:
        """Write the record."""
        hidden = ("run", "parameters")
        write_json(self.record, {name: value for name, value in vars(self).items() if name not in hidden})


@dataclass(frozen=True)
class Sweep:
    """The `values` to try for every parameter, and the `options` that all trials share."""

    folder: Path
    values: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    sampler: str
    trials: int  # for tpe; a grid has one per point
    pruner: str

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

    def setting(self, name: str, point: Point) -> Any:
        """A setting of the trial at this point."""
        return {**self.options, **point}[name]


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

    `train_point` trains a point in a run folder, and passes its evaluations to `watch`; raising one of OUTCOMES is an
    outcome too. Propagates its other errors.
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


def read_trial(sweep: Sweep, path: Path) -> Trial:
    """The trial of a record. Raises DataError if it is damaged."""
    record = read_object(path)
    try:
        parameters = {name: record["point"][name] for name in sweep.varying}
        return Trial(path.with_suffix(""), parameters, **record)
    except (LookupError, TypeError):
        raise DataError(f"{path}: damaged; remove it: a finished run is not trained again") from None


def list_trials(sweep: Sweep) -> list[Trial]:
    """The trials of the sweep, by number."""
    records = (sweep.folder / "trials").glob("*.json")
    return sorted((read_trial(sweep, path) for path in records), key=lambda trial: trial.number)


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
        run = sweep.folder / "trials" / name.replace("/", "_")
        new = Trial(run, {name: point[name] for name in sweep.varying}, len(trials), point)
        trial = next((trial for trial in trials if trial.point == point), new)
        if trial.state != "unfinished":
            continue
        try:
            lock.enter_context(trial.lock())
        except TimeoutError:
            busy = True
            continue
        if trial.record.exists():  # it may have changed before the lock was free
            trial = read_trial(sweep, trial.record)
        if trial.state == "unfinished":
            trial.write()
            return trial, busy
        lock.close()
    return None, busy


def run_trial(sweep: Sweep, trial: Trial, train_point: TrainPoint) -> None:
    """Train the point of a trial that this process has begun, and record how it ended."""

    def watch(history: History) -> None:
        trial.history, epoch = history, history[-1][0]
        trial.write()
        # Compare at ends of epochs, when trials of any batch size have seen the same images. A fully trained trial
        # has its outcome, however poor.
        if epoch % 1 == 0 and epoch < sweep.setting("epochs", trial.point) and is_poor(sweep, trial):
            raise optuna.TrialPruned

    say(f"Trial {trial.number}: {', '.join(f'{name} {value}' for name, value in trial.parameters.items())}")
    start, ending = time.monotonic(), ""
    try:
        trial.figures = train_point(trial.point, trial.run, watch)
        trial.state, ending = "complete", f"dev AUROC {trial.dev:.4f} ({sweep.choice})"
    except optuna.TrialPruned:
        trial.state = ending = "pruned"
    except OUTCOMES as error:
        trial.state, trial.error, ending = "failed", str(error), f"failed: {error}"
    finally:
        trial.seconds = time.monotonic() - start
        trial.write()
    say(f"Trial {trial.number}: {ending}{show_rest(sweep)}")


def show_rest(sweep: Sweep) -> str:
    """The number of trials left, and the time they take, at the mean of earlier ones and in one process."""
    spent = [trial.seconds for trial in list_trials(sweep) if trial.seconds and trial.state != "unfinished"]
    left = (len(sweep.grid) if sweep.sampler == "grid" else sweep.trials) - len(spent)
    return f"; {count_of(left, 'trial')} to go{show_left(left * sum(spent) / len(spent))}" if left > 0 else ""


def make_study(
    trials: Sequence[Trial], values: Mapping[str, Sequence[Any]], **parts: Any
) -> tuple[optuna.Study, dict[str, BaseDistribution]]:
    """An Optuna study of the trials, with a sampler or pruner, and the search space.

    Floats range from the lowest to the highest value; other parameters take one of their values.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {
        name: FloatDistribution(min(some), max(some), log=min(some) > 0)
        if all(isinstance(value, float) for value in some) and len(some) > 1
        else CategoricalDistribution(list(some))
        for name, some in values.items()
    }
    study = optuna.create_study(direction="maximize", **parts)
    for trial in trials:
        with suppress(ValueError):  # values of an earlier command
            study.add_trial(
                optuna.create_trial(
                    state=STATES[trial.state],
                    value=trial.dev,
                    params={name: trial.point[name] for name in space},
                    distributions=space,
                    intermediate_values={int(epoch): dev for epoch, dev in trial.history if epoch % 1 == 0},
                )
            )
    return study, space


def propose(sweep: Sweep, trials: Sequence[Trial]) -> list[Point]:
    """A new point from TPE, in a list; empty if TPE repeats itself."""
    # Seeded by the number of trials, so that a search repeats itself. Optuna takes 32 bits.
    seed = (sweep.setting("seed", sweep.grid[0]) * 1_000_003 + len(trials)) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study, space = make_study(trials, {name: sweep.values[name] for name in sweep.varying}, sampler=sampler)
    taken = [trial.point for trial in trials]
    for _ in range(PROPOSALS):
        point = {name: values[0] for name, values in sweep.values.items()}
        for name, value in study.ask(space).params.items():
            low, high = min(sweep.values[name]), max(sweep.values[name])
            point[name] = min(max(float(f"{value:.4g}"), low), high) if isinstance(value, float) else value
        if point not in taken:
            return [point]
    return []


def is_poor(sweep: Sweep, trial: Trial) -> bool:
    """Whether to prune a trial: its best evaluation is below the median of at least four others."""
    if sweep.pruner == "none":
        return False
    first = -(-sweep.setting("epochs", trial.point) // 3)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=first)
    study, _ = make_study([other for other in list_trials(sweep) if other.number != trial.number], {}, pruner=pruner)
    asked = study.ask()
    for epoch, dev in trial.history:
        if epoch % 1 == 0:
            asked.report(dev, int(epoch))
    return asked.should_prune()
