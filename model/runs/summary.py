"""Sweeps and runs across sets → tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.base.pages import show_figure, show_limits
from pipeline.base.tabular import Table

if TYPE_CHECKING:
    from model.runs.sweep import Trial


def print_trials(trials: "Sequence[Trial]") -> None:
    """A table of the five best of a sweep's ranked trials, with the parameters that vary."""
    columns = ["trial", *(name.replace("_", " ") for name in trials[0].parameters), "dev", "train", "valid"]
    rows = [
        [
            str(one.number),
            *map(str, one.parameters.values()),
            *map(show_figure, (one.dev, one.train, one.valid)),
        ]
        for one in trials[:5]
        if one.dev is not None
    ]
    Table(f"The best of {len(trials):,}, by AUROC on dev", columns, rows).print()


def print_cross(found: Mapping[str, Any]) -> None:
    """The matrix of runs and sets: a mean AUROC and its interval, of the same labels everywhere."""
    columns = ["trained on", *(f"on {name}, {one['split']}" for name, one in found["sets"].items())]
    rows = []
    for run in found["runs"]:
        cells = [found["cells"][name][run]["macro"] for name in found["sets"]]
        rows.append([run, *(f"{show_figure(cell['auroc'])} {show_limits(cell)}" for cell in cells)])
    Table(f"AUROC, mean of {', '.join(found['labels'])}", columns, rows).print()
