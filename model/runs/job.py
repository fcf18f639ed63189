"""A job: a run's configuration, shards and device; and the batches of these shards.

job = open_job(Config(lr=1e-3, epochs=3), Setup(shards=("shards",)), "runs/first")
train.train(job)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from model.initial import Start
from model.ranks import ALONE, Ranks
from model.runs.config import Config, Setup, check_config, open_start, resolve_config
from pipeline.base.errors import DataError
from pipeline.console import say, say_once
from pipeline.labels import MOST_VIEWS, split_patients
from pipeline.manifest import Manifest
from pipeline.policies import check_blank_policy, evaluation_targets
from pipeline.stream.batches import BatchStream, Labels, Unusable, stream_batches
from pipeline.stream.collection import Collection
from pipeline.stream.plan import Rows, Samples, Step
from pipeline.stream.samples import OpenSplit, find_images, find_studies
from pipeline.stream.select import NothingSelectedError, select_rows


@dataclass(frozen=True)
class Job:
    """Everything that stays constant while a run trains or is scored."""

    config: Config
    shards: Collection
    run: Path
    device: torch.device
    precision: torch.dtype  # of autocast; float32 means none
    setup: Setup
    ranks: Ranks = ALONE
    start: Start | None = None  # the weights to start from
    shared_images: bool = False  # allow scoring images that the weights were trained on

    @property
    def manifest(self) -> Manifest:
        """The shards' manifest."""
        return self.shards.manifest

    @property
    def pixels(self) -> Mapping[str, float]:
        """Mean and std that normalize the run's gray levels: the shards', or those of the network's first weights."""
        scale = dict(zip(("mean", "std"), self.config.input_scale, strict=False))
        return scale or self.manifest.pixels


def open_job(config: Config, setup: Setup, run: str | Path, ranks: Ranks = ALONE) -> Job:
    """The job that trains a run in the folder `run`.

    Open settings are taken from the shards (policies, and a share of train to hold out if there is no dev split), or
    from the network or its initial weights (the size and scale of its input). Raises SettingError
    for contradictory values, and DataError for unusable shards.
    """
    collection, start = setup.open(), open_start(config, setup.init)
    for text in collection.warnings:
        say_once(text)
    config = resolve_config(config, collection, setup.teacher, start)
    check_config(config, ranks)
    device = choose_device(config.amp)
    return Job(config, collection, Path(run), *device, setup, ranks, start)


def choose_device(amp: str) -> tuple[torch.device, torch.dtype]:
    """The GPU if there is one, else the CPU; and the precision of autocast (float32: no autocast).

    `auto`: bf16 if the GPU supports it, else fp16; off on CPUs, where it is slower. Raises DataError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type == "cpu":
        raise DataError("`amp` fp16 needs a GPU; use bf16 or off on this machine")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


@dataclass(frozen=True)
class Selected:
    """A split, the rows of the images that a run uses, and the samples made from them."""

    split: OpenSplit
    images: Rows
    samples: Samples
    blank: str  # the shards' policy, so that runs with any policy are measured on the same cells
    bad: Unusable = field(default_factory=Unusable)  # over all epochs and evaluations

    @property
    def rows(self) -> Rows:
        """The row of each sample's first image: the images of a study share their labels."""
        return self.samples.rows[:, 0]

    @cached_property
    def truth(self) -> Labels:
        """Targets and masks of all rows of the split, for metrics."""
        return Labels(*evaluation_targets(self.split.table, self.blank))


def holds_out(job: Job) -> bool:
    """Whether the run's dev is part of its shards' train split; other shards are used unchanged."""
    return job.config.dev is not None and "dev" not in job.manifest.splits and job.shards.digest == job.config.manifest


def open_split(job: Job, name: str) -> OpenSplit:
    """A split of the shards; a held-out dev is the train split, under the name dev."""
    return replace(job.shards.open("train" if name == "dev" and holds_out(job) else name), name=name)


def open_images(job: Job, name: str) -> tuple[OpenSplit, Rows]:
    """A split and the rows of the images that meet the run's conditions.

    A held-out dev is rows of train, under the name dev. Raises DataError; its subclass NothingSelectedError if no row
    is left.
    """
    config, split = job.config, open_split(job, name)
    limit = config.limit if name == "train" else None
    if name not in ("train", "dev") or not holds_out(job):
        return split, select_rows(split.table, config.where, config.views, limit)
    patients = split.table.select(["patient"]).append_column("row", pa.array(np.arange(split.table.num_rows)))
    parts = split_patients(patients, config.dev or 0.0, config.seed)
    places: Rows = parts[name == "dev"]["row"].to_numpy()
    if len(places) == 0:
        less = "raise" if name == "dev" else "lower"
        raise DataError(f"{job.shards}: `dev` {config.dev:g} leaves no patient of train for {name}; {less} it")
    chosen = select_rows(split.table.take(places), config.where, config.views, limit)
    return split, places[chosen]


def selected_splits(job: Job) -> list[str]:
    """The splits, including a held-out dev, with any image that meets the run's conditions."""
    splits = []
    for name in [*job.manifest.splits, *(["dev"] if holds_out(job) else [])]:
        with suppress(NothingSelectedError):
            open_images(job, name)
            splits.append(name)
    return splits


def open_rows(job: Job, name: str) -> Selected:
    """A split and the samples that meet the run's conditions; `limit` applies only to train.

    Raises DataError if a run on studies finds different labels within a study.
    """
    split, rows = open_images(job, name)
    blank = check_blank_policy(job.manifest.policies["blank"] or job.config.blank)
    bad = Unusable(int(job.config.max_bad * len(rows)))
    if job.config.fusion is None:
        return Selected(split, rows, find_images(split, rows), blank, bad)
    samples, left_out = find_studies(split, rows)
    if left_out and job.ranks.is_first:
        say(f"{name}: {left_out:,} images beyond their study's first {MOST_VIEWS} are left out")
    return Selected(split, rows, samples, blank, bad)


def read_batches(job: Job, chosen: Selected, labels: Labels, plan: Callable[[int], Iterator[Step]]) -> BatchStream:
    """The batches of a plan over the chosen samples, as the run reads them."""
    shape, threads = job.config.shape, job.setup.workers
    return stream_batches(chosen.split, labels, plan, size=shape, threads=threads, bad=chosen.bad)


def network_inputs(
    config: Config,
    device: torch.device,
    images: npt.NDArray[np.uint8],
    present: npt.NDArray[np.bool_],
    projection: npt.NDArray[np.int8],
) -> tuple[Tensor, ...]:
    """Inputs of a run's network, on the device: images uint8 [N, 1, H, W].

    Networks that pool views also take each sample's filled places, bool [B, V], and the projections, int8 [N].
    """
    arrays = (images,) if config.fusion is None else (images, present, projection)
    return tuple(to_device(array, device) for array in arrays)


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A NumPy array as a tensor on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
