"""A file of weights → its tensors, outputs, input scale, terms, and the images they were trained on.

That is best.pt of a run, a state dict of torchvision, timm or torchxrayvision, or a checkpoint that holds one, as
Lightning, DataParallel and torch.compile write it. All are read as tensors and plain values: no code of a file runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from model.checkpoint import refused
from model.chest import SCALE, SIZE, TERMS, is_chest, name_outputs, read_initial
from pipeline.base.files import hash_file

CONTAINERS = ("weights", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")
UNKNOWN = "unknown"  # the split that weights have learned from whose file does not say
NOT_STATED = "weights of a file; license not stated, nor what they were trained on"


class Entry(TypedDict):
    """What weights have seen, as `model.runs.overlap` describes it."""

    run: str
    split: str
    images: Tensor
    patients: Tensor


class Start(NamedTuple):
    """Weights that a run starts from."""

    path: Path
    digest: str  # sha256 of the file
    weights: Mapping[str, Tensor]
    left_out: Sequence[str] = ()  # tensors that are of no network, such as those of a loss
    outputs: Sequence[str] = ()  # what the head's outputs are, in their order; "" was not trained. Empty: not known
    scale: tuple[float, ...] = ()  # mean and deviation of the gray levels they take; empty: not known
    equalize: bool = False  # whether films are equalized for them
    terms: str = NOT_STATED
    seen: Sequence[Entry] = ()
    arch: str = ""  # the network's; empty: not known
    size: int = 0  # side of its input, in pixels; 0: not known


def read_start(path: Path, outputs: Sequence[str] = ()) -> Start:
    """The weights in a file. `outputs` name those of its head, where it does not say. Raises CheckpointError."""
    saved, digest = read_initial(path), hash_file(path)
    if "seen" in saved:
        with refused(path):
            scale = (saved["pixels"]["mean"], saved["pixels"]["std"])
            seen = hand_on(saved["seen"], path)
            about = (scale, saved["equalize"], saved["terms"], seen, saved["arch"], saved["image_size"])
            return Start(path, digest, saved["weights"], (), outputs or saved["outputs"], *about)
    nothing = torch.zeros(0, dtype=torch.int64)
    seen = [Entry(run=str(path), split=UNKNOWN, images=nothing, patients=nothing)]
    if is_chest(saved):
        weights = {name: value for name, value in saved.items() if name != "op_threshs"}
        known = name_outputs(saved, path.name)
        return Start(path, digest, weights, (), known, SCALE, False, TERMS, seen, "densenet121", SIZE)
    return Start(path, digest, *unwrap(saved), outputs, seen=seen)


def hand_on(seen: Sequence[Entry], source: Path) -> list[Entry]:
    """The entries of weights, for those that start from or are taught by them."""
    return [Entry(**entry | {"run": entry["run"] or str(source)}) for entry in seen]


def unwrap(saved: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a network in a checkpoint, by its own names; and the other tensors' names."""
    while inner := next((saved[name] for name in CONTAINERS if isinstance(saved.get(name), dict)), None):
        saved = inner
    weights = {str(name): value for name, value in saved.items() if isinstance(value, Tensor)}
    left_out: list[str] = []
    while prefix := next((text for text in PREFIXES if _is_usual(text, weights)), None):
        left_out += [name for name in weights if not name.startswith(prefix)]
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights, left_out


def _is_usual(prefix: str, names: Mapping[str, Any]) -> bool:
    """Whether more than half of the names begin with it."""
    return 2 * sum(name.startswith(prefix) for name in names) > len(names)
