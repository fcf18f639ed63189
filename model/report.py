"""Evaluations of a run → one HTML page that needs nothing else, and a model card in Markdown.

The page's figures are SVG by matplotlib. Each ink is drawn in a colour that stands for one of the style sheet's
(`INKS`), so that figures follow the page from light to dark; titles are HTML, never matplotlib's text.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.assessment import AREAS, Scored
from model.calibration import RULES, apply_temperature
from model.metrics import FEW, Bools, Curve, Floats, label_cells, reliability, threshold_curve

INK, FAINT, FIRST, SECOND, THIRD = (f"#00000{number}" for number in range(1, 6))
INKS = {
    INK: "currentColor",
    FAINT: "var(--faint)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
SVG_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "path.simplify_threshold": 0.4,  # of a point: a curve of 20,000 images is as light as one of 200
    "font.size": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}
MEANS = {"macro": "macro", "macro10": "macro, ≥ 10 positives", "mean5": "mean of competition's 5"}
TITLES = {"youden": "Youden's J", "max_f1": "highest F1", "sensitivity": "sensitivity"}


def render_report(
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, Scored],
) -> str:
    """The page of a run: settings, training curves, and by split what `assess` gives with the curves behind it.

    `history` are the lines of metrics.jsonl; `evaluations` and `images` have the same splits.
    """
    sections = [
        {
            "name": name,
            "evaluation": evaluation,
            "panels": draw_panels(evaluation, images[name]),
            "gaps": describe_gaps(evaluation),
        }
        for name, evaluation in evaluations.items()
    ]
    training = draw_training(history) if history else None
    page = _environment().get_template("report.html")
    return page.render(title=title, config=config, training=training, sections=sections)


def render_model_card(
    title: str,
    config: Mapping[str, Any],
    data: Mapping[str, Mapping[str, int]],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> str:
    """The model card of a run; `data` are samples, studies and patients of each split."""
    gaps = {name: describe_gaps(evaluation) for name, evaluation in evaluations.items()}
    card = _environment().get_template("model-card.md")
    return card.render(title=title, config=config, data=data, evaluations=evaluations, gaps=gaps)


def describe_gaps(evaluation: Mapping[str, Any]) -> list[str]:
    """A line for everything of an evaluation that is undefined or rests on fewer resamples, and why."""
    lines = []
    for level, part in (("images", evaluation), ("studies", evaluation["study"])):
        intervals = part["intervals"]
        for name in part["skipped"]:
            label = part["labels"][name]
            lacking = " and ".join(side for side in ("positives", "negatives") if label[side] == 0)
            lines.append(f"{name}, {level}: no {lacking}, so no AUROC, no AUPRC, and in no mean.")
        for name, label in part["labels"].items():
            few = min(label["positives"], label["negatives"])
            if 0 < few < FEW:
                lines.append(
                    f"{name}, {level}: {few} of one class; its figures and intervals are mostly chance."
                )
        for mean, shown in MEANS.items():
            if part[f"{mean}_auroc"] is None:
                lines.append(f"{shown}, {level}: undefined, for lack of labels.")
        for name, limits in intervals["auroc"].items():
            lost = intervals["resamples"] - limits["resamples"]
            if 0 < lost < intervals["resamples"]:
                what = f"{lost:,} of {intervals['resamples']:,} resamples have one class and are left out"
                lines.append(f"{MEANS.get(name, name)}, {level}: {what} of its intervals.")
        fitted = evaluation["calibration"]["image" if part is evaluation else "study"]
        lines += [
            f"{name}, {level} of dev: {label['note']}." for name, label in fitted.items() if label["note"]
        ]
    return lines


def draw_training(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """Train loss and dev AUROC by epoch, each as caption and SVG."""
    epochs = [line["epoch"] for line in history]

    def draw_loss(axes: Axes) -> None:
        axes.plot(epochs, [line["train_loss"] for line in history], ".-", color=FIRST)
        axes.set(xlabel="epoch", ylabel="train loss")

    def draw_auroc(axes: Axes) -> None:
        for mean, color in zip(MEANS, (FIRST, SECOND, THIRD), strict=True):
            values = [line.get(f"{mean}_auroc") for line in history]
            heights = [np.nan if value is None else value for value in values]
            axes.plot(epochs, heights, ".-", color=color, label=MEANS[mean])
        axes.set(xlabel="epoch", ylabel="AUROC, dev")
        axes.legend()

    return [
        ("Training loss", draw_svg(draw_loss, "train loss by epoch", (4.4, 2.6))),
        ("AUROC on dev", draw_svg(draw_auroc, "AUROC on dev by epoch", (4.4, 2.6))),
    ]


def draw_panels(evaluation: Mapping[str, Any], images: Scored) -> dict[str, dict[str, Markup]]:
    """ROC, precision-recall and reliability curves: kind → label → SVG; none of a label that is skipped."""
    panels: dict[str, dict[str, Markup]] = {"ROC": {}, "precision-recall": {}, "reliability": {}}
    for name, score, truth in label_cells(list(evaluation["labels"]), *images[:3]):
        label = evaluation["labels"][name]
        if label["auroc"] is None:
            continue
        curve = threshold_curve(score, truth)
        temperature = evaluation["calibration"]["image"][name]["temperature"]
        draws = {
            "ROC": partial(_draw_roc, curve, label["operating_points"]["youden"]),
            "precision-recall": partial(_draw_pr, curve),
            "reliability": partial(_draw_reliability, score, apply_temperature(score, temperature), truth),
        }
        for kind, draw in draws.items():
            panels[kind][name] = draw_svg(draw, f"{kind} curve of {name}", (2.1, 2.0), unit=True)
    return panels


def _draw_roc(curve: Curve, chosen: Mapping[str, float] | None, axes: Axes) -> None:
    hits, alarms = curve.true_positives, curve.false_positives
    axes.plot([0, 1], [0, 1], ":", color=FAINT)
    axes.plot([0, *alarms / alarms[-1]], [0, *hits / hits[-1]], color=FIRST)
    if chosen is not None:
        axes.plot(1 - chosen["specificity"], chosen["sensitivity"], "o", color=SECOND, markersize=4)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")


def _draw_pr(curve: Curve, axes: Axes) -> None:
    hits, called = curve.true_positives, curve.true_positives + curve.false_positives
    precision = hits / called
    axes.axhline(precision[-1], linestyle=":", color=FAINT)  # of calling all positive
    axes.step([0, *hits / hits[-1]], [precision[0], *precision], color=FIRST)
    axes.set(xlabel="recall", ylabel="precision")


def _draw_reliability(score: Floats, calibrated: Floats, truth: Bools, axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], ":", color=FAINT)
    for values, style, color in ((score, "s--", SECOND), (calibrated, "o-", FIRST)):
        bins = reliability(values, truth)
        drawn = bins.cells >= FEW
        axes.plot(bins.score[drawn], bins.share[drawn], style, color=color, markersize=3)
    axes.set(xlabel="mean score", ylabel="share of positives")


def draw_svg(
    draw: Callable[[Axes], None], description: str, inches: tuple[float, float], unit: bool = False
) -> Markup:
    """A figure as an SVG element for an HTML page, as wide as its place; `unit`: both axes from 0 to 1."""
    width, height = (72 * side for side in inches)
    with matplotlib.rc_context({**SVG_STYLE, "svg.hashsalt": description}):
        figure = Figure(figsize=inches)
        # Room for tick labels and the axes' names, in points; a layout engine would take half of the time.
        left = 33 if unit else 40
        axes = figure.add_axes((left / width, 30 / height, 1 - (left + 5) / width, 1 - 35 / height))
        draw(axes)
        if unit:
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
            axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    body = file.getvalue().split("<svg", 1)[1].split(">", 1)[1]
    body = re.sub('<g id="[^"]*"', "<g", body)  # the same in every figure, and not referred to
    body = re.sub(r"(\.\d\d)\d{2,}", r"\1", body)  # a hundredth of a point will do
    for drawn, shown in INKS.items():
        body = body.replace(drawn, shown)
    opening = f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width:g} {height:g}">'
    return Markup(opening + body)  # noqa: S704


def show_figure(value: float | None) -> str:
    """Three places; an undefined one as a dash."""
    return "–" if value is None else f"{value:.3f}"


def show_limits(limits: Mapping[str, Any]) -> str:
    """An interval in brackets."""
    return "–" if limits["low"] is None else f"[{limits['low']:.3f}, {limits['high']:.3f}]"


def show_setting(value: object) -> str:
    """A value of the configuration as one line."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    return "–" if value is None else str(value)


def show_cell(text: str) -> str:
    """A text as a line of Markdown that holds no markup, and no end of a table's cell."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "/").split())


def widest_gap(found: Mapping[str, Any]) -> str:
    """The label with the widest TPR gap between the groups of a variable, and the gap."""
    gaps = {name: gap for name, gap in found["tpr_gap"].items() if gap is not None}
    name = max(gaps, key=lambda label: gaps[label], default=None)
    return "–" if name is None else f"{name} {show_figure(gaps[name])}"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("model"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": show_figure,
        "limits": show_limits,
        "setting": show_setting,
        "cell": show_cell,
        "widest_gap": widest_gap,
    }
    environment.globals |= {"MEANS": MEANS, "RULES": RULES, "AREAS": AREAS, "TITLES": TITLES}
    return environment
