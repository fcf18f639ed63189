"""The embeddings of a split's images by a run, which other models can be fitted on, as a table.

A row per image, in the order of the split's table:
    key, patient   string
    <labels>       int8     the 14 raw labels, as in that table
    embedding      float32, a list of fixed size: what the network's last layer takes
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model.augment import normalize
from model.frozen import embed
from model.predict import explain_memory
from model.runs.job import Job, open_rows, read_batches, to_device
from model.runs.overlap import check_seen
from model.runs.predictor import EVALUATION_BATCH, load_network
from pipeline.base.files import atomic_file
from pipeline.console import progress_bar
from pipeline.labels import LABELS
from pipeline.stream.plan import plan_evaluation


@torch.inference_mode()
def embed_split(job: Job, split: str) -> pa.Table:
    """The table of a split, whatever the run's conditions, with its embeddings.

    Raises DataError as `check_seen` and `embed` do, and for an unusable image, with shard and key.
    """
    trained = load_network(job.run, job.config)
    config = replace(job.config, where=(), views="all", limit=None, fusion=None, max_bad=0.0)
    job = replace(job, config=config)
    check_seen(job, split, trained.seen)
    chosen = open_rows(job, split)
    batches = read_batches(
        job, chosen, chosen.truth, partial(plan_evaluation, chosen.samples, EVALUATION_BATCH)
    )
    parts: list[npt.NDArray[np.float32]] = []
    network = trained.network.eval()
    with progress_bar("Embedding", "images") as advance:
        for batch in batches:
            inputs = normalize(
                to_device(batch.images, job.device), trained.pixels["mean"], trained.pixels["std"]
            )
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
    with atomic_file(path) as file:
        if path.suffix == ".parquet":
            pq.write_table(table, file)
            return
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
