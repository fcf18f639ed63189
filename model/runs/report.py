"""A run's evaluations → report page and model card, with the run's settings and training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from model.runs.config import Config, name_choice
from model.runs.folder import describe_start
from pipeline.base.pages import FIRST, SECOND, THIRD, draw_svg, show_setting
from pipeline.base.tabular import Table, show_cell
from pipeline.labels import LABELS
from pipeline.look.judge_report import Section, render_card, render_page
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import MEANS, Evaluation
from pipeline.measure.metrics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh


History = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


def render_report(
    title: str,
    config: Mapping[str, Any],
    history: History,
    evaluations: Sequence[Evaluation],
    images: Mapping[str, Scored],
    dataset: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The page of a run; `history` are the lines of metrics.jsonl, `images` the scores of each split."""
    more = [Section("Settings", "settings", define_settings(config))]
    if history:
        curves = "".join(
            f"<figure>{svg}<figcaption>{name}</figcaption></figure>" for name, svg in draw_training(history)
        )
        more.append(Section("Training", "training", Markup(f'<div class="panels wide">{curves}</div>')))  # noqa: S704
    return render_page(title, evaluations, images, dataset.get("title", ""), more)


def define_settings(config: Mapping[str, Any]) -> Markup:
    """A run's settings for a page: what differs from the defaults, the others folded."""
    defaults = {field.name: field.default for field in fields(Config)}
    changed = {name: value for name, value in config.items() if defaults.get(name, MISSING) != value}
    others = {name: value for name, value in config.items() if name not in changed}
    folded = f"<details><summary>{len(others)} more, at their defaults</summary>{_define(others)}</details>"
    note = '<p class="note">What differs from the defaults, or comes from the shards.</p>'
    return Markup(f"{note}{_define(changed)}{folded if others else ''}")  # noqa: S704 - names and values are escaped


def _define(values: Mapping[str, object]) -> str:
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(show_setting(value))}</dd>" for name, value in values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def render_model_card(
    title: str,
    config: Mapping[str, Any],
    data: Mapping[str, Mapping[str, int]],
    evaluations: Sequence[Evaluation],
    dataset: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The model card of a run; `data` are samples, studies and patients of each split, `dataset` is the manifest's."""
    labels = config["labels"]
    paper = f" ({show_cell(dataset['paper'])})" if dataset.get("paper") else ""
    about = (
        f"Data set: {show_cell(dataset['title'])}{paper}. License: {show_cell(dataset['license'])}." if dataset else ""
    )
    rows = [
        [name, *(f"{counts[unit]:,}" for unit in ("samples", "studies", "patients"))] for name, counts in data.items()
    ]
    shared = [
        f"Of {show_cell(evaluation.split)}, {evaluation.head['shared_patients']:,} patients and "
        f"{evaluation.head['shared_images']:,} images are among those that these weights were trained on."
        for evaluation in evaluations
        if "shared_patients" in evaluation.head
    ] or ["It is not known which images these weights were trained on: if some of these, the results are too high."]
    policies = [f"{name} cells `{show_cell(config[name])}`" for name in ("uncertain", "blank") if name in config]
    if adopted := config.get("adopted"):
        made = f"with the weights of `{show_cell(adopted)}`"
        lacking = ", ".join(label for label in LABELS if label not in labels) or "none"
        chosen = (
            "This run trained nothing: it chose calibrations and thresholds on dev. Left out, because the weights have "
            f"no trained output for them, nobody annotated them here, or they were not asked for: {lacking}."
        )
    else:
        made = "trained on CheXpert-style labels that a program extracted from reports"
        chosen = f"The checkpoint is the one with the best AUROC on dev: {show_cell(name_choice(config['choose_by']))}."
        if config["keep"] == "last":
            chosen = "The checkpoint is the one of the last evaluation."
    settings = Table("", ("setting", "value"), [[name, show_setting(value)] for name, value in config.items()])
    parts = [
        f"A network that scores {len(labels)} finding{'s' * (len(labels) > 1)} on chest radiographs, {made}.",
        "## Data",
        f"Shards with the manifest of sha256 `{show_cell(config['manifest'])}`.",
        about,
        Table("", ("split", "images used", "studies", "patients"), rows).markdown(),
        *shared,
        f"Policies: {', '.join(policies)}.",
        "## Weights" if adopted else "## Training",
        settings.markdown(),
        f"{'These are' if adopted else 'Started from:'} {describe_start(config)}.",
        chosen,
    ]
    return render_card(title, parts, evaluations)


def draw_training(history: History) -> list[tuple[str, Markup]]:
    """The losses and dev's AUROC by epoch, each as caption and SVG."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes", ylabel: str, fields: Mapping[str, str]) -> None:
        for (label, field), color in zip(fields.items(), (FIRST, SECOND, THIRD), strict=False):
            values = [line[field] for line in history]
            if any(value is not None for value in values):
                heights = [np.nan if value is None else value for value in values]
                axes.plot([line["epoch"] for line in history], heights, ".-", color=color, label=label)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend()

    losses = {split: f"{split}_loss" for split in ("train", "dev")}
    means = {name: f"{mean}_auroc" for mean, name in MEANS.items()}
    figures = {
        "Loss": (partial(draw, ylabel="loss", fields=losses), "loss of train and dev by epoch"),
        "AUROC on dev": (partial(draw, ylabel="AUROC, dev", fields=means), "AUROC on dev by epoch"),
    }
    return [(name, draw_svg(plot, text, (4.4, 2.6))) for name, (plot, text) in figures.items()]


def draw_cells(axes: "Axes", cells: Floats, star: tuple[int, int] | None = None) -> "QuadMesh":
    """Cells [H, W] colored and with their numbers, the first row lowest; NaN stays empty, and a star marks one."""
    edges = (np.arange(length + 1) - 0.5 for length in reversed(cells.shape))
    low = float(np.nanmin(cells))
    high = max(float(np.nanmax(cells)), low + 1e-3)
    mesh = axes.pcolormesh(*edges, cells, cmap="cividis", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            # On cividis; SVG takes black for the page's ink.
            color = "#111111" if value > (low + high) / 2 else "white"
            text = f"\N{BLACK STAR} {value:.3f}" if (row, column) == star else f"{value:.3f}"
            axes.text(column, row, text, color=color, ha="center", va="center")
    return mesh
