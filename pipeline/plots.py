"""Statistics → a figure: stacked bars of the four states per label, and a heat map of co-occurrence.

Imported only where a plot was asked for: matplotlib takes its time. Figures are made without
pyplot: no window, no global state. The same numbers give the same bytes with the same matplotlib.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.manifest import write_atomically
from pipeline.stats import STATES, Statistics

# Okabe and Ito's colours, which the colour-blind tell apart; gray for what was not mentioned.
COLORS = {"positive": "#D55E00", "uncertain": "#F0E442", "negative": "#56B4E9", "blank": "#E3E3E3"}
NAMED_SHARE = 5.0  # percent: a narrower bar has no room for its number
DPI = 200


def draw_report(statistics: Statistics, cooccurrence: Mapping[str, Mapping[str, int]] | None) -> Figure:
    """Bars of the states in percent of the images, in the labels' order; beside them the heat map, if any."""
    size = (7.5, 5.0) if cooccurrence is None else (13.0, 6.2)
    figure = Figure(figsize=size, layout="constrained")
    totals = (f"{statistics[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    figure.suptitle(", ".join(totals), fontsize=12)
    if cooccurrence is None:
        _draw_states(figure.subplots(), statistics)
    else:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_states(left, statistics)
        _draw_cooccurrence(figure, right, cooccurrence)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically as PNG or SVG (its text stays text), by the suffix."""
    data = io.BytesIO()
    # A fixed salt for the ids and no date, so that the same numbers give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pipeline"}):
        kind = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(data, format=kind, dpi=DPI, metadata=metadata)
    write_atomically(path, data.getvalue())


def _draw_states(axes: Axes, statistics: Statistics) -> None:
    labels = statistics["labels"]
    places = range(len(labels))
    start = [0.0] * len(labels)
    for state in STATES:
        shares = [100 * counts[state] / statistics["images"] for counts in labels.values()]
        bars = axes.barh(places, shares, left=start, height=0.78, color=COLORS[state], label=state)
        texts = [f"{share:.0f}" if share >= NAMED_SHARE else "" for share in shares]
        axes.bar_label(bars, texts, label_type="center", fontsize=8)
        start = [left + share for left, share in zip(start, shares, strict=True)]
    axes.set_yticks(places, labels=list(labels))
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of images (%)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(STATES), frameon=False)


def _draw_cooccurrence(figure: Figure, axes: Axes, cooccurrence: Mapping[str, Mapping[str, int]]) -> None:
    """P(column | row) in percent; the diagonal, which is always 100, is left out."""
    labels = list(cooccurrence)
    shares = [
        [math.nan if label == other or not row[label] else 100 * row[other] / row[label] for other in labels]
        for label, row in cooccurrence.items()
    ]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_facecolor(COLORS["blank"])
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if not math.isnan(share):
                color = "white" if share > 55 else "black"
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(labels)), labels=labels, rotation=90, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("of the images positive for the row, positive for the column too", fontsize=10)
    bar = figure.colorbar(image, ax=axes, pad=0.02, label="P(column | row), %")
    bar.outline.set_visible(False)
