"""State dict ↔ file: written whole or not at all, and read without running code from it."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint that is missing or cannot be used; the message names the file."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write under a temporary name, fsync, rename. `state` holds tensors and plain Python values only."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The saved state, on the CPU. Raises CheckpointError."""
    try:
        # weights_only: a pickle can run code, tensors and plain values cannot.
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; a run has one after its first epoch") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this program") from error
