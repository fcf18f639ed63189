"""What commit b7c6fcb wrote, streamed and trained: no later one may change it, for runs are resumed after an upgrade.

The images are noise, the same on every machine. Weights are compared by their norms: the rounding of a convolution
depends on the processor.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from model.checkpoint import load_checkpoint
from model.runs.config import Config, read_config
from model.runs.job import open_job
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
    [
        ("images", "shards", {"augment": "crop"}),
        ("studies", "studies", {"fusion": "attention", "accumulate": 2}),
    ],
)
def test_a_run_has_the_same_configuration_losses_and_weights(
    originals: Path, tmp_path: Path, name: str, shards: str, changes: dict[str, Any]
) -> None:
    config = Config(
        arch="rescnn", image_size=32, batch_size=4, epochs=2, lr=1e-3, seed=5, amp="off", **changes
    )
    job = open_job(config, originals / shards, tmp_path / "run", workers=1)
    assert train.train(job) == 0
    expected = GOLDEN["runs"][name]
    assert read_config(job.run) == job.config
    written = json.loads((job.run / "config.json").read_text())
    assert written == expected["config"] | {"manifest": job.config.manifest}
    assert list(written) == list(expected["config"])
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_loss"] for line in lines] == pytest.approx(expected["losses"], abs=1e-4)
    network = load_checkpoint(job.run / "last.pt")["network"]
    norms = {key: float(network[key].double().norm()) for key in expected["norms"]}
    assert norms == pytest.approx(expected["norms"], rel=1e-4)
