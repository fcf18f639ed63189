"""Parameter values → trials, each an ordinary run, shared by any number of processes and machines.

In: the values, and a function that trains one point. Out: run folders in FOLDER/trials, sweep.csv and report.html.
Optuna's journal in the folder lists the trials, and proposes points for a search. Two locks, which the kernel
releases when a process is killed, are all the coordination:

*   A process begins a trial while it holds the lock of the sweep, so no point is begun twice.
*   It trains the trial while it holds the lock of the point's run folder. If a trial is running in the journal but
    nobody holds that lock, its process is gone: the point is begun again, and continues exactly in its run folder.

A trial's outcome is that of `train.py` with its options. Pruning compares a trial with earlier ones, so what is
pruned depends on their order; without pruning, nothing does.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from model.predict import DivergedError, MemoryExhaustedError
from model.runs.config import name_choice
from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import locked, named_writes
from pipeline.console import count_of, say, say_once, show_left

Point = dict[str, Any]  # parameter → value
History = list[
    tuple[float, float]
]  # epoch and AUROC on dev, by which trials are compared, of each evaluation
Watch = Callable[[History], None]
Figures = dict[str, Any]  # of a finished run, by `results.measure_run`
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
POLL = 1.0  # seconds between checks on other processes
PROPOSALS = 10  # by TPE, which repeats itself if parameters have few values


class Trial(NamedTuple):
    """A trial of a sweep; figures that it has not reached are None."""

    number: int
    state: str  # complete, pruned, running, failed
    error: str | None  # why it failed
    parameters: Point  # those that vary
    run: Path  # its run folder
    seconds: float | None  # in its last attempt
    history: History
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


@dataclass(frozen=True)
class Sweep:
    """The `values` to try for every parameter, and the `options` that all trials share."""

    folder: Path
    values: Mapping[str, Sequence[Any]]
    options: Mapping[str, Any]
    sampler: str
    trials: int  # for tpe; a grid has one per point
    pruner: str
    epochs: int  # of a full run, for the pruner
    seed: int

    @property
    def varying(self) -> list[str]:
        """The parameters with more than one value."""
        return [name for name, values in self.values.items() if len(values) > 1]

    @property
    def choice(self) -> str:
        """What trials are compared by, in words, to be followed by AUROC."""
        return name_choice(self.options.get("choose_by", "all"))

    def describe(self, point: Point) -> dict[str, Any]:
        """A point, and the name of its run folder."""
        name = "-".join(f"{parameter}={point[parameter]}" for parameter in self.varying) or "only"
        return {"run": name.replace("/", "_"), "point": point}

    def run_folder(self, trial: FrozenTrial | optuna.Trial) -> Path:
        """A trial's run folder, which two trials of a point share."""
        return self.folder / "trials" / str(trial.user_attrs["run"])


def run_sweep(
    sweep: Sweep, train_point: Callable[[Point, Path, Watch], Figures | None], should_stop: Callable[[], bool]
) -> bool:
    """Train points until all are done, by any process; returns False if a stop was requested.

    `train_point` trains a point in a run folder, passes its evaluations to `watch`, and returns None if it was
    stopped; raising one of OUTCOMES is an outcome too. Propagates its other errors, and raises DataError if the folder
    holds a sweep under other options or cannot be used.
    """
    study = open_study(sweep)
    while not should_stop():
        with ExitStack() as run_lock:
            with locked(sweep.folder / ".lock"):
                live = live_trials(study)
                trial = begin_trial(sweep, study)
                if trial is not None:
                    run_lock.enter_context(lock_run(sweep, trial))
            if trial is not None:
                run_trial(sweep, study, trial, train_point)
                continue
        if not any(trial.state == TrialState.RUNNING for trial in live):
            if len(live) < sweep.trials:
                say(f"{sweep.folder}: all points are tried: {len(live)} trials, not {sweep.trials}")
            return True
        say_once(f"{sweep.folder}: waiting for the trials of other processes")
        time.sleep(POLL)
    return False


