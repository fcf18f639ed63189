"""Train on each set of shards, on all but one, and on all; score every run on every set.

A network trained and tested at one hospital may have learned features of that hospital. The matrix, of training sets by
test sets, shows this. All AUROCs in a column are of the same images and labels, so their differences are paired.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from model.runs.config import is_reported, read_config
from model.runs.overlap import check_seen, list_seen, read_seen
from model.runs.predictor import of_run, score_as
from model.runs.report import define_settings
from model.runs.run import Run, open_rows
from pipeline.base.errors import DataError
from pipeline.base.files import write_atomically, write_json
from pipeline.base.pages import Table, draw_svg, open_templates, show_figure, show_limits
from pipeline.labels import LABELS
from pipeline.measure.delong import Areas, combine, measure_areas, subtract, weigh_labels
from pipeline.measure.metrics import Figure, count_classes
from pipeline.stream.dataset import Shards

Make = Callable[[Sequence[str], Path], Run]  # shards and folder → the run
SCORED = ("valid", "test", "dev")  # a set's first available split of these is scored
MACRO = "macro"  # the mean of all labels


@dataclass(frozen=True)
class Matrix:
    """What cross.json has."""

    runs: Mapping[str, list[str]]  # name → the folders that it trained on; none for a run given besides
    sets: dict[str, dict[str, str | int]]  # name → `split` that is scored, and its `images`
    labels: list[str]
    # By set, run and label: its `auroc`, and `less`, which is that minus the set's own run's, paired by patient.
    cells: dict[str, dict[str, dict[str, dict[str, Figure]]]]


def plan_runs(shards: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Run name → shard folders: each set alone, all but one (for three or more sets), and all."""
    sizes = dict.fromkeys((1, len(shards) - 1, len(shards)))
    sets = (chosen for size in sizes for chosen in combinations(shards, size))
    return {" + ".join(Path(folder).name for folder in chosen): chosen for chosen in sets}


def train_runs(
    shards: Sequence[str], out: Path, make: Make, train: Callable[[Run], None], others: Sequence[Path] = ()
) -> dict[str, Run]:
    """Train every run that is not finished; returns the runs by name, those of `others` first.

    Raises DataError for two folders of one name, `others` that saw scored images or take other samples, and no labels.
    """
    if len({Path(folder).name for folder in shards}) < len(shards):
        raise DataError("`shards`: two folders have the same name; rename one, by which the runs are called")
    # Open all runs first, to refuse folders that share patients or images before hours of training.
    made = {name: make(folders, out / name.replace(" + ", "+")) for name, folders in plan_runs(shards).items()}
    first, *_ = made.values()
    runs: dict[str, Run] = {}
    for folder in others:
        config = read_config(folder)
        if config.fusion != first.config.fusion:
            raise DataError(f"{folder}: scores {config.units}, and these runs {first.config.units}")
        runs[str(folder)] = score_as(first, folder, config)
    runs |= made
    list_labels(runs)
    for run in made.values():
        list_seen(run, ())  # raises DataError
    for folder, seen in zip(others, map(read_seen, others), strict=True):
        for alone in (made[Path(name).name].shards for name in shards):
            check_seen(replace(runs[str(folder)], shards=alone), choose_split(alone), seen)
    for run in made.values():
        if not (is_reported(run.folder) and read_config(run.folder) == run.config):
            train(run)
    return runs


def choose_split(collection: Shards) -> str:
    """The split of a set that is scored. Raises DataError if it has none of them."""
    for split in SCORED:
        if split in collection.manifest.splits:
            return split
    raise DataError(f"{collection}: no split to score on, of {', '.join(SCORED)}; shard it again with `dev`")


def list_labels(runs: Mapping[str, Run]) -> list[str]:
    """The labels of all runs with 10 patients of each class in every set. Raises DataError if there are none."""
    labels = set(LABELS)
    for run in runs.values():
        labels &= set(run.config.labels)
        if len(run.shards.folders) > 1:
            continue
        chosen = open_rows(run, choose_split(run.shards))
        patient = chosen.split.table["patient"].to_numpy()[chosen.rows]
        for column, label in enumerate(LABELS):
            target, known = (array[chosen.rows, column] for array in chosen.truth)
            if count_classes(target[known] == 1, patient[known])["few"]:
                labels.discard(label)
    if not labels:
        raise DataError("no label has 10 patients of each class in every set that is scored")
    return [label for label in LABELS if label in labels]


