"""A run's network and images → heat maps, compared with readers' marks, and embeddings: what leads to its scores.

A table of embeddings has a row per image, in the order of the split's table, for fitting other models:
    key, patient   string
    <labels>       int8     the 14 raw labels, as in the split's table
    embedding      float32, a list of fixed size: the input of the network's last layer
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.augment import normalize
from model.predict import draw_maps, embed, explain_memory, to_device
from model.runs.overlap import check_seen
from model.runs.predictor import EVALUATION_BATCH, Network, load_network, start_network
from model.runs.run import Run, open_images, open_rows, read_batches
from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.base.pages import Table, show_figure, show_limits
from pipeline.console import progress_bar
from pipeline.images import Gray, ImageOptions, decode_stored, prepare, resize
from pipeline.labels import LABELS
from pipeline.look.overlay import draw_overlay, read_images
from pipeline.measure.localization import Cell, Marks, mark_image
from pipeline.measure.metrics import Floats
from pipeline.stream.plan import plan_evaluation


def draw_heats(member: Network, image: Gray, labels: Sequence[str]) -> npt.NDArray[np.float32]:
    """The maps [L, H, W] of labels for an image of any size."""
    device = next(member.network.parameters()).device
    images = to_device(np.array(resize(image, *member.config.shape))[None, None], device)
    inputs = normalize(images, member.pixels["mean"], member.pixels["std"])
    with explain_memory("while drawing the maps of an image", "use a machine with more"):
        maps = draw_maps(member.network, inputs, [LABELS.index(label) for label in labels])[1]
        return maps[0].cpu().numpy()


def write_heatmaps(member: Network, files: Sequence[Path], scores: Floats, out: Path, top: int) -> int:
    """Write a picture of each of the `top` labels of each readable file, by scores [N, L]; returns how many."""
    options, known = member.images, member.config.labels
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    with progress_bar("Drawing maps", "images") as advance:
        for number, (file, row) in enumerate(zip(files, scores, strict=True), start=1):
            if math.isnan(row[0]):
                continue
            image = decode_stored(prepare(file.read_bytes(), options).data, options.encoding)
            labels = [known[place] for place in np.argsort(-row, kind="stable")[:top]]
            for label, heat in zip(labels, draw_heats(member, image, labels), strict=True):
                score = f"{label}: score {row[known.index(label)]:.3f}"
                picture = draw_overlay(image, heat, [score, f"{member.folder.name}, not for clinical use"])
                name = f"{number:05d}-{file.name}-{label.lower().replace(' ', '-')}.png"
                with atomic_file(out / name) as opened:
                    picture.save(opened, "PNG")
                written += 1
            advance(number, len(files))
    return written


def draw_cells(run: Run, splits: Sequence[str], marks: Marks) -> Iterator[Cell]:
    """The marked cells of splits, with maps, for learned labels. Raises DataError before any map is drawn."""
    if run.config.fusion is not None:
        raise DataError(f"{run.folder}: a run on studies; heat maps need a run on images")
    member = load_network(run.folder, run.config)
    for name in splits:
        check_seen(run, name, member.seen)
    square, shape, learned = str(run.manifest.options["square"]), run.config.shape, run.config.labels
    for name in splits:
        split, rows = open_images(run, name)
        facts = split.table.take(rows)
        labels = [[label for label in marks.get(key, {}) if label in learned] for key in facts["key"].to_pylist()]
        wanted = [place for place, names in enumerate(labels) if names]
        with progress_bar(f"Drawing maps of {name}", "images") as advance:
            for done, place in enumerate(wanted, start=1):
                run.ranks.agree()
                row = facts.slice(place, 1).to_pylist()[0]
                (image,) = read_images(split, rows[place : place + 1])
                for label, heat in zip(labels[place], draw_heats(member, image, labels[place]), strict=True):
                    yield Cell(label, row["patient"], heat, mark_image(marks[row["key"]][label], row, square, shape))
                advance(done, len(wanted))


def tabulate_localization(results: Mapping[str, Any]) -> Table:
    """Hits of the pointing game and IoU per label, compared with chance."""
    columns = ("label", "hits", "hit rate [95 %]", "chance", "p", "fixed map", "IoU [95 %]")
    rows = []
    for name, cell in results["labels"].items():
        row = [f"{name} (few)" if cell["few"] else name, f"{cell['hits']} of {cell['cells']}"]
        row += [f"{show_figure(cell['hit_rate'])} {show_limits(cell['hit_limits'])}", show_figure(cell["chance"])]
        row += [f"{cell['p']:.2g}", show_figure(cell["fixed"])]
        rows.append([*row, f"{show_figure(cell['iou'])} {show_limits(cell['iou_limits'])}"])
    return Table("Where the maps point", columns, rows, means="all" in results["labels"])


def open_network(run: Run) -> Network:
    """The network that a run would start from: whatever its weights have seen, it is not trained on these shards."""
    network = start_network(run).to(run.device).to(memory_format=torch.channels_last)
    config = replace(run.config, manifest="")
    images = ImageOptions._make(run.manifest.options[name] for name in ImageOptions._fields)
    return Network(run.folder, config, network, run.pixels, images, run.start.seen if run.start else (), {})


@torch.inference_mode()
def embed_split(run: Run, split: str, member: Network) -> pa.Table:
    """The table of a split with its embeddings, whatever the run's conditions. Raises DataError as `check_seen`."""
    config = replace(member.config, where=(), views="all", limit=None, fusion=None, max_bad=0.0)
    run, network, scale = replace(run, config=config), member.network.eval(), member.pixels
    check_seen(run, split, member.seen)
    chosen = open_rows(run, split)
    batches = read_batches(run, chosen, chosen.truth, partial(plan_evaluation, chosen.samples, EVALUATION_BATCH))
    parts: list[npt.NDArray[np.float32]] = []
    with progress_bar("Embedding", "images") as advance:
        for batch in batches:
            inputs = normalize(to_device(batch.images, run.device), scale["mean"], scale["std"])
            with explain_memory(f"while embedding {len(inputs)} images", "choose a smaller `image_size`"):
                features = embed(network, inputs.contiguous(memory_format=torch.channels_last))
            parts.append(features.cpu().numpy())
            advance(sum(map(len, parts)), len(chosen.rows))
    values = np.concatenate(parts)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    table = chosen.split.table.take(chosen.rows)
    return table.select(["key", "patient", *LABELS]).append_column("embedding", lists)


def write_embeddings(path: Path, table: pa.Table) -> None:
    """Write the table atomically, as Parquet or as an Arrow IPC file."""
    opened = pq.ParquetWriter if path.suffix == ".parquet" else pa.ipc.new_file
    with atomic_file(path) as file, opened(file, table.schema) as writer:
        writer.write_table(table)
