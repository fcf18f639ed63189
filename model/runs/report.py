"""Evaluations of a run → one HTML page that needs nothing else, and a model card in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from model.runs.config import MEANS, Config, name_choice
from model.runs.folder import describe_start
from pipeline.base.pages import (
    FAINT,
    FIRST,
    SECOND,
    THIRD,
    Panel,
    draw_svg,
    open_templates,
    show_figure,
    show_limits,
)
from pipeline.measure.calibration import RULES, apply_calibration
from pipeline.measure.evaluate import AREAS, KEPT, Scored, study_level
from pipeline.measure.metrics import (
    FEW,
    Bools,
    Curve,
    Floats,
    label_cells,
    net_benefit,
    reliability,
    threshold_curve,
)
from pipeline.measure.readers import count_below

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes

TITLES = {"youden": "Youden's J", "max_f1": "highest F1", "sensitivity": "sensitivity"}


MARKS = {  # of verdicts
    "shown": "Shortcut shown",
    "partly": "Partly a shortcut",
    "unclear": "Cannot tell whether a shortcut explains",
    "none": "No shortcut found for",
}


def render_report(
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    evaluations: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, Scored],
    dataset: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The page of a run: what to make of it, training curves, and by split what `assess` gives, with its curves.

    `history` are the lines of metrics.jsonl; `evaluations` and `images` have the same splits; `dataset` is the
    manifest's. Dev, which chose the checkpoint, comes last.
    """
    defaults = {one.name: one.default for one in fields(Config)}
    changed = {name: value for name, value in config.items() if defaults.get(name, MISSING) != value}
    sections = [
        {
            "name": name,
            "evaluation": evaluation,
            "panels": draw_panels(evaluation, images[name]),
            "gaps": describe_gaps(evaluation),
            "summary": summarize(name, evaluation),
            "variables": list_variables(evaluation),
        }
        for name, evaluation in sorted(evaluations.items(), key=lambda item: item[0] == "dev")
    ]
    training = draw_training(history) if history else None
    page = open_run_templates().get_template("report.html")
    return page.render(
        title=title, config=config, changed=changed, training=training, sections=sections, dataset=dataset
    )