def score_runs(runs: Mapping[str, Run], shards: Sequence[str]) -> Matrix:
    """The AUROCs of every run on every set, for each label of `list_labels`. Raises DataError and Stopped."""
    labels, trained = list_labels(runs), plan_runs(shards)
    matrix = Matrix({name: list(trained.get(name, ())) for name in runs}, {}, labels, {})
    shares = {key: weigh_labels(labels, [key] if key in labels else labels) for key in (MACRO, *labels)}
    for scored in (Path(folder).name for folder in shards):
        collection = runs[scored].shards
        split = choose_split(collection)
        measured: dict[str, Areas] = {}
        for name, run in runs.items():
            # Sets that share images are refused before training; images shared within a set were reported earlier.
            own = replace(run, shards=collection, setup=replace(run.setup, shared_images=name in trained))
            images = of_run(run).score(own, split).images
            columns = [run.config.labels.index(label) for label in labels]
            scores, target, mask = images.scores[:, columns], images.target[:, columns], images.mask[:, columns]
            measured[name] = measure_areas(scores, target, mask, images.patient)
            matrix.sets[scored] = {"split": split, "images": len(images.scores)}
        matrix.cells[scored] = {
            name: {
                key: {"auroc": combine(areas, share), "less": subtract([areas], [measured[scored]], share)}
                for key, share in shares.items()
            }
            for name, areas in measured.items()
        }
    return matrix


def tabulate_cross(matrix: Matrix, label: str) -> Table:
    """The results for a label: rows are runs, columns sets; ✗ marks results below chance."""
    title = f"AUROC, mean of {', '.join(matrix.labels)}" if label == MACRO else f"AUROC, {label}"
    heads = [f"{name}, {scored['split']} (n = {scored['images']:,})" for name, scored in matrix.sets.items()]
    columns = [(f"scored on {head}", name) for head in heads for name in ("AUROC [95 %]", "less its own")]
    rows = []
    for run in matrix.runs:
        row = [run]
        for name in matrix.sets:
            auroc, less = (matrix.cells[name][run][label][part] for part in ("auroc", "less"))
            row.append(f"{show_figure(auroc['value'])}{' ✗' if auroc['high'] < 0.5 else ''} {show_limits(auroc)}")
            row.append("" if run == name else f"{less['value']:+z.3f} {show_limits(less)}")
        rows.append(row)
    return Table(title, ("trained on", *columns), rows)


def write_cross(out: Path, matrix: Matrix, run: Run) -> None:
    """Write cross.json and cross.html, with the settings of a run."""
    write_json(out / "cross.json", asdict(matrix))
    names = [Path(name).name[-40:] for name in matrix.runs]
    rows = [[matrix.cells[name][key][MACRO]["auroc"]["value"] for name in matrix.sets] for key in matrix.runs]
    cells = np.array(rows, float)
    low, high = float(cells.min()), float(cells.max())

    def draw(axes: Axes) -> None:
        edges = (np.arange(length + 1) - 0.5 for length in reversed(cells.shape))
        axes.pcolormesh(*edges, cells, cmap="cividis", vmin=low, vmax=max(high, low + 1e-3))
        for (row, column), value in np.ndenumerate(cells):
            # On cividis; SVG takes black for the page's ink.
            color = "#111111" if value > (low + high) / 2 else "white"
            axes.text(column, row, f"{value:.3f}", color=color, ha="center", va="center")
        axes.invert_yaxis()
        axes.set_xticks(range(len(matrix.sets)), list(matrix.sets))
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="scored on", ylabel="trained on")

    size = (2 + 0.07 * max(map(len, names)) + 1.2 * len(matrix.sets), 1 + 0.4 * len(names))
    page = open_templates("model.runs").get_template("cross.html")
    text = page.render(
        title=f"Across sets: {out.name}",
        tables={label: tabulate_cross(matrix, label) for label in (MACRO, *matrix.labels)},
        figure=draw_svg(draw, "AUROC by training and test set", size, fitted=True),
        settings={run.folder.name: define_settings(asdict(run.config))},
    )
    write_atomically(out / "cross.html", text.encode())
