"""Parameter values → trials, each an ordinary run, shared by any number of processes and machines.

In: the values, and a function that trains one point. Out: in FOLDER/trials a run folder per trial and beside it its
record (`Trial` as JSON); sweep.csv and report.html. The records are all that processes share: Optuna proposes and
prunes by a study that is made of them in memory. Two locks, which the kernel releases when a process is killed:

*   A process begins a trial while it holds the lock of the sweep, so no point is begun twice.
*   It trains the trial while it holds the trial's lock. If a record says running but nobody holds that lock, its
    process is gone: the trial is begun again, and continues exactly in its run folder.

A trial's outcome is that of `train.py` with its options. Pruning compares a trial with earlier ones, so what is
pruned depends on their order; without pruning, nothing does.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
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
History = list[
    tuple[float, float]
]  # epoch and AUROC on dev, by which trials are compared, of each evaluation
Watch = Callable[[History], None]
Figures = dict[str, Any]  # of a finished run, by `results.measure_run`
TrainPoint = Callable[[Point, Path, Watch], Figures]
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
POLL = 1.0  # seconds between checks on other processes
PROPOSALS = 10  # by TPE, which repeats itself if parameters have few values
STATES = {state.name.lower(): state for state in TrialState}  # a stopped or failed trial is none to Optuna


@dataclass
class Trial:
    """A trial of a sweep; figures that it has not reached are None."""

    run: Path  # its run folder
    parameters: Point  # those that vary
    number: int  # in the order of their beginning
    point: Point  # all parameters
    state: str = "running"  # or stopped, complete, pruned, failed by one of OUTCOMES
    error: str | None = None  # why it failed
    seconds: float | None = None  # in its last attempt
    history: History = field(default_factory=list)
    rungs: dict[str, Any] = field(default_factory=dict)  # what Optuna's halving has noted
    # The figures of a finished run.
    dev: float | None = None  # AUROC of the kept checkpoint by `choose_by`, by which trials are compared
    labels: int | None = None  # number of labels in the next three means: those with both classes everywhere
    same: float | None = None  # on dev
    train: float | None = None  # on a part of train
    valid: float | None = None
    low: float | None = None  # of valid's 95 % interval
    high: float | None = None

    @property
    def epochs(self) -> float | None:
        """How many are done."""
        return self.history[-1][0] if self.history else None

    def lock(self, wait: float = -1) -> AbstractContextManager[None]:
        """The trial's lock, beside its run folder: the trainer has one inside. TimeoutError after `wait` seconds."""
        return locked(self.run.with_name(f"{self.run.name}.lock"), wait)

    @property
    def record(self) -> Path:
        """The file of its record."""
        return self.run.with_name(f"{self.run.name}.json")

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

    def settings(self, point: Point) -> Mapping[str, Any]:
        """All settings of a trial at this point."""
        return {**self.options, **point}

    @property
    def choice(self) -> str:
        """What trials are compared by, in words, to be followed by AUROC."""
        return name_choice(self.options.get("choose_by", "all"))


