"""Files of weights: state dict ↔ file, and a file → its tensors, outputs, input scale, terms and training images.

Files are written atomically, and read as tensors and plain values: no code in a file runs. Initial weights are a run's
best.pt, a state dict, or a checkpoint containing one; torchxrayvision's are pickles of whole networks, read with
placeholders for its classes. The package itself cannot be imported here, because it also has a module `model`.
"""

import argparse
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from model.names import HUB, XRV, Published, published
from model.ranks import ALONE, Ranks
from pipeline.base.errors import DataError, MissingPackageError, needs
from pipeline.base.files import atomic_file, hash_file

# Names under which checkpoints hold the network's tensors; averaged ones first
CONTAINERS = (
    *("weights", "state_dict_ema", "model_ema", "ema", "teacher", "student"),
    *("state_dict", "model_state_dict", "model", "module", "backbone", "encoder"),
)
UNKNOWN = "unknown"  # split of weights whose file does not state the training data
NOT_STATED = "weights of a file; license not stated, nor what they were trained on"
COMMON = ("model.safetensors", "open_clip_pytorch_model.bin")  # names of many networks' files


class CheckpointError(DataError):
    """A checkpoint that is missing or cannot be used; the message names the file."""


class _Stub(nn.Module):
    """Placeholder for torchxrayvision's classes, of which only the parameters are used."""


