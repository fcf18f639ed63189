import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def test_checkpoints_come_back_and_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    state = {"weights": {"a": torch.arange(3.0)}, "epoch": 3, "history": [{"auroc": None}]}
    save_checkpoint(path, state)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    assert (loaded["epoch"], loaded["history"]) == (3, [{"auroc": None}])
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"weights": Payload()}, path)
    with pytest.raises(CheckpointError, match=r"last.pt: damaged, or not a checkpoint of this program$"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    save_checkpoint(path, state)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"none.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"cannot be read: Is a directory$"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_cut_anywhere_are_damaged(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(3.0), "b": [1, None]}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"weights.pth: damaged, or not a checkpoint of this program$"):
            load_checkpoint(path)


def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A few bytes of a zip's directory would have torch allocate gigabytes."""
    path = tmp_path / "last.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10**7))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(caught.value) == f"{path}: damaged, or not a checkpoint of this program"
    assert str(caught.value.__cause__) == "its members are larger than the file"
