"""Evaluations → one self-contained HTML page, and a card in Markdown.

The first screen answers: which data, how well each finding is detected, at which threshold, what to distrust, and for
which groups it is worse. `templates/report.html` is the layout; tables come from `judged`, curves from the scores.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from pipeline.base import pages
from pipeline.base.pages import Panel, draw_svg, show_count, show_figure
from pipeline.look import judged
from pipeline.measure.calibration import apply_calibration
from pipeline.measure.evaluate import Scored, study_level
from pipeline.measure.evaluation import MEANS, UNITS, Evaluation
from pipeline.measure.metrics import FEW, Bools, Curve, Floats, label_cells, net_benefit, reliability, threshold_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WARNING = "For research. Not for clinical use."

Points = Sequence[Sequence[float | None]]  # of ROC curves: sensitivity and specificity
Panels = list[tuple[str, str, Markup]]  # name, caption and picture


class Section(NamedTuple):
    """A part of a page: its title, its anchor, and its body."""

    title: str
    place: str
    body: Markup


def render_page(
    title: str, evaluations: Sequence[Evaluation], images: Mapping[str, Scored], dataset: str, *more: Section
) -> str:
    """The page of the evaluations, dev last, then the sections of `more`; `images` are the scores of each split."""
    ordered = sorted(evaluations, key=lambda evaluation: evaluation.split == "dev")
    values = {
        "evaluations": [(evaluation, images[evaluation.split]) for evaluation in ordered],
        "data": {evaluation.split: describe_data(evaluation, dataset) for evaluation in ordered},
        "methods": read_lines("methods"),
    }
    tools = {"judged": judged, "means": MEANS, "units": UNITS, "draw_forest": draw_forest, "draw_curves": draw_curves}
    return pages.render("pipeline.look", "report.html", title=title, warning=WARNING, more=more, **values, **tools)


def read_lines(name: str) -> list[str]:
    """The paragraphs of a text in `templates`: methods or limits."""
    return files("pipeline.look").joinpath("templates", f"{name}.txt").read_text("utf-8").splitlines()


def describe_data(evaluation: Evaluation, dataset: str = "") -> str:
    """The data set of the split and its size, in words."""
    head = evaluation.head
    studies, patients = (show_count(evaluation.get(unit, None, "study").value) for unit in ("studies", "patients"))
    images = evaluation.get("images", None, "image").value
    size = f"{studies} studies of {patients} patients"
    if images is not None:
        size = f"{show_count(images)} images in {size}"
    about = f" of {dataset.replace('`', '')}" if dataset else ""
    chosen = f", chosen by {', '.join(head['chosen_by'])}" if head.get("chosen_by") else ""
    other = "; not the shards that the run was trained on" if "own" in head else ""
    return f"{about}: {size}{chosen}{other}."


def draw_forest(evaluation: Evaluation) -> Markup:
    """A line from limit to limit of AUROC for each finding, best first, then for the means."""
    means = [row for row in (evaluation.get("auroc", mean) for mean in MEANS) if row.value]
    rows = [row for row in (evaluation.get("auroc", label) for label in evaluation.labels) if row.value]
    rows = [*sorted(rows, key=lambda row: -row.number), *means]
    names = judged.name_rows(evaluation, [str(row.label) for row in rows]).values()

    def draw(axes: "Axes") -> None:
        for place, row in enumerate(rows):
            color = pages.INK if row in means else pages.FAINT if row.few else pages.FIRST
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=color, linewidth=1.2)
            axes.plot([row.number], [place], "D" if row in means else "o", color=color, markersize=4)
        axes.axvline(0.5, linestyle=":", color=pages.FAINT)
        axes.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in names])
        axes.set(xlabel="AUROC", ylim=(len(rows) - 0.4, -0.6))
        axes.tick_params(axis="y", length=0)

    size = (4.6, 0.6 + 0.19 * (len(evaluation.labels) + len(MEANS)))
    return draw_svg(draw, "AUROC of each label", size, fitted=True)


def draw_curves(evaluation: Evaluation, images: Scored) -> dict[str, Panels]:
    """ROC, precision-recall, reliability and decision curves, and readers; none for labels without an AUROC."""
    kinds = ("ROC", "precision-recall", "reliability", "decision")
    axes = {kind: Panel((2.1, 2.0), unit=kind != "decision") for kind in kinds}
    panels: dict[str, Panels] = {kind: [] for kind in kinds}
    rule = next(iter(judged.list_rules(evaluation)), None)
    for name, score, truth, _ in label_cells(evaluation.labels, *images[:4]):
        auroc, auprc = (evaluation.get(metric, name) for metric in ("auroc", "auprc"))
        if auroc.value is None:
            continue
        curve = threshold_curve(score, truth)
        temperature, bias = (evaluation.get(metric, name).value for metric in ("temperature", "bias"))
        calibrated = apply_calibration(score, {"temperature": temperature, "bias": bias})
        dot = [evaluation.get(rate, name, group=rule).value for rate in ("sensitivity", "specificity")]
        gains = [f"{at} {evaluation.get('net_benefit_gain', name, group=at).shown}" for at in ("at 0.1", "at 0.3")]
        error, fitted = (judged.show(evaluation.get(metric, name)) for metric in ("ece", "ece_calibrated"))
        fit = f" → {fitted}, T {show_figure(temperature)}, b {show_figure(bias)}" if temperature else ""
        for kind, caption, draw in (
            ("ROC", f"AUROC {auroc.shown}", partial(_draw_roc, curve, [dot])),
            ("precision-recall", f"AUPRC {auprc.shown}", partial(_draw_pr, curve)),
            ("reliability", f"ECE {error}{fit}", partial(_draw_reliability, score, calibrated, truth)),
            ("decision", ", ".join(gains), partial(_draw_decision, calibrated, truth)),
        ):
            svg = axes[kind].draw(draw, f"{kind} curve of {name}")
            panels[kind].append((judged.mark_few(name, auroc), caption, svg))
    return panels | {"readers": draw_readers(evaluation, images)}


def draw_readers(evaluation: Evaluation, images: Scored) -> Panels:
    """The ROC curves of the studies, with a point for each reader."""
    panels: Panels = []
    if not (readers := evaluation.head.get("readers")):
        return panels
    studies = study_level(images, evaluation.head["combine"])
    for name, score, truth, _ in label_cells(evaluation.labels, *studies[:4]):
        get = partial(evaluation.get, label=name, level="study")
        rates = [[get(rate, scorer=reader).value for rate in ("sensitivity", "specificity")] for reader in readers]
        points = [pair for pair in rates if None not in pair]
        if points and not truth.all() and truth.any():
            draw = partial(_draw_roc, threshold_curve(score, truth), points, mark="D", color=pages.THIRD, size=3.5)
            svg = draw_svg(draw, f"readers beside the ROC curve of {name}", (2.1, 2.0), unit=True)
            panels.append((name, f"{judged.count_below(evaluation, name)} readers below the curve", svg))
    return panels


def _draw_roc(
    curve: Curve, points: Points, axes: "Axes", mark: str = "o", color: str = pages.SECOND, size: float = 4
) -> None:
    """The ROC curve, and marked points of sensitivity and specificity."""
    hits, alarms = curve.true_positives, curve.false_positives
    axes.plot([0, 1], [0, 1], ":", color=pages.FAINT)
    axes.plot([0, *alarms / alarms[-1]], [0, *hits / hits[-1]], color=pages.FIRST)
    for sensitivity, specificity in points:
        if sensitivity is not None and specificity is not None:
            axes.plot(1 - specificity, sensitivity, mark, color=color, markersize=size)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")


def _draw_pr(curve: Curve, axes: "Axes") -> None:
    hits, called = curve.true_positives, curve.true_positives + curve.false_positives
    precision = hits / called
    axes.axhline(precision[-1], linestyle=":", color=pages.FAINT)  # precision of calling all positive
    axes.step([0, *hits / hits[-1]], [precision[0], *precision], color=pages.FIRST)
    axes.set(xlabel="recall", ylabel="precision")


def _draw_reliability(score: Floats, calibrated: Floats, truth: Bools, axes: "Axes") -> None:
    axes.plot([0, 1], [0, 1], ":", color=pages.FAINT)
    for values, style, color in ((score, "s--", pages.SECOND), (calibrated, "o-", pages.FIRST)):
        mean, share, cells = reliability(values, truth)
        axes.plot(mean[cells >= FEW], share[cells >= FEW], style, color=color, markersize=3)
    axes.set(xlabel="mean score", ylabel="share of positives")


def _draw_decision(calibrated: Floats, truth: Bools, axes: "Axes") -> None:
    thresholds, share = np.arange(1, 100) / 100, float(truth.mean())
    for probability, style, color in ((np.ones(len(truth)), "--", pages.SECOND), (calibrated, "-", pages.FIRST)):
        heights = [net_benefit(probability, truth, at).mean() for at in thresholds]
        axes.plot(thresholds, heights, style, color=color)
    axes.axhline(0, linestyle=":", color=pages.FAINT)
    axes.set(xlabel="threshold", ylabel="net benefit", xlim=(0, 1), ylim=(-0.25 * share, 1.05 * share))
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))


def render_card(title: str, parts: Sequence[str], evaluations: Sequence[Evaluation], dataset: str = "") -> str:
    """The card: `parts` of Markdown first, then the figures of each split, limits and methods."""
    described = [(evaluation, describe_data(evaluation, dataset)) for evaluation in evaluations]
    texts = {"warning": WARNING, "limits": read_lines("limits"), "methods": read_lines("methods"), "judged": judged}
    card = pages.render("pipeline.look", "card.md", title=title, parts=parts, evaluations=described, **texts)
    return re.sub("\n{3,}", "\n\n", card).strip("\n") + "\n"