class JournalLock(JournalFileOpenLock):
    """A lock of the kernel: Optuna's own would outlive a killed process."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.held = ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock, and cut off the half of a line that a killed process or a full disk has left."""
        self.held.enter_context(locked(self.journal.with_suffix(".lock")))
        with self.journal.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give the lock back."""
        self.held.close()


def open_study(sweep: Sweep) -> optuna.Study:
    """The study, created if needed. Raises DataError if its journal cannot be used or is of other options."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = sweep.folder / "journal.log"
    with named_writes(path):
        (sweep.folder / "trials").mkdir(parents=True, exist_ok=True)
        try:
            storage = JournalStorage(JournalFileBackend(str(path), JournalLock(path)))
            study = optuna.create_study(
                study_name="sweep", storage=storage, direction="maximize", load_if_exists=True
            )
        except (ValueError, LookupError, TypeError, AssertionError):  # depending on what is damaged
            raise DataError(f"{path}: damaged; remove it: finished runs are not trained again") from None
    study.pruner = make_pruner(sweep)
    here = json.loads(json.dumps(sweep.options))
    with locked(sweep.folder / ".lock"):
        if difference := describe_difference(study.user_attrs.get("options", here), here, here):
            raise DataError(
                f"{sweep.folder} is a sweep under other options: {difference}; choose another `sweep`"
            )
        study.set_user_attr("options", here)
    return study


def make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """The pruner: none, successive halving, or below the median of at least four trials after a third of the epochs."""
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=-(-sweep.epochs // 3))
    if sweep.pruner == "halving":
        first = max(1, sweep.epochs // 4)
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=2)
    return optuna.pruners.NopPruner()


def grid_points(sweep: Sweep) -> list[Point]:
    """All combinations, in the order of the given values."""
    return [
        dict(zip(sweep.values, combination, strict=True))
        for combination in itertools.product(*sweep.values.values())
    ]


def live_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that run, are finished, or failed by one of OUTCOMES, which would only recur."""
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False)
    begun = [one for one in trials if "point" in one.user_attrs]
    return [one for one in begun if one.state in states or "error" in one.user_attrs]


def begin_trial(sweep: Sweep, study: optuna.Study) -> optuna.Trial | None:
    """Begin the next trial, or return None if no point is left; for the process that holds the sweep's lock."""
    for running in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_abandoned(sweep, running):
            study.tell(running.number, state=TrialState.FAIL)
    live = live_trials(study)
    taken = [trial.user_attrs["point"] for trial in live]
    points = grid_points(sweep)
    if sweep.sampler == "tpe":
        if len(live) >= sweep.trials:
            return None
        points = propose(sweep, live) + points
    # A trial that was stopped or abandoned begins again, with its folder and history, before any other.
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))[::-1]
    wanted = [one.user_attrs for one in failed if "point" in one.user_attrs]
    if sweep.sampler == "grid":
        wanted = [attributes for attributes in wanted if attributes["point"] in points]
    wanted += map(sweep.describe, points)
    attributes = next((one for one in wanted if one["point"] not in taken), None)
    if attributes is None:
        return None
    trial = study.ask()
    for name, value in attributes.items():
        trial.set_user_attr(name, value)
    return trial


def is_abandoned(sweep: Sweep, trial: FrozenTrial) -> bool:
    """Whether a running trial's process is gone; for the process that holds the sweep's lock."""
    if "point" not in trial.user_attrs:  # killed as it began
        return True
    try:
        with lock_run(sweep, trial):
            return True
    except TimeoutError:
        return False


def lock_run(sweep: Sweep, trial: FrozenTrial | optuna.Trial) -> AbstractContextManager[None]:
    """The lock of a trial's run folder, beside it: the trainer has one inside. Raises TimeoutError if it is held."""
    run = sweep.run_folder(trial)
    return locked(run.with_name(f"{run.name}.lock"), wait=0)


