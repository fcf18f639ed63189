"""Trials of a sweep → sweep.csv, report.html, and the two contour plots as PNG.

Colors are those of cividis, which the color-blind and a gray printer tell apart. The report's figures take their
inks from the page, the PNGs are drawn on white.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.tri import LinearTriInterpolator, Triangulation

from model.runs.config import MEANS
from model.runs.sweep import Sweep, Trial, importances
from pipeline.base import pages
from pipeline.base.files import locked, write_atomically

MAP = matplotlib.colormaps["cividis"]
AXES = ("lr", "weight_decay")  # of the contour plots
NAMES = {"lr": "learning rate", "weight_decay": "weight decay", "batch_size": "batch size"}
METRICS = {"dev": "dev", "train": "train"}
FIGURES = {
    "dev": "dev_auroc",
    "labels": "same_labels",  # that the rest are over
    "same": "dev_same_auroc",
    "train": "train_auroc",
    "valid": "valid_auroc",
    "low": "valid_low",
    "high": "valid_high",
    "epochs": "epochs",
    "seconds": "seconds",
}
LEVELS = 12  # of the contours


def write_sweep_report(sweep: Sweep, trials: Sequence[Trial]) -> None:
    """Write sweep.csv, report.html, contour-dev.png and contour-train.png into the sweep's folder."""
    page = render_sweep(sweep.folder.name, trials, importances(sweep, trials), sweep.choice)
    with locked(sweep.folder / ".lock"):  # processes that share a sweep end at the same time
        write_atomically(sweep.folder / "sweep.csv", format_csv(trials).encode())
        write_atomically(sweep.folder / "report.html", page.encode())
        for metric in METRICS:
            if points := best_points(trials, metric):
                figure = Figure(figsize=(5.2, 4.0), layout="constrained")
                axes = figure.subplots()
                draw_contour(axes, points, "black")
                axes.set_title(f"{METRICS[metric]} AUROC: {sweep.choice}", fontsize=11)
                picture = io.BytesIO()
                figure.savefig(picture, format="png", dpi=200)
                write_atomically(sweep.folder / f"contour-{metric}.png", picture.getvalue())


def format_csv(trials: Sequence[Trial]) -> str:
    """A row per trial, in their order; empty where there is no figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parameters = list(trials[0].parameters) if trials else []
    writer.writerow(["number", "state", *parameters, *FIGURES.values(), "run"])
    for trial in trials:
        values = [getattr(trial, name) for name in FIGURES]
        shown = [
            "" if value is None else f"{value:.6f}" if isinstance(value, float) else value for value in values
        ]
        writer.writerow([trial.number, trial.state, *trial.parameters.values(), *shown, trial.run.name])
    return text.getvalue()


def rank(trials: Sequence[Trial]) -> list[Trial]:
    """Finished trials by dev, the best first; behind them the others by number."""
    return sorted(trials, key=lambda trial: (trial.dev is None, -(trial.dev or 0), trial.number))


def render_sweep(
    title: str, trials: Sequence[Trial], shares: Mapping[str, float] | None, choice: str = MEANS["macro10"]
) -> str:
    """The page; `shares` are the parameters' importances, if there are enough trials for them.

    `choice` is the AUROC that trials are compared by, as `name_choice` has it.
    """
    ranked = rank(trials)
    best = ranked[0] if ranked and ranked[0].dev is not None else None
    draw = partial(pages.draw_svg, fitted=True)
    contours = {
        METRICS[metric]: draw(
            partial(draw_contour, points=points, ink=pages.INK),
            f"{metric} contour",
            (4.6, 3.6),
        )
        for metric in METRICS
        if (points := best_points(trials, metric))
    }
    varying = list(trials[0].parameters) if trials else []
    done = [trial for trial in ranked if trial.dev is not None]
    shown = len(done) > 1 and len(varying) > 0
    page = pages.open_templates("model.runs").get_template("sweep.html")
    return page.render(
        title=title,
        best=best,
        trials=ranked,
        parameters={name: NAMES.get(name, name) for name in varying},
        contours=contours,
        shares=shares,
        importance=draw(lambda axes: draw_importances(axes, shares), "importances", (4.4, 1.8))
        if shares
        else None,
        parallel=draw(lambda axes: draw_parallel(axes, done), "parallel coordinates", (8.0, 3.2))
        if shown
        else None,
        choice=choice,
        curves=draw(lambda axes: draw_curves(axes, ranked, choice), "learning curves", (8.0, 3.4))
        if any(trial.history for trial in trials)
        else None,
        show=show_value,
    )


def show_value(value: Any) -> str:
    """A parameter's value as people type it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def best_points(trials: Sequence[Trial], metric: str) -> dict[tuple[float, float], float]:
    """(learning rate, weight decay) → the metric of the trial there that is best on dev; empty if neither varies."""
    points: dict[tuple[float, float], float] = {}
    for trial in rank(trials):
        value = getattr(trial, metric)
        if value is not None and any(name in trial.parameters for name in AXES):
            place = (float(trial.parameters.get("lr", 1)), float(trial.parameters.get("weight_decay", 1)))
            points.setdefault(place, value)
    return points


