"""Trials of a sweep → the comparison of its settings on dev, sweep.csv and report.html.

Colors are from cividis, which stays readable for color-blind readers and in grayscale. Every figure marks the best
trial on dev.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from model.runs.config import parse_choice
from model.runs.results import choice_score, read_history, read_scored
from model.runs.run import Run
from model.runs.sweep import Sweep, Trial, rank
from pipeline.base import pages
from pipeline.base.files import locked, write_atomically, write_csv
from pipeline.base.tabular import Table
from pipeline.console import count_of, echo
from pipeline.measure.delong import average, measure_areas, subtract, weigh_labels
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import Figure

AXES = ("lr", "weight_decay")  # of the planes
NAMES = {"lr": "learning rate", "weight_decay": "weight decay", "batch_size": "batch size"}
METRICS = {"dev": "of the checkpoint kept", "train": "of a part of train, at the checkpoint kept"}
# As `results.measure_run` names them.
FIGURES = ["dev_auroc", "same_labels", "dev_same_auroc", "train_auroc", "valid_auroc", "valid_low", "valid_high"]
FEW = 6  # values of a parameter, at most, for each to have a tick, and the best a hint if it is at the edge
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
            values = {NAMES.get(name, name): value for name, value in trial.parameters.items() if name != "seed"}
            name = ", ".join(f"{name} {show_value(value)}" for name, value in values.items())
            groups.setdefault(name or "all seeds", []).append(trial)
            scored[trial.number] = read_scored(run, trial.folder, "dev")
    if not groups:
        return []
    usable = ~np.isnan([images.scores for images in scored.values()]).any(axis=(0, 2))
    areas = {number: measure_areas(*images.take(usable)[:4]) for number, images in scored.items()}
    means = average(labels, next(iter(areas.values())))
    share = weigh_labels(labels, parse_choice(run.config.choose_by) or means["macro10"] or means["macro"])
    ranked = dict(sorted(groups.items(), key=lambda item: -fmean(trial.dev or 0 for trial in item[1])))
    best, *_ = sides = [[areas[trial.number] for trial in group] for group in ranked.values()]
    settings = []
    for item, side in zip(ranked.items(), sides, strict=True):
        settings.append(Setting(*item, subtract(best, side, share)))
    return settings


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
    choose_by = sweep.options.get("choose_by", "all")
    curves = {
        trial.number: [(line["epoch"], choice_score(line, choose_by) or 0.0) for line in read_history(trial.folder)]
        for trial in trials
    }
    page = render_sweep(sweep.folder.name, trials, sweep.choice, curves, settings, then)
    with locked(sweep.folder / ".lock"):  # processes that share a sweep may finish at once
        write_csv(sweep.folder / "sweep.csv", list_rows(trials))
        write_atomically(sweep.folder / "report.html", page.encode())


def list_rows(trials: Sequence[Trial]) -> Iterator[list[object]]:
    """The rows of sweep.csv: one per trial, in order; empty if there is no result."""
    yield ["number", "state", *(trials[0].parameters if trials else ()), *FIGURES, "seconds", "run"]
    for trial in trials:
        values = [*(trial.figures.get(name) for name in FIGURES), trial.seconds]
        shown = [f"{value:.6f}" if isinstance(value, float) else value for value in values]
        yield [trial.number, trial.state, *trial.parameters.values(), *shown, trial.folder.name]


def tabulate_trials(title: str, ranked: Sequence[Trial]) -> Table:
    """The results of ranked trials: the AUROC on dev that ranks them, then over the same labels of each split."""
    dev = [pages.show_figure(trial.figures.get("dev_auroc")) for trial in ranked]
    again = [pages.show_figure(trial.figures.get("dev_same_auroc")) for trial in ranked]
    rows = []
    for trial in ranked:
        first, labels, same, train, valid, low, high = (trial.figures.get(name) for name in FIGURES)
        limits = pages.show_limits({"low": low, "high": high})
        cells = [str(trial.number), trial.state, *map(show_value, trial.parameters.values())]
        cells += [pages.show_figure(first), show_value(labels)]
        cells += map(pages.show_figure, (same, train) if dev != again else (train,))
        cells += [f"{pages.show_figure(valid)} {limits}"]
        rows.append([*cells, "–" if trial.seconds is None else f"{trial.seconds / 60:.1f}"])
    names = [NAMES.get(name, name) for name in (ranked[0].parameters if ranked else ())]
    figures = ("dev", "labels", *(["same, dev"] if dev != again else []), "train", "valid [95 %]", "minutes")
    return Table(title, ("trial", "state", *names, *figures), rows, kind="trials")


def render_sweep(
    title: str, trials: Sequence[Trial], choice: str, curves: Curves, settings: Sequence[Setting] = (), then: str = ""
) -> str:
    """The page; `choice` is the AUROC that ranks trials, as named by `name_choice`."""
    ranked = rank(trials)
    done = [trial for trial in ranked if trial.dev is not None]
    draw = partial(pages.draw_svg, fitted=True)
    varying = list(trials[0].parameters) if trials else []
    planes = {
        metric: draw(partial(draw_plane, points=points, metric=metric), f"{metric} AUROC", (4.6, 3.6))
        for metric in METRICS
        if (points := best_points(trials, metric))
    }
    slices = [
        draw(partial(draw_slice, trials=done, name=name), f"dev AUROC by {name}", (4.0, 2.6))
        for name in varying
        if name not in (*(AXES if planes else ()), "seed") and len(done) > 1
    ]
    shown = partial(draw_curves, trials=ranked, curves=curves, choice=choice)
    page = pages.open_templates("model.runs").get_template("sweep.html")
    return page.render(
        title=title,
        table=tabulate_trials("", ranked),
        settings=tabulate_settings(settings, choice) if len(trials) > 1 else None,
        then=then,
        errors={trial.number: trial.error for trial in ranked if trial.error},
        done=done,
        parameters={name: NAMES.get(name, name) for name in varying},
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
    places = {value: float(number) for number, value in enumerate(known)}
    if not isinstance(known[0], str):
        lowest = min((value for value in known if value > 0), default=1)
        getattr(axes, f"set_{side}scale")("symlog", linthresh=lowest, linscale=0.9)
        places = {value: float(value) for value in known}
        known = known if len(known) <= FEW else [known[0], known[len(known) // 2], known[-1]]
    getattr(axes, f"set_{side}ticks")(
        [places[value] for value in known], [one if isinstance(one, str) else f"{one:.3g}" for one in known]
    )
    axes.set(**{f"{side}label": NAMES.get(name, name)})
    return [places[value] for value in values]


def draw_plane(axes: Axes, points: Plane, metric: str) -> None:
    """A metric over both AXES: a colored point for each pair of values, few with their numbers; a star at the best."""
    sides = zip("xy", zip(*points, strict=True), AXES, strict=True)
    x, y = (place(axes, *side) for side in sides)
    values = np.array([trial.figures[f"{metric}_auroc"] for trial in points.values()], float)
    axes.margins(0.15)
    drawn = axes.scatter(x, y, c=values, cmap="cividis", edgecolors=pages.INK, linewidths=0.8, s=200)
    axes.plot(x[0], y[0], "*", markersize=9, markerfacecolor="white", markeredgecolor="black")
    for right, up, value in zip(x, y, values, strict=True) if len(points) <= FEW**2 else ():
        axes.annotate(f"{value:.3f}", (right, up), (0, 10), textcoords="offset points", ha="center")
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(drawn, ax=axes).outline.set_visible(False)


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
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"dev AUROC: {choice}")


def print_sweep(sweep: Sweep, trials: Sequence[Trial], settings: Sequence[Setting]) -> None:
    """Print the results."""
    failed, complete = (sum(trial.state == state for trial in trials) for state in ("failed", "complete"))
    counted = f"{count_of(complete, 'trial')} complete{f', {failed} failed' if failed else ''}"
    echo(f"{sweep.folder / 'report.html'}: {counted}")
    if not complete:
        return
    ranked = rank(trials)
    tabulate_trials(f"The best of {count_of(len(trials), 'trial')}", ranked[:5]).print()
    echo(f"trial {ranked[0].number} is the best: {ranked[0].folder}")
    if complete > 1:
        tabulate_settings(settings, sweep.choice).print()
