"""Parameter values → trials, each an ordinary run, shared by any number of processes.

In: the values, and a function that trains one point. Out: run folders in FOLDER/trials, sweep.csv and report.html.
Optuna's storage (SQLite in the folder, or a database that several machines reach) holds what there is to do and who
does it. Every process follows the same three rules, and no other coordination is needed:

1.  A point without a live trial gets a waiting one. A trial is live if it waits, runs, is finished, or failed because
    of its own settings (it diverged, or ran out of memory). So a trial whose process died, was stopped or met any
    other error is run again, and continues exactly in its point's run folder.
2.  A process claims a waiting trial by changing its state, which the storage allows only one process to do. A process
    that sends no heartbeat for `grace` seconds loses its trial.
3.  If processes that start at once create two trials of one point by rule 1, the later one is dropped.

A trial's outcome is that of `train.py` with its options. Pruning compares a trial with earlier ones, so what is
pruned depends on their order; without pruning, nothing does.
"""

import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from model.predict import DivergedError, MemoryExhaustedError
from model.runs.config import name_choice
from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import locked
from pipeline.console import count_of, say, show_left

Point = dict[str, Any]  # parameter → value
Watch = Callable[[list[dict[str, Any]]], None]
ALIVE = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
LOCK_SECONDS = 60.0  # how long SQLite waits for other writers
POLL = 1.0  # seconds between checks on other processes


class Outcome(NamedTuple):
    """The figures of a finished run, from `scoring.measure_run`; sweeps of version 0.1 lack `labels` and `same`."""

    dev: float
    labels: int | None
    same: float | None
    train: float | None
    valid: float | None
    low: float | None
    high: float | None


class Trial(NamedTuple):
    """A trial of a sweep; figures that it has not reached are None."""

    number: int
    state: str  # complete, pruned, running, waiting, failed
    error: str | None  # why it failed
    parameters: Point  # those that vary
    run: Path  # its run folder
    dev: float | None  # AUROC of the kept checkpoint by `choose_by`, by which trials are compared
    labels: (
        int | None
    )  # how many labels the next three mean AUROCs are over: those with both classes everywhere
    same: float | None  # on dev
    train: float | None  # on a part of train
    valid: float | None
    low: float | None  # of valid's 95 % interval
    high: float | None
    epochs: float | None  # done
    seconds: float | None  # in its last attempt
    history: list[dict[str, Any]]  # epoch and `score` on dev of each evaluation


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
    grace: int  # seconds
    storage: str | None  # URL; None: SQLite in the folder

    @property
    def varying(self) -> list[str]:
        """The parameters with more than one value."""
        return [name for name, values in self.values.items() if len(values) > 1]

    @property
    def choice(self) -> str:
        """What trials are compared by, in words, to be followed by AUROC."""
        return name_choice(self.options.get("choose_by", "all"))

    def run_folder(self, point: Point) -> Path:
        """A point's run folder, which two trials of the point share."""
        name = "-".join(f"{parameter}={point[parameter]}" for parameter in self.varying) or "only"
        return self.folder / "trials" / name.replace("/", "_")


class TrialDropped(Exception):  # noqa: N818 - not an error
    """Raised in a trial that should not run: another one has its point, or there are enough."""


class TrialStopped(Exception):  # noqa: N818
    """Raised in a trial when a signal requested a stop; it is run again later."""