# What checkpoints may hold besides tensors and plain values; Namespace is the options of the command that trained it.
_ALLOWED: list[Any] = [
    *(argparse.Namespace, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear, nn.Sequential),
    *((_Stub, f"torchxrayvision.models.{part}") for part in ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")),
]


class Entry(TypedDict):
    """Images and patients that weights were trained on, or the sets (namespaces); see `model.runs.overlap`."""

    run: str
    split: str
    images: Tensor
    patients: Tensor
    sets: Sequence[str]


class Start(NamedTuple):
    """Weights that a run starts from."""

    path: Path
    digest: str  # sha256 of the file
    weights: Mapping[str, Tensor]
    outputs: Sequence[str] = ()  # names of the head's outputs, in order; "": untrained. Empty: unknown
    scale: tuple[float, ...] = ()  # mean and standard deviation of the input's gray levels; empty: unknown
    equalize: bool = False  # whether input images are equalized
    terms: str = NOT_STATED
    seen: Sequence[Entry] = ()
    arch: str = ""  # empty: unknown
    size: str = ""  # of the input, as `image_size`; empty: unknown


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain Python values atomically. Raises DataError, naming the file, if it cannot be written."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's error for a failed write, whose context is the reason
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path: Path, ranks: Ranks = ALONE, remedy: str = "") -> dict[str, Any]:
    """The saved state, on the CPU; among several `ranks`, the first one reads the file.

    Raises CheckpointError; if the file is damaged, its message ends with the `remedy`.
    """
    try:
        content = ranks.share(path.read_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; a run has one after its first epoch") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        if path.suffix == ".safetensors":
            with needs("timm"):
                import safetensors.torch  # a dependency of timm
            return dict(safetensors.torch.load(content))
        _refuse_bombs(content)
        # weights_only: a pickle can run code, tensors and plain values cannot.
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return dict(saved.state_dict() if isinstance(saved, nn.Module) else saved)
    except MissingPackageError:
        raise
    except Exception as error:  # a damaged file makes torch raise anything: IndexError, struct.error, …
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this program{remedy}") from error


def _refuse_bombs(content: bytes) -> None:
    """Raise ValueError for a zip whose members claim more bytes than it has: torch would allocate them all."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError("its members are larger than the file")


@contextmanager
def refused(path: Path, remedy: str = "") -> Iterator[None]:
    """Raise CheckpointError, naming the file, if its content does not fit the run."""
    try:
        yield
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not fit this run's configuration: {reason}{remedy}") from error


def hub_path(url: str) -> Path:
    """Where torch stores the file downloaded from this URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def cannot_download(what: str, url: str, error: Exception, place: Path | None = None) -> str:
    """Why a weights file is missing, and how to get it offline."""
    reason = " ".join(str(error).split())[:200]
    put = f"as {place}, or anywhere for `init` FILE" if place else "for `init` FILE"
    return f"{what} cannot be downloaded from {url}: {reason}; download that file elsewhere and put it here, {put}"


def read_start(init: Path, outputs: Sequence[str] = ()) -> Start:
    """The weights of a file, a run, a published encoder's name, or `hf-hub:OWNER/NAME/FILE`, downloaded if missing.

    `outputs` names the head's outputs if the file does not. Raises CheckpointError.
    """
    row = None if init.exists() else published().get(str(init))
    path = _fetch(str(init), row) if row or str(init).startswith(HUB) else init / "best.pt" if init.is_dir() else init
    remedy = "; a whole network is converted on a machine that you trust: torch.save(model.state_dict(), FILE)"
    with torch.serialization.safe_globals(_ALLOWED):
        saved = load_checkpoint(path, remedy=remedy)
    digest = hash_file(path)
    if "seen" in saved:
        with refused(path):
            scale = (float(saved["pixels"]["mean"]), float(saved["pixels"]["std"]))
            known, seen = outputs or tuple(saved["outputs"]), hand_on(saved["seen"], path)
            about = (saved["equalize"], saved["terms"], seen, saved["arch"], saved["image_size"])
            return Start(path, digest, unwrap(saved["weights"]), known, scale, *about)
    weights, xrv = unwrap(saved), published()[f"{XRV}densenet121-res224-all"]
    # A published encoder is known by its file's name or, if it is torchxrayvision's, a gray input and 18 outputs.
    rows = [known for known in published().values() if known.file == path.name and known.file not in COMMON]
    stem, head = (weights.get(name, torch.empty(0)) for name in ("features.conv0.weight", "classifier.weight"))
    if stem.shape[1:2] == (1,) and head.shape[:1] == (len(xrv.outputs.split("|")),):
        rows.append(xrv)
    nothing = torch.zeros(0, dtype=torch.int64)
    entry = Entry(run=str(path), split=UNKNOWN, images=nothing, patients=nothing, sets=[])
    if not row and not rows:
        return Start(path, digest, weights, outputs, seen=[entry])
    row = row or rows[0]
    entry["split"], entry["sets"] = "train", row.seen.split()
    names = row.outputs.split("|") if row.outputs else []
    thresholds = weights.pop("op_threshs", torch.zeros(len(names)))  # NaN: an output without training
    with refused(path):
        trained = ["" if value != value else name for name, value in zip(names, thresholds.tolist(), strict=True)]
    return Start(path, digest, weights, outputs or trained, row.scale, False, row.terms, [entry], row.arch, row.size)


def _fetch(init: str, row: Published | None) -> Path:
    """The local copy of published weights. Raises CheckpointError if they cannot be downloaded."""
    source = row.weights if row else init
    if row is not None and not source.startswith(HUB) and not source.endswith(row.file):
        how = f"get {row.file} from {source}, then `init` that file"
        raise CheckpointError(f"{init}: programs cannot download it; {how}")
    place = None if source.startswith(HUB) else hub_path(source)
    try:
        if place is None:
            with needs("timm", init):
                from huggingface_hub import hf_hub_download  # a dependency of timm
            owner, name, *file = source.removeprefix(HUB).split("/")
            source = f"https://huggingface.co/{owner}/{name}"
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(file) or "model.safetensors"))
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(source, str(place), progress=False)
    except MissingPackageError:
        raise
    except Exception as error:  # no connection, no such file
        raise CheckpointError(cannot_download(init, source, error, place)) from error
    return place


def hand_on(seen: Sequence[Entry], source: Path) -> list[Entry]:
    """The entries of weights, for runs that start from them or learn from their scores."""
    entries = []
    for entry in seen:
        run, split, sets = entry["run"] or str(source), entry["split"], entry["sets"]
        entries.append(Entry(run=run, split=split, images=entry["images"], patients=entry["patients"], sets=sets))
    return entries


def unwrap(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a checkpoint, by name."""
    while inner := next((saved[name] for name in CONTAINERS if isinstance(saved.get(name), dict)), None):
        saved = inner
    return {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
