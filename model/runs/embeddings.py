"""A table of a split's image embeddings by a run or network, for fitting other models.

A row per image, in the order of the split's table:
    key, patient   string
    <labels>       int8     the 14 raw labels, as in the split's table
    embedding      float32, a list of fixed size: the input of the network's last layer
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from model.augment import normalize
from model.networks import StudyNetwork, build_network, find_head, load_initial
from model.predict import explain_memory, to_device
from model.runs.folder import fuse
from model.runs.overlap import check_seen
from model.runs.predictor import EVALUATION_BATCH, Network
from model.runs.run import Run, open_rows, read_batches
from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file
from pipeline.console import progress_bar, say
from pipeline.images import ImageOptions
from pipeline.labels import LABELS
from pipeline.stream.plan import plan_evaluation


def start_network(run: Run) -> Network:
    """The network that a run would start from: whatever its weights have seen, it is not trained on these shards."""
    network = build_network(run.config.arch, len(LABELS), run.config.shape, bool(run.config.pretrained))
    if run.start is not None:
        say(f"{run.start.path}: {load_initial(network, run.start)}")
    network = fuse(network, run.config).to(run.device).to(memory_format=torch.channels_last)
    config, seen = replace(run.config, manifest=""), run.start.seen if run.start else ()
    images = ImageOptions._make(run.manifest.options[name] for name in ImageOptions._fields)
    return Network(run.folder, config, network, run.pixels, images, seen, {}, None)


@torch.inference_mode()
def embed_split(run: Run, split: str, member: Network) -> pa.Table:
    """The table of a split with its embeddings, ignoring the run's conditions.

    Raises DataError as `check_seen` and `embed` do, and for an unusable image, with shard and key.
    """
    config = replace(member.config, where=(), views="all", limit=None, fusion=None, max_bad=0.0)
    run = replace(run, config=config)
    check_seen(run, split, member.seen)
    chosen = open_rows(run, split)
    batches = read_batches(run, chosen, chosen.truth, partial(plan_evaluation, chosen.samples, EVALUATION_BATCH))
    parts: list[npt.NDArray[np.float32]] = []
    network = member.network.eval()
    with progress_bar("Embedding", "images") as advance:
        for batch in batches:
            images, scale = to_device(batch.images, run.device), member.pixels
            inputs = normalize(images, scale["mean"], scale["std"])
            with explain_memory(f"while embedding {len(inputs)} images", "choose a smaller `image_size`"):
                features = embed(network, inputs.contiguous(memory_format=torch.channels_last))
            parts.append(features.cpu().numpy())
            advance(sum(map(len, parts)), len(chosen.rows))
    values = np.concatenate(parts)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    table = chosen.split.table.take(chosen.rows)
    return table.select(["key", "patient", *LABELS]).append_column("embedding", lists)


def embed(network: nn.Module, inputs: Tensor) -> Tensor:
    """The backbone's embeddings [N, features] of normalized images [N, 1, H, W].

    Raises DataError if the logits of a network for images are not the output of its last linear layer.
    """
    if isinstance(network, StudyNetwork):
        features: Tensor = network.backbone(inputs)
        return features
    head = find_head(network)[1]
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    try:
        logits = network(inputs)
    finally:
        handle.remove()
    if not (captured and captured[-1].ndim == 2 and torch.equal(head(captured[-1]), logits)):
        raise DataError("embeddings are for networks that end in a linear layer")
    return captured[-1]


def write_embeddings(path: Path, table: pa.Table) -> None:
    """Write the table atomically, as Parquet or as an Arrow IPC file."""
    opened = pq.ParquetWriter if path.suffix == ".parquet" else pa.ipc.new_file
    with atomic_file(path) as file, opened(file, table.schema) as writer:
        writer.write_table(table)