def positions(values: Sequence[float]) -> tuple[list[float], dict[float, str]]:
    """Places of the values on a logarithmic axis, and the tick labels there; 0 is a decade below the lowest other."""
    lowest = min((value for value in values if value > 0), default=1.0)
    places = [float(np.log10(value if value > 0 else lowest / 10)) for value in values]
    return places, {place: show_value(value) for place, value in zip(places, values, strict=True)}


def draw_contour(axes: Axes, points: Mapping[tuple[float, float], float], ink: str) -> None:
    """Filled contours between the points, interpolated in the logarithms; the points, and the best one as a star.

    Without four points that span an area there are the points alone.
    """
    x, x_ticks = positions([place[0] for place in points])
    y, y_ticks = positions([place[1] for place in points])
    values = np.array(list(points.values()))
    scale = Normalize(values.min(), max(values.max(), values.min() + 1e-3))
    corners = np.column_stack([x, y])
    if len(points) >= 4 and np.linalg.matrix_rank(corners - corners[0]) == 2:
        mesh = Triangulation(x, y)
        # On a fine grid: contours straight between few points would have corners that mean nothing.
        fine_x, fine_y = np.meshgrid(np.linspace(min(x), max(x), 80), np.linspace(min(y), max(y), 80))
        field = LinearTriInterpolator(mesh, values)(fine_x, fine_y)
        levels = np.linspace(scale.vmin or 0.0, scale.vmax or 1.0, LEVELS)
        axes.contourf(fine_x, fine_y, field, levels=levels, cmap=MAP, norm=scale, extend="both")
    drawn = axes.scatter(x, y, c=values, cmap=MAP, norm=scale, edgecolors=ink, linewidths=0.8, s=36, zorder=3)
    top = int(values.argmax())
    axes.plot(x[top], y[top], "*", markersize=17, markerfacecolor="white", markeredgecolor="black", zorder=4)
    for axis, ticks, name in ((axes.xaxis, x_ticks, AXES[0]), (axes.yaxis, y_ticks, AXES[1])):
        kept = sorted(ticks)
        if len(kept) > 8:  # a search has as many values as trials
            kept = kept[:: len(kept) // 5]
        axis.set_major_locator(FixedLocator(kept))
        axis.set_minor_locator(NullLocator())
        axis.set_ticklabels([ticks[place] for place in kept])
        axis.set_label_text(NAMES[name])
        low, high = min(ticks), max(ticks)
        room = 0.06 * (high - low) or 0.5
        axis.set_view_interval(low - room, high + room, ignore=True)
    figure = axes.get_figure()
    if figure is not None:
        bar = figure.colorbar(drawn, ax=axes)
        bar.outline.set_visible(False)


def draw_parallel(axes: Axes, trials: Sequence[Trial]) -> None:
    """A line per finished trial across its parameters and its AUROC on dev, stronger the higher that is.

    The best one is thick.
    """
    columns: dict[str, tuple[list[float], dict[float, str]]] = {}
    for name in trials[0].parameters:
        values = [trial.parameters[name] for trial in trials]
        if all(isinstance(value, float) for value in values):
            columns[NAMES.get(name, name)] = positions(values)
        else:
            order = sorted(set(values))
            places = [float(order.index(value)) for value in values]
            columns[NAMES.get(name, name)] = (places, {float(n): str(value) for n, value in enumerate(order)})
    scores = [trial.dev or 0.0 for trial in trials]
    columns["dev AUROC"] = (scores, {value: f"{value:.3f}" for value in (min(scores), max(scores))})
    color = Normalize(min(scores), max(max(scores), min(scores) + 1e-3))
    heights = []
    for column, (places, ticks) in enumerate(columns.values()):
        low, high = min(places), max(places)
        height = {place: (place - low) / (high - low) if high > low else 0.5 for place in {*places, *ticks}}
        heights.append([height[place] for place in places])
        axes.axvline(column, color=pages.FAINT, linewidth=0.6, zorder=0)
        kept = sorted(ticks)
        for place in kept if len(kept) <= 8 else (kept[0], kept[-1]):
            axes.annotate(
                ticks[place],
                (column, height[place]),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
    for number in reversed(range(len(trials))):  # the best one on top
        line = [of_column[number] for of_column in heights]
        if number:
            axes.plot(range(len(columns)), line, pages.FIRST, alpha=0.15 + 0.7 * color(scores[number]))
        else:
            axes.plot(range(len(columns)), line, pages.SECOND, linewidth=2.6)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(columns) - 0.65)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_importances(axes: Axes, shares: Mapping[str, float]) -> None:
    """Bars, the most important parameter on top."""
    names = sorted(shares, key=lambda name: shares[name])
    bars = axes.barh(
        [NAMES.get(name, name) for name in names], [shares[name] for name in names], color=pages.FIRST
    )
    axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)


def draw_curves(axes: Axes, trials: Sequence[Trial], choice: str = MEANS["macro10"]) -> None:
    """AUROC on dev by epoch: the best trial thick, pruned ones dashed with a cross at their end."""
    best = trials[0] if trials[0].dev is not None else None
    for trial in reversed(trials):
        if trial.history:
            epochs, scores = zip(*trial.history, strict=True)
            first = trial is best
            axes.plot(
                epochs,
                scores,
                color=pages.SECOND if first else pages.FAINT,
                linewidth=2.2 if first else 0.9,
                linestyle="--" if trial.state == "pruned" else "-",
                marker="x" if trial.state == "pruned" else None,
                markevery=[-1],
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"dev AUROC: {choice}")
