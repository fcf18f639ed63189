"""What a run is: its configuration, its folder, the device and the shards that it works on.

config.json           Config; the run's outcome is a function of it
environment.jsonl     a line per start: the code, packages and device it ran with
metrics.jsonl         a line per evaluation
tensorboard/          the same and the loss, as TensorBoard's events
last.pt               all that a resume restores
best.pt               the averaged weights with the best dev macro AUROC, and what scoring an image needs
trained-on.arrow      checksums of the images of train and dev, and hashes of their patients, as `overlap` says
calibration.json      thresholds and calibrations chosen on dev
evaluation-<split>.json, scores-<split>.arrow    for every split that was scored; of other shards than the
                      run's own they are named <split>-<first 8 digits of the manifest's sha256>
report.html, model-card.md
"""

import hashlib
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint, refused, save_checkpoint
from model.fusion import StudyNetwork
from model.networks import build_network
from model.ranks import ALONE, Ranks
from model.runs.config import Config, output_count, read_config
from pipeline.base.errors import DataError
from pipeline.base.files import write_json
from pipeline.console import say
from pipeline.images import ImageOptions
from pipeline.labels import MOST_VIEWS, split_patients
from pipeline.manifest import Manifest, manifest_digest
from pipeline.stream.batches import Batch, OpenSplit, open_split
from pipeline.stream.cache import Remote, redact
from pipeline.stream.plan import Rows
from pipeline.stream.samples import Studies, StudyBatch, find_studies
from pipeline.stream.select import NothingSelectedError, select_rows

PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "simplejpeg", "opencv-python-headless", "pillow")
AS_IT_IS = ImageOptions(size=None, square="no", encoding="png", quality=95, max_pixels=50_000_000)


class StopFlag:
    """Set by a signal; the loop finishes its step, saves, and exits with `code`.

    SIGUSR1 is what Slurm sends before a job's time is up (sbatch --signal=USR1@120).
    """

    def __init__(self) -> None:
        self.code = 0
        for number, code in {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}.items():
            signal.signal(number, lambda *_, code=code: self._set(code))

    def _set(self, code: int) -> None:
        self.code = code

    def __call__(self) -> bool:
        return self.code != 0


@dataclass(frozen=True)
class Job:
    """What stays the same while a run trains or is scored."""

    config: Config
    shards: Path  # where manifest and tables are
    remote: Remote | None  # where the tars are, if not there too
    run: Path
    manifest: Manifest
    device: torch.device
    precision: torch.dtype  # of autocast; float32 means none
    workers: int
    teacher: Path | None  # the run whose scores selftrained labels learn from
    init: Path | None  # the weights to start from
    strict: bool  # refuse labels with one class instead of warning about them
    stop: StopFlag
    wandb: str | None = None  # the project of Weights & Biases that is told of everything
    ranks: Ranks = ALONE


class Selected(NamedTuple):
    """A split, and the rows of its table that a run uses: those of images, or of the studies that they make."""

    split: OpenSplit
    images: Rows
    studies: Studies | None

    @property
    def rows(self) -> Rows:
        """A row for each sample: the image's, or that of the study's first image; they share their labels."""
        return self.images if self.studies is None else self.studies.rows[:, 0]

    def thin(self, step: int) -> "Selected":
        """Every so manieth sample of it."""
        if self.studies is None:
            return self._replace(images=self.images[::step])
        return self._replace(studies=self.studies._replace(rows=self.studies.rows[::step]))


def agree(job: Job, *values: float) -> npt.NDArray[np.float64]:
    """The sums of values over the ranks; a stop that one of them was asked for becomes one of all."""
    table = job.ranks.gather(job.stop.code if job.stop() else 0, *values)
    job.stop.code = int(table[:, 0].max())
    sums: npt.NDArray[np.float64] = table[:, 1:].sum(axis=0)
    return sums


def holds_out(job: Job) -> bool:
    """Whether the run's dev is a part of its shards' train; other shards are taken as they are."""
    return (
        job.config.dev is not None
        and "dev" not in job.manifest.splits
        and manifest_digest(job.shards) == job.config.manifest
    )


def open_images(job: Job, name: str) -> tuple[OpenSplit, Rows]:
    """A split and the rows of the images that the run's conditions leave of it.

    Where the run holds out its dev, that is rows of train, under the name dev. Raises DataError, of which
    NothingSelectedError where no row is left.
    """
    config = job.config
    limit = config.limit if name == "train" else None
    if name not in ("train", "dev") or not holds_out(job):
        split = open_split(job.shards, job.manifest, name, job.remote)
        return split, select_rows(split.table, config.where, config.views, limit)
    split = open_split(job.shards, job.manifest, "train", job.remote)
    patients = split.table.select(["patient"]).append_column("row", pa.array(np.arange(split.table.num_rows)))
    parts = split_patients(patients, config.dev or 0.0, config.seed)
    places: Rows = parts[name == "dev"]["row"].to_numpy()
    if len(places) == 0:
        less = "raise" if name == "dev" else "lower"
        raise DataError(
            f"{job.shards}: --dev {config.dev:g} leaves no patient of train for {name}; {less} it"
        )
    chosen = select_rows(split.table.take(places), config.where, config.views, limit)
    return split._replace(name=name), places[chosen]


