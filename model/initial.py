"""A file of weights → its tensors, outputs, input scale, terms, and the images they were trained on.

The file is a run's best.pt, a state dict of torchvision, timm or torchxrayvision, or a checkpoint containing one, as
Lightning, DataParallel and torch.compile write it. All are read as tensors and plain values: no code in a file runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from model.checkpoint import refused
from model.chest import SCALE, SIZE, TERMS, is_chest, name_outputs, read_initial
from pipeline.base.files import hash_file

# Names under which checkpoints hold the network's tensors; averaged ones first
CONTAINERS = (
    *("weights", "state_dict_ema", "model_ema", "ema", "teacher", "student"),
    *("state_dict", "model_state_dict", "model", "module", "backbone", "encoder"),
)
UNKNOWN = "unknown"  # split of weights whose file does not state the training data
NOT_STATED = "weights of a file; license not stated, nor what they were trained on"


class Entry(TypedDict):
    """Images and patients that weights were trained on; see `model.runs.overlap`."""

    run: str
    split: str
    images: Tensor
    patients: Tensor


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


def read_start(path: Path, outputs: Sequence[str] = ()) -> Start:
    """The weights in a file. `outputs` names the head's outputs if the file does not. Raises CheckpointError."""
    saved, digest = read_initial(path), hash_file(path)
    if "seen" in saved:
        with refused(path):
            scale = (saved["pixels"]["mean"], saved["pixels"]["std"])
            seen = hand_on(saved["seen"], path)
            about = (scale, saved["equalize"], saved["terms"], seen, saved["arch"], saved["image_size"])
            return Start(path, digest, saved["weights"], outputs or saved["outputs"], *about)
    nothing = torch.zeros(0, dtype=torch.int64)
    seen = [Entry(run=str(path), split=UNKNOWN, images=nothing, patients=nothing)]
    if is_chest(saved):
        weights = {name: value for name, value in saved.items() if name != "op_threshs"}
        known = name_outputs(saved, path.name)
        return Start(path, digest, weights, known, SCALE, False, TERMS, seen, "densenet121", SIZE)
    return Start(path, digest, unwrap(saved), outputs, seen=seen)


def hand_on(seen: Sequence[Entry], source: Path) -> list[Entry]:
    """The entries of weights, for runs that start from them or learn from their scores."""
    return [Entry(**entry | {"run": entry["run"] or str(source)}) for entry in seen]


def unwrap(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors in a checkpoint, by name."""
    while inner := next((saved[name] for name in CONTAINERS if isinstance(saved.get(name), dict)), None):
        saved = inner
    return {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
