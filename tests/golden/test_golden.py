"""What must be the same on every machine and after every commit: shards, batches, and how a run begins.

The images are noise, the same on every machine. Of training only the first step is compared, because the rounding of
a convolution depends on the processor, and Adam turns the rounding of a gradient near zero into a whole step: after two
epochs, losses differ by 1e-2 from one processor to another. Later steps are compared between runs on one machine, in
`tests/model/runs/test_train.py`; optimizer and schedule with torch's own, in `tests/model/test_optim.py`.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from model.runs.config import Config, Setup, read_config
from model.runs.folder import begin_run
from model.runs.run import open_run, open_training
from pipeline import open_shards
from pipeline.base.files import hash_file
from pipeline.stream.batches import BatchStream

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden.json").read_text())


@pytest.mark.parametrize("kind", ["shards", "studies"])
def test_shards_have_the_same_bytes(originals: Path, kind: str) -> None:
    files = [path for path in (originals / kind).iterdir() if path.suffix in (".tar", ".arrow")]
    assert {path.name: hash_file(path) for path in files} == GOLDEN["shards"][kind]


def digest(stream: BatchStream) -> str:
    """sha256 of the images, targets and masks of the batches."""
    sha256 = hashlib.sha256()
    for batch in stream:
        for array in (batch.images, batch.target, batch.mask):
            sha256.update(np.ascontiguousarray(array).tobytes())
    return sha256.hexdigest()


def test_batches_have_the_same_order_and_content(originals: Path) -> None:
    images = open_shards(originals / "shards")["train"]
    studies = open_shards(originals / "studies")["train"].studies()
    assert GOLDEN["batches"] == {
        "images, epoch 0": digest(images.batches(4, 40, epoch=0, seed=5)),
        "images, epoch 1": digest(images.batches(4, 40, epoch=1, seed=5)),
        "images, in order": digest(images.batches(4, 40, epoch=None, seed=5)),
        "studies, epoch 0": digest(studies.batches(4, 40, epoch=0, seed=5)),
    }


@pytest.mark.parametrize(
    ("name", "shards", "changes"),
    [("images", "shards", {"augment": "crop"}), ("studies", "studies", {"fusion": "attention", "accumulate": 2})],
)
def test_a_run_has_the_same_configuration_and_first_step(
    originals: Path, tmp_path: Path, name: str, shards: str, changes: dict[str, Any]
) -> None:
    config = Config(arch="rescnn", image_size="32", batch_size=4, epochs=2, lr=1e-3, seed=5, amp="off", **changes)
    run = open_run(config, Setup(shards=(str(originals / shards),), workers=1), tmp_path / "run")
    begin_run(run.folder, run.config)
    expected = GOLDEN["runs"][name]
    assert read_config(run.folder) == run.config
    written = json.loads((run.folder / "config.json").read_text())
    assert written == expected["config"] | {"manifest": run.config.manifest}
    assert list(written) == list(expected["config"])
    data = open_training(run)
    state = train.start_state(run, data)
    batch = next(iter(train.stream_epoch(run, data, 0)))
    loss, norm = train.train_step(run, state, batch, batch.mask.sum()).tolist()
    # Between SSE4.1, AVX2 and AVX-512 the loss differs by 1e-5 of it and the gradient's norm by 2.5e-3: in the last
    # layers BatchNorm divides by the deviation of four values, which are nearly equal.
    assert loss == pytest.approx(expected["loss"], rel=1e-4)
    assert norm == pytest.approx(expected["gradient_norm"], rel=1e-2)