def summarize(split: str, evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to believe of a split and what not, each as a mark and a sentence that names the labels."""
    labels, belief = evaluation["labels"], evaluation.get("belief", {})
    told = {name for found in evaluation.get("sanity", {}).values() for name in found["kept"]}
    few = {name for name, label in labels.items() if label["few"]}
    lines = [
        *(
            (mark, text, {name for name, rest in belief.items() if rest["mark"] == mark})
            for mark, text in MARKS.items()
        ),
        ("partly", "Recognized without the lungs", told),
        ("unclear", "Too few patients of a class to tell", few),
    ]
    dev = (
        [("partly", "Used to select the checkpoint and thresholds, so its figures are optimistic.")]
        if split == "dev"
        else []
    )
    return dev + [
        (mark, f"{text}: {', '.join(name for name in labels if name in found)}.")
        for mark, text, found in lines
        if found
    ]


def list_variables(evaluation: Mapping[str, Any]) -> list[str]:
    """What the verdicts hold equal, over all labels, other than another label."""
    belief, labels = evaluation.get("belief", {}), evaluation["labels"]
    return list(
        dict.fromkeys(name for rest in belief.values() for name in rest["within"] if name not in labels)
    )


def render_model_card(
    title: str,
    config: Mapping[str, Any],
    data: Mapping[str, Mapping[str, int]],
    evaluations: Mapping[str, Mapping[str, Any]],
    dataset: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The model card of a run; `data` are samples, studies and patients of each split, `dataset` is the manifest's."""
    gaps = {name: describe_gaps(evaluation) for name, evaluation in evaluations.items()}
    card = open_run_templates().get_template("model-card.md")
    return card.render(
        title=title,
        config=config,
        data=data,
        evaluations=evaluations,
        gaps=gaps,
        dataset=dataset,
        start=describe_start(config),
        choice=name_choice(config["choose_by"]),
    )


def describe_gaps(evaluation: Mapping[str, Any]) -> list[str]:
    """A line for everything of an evaluation that is undefined or rests on fewer resamples, and why."""
    absent = [name for name in evaluation.get("not_annotated", ()) if name not in evaluation["labels"]]
    lines = [
        f"{name}: not annotated by this data set, so not learned, and without scores." for name in absent
    ]
    levels = {"images": evaluation} if evaluation["unit"] == "image" else {}
    for level, part in (levels | {"studies": evaluation["study"]}).items():
        intervals = part["intervals"]
        for name in part["skipped"]:
            if name in evaluation.get("not_annotated", ()):
                lines.append(
                    f"{name}, {level}: not annotated by this data set, so no figures, and in no mean."
                )
                continue
            label = part["labels"][name]
            lacking = " and ".join(side for side in ("positives", "negatives") if label[side] == 0)
            lines.append(f"{name}, {level}: no {lacking}, so no AUROC, no AUPRC, and in no mean.")
        for name, label in part["labels"].items():
            few = min(label["positives"], label["negatives"])
            if label["few"] and few:
                lines.append(f"{name}, {level}: {few} of one class, too few to tell; marked few.")
        for mean, shown in MEANS.items():
            if part[f"{mean}_auroc"] is None:
                lines.append(f"{shown}, {level}: undefined, for lack of labels.")
        for name, limits in intervals["auprc"].items():
            lost = intervals["resamples"] - limits["resamples"]
            if 0 < lost < intervals["resamples"]:
                what = f"{lost:,} of {intervals['resamples']:,} resamples have one class and are left out"
                lines.append(f"{MEANS.get(name, name)}, {level}: {what} of AUPRC's interval.")
        fitted = evaluation["calibration"]["image" if part is evaluation else "study"]
        lines += [
            f"{name}, {level} of dev: {label['note']}." for name, label in fitted.items() if label["note"]
        ]
    for name, count in evaluation["many_groups"].items():
        lines.append(f"{name}: {count:,} values, too many to compare as groups.")
    return lines


def draw_training(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Markup]]:
    """The losses and dev's AUROC by epoch, each as caption and SVG."""
    from matplotlib.ticker import MaxNLocator

    epochs = [line["epoch"] for line in history]

    def draw_loss(axes: "Axes") -> None:
        for split, color in (("train", FIRST), ("dev", SECOND)):
            axes.plot(epochs, [line[f"{split}_loss"] for line in history], ".-", color=color, label=split)
        axes.set(xlabel="epoch", ylabel="loss")
        axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))

    def draw_auroc(axes: "Axes") -> None:
        for mean, color in zip(MEANS, (FIRST, SECOND, THIRD), strict=True):
            values = [line[f"{mean}_auroc"] for line in history]
            if any(value is not None for value in values):
                heights = [np.nan if value is None else value for value in values]
                axes.plot(epochs, heights, ".-", color=color, label=MEANS[mean])
        axes.set(xlabel="epoch", ylabel="AUROC, dev")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend()

    return [
        ("Loss", draw_svg(draw_loss, "loss of train and dev by epoch", (4.4, 2.6))),
        ("AUROC on dev", draw_svg(draw_auroc, "AUROC on dev by epoch", (4.4, 2.6))),
    ]


def draw_panels(evaluation: Mapping[str, Any], images: Scored) -> dict[str, dict[str, Markup]]:
    """ROC, precision-recall, reliability and decision curves: kind → label → SVG; none of a label that is skipped."""
    kinds = ("ROC", "precision-recall", "reliability", "decision")
    panels: dict[str, dict[str, Markup]] = {kind: {} for kind in kinds}
    axes = {kind: Panel((2.1, 2.0), unit=kind != "decision") for kind in kinds}
    for name, score, truth in label_cells(list(evaluation["labels"]), *images[:3]):
        label = evaluation["labels"][name]
        if label["auroc"] is None:
            continue
        curve = threshold_curve(score, truth)
        calibrated = apply_calibration(score, evaluation["calibration"]["image"][name])
        draws = {
            "ROC": partial(_draw_roc, curve, label["operating_points"]["youden"]),
            "precision-recall": partial(_draw_pr, curve),
            "reliability": partial(_draw_reliability, score, calibrated, truth),
            "decision": partial(_draw_decision, calibrated, truth),
        }
        for kind, draw in draws.items():
            panels[kind][name] = axes[kind].draw(draw, f"{kind} curve of {name}")
    return panels | {"readers": draw_readers(evaluation, images)}


