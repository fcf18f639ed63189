"""A frozen backbone's embeddings of the images, computed once for all runs that can use them.

`<shards>/embeddings/<split>-<key>.arrow`; in the run's folder if the shards lie at a URL or that one cannot be written.
An Arrow IPC file with one row per image that some run has needed:
    row        int64                          of the split's table, ascending
    embedding  float32, a list of fixed size  what the backbone makes of the image
Its schema's metadata are `about`, all that the values depend on (the key is its hash), and `sha256` of both columns.
Images that cannot be used are not in it: each run that needs them tries again, and says so.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from model.augment import normalize
from model.frozen import embed, hash_backbone
from model.names import AUGMENTATIONS
from model.networks import find_head
from model.predict import InterruptedEvaluationError, explain_memory
from model.runs.job import Job, Selected, agree, read_batches, to_device
from model.runs.scoring import EVALUATION_BATCH
from pipeline.base.errors import DataError
from pipeline.base.files import atomic_file, locked, read_arrow, remove_temporaries
from pipeline.console import progress_bar, say
from pipeline.stream.batches import Decoded, choose_usable
from pipeline.stream.plan import Rows, Step, plan_evaluation
from pipeline.stream.samples import find_images

FOLDER = "embeddings"
Values = npt.NDArray[np.float32]  # [images, features]


def use_embeddings(job: Job, network: nn.Module, chosen: Selected) -> Selected:
    """The chosen rows, with embeddings in place of their images: those that no run had computed are computed here.

    Raises InterruptedEvaluationError after a stop; what was computed until then is kept.
    """
    split = (
        chosen.split.name if chosen.split.name in job.manifest.splits else "train"
    )  # of a dev that is held out
    about = describe(job, network, split)
    path = choose_folder(job) / f"{split}-{hashlib.sha256(about).hexdigest()[:16]}.arrow"
    size = find_head(network)[2].in_features
    rows, values = _share(job, *read_embeddings(path, about, chosen.split.table.num_rows, size))
    missing = np.setdiff1d(chosen.samples.images, rows)
    if len(missing):
        found, more = compute_embeddings(job, network, chosen, missing, size)
        order = np.argsort(np.concatenate([rows, found]))
        rows = np.concatenate([rows, found])[order]
        values = np.concatenate([values, more])[order]
        if job.ranks.is_first and len(found):
            write_embeddings(path, about, rows, values)
        if job.stop.code:
            raise InterruptedEvaluationError
    place = np.full(chosen.split.table.num_rows, -1)
    place[rows] = np.arange(len(rows))
    return replace(chosen, recall=partial(recall, values=values, place=place))


def recall(steps: Iterable[Step], values: Values, place: Rows) -> Iterator[Decoded]:
    """Each step with embeddings for images, as images of one pixel: float32 [N, features, 1, 1].

    `place` [rows of the table] is each row's place in `values`, or -1; such an image is left out as an unusable one is.
    """
    for step in steps:
        sample, position = np.nonzero(step.rows >= 0)
        found = place[step.rows[sample, position]]
        kept, bad = choose_usable(sample, position, found >= 0)
        images: Any = values[found[kept]]  # float32, where images of many pixels are uint8
        images[found[kept] < 0] = 0
        yield Decoded(step, images[..., None, None], sample[kept], position[kept], bad)


@torch.inference_mode()
def compute_embeddings(
    job: Job, network: nn.Module, chosen: Selected, missing: Rows, size: int
) -> tuple[Rows, Values]:
    """The rows among `missing` with a usable image, ascending, and their embeddings; after a stop those so far.

    Each rank computes its share, and all get all.
    """
    single = replace(chosen, samples=find_images(chosen.split, missing))
    plan = partial(
        plan_evaluation, single.samples, EVALUATION_BATCH, rank=job.ranks.rank, ranks=job.ranks.count
    )
    values, done = np.zeros((len(missing), size), np.float32), np.zeros(len(missing))
    pixels = job.pixels
    network.eval()
    with progress_bar(f"Embedding {chosen.split.name}", "images") as advance:
        for batch in read_batches(job, single, chosen.truth, plan):
            if job.stop():
                break
            images = to_device(batch.images, job.device)
            inputs = normalize(images, pixels["mean"], pixels["std"])
            with (
                explain_memory(
                    f"while embedding {len(images)} images at once", "choose a smaller `image_size`"
                ),
                torch.autocast(job.device.type, job.precision, enabled=job.precision != torch.float32),
            ):
                found = embed(network, inputs.contiguous(memory_format=torch.channels_last))
            places = batch.step.step * EVALUATION_BATCH + batch.sample
            values[places], done[places] = found.float().cpu().numpy(), 1
            done[places[batch.bad]] = 0
            advance(min(int(done.sum()) * job.ranks.count, len(missing)), len(missing))
    agree(job)
    usable = job.ranks.sum(done) > 0
    together: Any = job.ranks.sum(values)  # type: ignore[arg-type]
    return missing[usable], together[usable]


def describe(job: Job, network: nn.Module, split: str) -> bytes:
    """All that the embeddings of a split depend on, as JSON."""
    config = job.config
    about = {
        "manifest": job.shards.digest,
        "split": split,
        "arch": config.arch,
        "weights": hash_backbone(network),
        "image_size": config.image_size,
        "pixels": dict(job.pixels),
        "equalized": AUGMENTATIONS[config.augment].robust,
        "device": job.device.type,
        "precision": str(job.precision),
    }
    return json.dumps(about).encode()


def choose_folder(job: Job) -> Path:
    """Where the embeddings are: beside the shards or, where no file can be written there, in the run's folder."""
    shards = job.shards.folders[0]
    beside = shards.path / FOLDER
    if shards.remote is None and os.access(beside if beside.exists() else shards.path, os.W_OK):
        return beside
    return job.run / FOLDER