def selected_splits(job: Job) -> list[str]:
    """The splits, with a dev that is held out, of which the run's conditions leave any image."""
    found = []
    for name in [*job.manifest.splits, *(["dev"] if holds_out(job) else [])]:
        with suppress(NothingSelectedError):
            open_images(job, name)
            found.append(name)
    return found


def open_rows(job: Job, name: str) -> Selected:
    """A split and the samples that the run's conditions leave of it; `limit` is for train alone.

    Raises DataError where the images of a study have different labels and the run learns studies.
    """
    config = job.config
    split, rows = open_images(job, name)
    studies = None if config.fusion is None else find_studies(split, rows)
    if studies is not None and studies.left_out and job.ranks.is_first:
        say(f"{name}: {studies.left_out:,} images beyond their study's first {MOST_VIEWS} are left out")
    return Selected(split, rows, studies)


def choose_device(amp: str) -> tuple[torch.device, torch.dtype]:
    """The GPU where there is one, and the precision of autocast there (float32: no autocast).

    `auto`: bf16 where the GPU has it, else fp16; off on a CPU, where it is slower. Raises DataError.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "fp16" and device.type == "cpu":
        raise DataError("--amp fp16 needs a GPU; use bf16 or off on this machine")
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)


def to_device(array: Any, device: torch.device) -> Tensor:
    """A NumPy array as a tensor on the device; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def view_tensors(
    batch: Batch | StudyBatch, device: torch.device, part: slice = slice(None)
) -> tuple[Tensor, ...]:
    """What a network takes of a part of a batch: images uint8 [n, 1, H, W], of studies those that are there.

    For studies also which views they are, bool [B, V], and the projections, int8 [B, V].
    """
    if isinstance(batch, Batch):
        return (to_device(batch.images[part], device),)
    present = batch.present[part]
    arrays = batch.images[part][present], present, batch.projection[part]
    return tuple(to_device(array, device) for array in arrays)


def fuse(network: nn.Module, config: Config) -> nn.Module:
    """The network of a run by studies, made of one for images; the same one for a run by images."""
    return network if config.fusion is None else StudyNetwork(network, config.fusion, config.freeze)


def open_run(run: Path, config: Config) -> None:
    """Create the run folder. Raises DataError, with the difference, where it has another configuration."""
    if (run / "config.json").exists():
        there = asdict(read_config(run))
        for name, here in asdict(config).items():
            if there[name] != here:
                difference = f"{name} is {there[name]} there and {here} here"
                raise DataError(
                    f"{run} is a run of another configuration: {difference}; choose another --run (in make: RUN=)"
                )
        return
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / "config.json", asdict(config))


def record_environment(job: Job) -> None:
    """Add a line on what this start runs with to environment.jsonl: with config.json it reproduces the run."""
    line = {
        "command": [redact(word) for word in sys.argv],
        "code": describe_code(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu",
        "precision": str(job.precision),
        "threads": torch.get_num_threads(),
        "ranks": job.ranks.count,
    }
    with (job.run / "environment.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def follow_by_wandb(job: Job) -> Iterator[None]:
    """Let Weights & Biases, if it was asked for, read what goes to TensorBoard; a run continues as the same there.

    Raises DataError where it is missing.
    """
    if job.wandb is None:
        yield
        return
    try:
        import wandb
    except ImportError:
        raise DataError("--wandb: the package is missing: pip install '.[wandb]'") from None
    digest = hashlib.sha256((job.run / "config.json").read_bytes()).hexdigest()[:8]
    wandb.init(
        project=job.wandb,
        name=job.run.name,
        id=f"{job.run.name}-{digest}",
        resume="allow",
        dir=job.run,
        config=asdict(job.config),
        sync_tensorboard=True,
        save_code=False,
    )
    try:
        yield
    finally:
        wandb.finish()  # before the next trial of a sweep begins another


def result_name(config: Config, shards: Path, split: str) -> str:
    """What a run's scores of a split are named by: of shards other than its own also by their manifest's hash."""
    digest = manifest_digest(shards)
    return split if digest == config.manifest else f"{split}-{digest[:8]}"


def describe_code() -> str:
    """The commit of this checkout, with `-dirty` where files were changed; else the package's version."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return version("chexpert-pipeline")


def save_best(job: Job, weights: Mapping[str, Tensor], epoch: float, score: float) -> None:
    """Write best.pt: all that scoring an image needs but the architecture, which config.json has."""
    # Shards that others wrote do not say how: their images are taken as they are.
    said = {name: job.manifest.options[name] for name in AS_IT_IS._fields if name in job.manifest.options}
    images = AS_IT_IS._asdict() | said
    about = {"epoch": epoch, "dev_auroc": score, "images": images, "pixels": dict(job.manifest.pixels)}
    save_checkpoint(job.run / "best.pt", {"weights": dict(weights), **about})


def load_best(
    run: Path, config: Config, device: torch.device, ranks: Ranks = ALONE
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the weights of best.pt, and what else that holds. Raises CheckpointError."""
    best = load_checkpoint(run / "best.pt", ranks)
    network = fuse(build_network(config.arch, output_count(config)), config)
    with refused(run / "best.pt"):
        network.load_state_dict(best["weights"])
        ImageOptions(**best["images"])
        if not (float(best["dev_auroc"]) >= 0 and float(best["pixels"]["std"]) > 0):
            raise ValueError("dev_auroc or pixels")
        float(best["pixels"]["mean"])
    return network.to(device).to(memory_format=torch.channels_last), best