def run_sweep(
    sweep: Sweep, train_point: Callable[[Point, Path, Watch], Outcome | None], should_stop: Callable[[], bool]
) -> bool:
    """Train points until all are done, by any process; returns False if a stop was requested.

    `train_point` trains a point in a run folder, passes its evaluations to `watch`, and returns None if it was
    stopped; raising one of OUTCOMES is an outcome too. Propagates its other errors, and raises DataError if the folder
    holds a sweep under other options or the storage is unusable.
    """
    said = False
    ours: Exception | None = None
    with open_study(sweep) as (study, storage), accept_experiments():
        check_options(sweep, study)
        claimed = 0

        def objective(trial: optuna.Trial) -> float:
            nonlocal claimed, ours
            claimed = trial.number
            try:
                return run_trial(sweep, study, trial, train_point, should_stop)
            except (ValueError, AssertionError) as error:
                ours = error
                raise

        while not should_stop():
            optuna.storages.fail_stale_trials(study)
            queue_points(sweep, study)
            trials = study.get_trials(deepcopy=False)
            beat_for_waiting(study, storage)
            if any(trial.state == TrialState.WAITING for trial in trials) or count_free(sweep, trials) > 0:
                try:
                    study.optimize(objective, n_trials=1, catch=(TrialDropped, TrialStopped, *OUTCOMES))
                # Raised by Optuna if another process has given up on this trial meanwhile.
                except (ValueError, AssertionError, optuna.exceptions.UpdateFinishedTrialError) as error:
                    if error is ours or study.get_trials(deepcopy=False)[claimed].state == TrialState.RUNNING:
                        raise
                    say(f"Trial {claimed}: another process took it while this one was paused")
            elif any(trial.state == TrialState.RUNNING for trial in trials):
                if not said:
                    say(f"{sweep.folder}: waiting for the trials of other processes")
                    said = True
                time.sleep(POLL)
            else:
                return True
    return False


