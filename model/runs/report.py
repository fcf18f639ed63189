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
from pipeline.base.pages import FIRST, SECOND, THIRD, draw_svg, open_templates, show_setting
from pipeline.base.tabular import Table, show_cell
from pipeline.labels import LABELS
from pipeline.look.judge_report import Section, render_card, render_page
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import MEANS, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    rows = [
        [name, *(f"{counts[unit]:,}" for unit in ("samples", "studies", "patients"))] for name, counts in data.items()
    ]
    settings = [[name, show_setting(value)] for name, value in config.items()]
    card = open_templates("model.runs").get_template("card.md")
    text = card.render(
        config={"adopted": "", "keep": "best"} | dict(config),
        dataset={"paper": ""} | dict(dataset) if dataset else {},
        data=Table("", ("split", "images used", "studies", "patients"), rows).markdown(),
        evaluations=evaluations,
        settings=Table("", ("setting", "value"), settings).markdown(),
        start=describe_start(config),
        lacking=[label for label in LABELS if label not in config["labels"]],
        choice=name_choice(config.get("choose_by", "all")),
        cell=show_cell,
    )
    return render_card(title, [text], evaluations)


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
