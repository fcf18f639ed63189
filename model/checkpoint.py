"""State dict ↔ file: written atomically, and read without running code from it."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from model.ranks import ALONE, Ranks
from pipeline.base.errors import DataError, MissingPackageError, needs
from pipeline.base.files import atomic_file


class CheckpointError(DataError):
    """A checkpoint that is missing or cannot be used; the message names the file."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. `state` holds only tensors and plain Python values.

    Raises DataError, naming the file, if it cannot be written.
    """
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
            return _read_safetensors(content)
        refuse_bombs(content)
        # weights_only: a pickle can run code, tensors and plain values cannot.
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return dict(saved.state_dict() if isinstance(saved, torch.nn.Module) else saved)
    except MissingPackageError:
        raise
    except Exception as error:  # a damaged file makes torch raise anything: IndexError, struct.error, …
        raise CheckpointError(f"{path}: damaged, or not a checkpoint of this program{remedy}") from error


def _read_safetensors(content: bytes) -> dict[str, Any]:
    with needs("timm"):
        import safetensors.torch  # a dependency of timm

    return dict(safetensors.torch.load(content))


def refuse_bombs(content: bytes) -> None:
    """Raise ValueError for a zip whose members claim more bytes than it has: torch would allocate them all."""
    file = io.BytesIO(content)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > len(content):
                raise ValueError("its members are larger than the file")


def hub_path(url: str) -> Path:
    """Where torch stores the file downloaded from this URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def cannot_download(what: str, url: str, error: Exception, place: Path | None = None) -> str:
    """Why a weights file is missing, and how to get it offline."""
    reason = " ".join(str(error).split())[:200]
    put = f"as {place}, or anywhere for `init` FILE" if place else "for `init` FILE"
    return f"{what} cannot be downloaded from {url}: {reason}; download that file elsewhere and put it here, {put}"


@contextmanager
def refused(path: Path, remedy: str = "") -> Iterator[None]:
    """Raise CheckpointError, naming the file, if its content does not fit the run."""
    try:
        yield
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not fit this run's configuration: {reason}{remedy}") from error