@contextmanager
def open_study(sweep: Sweep) -> Iterator[tuple[optuna.Study, optuna.storages.RDBStorage]]:
    """The study, created if needed, and its storage. Raises DataError if that is unusable."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    url = sweep.storage or f"sqlite:///{sweep.folder.resolve() / 'study.db'}"
    # Turn off sqlite3's implicit transactions: they are begun explicitly below.
    arguments: dict[str, Any] = {"pool_pre_ping": True}
    if sweep.storage is None:
        arguments = {"connect_args": {"timeout": LOCK_SECONDS, "isolation_level": None}}
    try:
        with accept_experiments(), locked(sweep.folder / ".lock"):
            storage = make_storage(url, arguments, sweep.grace)
            if sweep.storage is None:
                # SQLite has no SELECT … FOR UPDATE: two processes that see a trial waiting would both claim it.
                sqlalchemy.event.listen(
                    storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
                )
            study = optuna.create_study(
                study_name=sweep.folder.name,
                storage=storage,
                direction="maximize",
                load_if_exists=True,
                pruner=make_pruner(sweep),
                sampler=optuna.samplers.RandomSampler(seed=sweep.seed),
            )
    except Exception as error:  # of many kinds, some with the URL and its password
        kind, reason = "the database of `storage`", type(error).__name__
        if sweep.storage is None:
            kind, reason = "SQLite", getattr(error, "orig", reason)  # such as `database or disk is full`
        raise DataError(f"{sweep.folder}: {kind} cannot be used: {reason}") from None
    try:
        yield study, storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def make_storage(
    url: str, engine: dict[str, Any], grace: int, attempts: int = 5
) -> optuna.storages.RDBStorage:
    """Optuna's tables at a URL, created if needed."""
    try:
        return optuna.storages.RDBStorage(
            url, engine_kwargs=engine, heartbeat_interval=max(1, grace // 3), grace_period=grace
        )
    # If two machines create the tables at once, one fails and then finds them there.
    except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
        if attempts == 1:
            raise
        time.sleep(POLL)
        return make_storage(url, engine, grace, attempts - 1)


def check_options(sweep: Sweep, study: optuna.Study) -> None:
    """Record the options that all trials share. Raises DataError, with the difference, if others are recorded."""
    there = study.user_attrs.get("options")
    if there is None:
        study.set_user_attr("options", dict(sweep.options))
        return
    here = json.loads(json.dumps(sweep.options))
    difference = describe_difference(there, here, here)
    if difference:
        raise DataError(
            f"{sweep.folder} is a sweep under other options: {difference}; choose another `sweep`"
        )


@contextmanager
def accept_experiments() -> Iterator[None]:
    """Silence Optuna's warnings that heartbeats and the constant liar are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def make_pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """The pruner: none, successive halving, or below the median of at least four trials after a third of the epochs."""
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=-(-sweep.epochs // 3))
    if sweep.pruner == "halving":
        first = max(1, sweep.epochs // 4)
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=2)
    return optuna.pruners.NopPruner()


def queue_points(sweep: Sweep, study: optuna.Study) -> None:
    """Rule 1: queue the points of the grid, and of trials that were given up, that no live trial has.

    Optuna's RetryFailedTrialCallback does this only for stale trials: not for one that was stopped, nor for those of
    a process that died before starting any.
    """
    trials = study.get_trials(deepcopy=False)
    taken = [trial.user_attrs.get("point") for trial in trials if is_alive(trial)]
    if sweep.sampler == "grid":
        wanted: Iterator[tuple[Point, Point]] = ((point, {}) for point in grid_points(sweep))
    else:
        lost = [trial for trial in trials if not is_alive(trial) and "point" in trial.user_attrs]
        wanted = ((trial.user_attrs["point"], trial.params) for trial in lost)
    for point, suggested in wanted:
        if point not in taken:
            study.enqueue_trial(suggested, user_attrs={"point": point})
            taken.append(point)


def beat_for_waiting(study: optuna.Study, storage: optuna.storages.RDBStorage) -> None:
    """Give waiting trials a heartbeat, because Optuna considers a running trial without any alive.

    A process killed between its claim and its first heartbeat would leave such a trial.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        storage.record_heartbeat(trial._trial_id)


def grid_points(sweep: Sweep) -> list[Point]:
    """All combinations, in the order of the given values."""
    return [
        dict(zip(sweep.values, combination, strict=True))
        for combination in itertools.product(*sweep.values.values())
    ]


def is_alive(trial: FrozenTrial) -> bool:
    """Whether a trial waits, runs, is finished, or failed by one of OUTCOMES, which would only recur."""
    return trial.state in ALIVE or "error" in trial.user_attrs


def count_free(sweep: Sweep, trials: Sequence[FrozenTrial]) -> int:
    """The number of trials the sampler may still propose."""
    return 0 if sweep.sampler == "grid" else sweep.trials - sum(map(is_alive, trials))


def run_trial(
    sweep: Sweep,
    study: optuna.Study,
    trial: optuna.Trial,
    train_point: Callable[[Point, Path, Watch], Outcome | None],
    should_stop: Callable[[], bool],
) -> float:
    """Train the point of a trial that this process has claimed; returns its AUROC on dev.

    Raises TrialDropped, TrialStopped, TrialPruned, and whatever `train_point` raises.
    """
    point = trial.user_attrs.get("point")
    others = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
    if sweep.sampler == "tpe":
        if point is None and count_free(sweep, others) <= 0:
            raise TrialDropped
        # Seeded by the trial's number, so that processes starting together propose different points.
        study.sampler = optuna.samplers.TPESampler(
            seed=sweep.seed * 1_000_003 + trial.number, constant_liar=True
        )
        suggested = suggest_point(sweep, trial)
        point = point or suggested
        trial.set_user_attr("point", point)
    if point is None or any(is_alive(other) and other.user_attrs.get("point") == point for other in others):
        raise TrialDropped

    reported = 0

    def watch(history: list[dict[str, Any]]) -> None:
        nonlocal reported
        # Compare at ends of epochs, when trials of any batch size have seen the same images.
        for line in history[reported:]:
            if line["epoch"] % 1 == 0:
                trial.report(line["score"], int(line["epoch"]))
        reported = len(history)
        trial.set_user_attr("history", history)
        # A fully trained trial has its outcome, however poor.
        last = history[-1]["epoch"]
        if last % 1 == 0 and last < sweep.epochs and trial.should_prune():
            raise optuna.TrialPruned

    shown = ", ".join(f"{name} {point[name]}" for name in sweep.varying)
    say(f"Trial {trial.number}: {shown}")
    try:
        run = sweep.run_folder(point)
        # A process that was paused and lost its trial may still be working there.
        run.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(run.with_name(f"{run.name}.lock"), should_stop=should_stop))
            except TimeoutError:
                raise TrialStopped from None
            outcome = train_point(point, run, watch)
    except OUTCOMES as error:
        say(f"Trial {trial.number}: failed: {error}")
        trial.set_user_attr("error", str(error))
        raise
    except optuna.TrialPruned:
        say(f"Trial {trial.number}: pruned")
        raise
    if outcome is None:
        raise TrialStopped
    trial.set_user_attr("outcome", outcome._asdict())
    say(f"Trial {trial.number}: dev AUROC {outcome.dev:.4f} ({sweep.choice}){show_rest(sweep, trial)}")
    return outcome.dev