def open_sweep(sweep: Sweep) -> None:
    """Make the folder. Raises DataError if it cannot be written, or has a sweep under other options."""
    path, options = sweep.folder / "sweep.json", json.loads(json.dumps(sweep.options))
    with named_writes(path):
        (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
    with locked(sweep.folder / ".lock"):
        earlier = read_object(path) if path.exists() else options
        if difference := describe_difference(earlier, options, options):
            raise DataError(
                f"{sweep.folder} is a sweep under other options: {difference}; choose another `sweep`"
            )
        write_json(path, options)


def run_sweep(sweep: Sweep, train_point: TrainPoint) -> None:
    """Train points until all are done, by any process. Raises Stopped.

    `train_point` trains a point in a run folder, and passes its evaluations to `watch`; raising one of OUTCOMES is an
    outcome too. Propagates its other errors.
    """
    while True:
        ALONE.agree()
        with ExitStack() as lock:
            with locked(sweep.folder / ".lock"):
                trial = begin_trial(sweep, lock)
                trials = list_trials(sweep)
            if trial is not None:
                run_trial(sweep, trial, train_point)
                continue
        if not any(trial.state == "running" for trial in trials):
            if len(trials) < sweep.trials:
                say(f"{sweep.folder}: all points are tried: {len(trials)} trials, not {sweep.trials}")
            return
        say_once(f"{sweep.folder}: waiting for the trials of other processes")
        time.sleep(POLL)


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


def grid_points(sweep: Sweep) -> list[Point]:
    """All combinations, in the order of the given values."""
    return [
        dict(zip(sweep.values, combination, strict=True))
        for combination in itertools.product(*sweep.values.values())
    ]


def begin_trial(sweep: Sweep, lock: ExitStack) -> Trial | None:
    """Begin the next trial and enter its lock, or return None if no point is left; under the lock of the sweep."""
    for trial in list_trials(sweep):
        if trial.state == "running":
            with (
                suppress(TimeoutError),
                trial.lock(wait=0),
            ):  # nobody held it: killed, unless it has just ended
                trial = read_trial(sweep, trial.record)
                if trial.state == "running":
                    trial.state = "stopped"
                    trial.write()
    trials = list_trials(sweep)
    stopped = [trial for trial in trials if trial.state == "stopped"]
    taken = [trial.point for trial in trials if trial.state != "stopped"]
    points = grid_points(sweep)
    if sweep.sampler == "tpe":
        # A search finishes what it has begun. Points of the grid are for parameters with few values.
        fresh = propose(sweep, trials) + points if len(taken) < sweep.trials and not stopped else []
        points = [trial.point for trial in stopped] + fresh
    point = next((point for point in points if point not in taken), None)
    if point is None:
        return None
    name = "-".join(f"{parameter}={point[parameter]}" for parameter in sweep.varying) or "only"
    run = sweep.folder / "trials" / name.replace("/", "_")
    number = trials[-1].number + 1 if trials else 0
    new = Trial(run, {name: point[name] for name in sweep.varying}, number, point)
    trial = next((trial for trial in stopped if trial.point == point), new)
    lock.enter_context(trial.lock())
    trial.state = "running"
    trial.write()
    return trial


def run_trial(sweep: Sweep, trial: Trial, train_point: TrainPoint) -> None:
    """Train the point of a trial that this process has begun, and record how it ended."""

    def watch(history: History) -> None:
        trial.history, epoch = history, history[-1][0]
        # Compare at ends of epochs, when trials of any batch size have seen the same images. A fully trained trial
        # has its outcome, however poor.
        poor = epoch % 1 == 0 and epoch < sweep.settings(trial.point)["epochs"] and is_poor(sweep, trial)
        trial.write()
        if poor:
            raise optuna.TrialPruned

    say(f"Trial {trial.number}: {', '.join(f'{name} {value}' for name, value in trial.parameters.items())}")
    start, state, ending = time.monotonic(), "stopped", ""
    try:
        vars(trial).update(train_point(trial.point, trial.run, watch))
        state, ending = "complete", f"dev AUROC {trial.dev:.4f} ({sweep.choice})"
    except optuna.TrialPruned:
        state = ending = "pruned"
    except OUTCOMES as error:
        state, trial.error, ending = "failed", str(error), f"failed: {error}"
    finally:
        trial.state, trial.seconds = state, time.monotonic() - start
        trial.write()
    if ending:
        say(f"Trial {trial.number}: {ending}{show_rest(sweep)}")


def show_rest(sweep: Sweep) -> str:
    """How many trials are left, and how long they take, if as long as those before and alone."""
    spent = [trial.seconds for trial in list_trials(sweep) if trial.seconds and trial.state != "stopped"]
    left = (len(grid_points(sweep)) if sweep.sampler == "grid" else sweep.trials) - len(spent)
    return f"; {count_of(left, 'trial')} to go{show_left(left * sum(spent) / len(spent))}" if left > 0 else ""


def make_study(
    trials: Sequence[Trial], space: Mapping[str, BaseDistribution] = MappingProxyType({}), **parts: Any
) -> optuna.Study:
    """Optuna's view of the trials, with their parameters of the space, and its sampler or pruner."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", **parts)
    for trial in trials:
        if trial.state in STATES:
            with suppress(ValueError):  # of other values, by an earlier command
                study.add_trial(
                    optuna.create_trial(
                        state=STATES[trial.state],
                        value=trial.dev,
                        params={name: trial.point[name] for name in space},
                        distributions=dict(space),
                        intermediate_values={
                            int(epoch): dev for epoch, dev in trial.history if epoch % 1 == 0
                        },
                        system_attrs=trial.rungs,
                    )
                )
    return study


def make_space(values: Mapping[str, Sequence[Any]]) -> dict[str, BaseDistribution]:
    """What is searched: floats from the lowest to the highest value, other parameters among their values."""
    return {
        name: FloatDistribution(min(some), max(some), log=min(some) > 0)
        if all(isinstance(value, float) for value in some) and len(some) > 1
        else CategoricalDistribution(list(some))
        for name, some in values.items()
    }


def propose(sweep: Sweep, trials: Sequence[Trial]) -> list[Point]:
    """A point by TPE that no trial has; none if TPE repeats itself."""
    space = make_space({name: sweep.values[name] for name in sweep.varying})
    # Seeded by the number of trials, so that a search repeats itself. Optuna takes 32 bits.
    seed = (sweep.settings(grid_points(sweep)[0])["seed"] * 1_000_003 + len(trials)) % 2**32
    study = make_study(trials, space, sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True))
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
    """Whether the pruner ends a trial: by successive halving, or below the median of at least four others."""
    if sweep.pruner == "none":
        return False
    epochs = sweep.settings(trial.point)["epochs"]
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, epochs // 4), reduction_factor=2)
    median = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=-(-epochs // 3))
    others = [other for other in list_trials(sweep) if other.number != trial.number]
    waiting = replace(trial, state="waiting")
    study = make_study([*others, waiting], pruner=halving if sweep.pruner == "halving" else median)
    poor = study.ask().should_prune()  # of the trial that waits
    trial.rungs = study.trials[-1].system_attrs
    return poor


def importances(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float] | None:
    """How much of dev's variance each parameter explains, by fANOVA (Hutter et al., 2014).

    None if fewer than four trials are finished, fewer than two parameters vary, or all trials are equal.
    """
    done = [trial for trial in trials if trial.dev is not None]
    if len(done) < 4 or len(sweep.varying) < 2 or len({trial.dev for trial in done}) == 1:
        return None
    space = make_space({name: sorted({trial.parameters[name] for trial in done}) for name in sweep.varying})
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(make_study(done, space), evaluator=evaluator))