def propose(sweep: Sweep, live: Sequence[FrozenTrial]) -> list[Point]:
    """A point by TPE that no trial has; none if TPE repeats itself."""
    space = make_space({name: sweep.values[name] for name in sweep.varying})
    # Seeded by the number of trials, so that a search repeats itself.
    sampler = optuna.samplers.TPESampler(seed=sweep.seed * 1_000_003 + len(live), constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in live:
        with suppress(ValueError):  # of other values, by an earlier command
            study.add_trial(
                optuna.create_trial(
                    state=trial.state,
                    params={name: trial.user_attrs["point"][name] for name in space},
                    distributions=space,
                    value=trial.value,
                    intermediate_values=trial.intermediate_values,
                )
            )
    taken = [trial.user_attrs["point"] for trial in live]
    for _ in range(PROPOSALS):
        point = {name: values[0] for name, values in sweep.values.items()}
        for name, value in study.ask(space).params.items():
            low, high = min(sweep.values[name]), max(sweep.values[name])
            point[name] = min(max(float(f"{value:.4g}"), low), high) if isinstance(value, float) else value
        if point not in taken:
            return [point]
    return []


def make_space(values: Mapping[str, Sequence[Any]]) -> dict[str, optuna.distributions.BaseDistribution]:
    """What is searched: floats from the lowest to the highest value, other parameters among their values."""
    return {
        name: optuna.distributions.FloatDistribution(min(some), max(some), log=min(some) > 0)
        if all(isinstance(value, float) for value in some) and len(some) > 1
        else optuna.distributions.CategoricalDistribution(list(some))
        for name, some in values.items()
    }


def run_trial(
    sweep: Sweep,
    study: optuna.Study,
    trial: optuna.Trial,
    train_point: Callable[[Point, Path, Watch], Figures | None],
) -> None:
    """Train the point of a trial that this process has begun, and record how it ended."""
    point, reported = trial.user_attrs["point"], 0

    def watch(history: History) -> None:
        nonlocal reported
        # Compare at ends of epochs, when trials of any batch size have seen the same images.
        for epoch, score in history[reported:]:
            if epoch % 1 == 0:
                trial.report(score, int(epoch))
        reported = len(history)
        trial.set_user_attr("history", history)
        # A fully trained trial has its outcome, however poor.
        last = history[-1][0]
        if last % 1 == 0 and last < sweep.epochs and trial.should_prune():
            raise optuna.TrialPruned

    say(f"Trial {trial.number}: {', '.join(f'{name} {point[name]}' for name in sweep.varying)}")
    state, dev, ending = TrialState.FAIL, None, ""
    try:
        figures = train_point(point, sweep.run_folder(trial), watch)
        if figures is not None:
            trial.set_user_attr("figures", figures)
            state, dev = TrialState.COMPLETE, figures["dev"]
            ending = f"dev AUROC {dev:.4f} ({sweep.choice})"
    except optuna.TrialPruned:
        state, ending = TrialState.PRUNED, "pruned"
    except OUTCOMES as error:
        trial.set_user_attr("error", str(error))
        ending = f"failed: {error}"
    finally:
        study.tell(trial, dev, state)
    if ending:
        say(f"Trial {trial.number}: {ending}{show_rest(sweep, study)}")


def show_rest(sweep: Sweep, study: optuna.Study) -> str:
    """How many trials are left, and how long they take, if as long as those before and alone."""
    spent = [one.duration.total_seconds() for one in live_trials(study) if one.duration is not None]
    left = (len(grid_points(sweep)) if sweep.sampler == "grid" else sweep.trials) - len(spent)
    return f"; {count_of(left, 'trial')} to go{show_left(left * sum(spent) / len(spent))}" if left > 0 else ""


def list_trials(sweep: Sweep) -> list[Trial]:
    """The live trials of the sweep, by number."""
    return [
        Trial(
            number=trial.number,
            state="failed" if trial.state == TrialState.FAIL else trial.state.name.lower(),
            error=trial.user_attrs.get("error"),
            parameters={name: trial.user_attrs["point"][name] for name in sweep.varying},
            run=sweep.run_folder(trial),
            seconds=trial.duration.total_seconds() if trial.duration else None,
            history=trial.user_attrs.get("history", []),
            **trial.user_attrs.get("figures", {}),
        )
        for trial in live_trials(open_study(sweep))
    ]


def importances(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float] | None:
    """How much of dev's variance each parameter explains, by fANOVA (Hutter et al., 2014).

    None if fewer than four trials are finished, fewer than two parameters vary, or all trials are equal.
    """
    done = [trial for trial in trials if trial.dev is not None]
    if len(done) < 4 or len(sweep.varying) < 2 or len({trial.dev for trial in done}) == 1:
        return None
    space = make_space({name: sorted({trial.parameters[name] for trial in done}) for name in sweep.varying})
    study = optuna.create_study(direction="maximize")
    for trial in done:
        study.add_trial(optuna.create_trial(params=trial.parameters, distributions=space, value=trial.dev))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