def show_rest(sweep: Sweep, trial: optuna.Trial) -> str:
    """How many trials are left after this one, and how long they take, if as long as those before and alone."""
    others = [one for one in trial.study.get_trials(deepcopy=False) if one.number != trial.number]
    ended = [one.duration for one in others if one.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    spent = [one.total_seconds() for one in ended if one is not None]
    if trial.datetime_start is not None:
        spent.append((datetime.now() - trial.datetime_start).total_seconds())
    left = (len(grid_points(sweep)) if sweep.sampler == "grid" else sweep.trials) - 1
    left -= sum(one.state not in (TrialState.WAITING, TrialState.RUNNING) and is_alive(one) for one in others)
    return (
        f"; {count_of(left, 'trial')} to go{show_left(left * sum(spent) / len(spent))}"
        if left and spent
        else ""
    )


def suggest_point(sweep: Sweep, trial: optuna.Trial) -> Point:
    """A point: floats between the lowest and highest value, other parameters one of their values."""
    point: Point = {}
    for name, values in sweep.values.items():
        if len(values) == 1:
            point[name] = values[0]
        elif all(isinstance(value, float) for value in values):
            low, high = min(values), max(values)
            value = trial.suggest_float(name, low, high, log=low > 0)
            point[name] = float(f"{value:.4g}")
        else:
            point[name] = trial.suggest_categorical(name, list(values))
    return point


def list_trials(sweep: Sweep) -> list[Trial]:
    """The live trials of the sweep, by number."""
    found = []
    with open_study(sweep) as (study, _):
        trials = study.get_trials()
    for trial in trials:
        point = trial.user_attrs.get("point")
        if point is None or not is_alive(trial):
            continue
        outcome = trial.user_attrs.get("outcome") if trial.state == TrialState.COMPLETE else None
        history = trial.user_attrs.get("history", [])
        found.append(
            Trial(
                number=trial.number,
                state="failed" if trial.state == TrialState.FAIL else trial.state.name.lower(),
                error=trial.user_attrs.get("error"),
                parameters={name: point[name] for name in sweep.varying},
                run=sweep.run_folder(point),
                **dict.fromkeys(Outcome._fields) | (outcome or {}),
                epochs=history[-1]["epoch"] if history else None,
                seconds=trial.duration.total_seconds() if trial.duration else None,
                history=history,
            )
        )
    return found


def importances(sweep: Sweep, trials: Sequence[Trial]) -> dict[str, float] | None:
    """How much of dev's variance each parameter explains, by fANOVA (Hutter et al., 2014).

    None if fewer than four trials are finished, fewer than two parameters vary, or all trials are equal.
    """
    done = [trial for trial in trials if trial.dev is not None]
    if len(done) < 4 or len(sweep.varying) < 2 or len({trial.dev for trial in done}) == 1:
        return None
    columns = {name: sorted({trial.parameters[name] for trial in done}) for name in sweep.varying}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(values[0], values[-1], log=values[0] > 0)
        if all(isinstance(value, float) for value in values) and len(values) > 1
        else optuna.distributions.CategoricalDistribution(values)
        for name, values in columns.items()
    }
    study = optuna.create_study(direction="maximize")
    for trial in done:
        study.add_trial(
            optuna.create_trial(params=trial.parameters, distributions=distributions, value=trial.dev)
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
