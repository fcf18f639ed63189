"""A file of weights → its tensors, outputs, input scale, terms, and the images they were trained on.

The file is a run's best.pt, a state dict, or a checkpoint containing one; torchxrayvision's are pickles of whole
networks. All are read as tensors and plain values, with placeholders for torchxrayvision's classes: no code in a file
runs. The package itself cannot be imported here, because it also has a module `model`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from model.checkpoint import CheckpointError, cannot_download, hub_path, load_checkpoint, refused
from model.names import HUB, XRV, Published, published
from pipeline.base.errors import MissingPackageError, needs
from pipeline.base.files import hash_file

# Names under which checkpoints hold the network's tensors; averaged ones first
CONTAINERS = (
    *("weights", "state_dict_ema", "model_ema", "ema", "teacher", "student"),
    *("state_dict", "model_state_dict", "model", "module", "backbone", "encoder"),
)
UNKNOWN = "unknown"  # split of weights whose file does not state the training data
NOT_STATED = "weights of a file; license not stated, nor what they were trained on"
COMMON = ("model.safetensors", "open_clip_pytorch_model.bin")  # names of many networks' files
_LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear, nn.Sequential)


class _Pickled(nn.Module):
    """Placeholder for torchxrayvision's classes, of which only the parameters are used."""


# What checkpoints may hold besides tensors and plain values; Namespace is the options of the command that trained it.
_ALLOWED: list[Any] = [
    argparse.Namespace,
    *_LAYERS,
    *(
        (_Pickled, f"torchxrayvision.models.{name}")
        for name in ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")
    ),
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


def read_start(init: Path, outputs: Sequence[str] = ()) -> Start:
    """The weights of a file, a run, a published encoder's name, or `hf-hub:OWNER/NAME/FILE`, downloaded if missing.

    `outputs` names the head's outputs if the file does not. Raises CheckpointError.
    """
    row = None if init.exists() else published().get(str(init))
    path = _fetch(str(init), row) if row or str(init).startswith(HUB) else init / "best.pt" if init.is_dir() else init
    with torch.serialization.safe_globals(_ALLOWED):
        saved = load_checkpoint(
            path,
            remedy="; a whole network is converted on a machine that you trust: torch.save(model.state_dict(), FILE)",
        )
    digest = hash_file(path)
    if "seen" in saved:
        with refused(path):
            scale = (float(saved["pixels"]["mean"]), float(saved["pixels"]["std"]))
            known = outputs or tuple(saved["outputs"])
            about = (
                saved["equalize"],
                saved["terms"],
                hand_on(saved["seen"], path),
                saved["arch"],
                saved["image_size"],
            )
            return Start(path, digest, unwrap(saved["weights"]), known, scale, *about)
    weights = unwrap(saved)
    row = row or _recognize(path, weights)
    nothing = torch.zeros(0, dtype=torch.int64)
    entry = Entry(run=str(path), split="train" if row else UNKNOWN, images=nothing, patients=nothing, sets=[])
    if row is None:
        return Start(path, digest, weights, outputs, seen=[entry])
    entry["sets"] = row.seen.split()
    names = row.outputs.split("|") if row.outputs else []
    thresholds = weights.pop("op_threshs", torch.zeros(len(names)))  # NaN: an output without training
    with refused(path):
        known = ["" if value != value else name for name, value in zip(names, thresholds.tolist(), strict=True)]
    return Start(path, digest, weights, outputs or known, row.scale, False, row.terms, [entry], row.arch, row.size)


def _recognize(path: Path, weights: Mapping[str, Tensor]) -> Published | None:
    """The published encoder that a file is of, by its name or, of torchxrayvision's, its gray input and 18 outputs."""
    rows = [row for row in published().values() if row.file == path.name and row.file not in COMMON]
    if rows:
        return rows[0]
    stem, head = (weights.get(name, torch.empty(0)) for name in ("features.conv0.weight", "classifier.weight"))
    row = published()[f"{XRV}densenet121-res224-all"]
    return row if stem.shape[1:2] == (1,) and head.shape[:1] == (len(row.outputs.split("|")),) else None


def _fetch(init: str, row: Published | None) -> Path:
    """The local copy of published weights. Raises CheckpointError if they cannot be downloaded."""
    source, place = row.weights if row else init, None
    if row is not None and not source.startswith(HUB) and not source.endswith(row.file):
        raise CheckpointError(
            f"{init}: programs cannot download it; get {row.file} from {source}, then `init` that file"
        )
    try:
        if source.startswith(HUB):
            with needs("timm", init):
                from huggingface_hub import hf_hub_download  # a dependency of timm
            owner, name, *file = source.removeprefix(HUB).split("/")
            source = f"https://huggingface.co/{owner}/{name}"
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(file) or "model.safetensors"))
        place = hub_path(source)
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
    return [
        Entry(
            run=entry["run"] or str(source),
            split=entry["split"],
            images=entry["images"],
            patients=entry["patients"],
            sets=entry["sets"],
        )
        for entry in seen
    ]


def unwrap(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a checkpoint, by name."""
    while inner := next((saved[name] for name in CONTAINERS if isinstance(saved.get(name), dict)), None):
        saved = inner
    return {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
