"""Evaluations → one HTML page that needs nothing else, and a card in Markdown.

The first screen answers: which data, how good is each finding, at which threshold, what to distrust, and for whom it is
worse. All tables are those of `judged`; the curves are of the scores themselves.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from pipeline.base.pages import (
    FAINT,
    FIRST,
    INK,
    SECOND,
    THIRD,
    Panel,
    draw_svg,
    open_templates,
)
from pipeline.base.tabular import Table, show_cell
from pipeline.look import judged
from pipeline.measure.calibration import apply_calibration
from pipeline.measure.evaluate import Scored, study_level
from pipeline.measure.evaluation import MEANS, UNITS, Evaluation
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METHODS = (
    "Uncertain cells are in no figure. A label with one class has no AUROC and is in no mean.",
    "A study's score comes from its views' scores as its heading says; its labels are theirs.",
    "Calibrations and thresholds, other than a given one, are chosen on dev alone, for images and for studies "
    "apart.",
    "Intervals are 95 %. Of an AUROC: Newcombe's method 5 (2006), its variance widened by DeLong's with patients "
    "as clusters (Obuchowski, 1997); of a mean: from its labels' limits and their correlation over patients (Zou, "
    "2007); of a difference: the same, paired by patient, with Student's t.",
    "A difference between two data sets: as of independent samples, from both sides' limits (Newcombe, 1998; Zou, "
    "2007).",
    "Intervals of AUPRC are percentiles over resamples of patients with all of their images (Efron and "
    "Tibshirani, 1993); with few positives they are too narrow. A resample that leaves a label one class is left "
    "out for that label and for every mean with it; under 100 resamples, or if all agree, there is no interval. A "
    "comparison takes both runs on the same resamples.",
    "Intervals of sensitivity, specificity and TPR: Wilson's (1927), with patients as clusters (Rao and Scott, "
    "1992); of a TPR gap: from both TPRs' limits (Newcombe, 1998), at a level that holds for all gaps together "
    "(Bonferroni).",
    "A label marked few has fewer than 10 patients in a class: too few to tell.",
    "AUPRC is the average precision, without interpolation. Brier: mean squared distance of score and truth.",
    "ECE: 15 bins of equal width, on the score of positive (Naeini et al., 2015). Calibrated: sigmoid(logit / T + "
    "b) with the label's temperature T and bias b (Platt, 1999), if that is better on dev's patients left out; "
    "else the score.",
    "Net benefit: TP / n − FP / n × t / (1 − t) at a threshold t of the calibrated probability (Vickers and "
    "Elkin, 2006); the limits of its gain: a mean's, with patients as clusters.",
    "AUROC within strata: over the pairs of a positive and a negative of the same stratum, of those with 10 of "
    "each. Within another label: the one that tells most about it. Balanced: under overlap weights (Li et al., "
    "2018), by a logistic regression on the ranks of the covariates; its limits take the weights as given. ✗: a "
    "shortcut is shown; !: partly a shortcut; ?: cannot tell.",
    "The macro AUROC of a subgroup is over the labels with 10 patients of each class in every group beside it "
    "that has any such label.",
)
LIMITS = (
    "Labels that a program read from reports are not a radiologist's reading of images.",
    "Figures hold for the hospitals, devices and patients of this data; elsewhere, and for children, they differ.",
    "Figures of labels marked few, with fewer than 10 patients in a class, say too little to tell, and neither does a "
    "difference whose interval holds 0.",
    "Scores are no probabilities of disease; thresholds shift with prevalence.",
)
FIRST_KEY, SECOND_KEY = (f'<span class="key {name}"></span>' for name in ("first", "second"))
WARNING = "For research. Not for clinical use."


class Section(NamedTuple):
    """A part of a page: what it is called, where links find it, and its body."""

    title: str
    place: str
    body: Markup


def render_page(
    title: str,
    evaluations: Sequence[Evaluation],
    images: Mapping[str, Scored],
    dataset: str = "",
    more: Sequence[Section] = (),
) -> str:
    """The page of the evaluations, dev last, then the sections of `more`; `images` are the scores of each split."""
    ordered = sorted(evaluations, key=lambda one: one.split == "dev")
    splits = [
        Section(one.split, f"split-{number}", render_split(one, images[one.split]))
        for number, one in enumerate(ordered, 1)
    ]
    methods = Section("Methods", "methods", _list(METHODS))
    first = Markup("\n").join(render_first(one, dataset) for one in ordered[:1])
    rest = [Section("", "", render_first(one, dataset, brief=True)) for one in ordered[1:]]
    splits = [
        part._replace(body=intro.body + part.body)
        for part, intro in zip(splits, [Section("", "", Markup()), *rest], strict=False)
    ]
    page = open_templates("pipeline.look").get_template("report.html")
    return page.render(title=title, warning=WARNING, first=first, sections=[*splits, methods, *more])


def render_first(evaluation: Evaluation, dataset: str, brief: bool = False) -> Markup:
    """Which data, the mean, each finding, the thresholds, what to distrust, and the gaps between groups."""
    parts = [f"<p>{describe_data(evaluation, dataset, markup=True)}</p>", render_tiles(evaluation)]
    if not brief:
        drawn = draw_svg(
            partial(_draw_forest, evaluation), "AUROC of each label", _forest_size(evaluation), fitted=True
        )
        forest = (
            f'<figure class="forest">{drawn}<figcaption>AUROC per {evaluation.unit}</figcaption></figure>'
        )
        rules = judged.list_rules(evaluation)[:1]
        tables = [
            judged.tabulate_rates(evaluation, evaluation.unit, rule, brief=True).html() for rule in rules
        ]
        parts.append(f'<div class="beside">{forest}<div>{_join(tables)}</div></div>')
    lines = [f'<li class="{mark}">{escape(text)}</li>' for mark, text in judged.summarize(evaluation)]
    parts.append(f'<ul class="verdicts">{"".join(lines)}</ul>' if lines else "")
    if gaps := judged.list_open_gaps(evaluation):
        parts.append(
            f"<p>Gaps between groups that remain after correction for their number:</p>{_list(gaps[:5])}"
        )
    return _join(parts)


def describe_data(evaluation: Evaluation, dataset: str = "", markup: bool = False) -> str:
    """The split, its data set and its size, in a sentence."""
    head = evaluation.head
    studies, patients = (evaluation.get(what, None, "study").value for what in ("studies", "patients"))
    images = evaluation.get("images", None, "image").value
    size = f"{studies or 0:,.0f} studies of {patients or 0:,.0f} patients"
    size = f"{images:,.0f} images in {size}" if images is not None else size
    about = f" of {dataset.replace('`', '')}" if dataset else ""
    chosen = f", chosen by {', '.join(head['chosen_by'])}" if head.get("chosen_by") else ""
    other = "; not the shards that the run learned from" if "own" in head else ""
    name = f"<strong>{escape(evaluation.split)}</strong>" if markup else evaluation.split
    text = f"{about}: {size}{chosen}{other}."
    return f"{name}{escape(text) if markup else text}"


def render_tiles(evaluation: Evaluation) -> Markup:
    """The means of images and of studies, and the difference to each other scorer, large."""
    tiles = []
    for level in evaluation.distinct_levels:
        best, units = evaluation.best_mean(level), UNITS[level]
        count = evaluation.get(units, None, level).value or 0
        others = {MEANS[mean]: evaluation.get("auroc", mean, level) for mean in MEANS if mean != best}
        small = "".join(
            f"<dt>{name}</dt><dd>{row.shown}</dd>" for name, row in others.items() if row.value is not None
        )
        tiles.append(
            (
                f"per {level}, {count:,.0f} {units}",
                evaluation.get("auroc", best, level).shown,
                f"AUROC, {MEANS[best]}",
                small,
            )
        )
    for scorer in evaluation.head.get("against", ()):
        best = evaluation.best_mean()
        less = evaluation.get("auroc_difference", best, scorer=scorer)
        tiles.append((f"less {scorer}", less.change, f"difference in AUROC, {MEANS[best]}", ""))
    late = evaluation.select(
        metric="auroc_difference", group="studies=all", label=evaluation.best_mean("study")
    )
    tiles += [
        (f"less {row.scorer}", row.change, f"difference in AUROC, {MEANS[str(row.label)]}", "")
        for row in late
    ]
    parts = []
    for name, value, note, small in tiles:
        figure, _, limits = value.partition(" ")
        small = f"<dl>{small}</dl>" if small else ""
        parts.append(
            f'<div class="tile"><p>{escape(name)}</p><p class="value">{figure} <small>{limits}</small></p>\n'
            f'<p class="note">{note}</p>{small}</div>'
        )
    return Markup(f'<div class="tiles">{"".join(parts)}</div>')  # noqa: S704 - names are escaped


def render_split(evaluation: Evaluation, images: Scored) -> Markup:
    """Everything about a split: tables, curves, groups, and what is left out."""
    views = f", {evaluation.head['combine']} over its views" if evaluation.unit == "image" else ""
    levels = {"image": "Per image", "study": f"Per study{views}"}
    curves = draw_curves(evaluation, images)
    parts: list[object] = [
        judged.tabulate_metrics(evaluation, level, levels[level]).html()
        for level in evaluation.distinct_levels
    ]
    parts += [
        judged.tabulate_rates(evaluation, level, rule).html()
        for level in evaluation.distinct_levels
        for rule in judged.list_rules(evaluation)
    ]
    parts += [table.html() for table in judged.list_beside(evaluation)]
    parts.append(curves)
    variables = judged.list_variables(evaluation)
    groups = [judged.tabulate_groups(evaluation, variable).html() for variable in variables]
    if any(groups):
        note = (
            "TPR at the first threshold; its gap is the highest less the lowest, over groups with positives of at "
            "least 10 patients; its limits hold for all gaps of this split together."
        )
        parts += ["<h3>Subgroups</h3>", f'<p class="note">{note}</p>', *groups]
    verdicts = [(str(row.group), row.note) for row in evaluation.select(metric="verdict")]
    if verdicts:
        lines = "".join(f'<li class="{mark}">{escape(text)}</li>' for mark, text in verdicts)
        parts += ["<h3>Does the model rely on shortcuts?</h3>", f'<ul class="verdicts">{lines}</ul>']
        parts.append(judged.tabulate_belief(evaluation).html())
    parts += ["<h3>Left out, and why</h3>", _list(judged.describe_gaps(evaluation) or ["Nothing."])]
    return _join(parts)


def draw_curves(evaluation: Evaluation, images: Scored) -> Markup:
    """ROC, readers, precision-recall, reliability and decision curves; none of a label that is skipped."""
    unit = evaluation.unit
    kinds = {
        "ROC": ("ROC curves", "The dot is the first threshold."),
        "precision-recall": ("Precision-recall curves", "The dotted line is the share of positives."),
        "reliability": (
            "Calibration",
            f"{SECOND_KEY}the scores, {FIRST_KEY}with the temperature T and bias b fitted on dev; bins of 10 or more",
        ),
        "decision": (
            "Decision curves",
            f"Net benefit of acting if the calibrated probability reaches a threshold ({FIRST_KEY}), beside acting on "
            f"all ({SECOND_KEY}) and on none (dotted). Below each: the gain over the better of these, at two of them.",
        ),
    }
    axes = {kind: Panel((2.1, 2.0), unit=kind != "decision") for kind in kinds}
    drawn: dict[str, list[tuple[str, str, Markup]]] = {kind: [] for kind in kinds}
    rules = [*judged.list_rules(evaluation), None]
    for name, score, truth, _ in label_cells(evaluation.labels, *images[:4]):
        auroc = evaluation.get("auroc", name)
        if auroc.value is None:
            continue
        curve = threshold_curve(score, truth)
        fit = {metric: evaluation.get(metric, name).value for metric in ("temperature", "bias")}
        calibrated = apply_calibration(score, fit)
        dot = [evaluation.get(rate, name, group=rules[0]).value for rate in ("sensitivity", "specificity")]
        gains = {at: evaluation.get("net_benefit_gain", name, group=f"at {at}") for at in (0.1, 0.3)}
        errors = [judged.show(evaluation.get(metric, name).value) for metric in ("ece", "ece_calibrated")]
        fitted = f" → {errors[1]}, T {judged.show(fit['temperature'])}, b {judged.show(fit['bias'])}"
        for kind, caption, draw in (
            ("ROC", f"AUROC {auroc.shown}", partial(_draw_roc, curve, dot)),
            ("precision-recall", f"AUPRC {evaluation.get('auprc', name).shown}", partial(_draw_pr, curve)),
            (
                "reliability",
                f"ECE {errors[0]}{fitted if fit['temperature'] else ''}",
                partial(_draw_reliability, score, calibrated, truth),
            ),
            (
                "decision",
                ", ".join(f"at {at} {gain.shown}" for at, gain in gains.items()),
                partial(_draw_decision, calibrated, truth),
            ),
        ):
            svg = axes[kind].draw(draw, f"{kind} curve of {name}")
            drawn[kind].append((judged.name_row(evaluation, name, unit), caption, svg))
    parts = [_panels(*kinds[kind], panels) for kind, panels in drawn.items()]
    return _join([parts[0], draw_readers(evaluation, images), *parts[1:]])


def draw_readers(evaluation: Evaluation, images: Scored) -> Markup:
    """The ROC curves of the studies, with a point for each reader."""
    readers, panels = evaluation.head.get("readers", ()), []
    studies = study_level(images, evaluation.head["combine"]) if readers else images
    for name, score, truth, _ in label_cells(evaluation.labels, *studies[:4]) if readers else ():
        rates = [
            [
                evaluation.get(rate, name, "study", scorer=reader).value
                for rate in ("sensitivity", "specificity")
            ]
            for reader in readers
        ]
        points = [pair for pair in rates if None not in pair]
        if points and not truth.all() and truth.any():
            draw = partial(_draw_readers, threshold_curve(score, truth), points)
            svg = draw_svg(draw, f"readers beside the ROC curve of {name}", (2.1, 2.0), unit=True)
            panels.append((name, f"{judged.count_below(evaluation, name)} readers below the curve", svg))
    return _panels(
        "Readers",
        "ROC curves of the studies; a diamond is a reader. A reader is below the curve if the scores have a higher "
        "sensitivity at the reader's specificity.",
        panels,
    )


def _panels(heading: str, note: str, panels: Sequence[tuple[str, str, Markup]]) -> Markup:
    """Small figures under a heading, in rows of equal length as far as their number allows."""
    if not panels:
        return Markup()
    columns = min(range(4, 8), key=lambda number: (-len(panels) % number, -number))
    figures = "".join(
        f"<figure>{svg}<figcaption>{escape(name)}<small>{escape(caption)}</small></figcaption></figure>"
        for name, caption, svg in panels
    )
    return Markup(  # noqa: S704 - names and captions are escaped
        f'<h3>{heading}</h3><p class="note">{note}</p><div class="panels of-{columns}">{figures}</div>'
    )


def _list(lines: Sequence[str]) -> Markup:
    return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(line) for line in lines))


def _join(parts: Sequence[object]) -> Markup:
    """Parts that are safe already, under each other."""
    return Markup("\n".join(str(part) for part in parts if part))  # noqa: S704 - each part is escaped


def _forest_size(evaluation: Evaluation) -> tuple[float, float]:
    return 4.6, 0.6 + 0.19 * (len(evaluation.labels) + len(MEANS))


def _draw_forest(evaluation: Evaluation, axes: "Axes") -> None:
    """A line from limit to limit for each finding, best first, and below for the means."""
    found = [
        row for label in (*evaluation.labels, *MEANS) for row in [evaluation.get("auroc", label)] if row.value
    ]
    means = [row for row in found if row.label in MEANS]
    rows = sorted((row for row in found if row not in means), key=lambda row: -(row.value or 0))
    for place, row in enumerate([*rows, *means]):
        color = INK if row in means else FAINT if row.few else FIRST
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=color, linewidth=1.2)
        axes.plot([row.value or 0], [place], "D" if row in means else "o", color=color, markersize=4)
    names = [judged.name_row(evaluation, str(row.label)) for row in (*rows, *means)]
    axes.axvline(0.5, linestyle=":", color=FAINT)
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="AUROC")
    axes.tick_params(axis="y", length=0)


def _draw_readers(curve: Curve, points: Sequence[Sequence[Any]], axes: "Axes") -> None:
    _draw_roc(curve, [None, None], axes)
    axes.plot(
        [1 - specificity for _, specificity in points],
        [hits for hits, _ in points],
        "D",
        color=THIRD,
        markersize=3.5,
    )


def _draw_roc(curve: Curve, chosen: Sequence[float | None], axes: "Axes") -> None:
    hits, alarms = curve.true_positives, curve.false_positives
    axes.plot([0, 1], [0, 1], ":", color=FAINT)
    axes.plot([0, *alarms / alarms[-1]], [0, *hits / hits[-1]], color=FIRST)
    sensitivity, specificity = chosen
    if sensitivity is not None and specificity is not None:
        axes.plot(1 - specificity, sensitivity, "o", color=SECOND, markersize=4)
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


def render_card(
    title: str, parts: Sequence[str], evaluations: Sequence[Evaluation], dataset: str = ""
) -> str:
    """The card: `parts` of Markdown first, then the figures of each split, limits and methods."""
    lines = [f"# Model card: {show_cell(title)}", f"**{WARNING}**", *parts]
    for one in evaluations:
        lines += [f"## Metrics on {show_cell(one.split)}", show_cell(describe_data(one, dataset))]
        for level in one.distinct_levels:
            lines.append(judged.tabulate_metrics(one, level, f"Per {level}").markdown())
            lines += [
                judged.tabulate_rates(one, level, rule, brief=True).markdown()
                for rule in judged.list_rules(one)[:1]
            ]
        verdicts = [f"- {show_cell(row.note)}" for row in one.select(metric="verdict")]
        lines += ["### Does the model rely on shortcuts?", "\n".join(verdicts)] if verdicts else []
        lines.append(tabulate_macros(one).markdown())
        lines += ["### Left out, and why", _bullets(judged.describe_gaps(one) or ["Nothing."])]
    lines += ["## Limits", _bullets(LIMITS), "## How it was measured", _bullets(METHODS)]
    return "\n\n".join(line.strip("\n") for line in lines if line.strip()) + "\n"


def tabulate_macros(evaluation: Evaluation) -> Table:
    """A row for each group: images, macro AUROC, less the first group's, and the widest TPR gap of the variable."""
    rows = []
    for variable in judged.list_variables(evaluation):
        gaps = [row for row in evaluation.select(metric="tpr_gap", group=variable) if row.value is not None]
        widest = max(gaps, key=lambda row: row.value or 0, default=None)
        text = f"{widest.label} {widest.shown}" if widest else "–"
        for row in evaluation.select(metric="auroc", label="macro", scorer=None):
            name, _, group = str(row.group).partition("=")
            if name == variable:
                size = evaluation.get("images", None, group=row.group)
                less = evaluation.get("auroc_less_first", "macro", group=row.group)
                over = str(len(row.note.split(", ")) if row.note else 0)
                rows.append(
                    [
                        f"{variable} {group}",
                        judged.count(size.value),
                        row.shown,
                        "" if less.value is None else less.change,
                        over,
                        text,
                    ]
                )
                text = ""
    columns = (
        "group",
        "images",
        "macro AUROC [95 %]",
        "minus the first group [95 %]",
        "labels in it",
        "widest TPR gap [95 %]",
    )
    return Table("Subgroups", columns, rows)


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {show_cell(line)}" for line in lines)