def read_embeddings(path: Path, about: bytes, images: int, size: int) -> tuple[Rows, Values]:
    """Rows and embeddings in a file for a table of that many images; none where there is no such file.

    A file that is damaged or of something else is named, and counts as none.
    """
    nothing = np.empty(0, np.int64), np.empty((0, size), np.float32)
    try:
        table = read_arrow(path, path.read_bytes())
        rows = table["row"].to_numpy()
        values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), size)
        fits = table.schema.metadata == {b"about": about, b"sha256": _digest(rows, values)}
        fits &= bool((np.diff(rows, prepend=-1) > 0).all() and (rows < images).all())
    except FileNotFoundError:
        return nothing
    except (DataError, LookupError, ValueError, TypeError, AttributeError, pa.ArrowException):
        fits = False
    if fits:
        return rows, values
    say(f"{path}: damaged, or of something else; computed again")
    return nothing


def write_embeddings(path: Path, about: bytes, rows: Rows, values: Values) -> None:
    """Write the file, atomically. Raises DataError, naming it, where it cannot be written."""
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    table = pa.table({"row": rows, "embedding": lists})
    table = table.replace_schema_metadata({"about": about, "sha256": _digest(rows, values)})
    path.parent.mkdir(exist_ok=True)
    with locked(path.parent / ".lock"):
        remove_temporaries(path.parent)  # of killed processes: all others hold the lock
        with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def _digest(rows: Rows, values: Values) -> bytes:
    digest = hashlib.sha256(np.ascontiguousarray(rows, np.int64).data)
    digest.update(np.ascontiguousarray(values, np.float32).data)
    return digest.hexdigest().encode()


def _share(job: Job, rows: Rows, values: Values) -> tuple[Rows, Values]:
    """What the first rank has read, on all ranks."""
    if not job.ranks.joined:
        return rows, values
    count = int(job.ranks.gather(len(rows))[0, 0])
    if not job.ranks.is_first:
        rows, values = np.zeros(count, np.int64), np.zeros((count, values.shape[1]), np.float32)
    arrays: Any = [job.ranks.sum(array) for array in (rows, values)]  # type: ignore[arg-type]
    return arrays[0], arrays[1]
