"""A run's heat maps: as pictures (predict --heatmaps), and compared with readers' annotations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.augment import normalize
from model.predict import draw_maps, explain_memory, to_device
from model.runs.overlap import check_seen
from model.runs.predictor import Network, load_network
from model.runs.run import Run, open_images
from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.base.pages import show_figure, show_limits
from pipeline.base.tabular import Table
from pipeline.console import progress_bar
from pipeline.images import Gray, decode_stored, prepare, resize
from pipeline.labels import LABELS
from pipeline.look.overlay import draw_overlay, read_images
from pipeline.measure.localization import Cell, Marks, mark_image
from pipeline.measure.metrics import Floats


def draw_heats(member: Network, image: Gray, labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """The maps [L, H, W] of labels for an image of any size."""
    columns = [LABELS.index(label) for label in labels]
    device = next(member.network.parameters()).device
    images = to_device(np.array(resize(image, *member.config.shape))[None, None], device)
    inputs = normalize(images, member.pixels["mean"], member.pixels["std"])
    with explain_memory("while drawing the maps of an image", "use a machine with more"):
        return draw_maps(member.network, inputs, columns)[1][0].cpu().numpy()


def write_heatmaps(member: Network, files: Sequence[Path], scores: Floats, out: Path, top: int) -> int:
    """Write a picture for each of the `top` labels of each file by scores [N, L]; returns how many.

    Unreadable files, which have no score, are skipped.
    """
    options, known = member.images, member.config.labels
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    with progress_bar("Drawing maps", "images") as advance:
        for number, (file, row) in enumerate(zip(files, scores, strict=True)):
            if math.isnan(row[0]):
                continue
            image = decode_stored(prepare(file.read_bytes(), options).data, options.encoding)
            labels = [known[place] for place in np.argsort(-row, kind="stable")[:top]]
            for label, heat in zip(labels, draw_heats(member, image, labels), strict=True):
                score = row[known.index(label)]
                text = [f"{label}: score {score:.3f}", f"{member.folder.name}, not for clinical use"]
                name = f"{number + 1:05d}-{file.name}-{label.lower().replace(' ', '-')}.png"
                with atomic_file(out / name) as picture:
                    draw_overlay(image, heat, text).save(picture, "PNG")
                written += 1
            advance(number + 1, len(files))
    return written


def draw_cells(run: Run, splits: Sequence[str], marks: Marks) -> Iterator[Cell]:
    """The marked cells of splits, for labels that the run was trained on, with their maps.

    Raises DataError as `check_seen` does, before any map is drawn.
    """
    if run.config.fusion is not None:
        raise DataError(f"{run.folder}: a run on studies; heat maps need a run on images")
    member = load_network(run.folder, run.config)
    for name in splits:
        check_seen(run, name, member.seen)
    square, shape = str(run.manifest.options["square"]), run.config.shape
    for name in splits:
        split, rows = open_images(run, name)
        facts = split.table.take(rows)
        labels = [
            [label for label in marks.get(key, {}) if label in run.config.labels] for key in facts["key"].to_pylist()
        ]
        wanted = [place for place, names in enumerate(labels) if names]
        with progress_bar(f"Drawing maps of {name}", "images") as advance:
            for done, place in enumerate(wanted, start=1):
                run.ranks.agree()
                row = facts.slice(place, 1).to_pylist()[0]
                (image,) = read_images(split, rows[place : place + 1])
                heats = draw_heats(member, image, labels[place])
                for label, heat in zip(labels[place], heats, strict=True):
                    marked = mark_image(marks[row["key"]][label], row, square, shape)
                    yield Cell(label, row["patient"], heat, marked)
                advance(done, len(wanted))


def tabulate_localization(results: Mapping[str, Any]) -> Table:
    """Hits of the pointing game and IoU per label, compared with chance."""
    columns = ("label", "hits", "hit rate [95 %]", "chance", "p", "fixed map", "IoU [95 %]")
    rows = [
        [
            f"{name} (few)" if cell["few"] else name,
            f"{cell['hits']} of {cell['cells']}",
            f"{show_figure(cell['hit_rate'])} {show_limits(cell['hit_limits'])}",
            show_figure(cell["chance"]),
            f"{cell['p']:.2g}",
            show_figure(cell["fixed"]),
            f"{show_figure(cell['iou'])} {show_limits(cell['iou_limits'])}",
        ]
        for name, cell in results["labels"].items()
    ]
    return Table("Where the maps point", columns, rows, means="all" in results["labels"])
