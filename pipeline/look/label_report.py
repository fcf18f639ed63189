"""Counts and audits of labels → tables for a terminal, and one self-contained HTML page with pictures.

The page shows the numbers of `pipeline stats --format json`, for every grouping the source has. The same numbers and
matplotlib version give the same bytes.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.base import pages
from pipeline.base.errors import printable
from pipeline.base.pages import Table
from pipeline.labels import LABELS, STATES
from pipeline.measure.audit import Audit, Clue, shorten
from pipeline.measure.counts import NO_GROUP, Statistics, count_cooccurrence, count_groups
from pipeline.measure.metrics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED_SHARE = 5.0  # percent: narrower bars have no room for a number
STRENGTH = 0.55  # of the color at 100 %: numbers stay legible on light and dark backgrounds
KINDS = ("acquisition", "together", "content")  # of covariates, from left to right
COLORS = dict(zip(STATES, (pages.POSITIVE, pages.UNCERTAIN, pages.NEGATIVE, pages.BLANK), strict=True))


def render_label_report(title: str, scope: str, report: Statistics, table: pa.Table, audit: Audit) -> str:
    """The page. `report`, of a label table, may have `policy`; `scope` says what was counted."""
    counted = (count_groups(table, variable) for variable in NO_GROUP)
    states, together = partial(draw_states, report), partial(draw_cooccurrence, count_cooccurrence(table))
    values = {
        "states": pages.draw_svg(states, "share of images by state", (4.4, 4.0), fitted=True),
        "heat_map_together": pages.draw_svg(together, "co-occurrence", (6.6, 6.0), fitted=True),
        "groups": [tabulate_shares(by) for by in counted if len(by["groups"]) > 1],  # that split the table
        "counts": tabulate_counts(report),
        "policy": tabulate_policy(report["policy"]) if "policy" in report else None,
    }
    return render_audit(title, scope, audit, "labels.html", report=report, **values)


def render_audit(title: str, scope: str, audit: Audit, page: str = "audit.html", **values: object) -> str:
    """The page of an audit alone, or another with a section for it; `scope` says what was audited."""
    covariates = len({clue.covariate for clue in audit.clues})
    size, predicted = (2.4 + 0.3 * covariates, 4.6), "how well covariates predict labels"
    heat_map = pages.draw_svg(partial(draw_audit, audit), predicted, size, fitted=True) if covariates else None
    values |= {"audit": audit, "alarms": audit.describe_alarms(), "table": tabulate_audit(audit), "heat_map": heat_map}
    return pages.render("pipeline.look", page, title=title, scope=scope, **values)


def draw_states(statistics: Statistics, axes: "Axes") -> None:
    """One 100 % bar per label: its images by state, hatched if not annotated."""
    labels = statistics["labels"]
    rest = np.array([counts.get("not_annotated", 0) for counts in labels.values()])
    left = np.zeros(len(labels))
    for state in STATES:
        shares = 100 * np.array([counts[state] for counts in labels.values()]) / statistics["images"]
        # Thin lines separate the states for readers who cannot tell their colors apart.
        line: dict[str, Any] = {"color": COLORS[state], "edgecolor": pages.PAPER, "linewidth": 0.6}
        bars = axes.barh(range(len(labels)), shares, left=left, height=0.82, label=state, **line)
        texts = [f"{share:.0f}" if share >= NAMED_SHARE else "" for share in shares]
        text_color = pages.INK if state == "blank" else pages.ON_STATE
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color=text_color)
        left += shares
    if rest.any():
        hatch: dict[str, Any] = {"facecolor": "none", "edgecolor": pages.BLANK, "hatch": "////", "linewidth": 0.6}
        shares = 100 * rest / statistics["images"]
        axes.barh(range(len(labels)), shares, left=left, height=0.82, label="not annotated", **hatch)
    axes.set(xlim=(0, 100), ylim=(len(labels) - 0.5, -0.5), xlabel="share of images (%)")
    axes.set_yticks(range(len(labels)), labels=list(labels))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    legend = {"handlelength": 1, "handletextpad": 0.5, "columnspacing": 1.2, "borderaxespad": 0.2}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4 + bool(rest.any()), **legend)  # above


def draw_cooccurrence(counts: Floats, axes: "Axes") -> None:
    """P(column | row) in percent, as a number and as strength of color; without the diagonal and empty rows."""
    positives = np.diag(counts)[:, None]
    shares = np.divide(counts, positives, out=np.full(counts.shape, np.nan), where=positives > 0)
    np.fill_diagonal(shares, np.nan)
    _draw_cells(axes, shares, [[f"{100 * share:.0f}" for share in row] for row in shares], LABELS, LABELS)


def draw_audit(audit: Audit, axes: "Axes") -> None:
    """How well each covariate predicts each label: max(AUROC, 1 - AUROC), colored from .5 up; ! marks an alarm."""
    kinds: dict[str, str] = {}  # of each covariate: the first in KINDS, since some are content only for some labels
    for kind in KINDS:
        kinds |= {clue.covariate: kind for clue in audit.clues if clue.kind == kind and clue.covariate not in kinds}
    columns = list(kinds)
    labels = list(dict.fromkeys(clue.label for clue in sorted(audit.clues, key=lambda clue: clue.kind == "content")))
    strengths = np.full((len(labels), len(columns)), np.nan)
    texts = [[""] * len(columns) for _ in labels]
    for clue in audit.clues:
        y, x = labels.index(clue.label), columns.index(clue.covariate)
        strengths[y, x] = max(clue.strength, 0.5)
        texts[y][x] = f"{100 * clue.strength:.0f}{'!' if clue.alarm else ''}"
    _draw_cells(axes, 2 * strengths - 1, texts, labels, columns)
    for kind in KINDS:
        places = [place for place, name in enumerate(columns) if kinds[name] == kind]
        if places and kind != "together":  # its one column has that name
            axes.text(min(places) - 0.4, -0.75, kind, fontsize=8, color=pages.INK)
        if kind != KINDS[-1]:  # a gap to the next kind
            axes.axvline(max(places, default=-1) + 0.5, color=pages.PAPER, linewidth=4)


def _draw_cells(
    axes: "Axes", shares: Floats, texts: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """A heat map of shares [R, C], with a text in each cell; NaN cells are gray and empty."""
    from matplotlib.patches import Rectangle  # slow to load, and a terminal shows counts, too

    for (y, x), share in np.ndenumerate(shares):
        color = pages.BLANK if np.isnan(share) else (pages.FIRST, STRENGTH * share)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor=pages.PAPER, linewidth=0.6))
        if not np.isnan(share):
            axes.text(x, y, texts[y][x], ha="center", va="center", fontsize=8, color=pages.INK)
    axes.set_xticks(range(len(columns)), labels=[name.replace("$", r"\$") for name in columns], rotation=90)
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def tabulate_counts(report: Statistics) -> Table:
    """The four states of each label."""
    columns = ["label", "positive", "uncertain", "negative", "blank"]
    columns += ["not annotated"] if any("not_annotated" in row for row in report["labels"].values()) else []
    counted = ((label, *counts.values()) for label, counts in report["labels"].items())
    rows = [[label, *(f"{count:,}" for count in states), _percent(share)] for label, *states, share in counted]
    totals = ", ".join(f"{report[unit]:,} {unit}" for unit in ("images", "studies", "patients"))
    return Table(totals, [*columns, "positive %"], rows, kind="counts")


def tabulate_shares(groups: Statistics) -> Table:
    """The share of positives in each group."""
    parts = groups["groups"].values()
    columns = ["label", *(f"{name} (n = {part['images']:,})" for name, part in groups["groups"].items())]
    rows = [[label, *(_percent(part["labels"][label]["share_positive"]) for part in parts)] for label in LABELS]
    return Table(f"positive % by {groups['variable']}", columns, rows, kind="groups")


def tabulate_policy(policies: Statistics) -> Table:
    """The targets of each label under policies."""
    columns = ["label", "uncertain", "positives", "negatives", "open", "masked", "mean target", "pos. weight"]
    rows = []
    for label, row in policies["labels"].items():
        counts = [f"{row[name]:,}" for name in ("positives", "negatives", "open", "masked")]
        figures = [pages.show_figure(row[name]) for name in ("mean_target", "pos_weight")]
        rows.append([label, row["policy"], *counts, *figures])
    return Table(f"under the policies below, and {policies['blank']} for blank", columns, rows, kind="policy")


def print_report(report: Statistics) -> None:
    """Print the counts per label, and a table for each requested section."""
    tabulate_counts(report).print()
    for section, tabulate in (("by", tabulate_shares), ("policy", tabulate_policy)):
        if section in report:
            tabulate(report[section]).print()


def print_audit(audit: Audit) -> None:
    """Print the alarms in words, and what predicts each label best, worst first."""
    for text in audit.describe_alarms():
        print(printable(f"{text}."))
    tabulate_audit(audit).print()
    for note in [*([] if audit.clues else [f"{audit.size}: nothing to test."]), *audit.notes]:
        print(printable(note))


def tabulate_audit(audit: Audit) -> Table:
    """What predicts each label best, worst first; ! marks an alarm."""
    best: dict[str, dict[str, Clue]] = {}
    for clue in sorted(audit.clues, key=lambda clue: clue.kind == "content"):
        best.setdefault(clue.label, {}).setdefault(clue.kind, clue)
    columns = ["label", "AUROC", "95 %", "acquisition", "adjusted", "all together"]
    if any("content" in kinds for kinds in best.values()):
        columns += ["AUROC", "content (may be the disease)"]
    rows = []
    for label, kinds in best.items():
        cells = ["–"] * (len(columns) - 1)
        if alone := kinds.get("acquisition"):
            cells[:4] = _mark(alone), alone.limits, alone.covariate, shorten(alone.adjusted)
        if joint := kinds.get("together"):
            cells[4] = _mark(joint)
        if content := kinds.get("content"):
            cells[5:] = shorten(content.strength), content.covariate
        rows.append([label, *cells])
    tests = f"of {len(audit.clues)} tests, those whose lower limit, adjusted by Holm's method at level {audit.level}"
    title = f"{audit.size}; alarms (!): {sum(clue.alarm for clue in audit.clues)}\n{tests}, is above {audit.threshold}"
    return Table(title, columns, rows, kind="audit", folded=True)


def _mark(clue: Clue) -> str:
    return f"{'! ' if clue.alarm else ''}{shorten(clue.strength)}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
