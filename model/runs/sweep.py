"""Parameter values → trials, each an ordinary run, shared by processes and machines; trials → comparison and report.

FOLDER/trials has a run folder per trial and beside it its record (`Trial` as JSON), which is all that processes share.
Optuna proposes points with a study made from the records in memory: in its own journal a parameter's choices are fixed
for good, and one damaged line costs all trials. Two locks, which the kernel releases when a process is killed:

*   A process begins a trial while it holds the lock of the sweep, so no point is begun twice.
*   It trains the trial while it holds the trial's lock. An unfinished trial whose lock is free was stopped or
    killed: the next process resumes it, exactly, in its run folder.
"""

import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from model.predict import DivergedError, MemoryExhaustedError
from model.ranks import ALONE
from model.runs.config import name_choice, parse_choice
from model.runs.results import choice_score, measure_run, read_history, read_scored
from model.runs.run import Run
from pipeline.base import pages
from pipeline.base.errors import DataError, describe_difference
from pipeline.base.files import locked, named_writes, read_object, write_atomically, write_csv, write_json
from pipeline.base.pages import Table
from pipeline.console import count_of, echo, say, say_once, show_left
from pipeline.measure.delong import average, measure_areas, subtract, weigh_labels
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import Figure

Point = dict[str, Any]  # parameter → value
Figures = Mapping[str, float | None]  # of a finished run, by `results.measure_run`
TrainPoint = Callable[[Point, Path], Figures]  # trains a point in a run folder
OUTCOMES = (DivergedError, MemoryExhaustedError)  # errors that the same settings would cause again
POLL = 1.0  # seconds between checks on other processes
PROPOSALS = 10  # by TPE, which repeats itself if parameters have few values
STATES = {"unfinished": TrialState.RUNNING, "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
AXES = ("lr", "weight_decay")  # of the planes
NAMES = {"lr": "learning rate", "weight_decay": "weight decay", "batch_size": "batch size"}
METRICS = {"dev": "of the checkpoint kept", "train": "of a part of train, at the checkpoint kept"}
# As `results.measure_run` names them.
FIGURES = ["dev_auroc", "same_labels", "dev_same_auroc", "train_auroc", "valid_auroc", "valid_low", "valid_high"]
FEW = 6  # values of a parameter, at most, for each to have a tick, and the best a hint if it is at the edge


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
        record = {name: value for name, value in vars(self).items() if name not in ("folder", "parameters")}
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
    """Train points until all processes together have finished them. Raises Stopped, and errors but OUTCOMES."""
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
    start = time.monotonic()
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


def train_run(train: Callable[[Run], None], run: Run) -> Figures:
    """Train the run of a trial; returns its results."""
    torch.compiler.reset()  # else it gives up after several networks in one process
    gc.collect()  # a failed trial's traceback keeps its memory
    torch.cuda.empty_cache()
    train(run)
    return measure_run(run)


def propose(sweep: Sweep, trials: Sequence[Trial]) -> list[Point]:
    """A new point from TPE, in a list; empty if TPE repeats itself.

    Floats range from the lowest to the highest value; other parameters take one of their values.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, BaseDistribution] = {}
    for name in sweep.varying:
        values = sweep.values[name]
        if all(isinstance(value, float) for value in values):
            space[name] = FloatDistribution(min(values), max(values), log=min(values) > 0)
        else:
            space[name] = CategoricalDistribution(values)
    first = sweep.grid[0]
    # Seeded by the number of trials, so that a search repeats itself. Optuna takes 32 bits.
    seed = {**sweep.options, **first}["seed"]
    sampler = optuna.samplers.TPESampler(seed=(seed * 1_000_003 + len(trials)) % 2**32, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in trials:
        with suppress(ValueError):  # values of an earlier command
            state, params = STATES[trial.state], {name: trial.point[name] for name in space}
            study.add_trial(optuna.create_trial(state=state, value=trial.dev, params=params, distributions=space))
    for _ in range(PROPOSALS):
        point = {**first}
        for name, value in study.ask(space).params.items():
            low, high = min(sweep.values[name]), max(sweep.values[name])
            point[name] = min(max(float(f"{value:.4g}"), low), high) if isinstance(value, float) else value
        if all(trial.point != point for trial in trials):
            return [point]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Report: colors are from cividis, which stays readable for color-blind readers and in grayscale; a star marks the best.

Plane = Mapping[tuple[Any, Any], Trial]  # by the values of AXES
Curves = Mapping[int, Sequence[tuple[float, float]]]  # by the trial's number: epoch and AUROC on dev of each evaluation


class Setting(NamedTuple):
    """Finished trials that differ in their seed alone, and the best setting's AUROC on dev minus theirs."""

    name: str
    trials: Sequence[Trial]  # the best first
    less: Figure  # value, low, high; paired by patient


def compare_settings(run: Run, trials: Sequence[Trial]) -> list[Setting]:
    """The settings, by their trials' mean AUROC on the dev split of a run's shards, the best first.

    Differences are on the samples that all trials scored, and on the labels that choose checkpoints.
    """
    labels = run.config.labels
    groups: dict[str, list[Trial]] = {}
    scored: dict[int, Scored] = {}
    for trial in rank(trials):
        if trial.dev is not None:
            varied = {NAMES.get(name, name): value for name, value in trial.parameters.items() if name != "seed"}
            setting = ", ".join(f"{name} {show_value(value)}" for name, value in varied.items()) or "all seeds"
            groups.setdefault(setting, []).append(trial)
            scored[trial.number] = read_scored(run, trial.folder, "dev")
    if not groups:
        return []
    usable = ~np.isnan([images.scores for images in scored.values()]).any(axis=(0, 2))
    areas = {number: measure_areas(*images.take(usable)[:4]) for number, images in scored.items()}
    means = average(labels, next(iter(areas.values())))
    share = weigh_labels(labels, parse_choice(run.config.choose_by) or means["macro10"] or means["macro"])
    ranked = dict(sorted(groups.items(), key=lambda item: -fmean(trial.dev or 0 for trial in item[1])))
    sides = [[areas[trial.number] for trial in group] for group in ranked.values()]
    less = [subtract(sides[0], side, share) for side in sides]
    return [Setting(name, group, figure) for (name, group), figure in zip(ranked.items(), less, strict=True)]


def tabulate_settings(settings: Sequence[Setting], choice: str) -> Table:
    """The spread over seeds, if there are several, and the paired differences from the best setting."""
    seeds, rows = any(len(setting.trials) > 1 for setting in settings), []
    for name, trials, less in settings:
        dev = [trial.dev or 0.0 for trial in trials]
        spread = f"{stdev(dev):.3f}" if len(dev) > 1 else "–"
        cells = [str(len(dev)), f"{fmean(dev):.3f}", spread, f"{min(dev):.3f} to {max(dev):.3f}"] if seeds else []
        compared = f"{less['value']:z.3f} {pages.show_limits(less)}"
        rows.append([name, *cells, "–" if trials is settings[0].trials else compared])
    columns = ("seeds", "dev, mean", "SD", "range") if seeds else ()
    note = f"dev: AUROC, {choice}. The difference is between means over seeds, paired by patient; its interval covers "
    note += "the choice of dev's patients, not that of seeds."
    return Table("Settings", ("setting", *columns, "best minus this [95 %]"), rows, [note])


def write_sweep_report(sweep: Sweep, trials: Sequence[Trial], settings: Sequence[Setting], then: str) -> None:
    """Write sweep.csv and report.html into the sweep's folder; `then` is the command that uses the best setting."""
    chosen = sweep.options.get("choose_by", "all")
    curves, rows = {}, []
    for trial in trials:
        history = read_history(trial.folder)
        curves[trial.number] = [(line["epoch"], choice_score(line, chosen) or 0.0) for line in history]
        figures = [*(trial.figures.get(name) for name in FIGURES), trial.seconds]
        shown = [f"{value:.6f}" if isinstance(value, float) else value for value in figures]
        rows.append([trial.number, trial.state, *trial.parameters.values(), *shown, trial.folder.name])
    parameters = trials[0].parameters if trials else ()
    page = render_sweep(sweep, trials, curves, settings, then)
    with locked(sweep.folder / ".lock"):  # processes that share a sweep may finish at once
        write_csv(sweep.folder / "sweep.csv", [["number", "state", *parameters, *FIGURES, "seconds", "run"], *rows])
        write_atomically(sweep.folder / "report.html", page.encode())


def tabulate_trials(title: str, ranked: Sequence[Trial]) -> Table:
    """The results of ranked trials: the AUROC on dev that ranks them, then over the same labels of each split."""
    dev, again = ([pages.show_figure(trial.figures.get(name)) for trial in ranked] for name in (FIGURES[0], FIGURES[2]))
    rows = []
    for trial in ranked:
        first, labels, same, train, valid, low, high = (trial.figures.get(name) for name in FIGURES)
        means = [pages.show_figure(value) for value in ((same, train) if dev != again else (train,))]
        limits = pages.show_limits({"low": low, "high": high})
        minutes = "–" if trial.seconds is None else f"{trial.seconds / 60:.1f}"
        cells = [str(trial.number), trial.state, *map(show_value, trial.parameters.values()), pages.show_figure(first)]
        rows.append([*cells, show_value(labels), *means, f"{pages.show_figure(valid)} {limits}", minutes])
    names = [NAMES.get(name, name) for name in (ranked[0].parameters if ranked else ())]
    figures = ("dev", "labels", *(["same, dev"] if dev != again else []), "train", "valid [95 %]", "minutes")
    return Table(title, ("trial", "state", *names, *figures), rows, kind="trials")


def render_sweep(
    sweep: Sweep, trials: Sequence[Trial], curves: Curves, settings: Sequence[Setting] = (), then: str = ""
) -> str:
    """The page of a sweep."""
    ranked, choice = rank(trials), sweep.choice
    done = [trial for trial in ranked if trial.dev is not None]
    draw = partial(pages.draw_svg, fitted=True)
    points = {metric: best_points(trials, metric) for metric in METRICS}
    planes = {
        metric: draw(partial(draw_plane, points=points[metric], metric=metric), f"{metric} AUROC", (4.6, 3.6))
        for metric in METRICS
        if points[metric]
    }
    slices = [
        draw(partial(draw_slice, trials=done, name=name), f"dev AUROC by {name}", (4.0, 2.6))
        for name in (trials[0].parameters if len(done) > 1 else ())
        if name not in (*(AXES if planes else ()), "seed")
    ]
    shown = partial(draw_curves, trials=ranked, curves=curves, choice=choice)
    return pages.render(
        "model.runs",
        "sweep.html",
        title=sweep.folder.name,
        trials=ranked,
        table=tabulate_trials("", ranked),
        settings=tabulate_settings(settings, choice) if len(trials) > 1 else None,
        then=then,
        done=done,
        names=NAMES,
        hints=list(hint_at_edges(done)),
        planes=planes,
        slices=slices,
        notes=METRICS,
        choice=choice,
        curves=draw(shown, "learning curves", (4.6, 3.6)) if any(curves.values()) else None,
        show=show_value,
    )


def show_value(value: object) -> str:
    """A parameter's value as users type it."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def hint_at_edges(done: Sequence[Trial]) -> Iterator[str]:
    """A value to try next, for each parameter whose best value is the lowest or highest tried."""
    for name, best in done[0].parameters.items() if done else ():
        values = sorted({trial.parameters[name] for trial in done})
        if name == "seed" or not isinstance(best, (int, float)) or not 1 < len(values) <= FEW:
            continue
        for edge, neighbor, which in ((values[0], values[1], "lowest"), (values[-1], values[-2], "highest")):
            if best == edge and edge and neighbor:
                further = show_value(float(f"{edge * min(max(edge / neighbor, 0.1), 10):.2g}"))  # a decade at most
                shown = f"{NAMES.get(name, name)}, {show_value(best)}"
                yield f"The best {shown}, is the {which} of those tried: try {further}, too."


def best_points(trials: Sequence[Trial], metric: str) -> Plane:
    """(learning rate, weight decay) → the best of their trials on dev, in order of rank; empty unless both vary."""
    points: dict[tuple[Any, Any], Trial] = {}
    for trial in rank(trials):
        if trial.figures.get(f"{metric}_auroc") is not None and trial.parameters.keys() >= set(AXES):
            points.setdefault((trial.parameters["lr"], trial.parameters["weight_decay"]), trial)
    return points


def place(axes: Axes, side: str, values: Sequence[Any], name: str) -> list[float]:
    """The positions of a parameter's values on axis x or y, which gets its name and ticks.

    Numbers lie on a logarithmic scale, with 0 a decade below the lowest other one; words lie side by side.
    """
    known = sorted(set(values))
    places, shown = {value: float(number) for number, value in enumerate(known)}, known
    if not isinstance(known[0], str):
        lowest = min((value for value in known if value > 0), default=1)
        getattr(axes, f"set_{side}scale")("symlog", linthresh=lowest, linscale=0.9)
        places = {value: float(value) for value in known}
        shown = known if len(known) <= FEW else [known[0], known[len(known) // 2], known[-1]]
    texts = [value if isinstance(value, str) else f"{value:.3g}" for value in shown]
    getattr(axes, f"set_{side}ticks")([places[value] for value in shown], texts)
    axes.set(**{f"{side}label": NAMES.get(name, name)})
    return [places[value] for value in values]


def draw_plane(axes: Axes, points: Plane, metric: str) -> None:
    """A metric over both AXES: a colored point for each pair of values, few with their numbers; a star at the best."""
    x, y = (place(axes, *side) for side in zip("xy", zip(*points, strict=True), AXES, strict=True))
    values = np.array([trial.figures[f"{metric}_auroc"] for trial in points.values()], float)
    axes.margins(0.15)
    drawn = axes.scatter(x, y, c=values, cmap="cividis", edgecolors=pages.INK, linewidths=0.8, s=200)
    axes.plot(x[0], y[0], "*", markersize=9, markerfacecolor="white", markeredgecolor="black")
    for right, up, value in zip(x, y, values, strict=True) if len(points) <= FEW**2 else ():
        axes.annotate(f"{value:.3f}", (right, up), (0, 10), textcoords="offset points", ha="center")
    axes.figure.colorbar(drawn, ax=axes).outline.set_visible(False)


def draw_slice(axes: Axes, trials: Sequence[Trial], name: str) -> None:
    """AUROC on dev by a parameter, of ranked finished trials; a star at the best one."""
    places = place(axes, "x", [trial.parameters[name] for trial in trials], name)
    scores = [trial.dev or 0.0 for trial in trials]
    axes.plot(places, scores, "o", color=pages.FIRST, markersize=4)
    axes.plot(places[0], scores[0], "*", color=pages.SECOND, markersize=13)
    axes.set_ylabel("dev AUROC")


def draw_curves(axes: Axes, trials: Sequence[Trial], curves: Curves, choice: str) -> None:
    """AUROC on dev by epoch of ranked trials: the best thick."""
    for trial in reversed(trials):
        if points := curves.get(trial.number):
            first = trial is trials[0] and trial.dev is not None
            color, width = (pages.SECOND, 2.2) if first else (pages.FAINT, 0.9)
            axes.plot(*zip(*points, strict=True), color=color, linewidth=width)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", ylabel=f"dev AUROC: {choice}")


def print_sweep(sweep: Sweep, trials: Sequence[Trial], settings: Sequence[Setting]) -> None:
    """Print the results."""
    failed, complete = (sum(trial.state == state for trial in trials) for state in ("failed", "complete"))
    counted = f"{count_of(complete, 'trial')} complete{f', {failed} failed' if failed else ''}"
    echo(f"{sweep.folder / 'report.html'}: {counted}")
    if complete:
        ranked = rank(trials)
        tabulate_trials(f"The best of {count_of(len(trials), 'trial')}", ranked[:5]).print()
        echo(f"trial {ranked[0].number} is the best: {ranked[0].folder}")
    if complete > 1:
        tabulate_settings(settings, sweep.choice).print()
