"""The embeddings of a split's images, which other models can be fitted on: a run or a network → one table.

A row per image, in the order of the split's table:
    key, patient   string
    <labels>       int8     the 14 raw labels, as in that table
    embedding      float32, a list of fixed size: what the network's last layer takes
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from model.augment import normalize
from model.frozen import embed
from model.networks import build_network, load_initial
from model.predict import explain_memory
from model.runs.folder import fuse
from model.runs.job import Job, to_device
from model.runs.overlap import check_seen, read_start_seen
from model.runs.predictor import EVALUATION_BATCH, load_member
from pipeline.base.files import atomic_file
from pipeline.console import progress_bar
from pipeline.labels import LABELS
from pipeline.stream.batches import Batch
from pipeline.stream.dataset import Selection


class Encoder(NamedTuple):
    """A network, and how it takes images: the side of the square in pixels, mean and std of the gray levels."""

    network: nn.Module
    size: int
    pixels: Mapping[str, float]


def embed_split(encoder: Encoder, split: Selection, threads: int) -> pa.Table:
    """The table of a split with its embeddings. Raises DataError, naming shard and key, for an unusable image."""
    batches = split.batches(
        EVALUATION_BATCH, encoder.size, epoch=None, uncertain="ignore", blank="ignore", threads=threads
    )  # the policies are of targets, which are not used
    values = embed_images(encoder, batches, len(split.samples.rows))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return split.table.select(["key", "patient", *LABELS]).append_column("embedding", lists)


@torch.inference_mode()
def embed_images(encoder: Encoder, batches: Iterable[Batch], total: int) -> npt.NDArray[np.float32]:
    """The embeddings [N, features] of the images of batches, `total` in all. Raises DataError as `embed` does."""
    network, _, pixels = encoder
    device = next(network.parameters()).device
    network.eval()
    parts: list[npt.NDArray[np.float32]] = []
    with progress_bar("Embedding", "images") as advance:
        for batch in batches:
            inputs = normalize(to_device(batch.images, device), pixels["mean"], pixels["std"])
            with explain_memory(f"while embedding {len(inputs)} images", "choose a smaller `image_size`"):
                features = embed(network, inputs.contiguous(memory_format=torch.channels_last))
            parts.append(features.cpu().numpy())
            advance(sum(map(len, parts)), total)
    return np.concatenate(parts)


def open_run(job: Job, split: str) -> Encoder:
    """The network of a run with its best weights, as the run reads images. Raises DataError as `check_seen` does."""
    member = load_member(job.run, job.config)
    check_seen(job, split, member.seen)
    return Encoder(member.network, job.config.image_size, member.pixels)


def start_network(job: Job, split: str) -> Encoder:
    """The network that a job would start from, as it would read images. Raises DataError as `check_seen` does."""
    # The weights come from elsewhere: these shards are not their own, whatever the job would learn from them.
    elsewhere = replace(job, config=replace(job.config, manifest=""))
    check_seen(elsewhere, split, read_start_seen(job.start))
    network = build_network(job.config.arch, len(LABELS), job.config.pretrained)
    if job.start is not None:
        load_initial(network, job.start)
    network = fuse(network, job.config).to(job.device).to(memory_format=torch.channels_last)
    return Encoder(network, job.config.image_size, job.pixels)


def write_embeddings(path: Path, table: pa.Table) -> None:
    """Write the table atomically, as Parquet or as an Arrow IPC file."""
    with atomic_file(path) as file:
        if path.suffix == ".parquet":
            pq.write_table(table, file)
            return
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
