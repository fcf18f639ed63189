"""A run's evaluations → report page and model card, with the run's settings and training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from model.runs.config import Config, name_choice
from model.runs.folder import describe_start
from pipeline.base.pages import FIRST, SECOND, THIRD, Table, draw_svg, render, show_cell, show_setting
from pipeline.labels import LABELS
from pipeline.look.judge_report import Section, render_card, render_page
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import MEANS, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Settings = Mapping[str, Any]
History = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl
Evaluations = Sequence[Evaluation]
Images = Mapping[str, Scored]  # of each split
Counts = Mapping[str, Mapping[str, int]]  # split → samples, studies and patients


def render_report(
    title: str, config: Settings, history: History, evaluations: Evaluations, images: Images, data: str = ""
) -> str:
    """The page of a run; `data` is the title of the data set."""
    more = [Section("Settings", "settings", define_settings(config))]
    if history:
        more.append(Section("Training", "training", draw_training(history)))
    return render_page(title, evaluations, images, data, *more)


def define_settings(config: Settings) -> Markup:
    """A run's settings for a page: what differs from the defaults, the others folded."""
    defaults = {field.name: field.default for field in fields(Config)}
    changed, others = Markup(), []
    for name, value in config.items():
        row = Markup("<dt>{}</dt><dd>{}</dd>").format(name, show_setting(value))
        if defaults.get(name, MISSING) == value:
            others.append(row)
        else:
            changed += row
    note = Markup('<p class="note">What differs from the defaults, or comes from the shards.</p><dl>{}</dl>')
    folded = Markup("<details><summary>{} more, at their defaults</summary><dl>{}</dl></details>")
    return note.format(changed) + (folded.format(len(others), Markup().join(others)) if others else "")


def render_model_card(
    title: str, config: Settings, data: Counts, evaluations: Evaluations, dataset: Mapping[str, str]
) -> str:
    """The model card of a run; `data` counts the images used, `dataset` is the manifest's."""
    units = ("samples", "studies", "patients")
    rows = [[name, *(f"{counts[unit]:,}" for unit in units)] for name, counts in data.items()]
    settings = [[name, show_setting(value)] for name, value in config.items()]
    text = render(
        "model.runs",
        "card.md",
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


def draw_training(history: History) -> Markup:
    """Panels of the losses and of dev's AUROC by epoch."""
    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes", ylabel: str, curves: Mapping[str, str]) -> None:
        for (label, name), color in zip(curves.items(), (FIRST, SECOND, THIRD), strict=False):
            heights = [np.nan if line[name] is None else line[name] for line in history]
            if not np.isnan(heights).all():
                axes.plot([line["epoch"] for line in history], heights, ".-", color=color, label=label)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend()

    losses = partial(draw, ylabel="loss", curves={split: f"{split}_loss" for split in ("train", "dev")})
    means = partial(draw, ylabel="AUROC, dev", curves={name: f"{mean}_auroc" for mean, name in MEANS.items()})
    figures = (losses, "loss of train and dev by epoch", "Loss"), (means, "AUROC on dev by epoch", "AUROC on dev")
    panel = Markup("<figure>{}<figcaption>{}</figcaption></figure>")
    panels = Markup().join(panel.format(draw_svg(plot, text, (4.4, 2.6)), name) for plot, text, name in figures)
    return Markup('<div class="panels wide">{}</div>').format(panels)