def draw_readers(evaluation: Mapping[str, Any], images: Scored) -> dict[str, Markup]:
    """Where readers were given: label → ROC curve of the studies, with a point for each reader, as SVG."""
    if "readers" not in evaluation:
        return {}
    drawn = {}
    studies = study_level(images, evaluation["calibration"]["combine"])
    for name, score, truth in label_cells(list(evaluation["labels"]), *studies[:3]):
        places = [of for of in evaluation["readers"]["labels"][name].values() if of["below"] is not None]
        if places:
            draw = partial(_draw_readers, threshold_curve(score, truth), places)
            drawn[name] = draw_svg(draw, f"readers beside the ROC curve of {name}", (2.1, 2.0), unit=True)
    return drawn


def _draw_readers(curve: Curve, places: Sequence[Mapping[str, Any]], axes: "Axes") -> None:
    _draw_roc(curve, None, axes)
    x, y = [1 - of["specificity"] for of in places], [of["sensitivity"] for of in places]
    axes.plot(x, y, "D", color=THIRD, markersize=3.5)


def _draw_roc(curve: Curve, chosen: Mapping[str, float] | None, axes: "Axes") -> None:
    hits, alarms = curve.true_positives, curve.false_positives
    axes.plot([0, 1], [0, 1], ":", color=FAINT)
    axes.plot([0, *alarms / alarms[-1]], [0, *hits / hits[-1]], color=FIRST)
    if chosen is not None:
        axes.plot(1 - chosen["specificity"], chosen["sensitivity"], "o", color=SECOND, markersize=4)
    axes.set(xlabel="1 − specificity", ylabel="sensitivity")


def _draw_pr(curve: Curve, axes: "Axes") -> None:
    hits, called = curve.true_positives, curve.true_positives + curve.false_positives
    precision = hits / called
    axes.axhline(precision[-1], linestyle=":", color=FAINT)  # of calling all positive
    axes.step([0, *hits / hits[-1]], [precision[0], *precision], color=FIRST)
    axes.set(xlabel="recall", ylabel="precision")


def _draw_reliability(score: Floats, calibrated: Floats, truth: Bools, axes: "Axes") -> None:
    axes.plot([0, 1], [0, 1], ":", color=FAINT)
    for values, style, color in ((score, "s--", SECOND), (calibrated, "o-", FIRST)):
        bins = reliability(values, truth)
        drawn = bins.cells >= FEW
        axes.plot(bins.score[drawn], bins.share[drawn], style, color=color, markersize=3)
    axes.set(xlabel="mean score", ylabel="share of positives")


def _draw_decision(calibrated: Floats, truth: Bools, axes: "Axes") -> None:
    thresholds, share = np.arange(1, 100) / 100, float(truth.mean())
    for probability, style, color in ((np.ones(len(truth)), "--", SECOND), (calibrated, "-", FIRST)):
        heights = [net_benefit(probability, truth, at).mean() for at in thresholds]
        axes.plot(thresholds, heights, style, color=color)
    axes.axhline(0, linestyle=":", color=FAINT)
    axes.set(xlabel="threshold", ylabel="net benefit", xlim=(0, 1), ylim=(-0.25 * share, 1.05 * share))
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))


def show_cell(text: str) -> str:
    """A text as a line of Markdown that holds no markup, and no end of a table's cell."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "/").split())


def widest_gap(found: Mapping[str, Any]) -> str:
    """The label with the widest TPR gap between the groups of a variable, and the gap."""
    gaps = {name: gap for name, gap in found["tpr_gap"].items() if gap is not None}
    name = max(gaps, key=lambda label: gaps[label], default=None)
    if name is None:
        return "–"
    return f"{name} {show_figure(gaps[name])} {show_limits(found['tpr_gap_limits'][name])}"


def mark_few(label: Mapping[str, Any] | None) -> str:
    """What stands behind a label whose figures rest on too few positives or negatives; nothing for a mean."""
    return " (few)" if label and label["few"] else ""


def open_run_templates() -> "jinja2.Environment":
    """The templates of a run's pages."""
    environment = open_templates("model.runs")
    environment.filters |= {
        "below": count_below,
        "cell": show_cell,
        "few": mark_few,
        "widest_gap": widest_gap,
    }
    environment.globals |= {"MEANS": MEANS, "RULES": RULES, "AREAS": AREAS, "KEPT": KEPT, "TITLES": TITLES}
    return environment
