"""`open_shards`: shards in a user's own code."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import DataError, open_shards
from pipeline.labels import LABELS
from pipeline.manifest import Manifest, read_table
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.dataset import Selection
from pipeline.stream.select import NothingSelectedError

Shards = tuple[Path, Manifest]


def test_splits_tables_and_batches_are_those_of_the_manifest(shards: Shards) -> None:
    folder, manifest = shards
    opened = open_shards(folder)
    assert list(opened) == list(manifest.splits) == ["train", "dev", "valid"]
    for name, selection in opened.items():
        table = read_table(folder, manifest.split(name))
        assert selection.table.equals(table)
        batches = list(selection.batches(batch_size=5, size=32, epoch=None))
        seen = np.concatenate([batch.step.images for batch in batches])
        np.testing.assert_array_equal(seen, np.arange(table.num_rows))
        target, mask = make_targets(table, parse_uncertain_policy("best"), "zeros", seed=0)  # the shards' own
        np.testing.assert_array_equal(np.concatenate([batch.target for batch in batches]), target)
        np.testing.assert_array_equal(np.concatenate([batch.mask for batch in batches]), mask)
    with pytest.raises(DataError, match=r"^split 'test' does not exist; these shards hold train, dev, valid$"):
        opened["test"]


def test_policies_are_those_given(shards: Shards) -> None:
    train = open_shards(shards[0])["train"]
    uncertain = "ignore,Edema=multiclass"
    batches = list(train.batches(5, 32, epoch=None, uncertain=uncertain, blank="ignore", seed=3))
    policy = parse_uncertain_policy(uncertain)
    target, mask = make_targets(train.table, policy, "ignore", seed=3)
    np.testing.assert_array_equal(np.concatenate([batch.target for batch in batches]), target)
    np.testing.assert_array_equal(np.concatenate([batch.mask for batch in batches]), mask)
    with pytest.raises(DataError, match=r"^uncertain policy 'perhaps' is unknown; choose from best, zeros"):
        train.batches(5, 32, epoch=0, uncertain="perhaps")


CONDITIONS: dict[str, tuple[Callable[[Selection], Selection], str]] = {
    "women": (lambda selection: selection.where("sex=Female"), "sex == 'Female'"),
    "old": (lambda selection: selection.where("age>=50", "age<80"), "50 <= age < 80"),
    "frontal": (lambda selection: selection.where(views="frontal"), "view == 'frontal'"),
    "lateral": (lambda selection: selection.where(views="lateral"), "view == 'lateral'"),
    "studies": (lambda selection: selection.studies(), "age == age"),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(steps=st.lists(st.sampled_from(sorted(CONDITIONS)), min_size=2, max_size=4))
def test_selections_in_any_order_hold_together(study_shards: Shards, steps: list[str]) -> None:
    selection = open_shards(study_shards[0])["train"]
    frame = selection.table.to_pandas()
    chosen = frame.query(" and ".join(f"({CONDITIONS[step][1]})" for step in steps))
    groups = ["patient", "study"] if "studies" in steps else ["key"]
    expected = sorted(sorted(rows.index[:3]) for _, rows in chosen.groupby(groups))
    try:
        for step in steps:
            selection = CONDITIONS[step][0](selection)
        samples = selection.samples.rows.tolist()
    except NothingSelectedError:
        samples = []
    assert sorted([row for row in rows if row >= 0] for rows in samples) == expected
    if samples:
        first = frame.loc[[rows[0] for rows in samples], "key"].tolist()
        assert selection.table["key"].to_pylist() == first


def test_each_rank_takes_its_share_of_a_batch_in_training_and_in_evaluation(study_shards: Shards) -> None:
    studies = open_shards(study_shards[0])["train"].where("sex=Female").studies()
    for epoch in (2, None):
        every = [batch.step.rows for batch in studies.batches(4, 32, epoch=epoch, seed=1)]
        halves = [
            [batch.step.rows for batch in studies.batches(4, 32, epoch=epoch, seed=1, rank=rank, ranks=2)]
            for rank in (0, 1)
        ]
        assert {len(rows) for half in halves for rows in half[:-1]} == {2}
        if epoch is None:
            np.testing.assert_array_equal(np.concatenate([*halves[0], *halves[1]]), np.concatenate(every))
        else:
            for rows, *parts in zip(every, *halves, strict=True):
                np.testing.assert_array_equal(np.concatenate(parts), rows)


def test_batches_of_some_labels_have_their_columns(shards: Shards) -> None:
    train = open_shards(shards[0])["train"]
    labels = ("Pleural Effusion", "Edema")
    columns = [LABELS.index(label) for label in labels]
    options: dict[str, Any] = {"batch_size": 4, "size": 16, "epoch": 0, "uncertain": "ignore"}
    for batch, other in zip(train.batches(**options, labels=labels), train.batches(**options), strict=True):
        np.testing.assert_array_equal(batch.target, other.target[:, columns])
        np.testing.assert_array_equal(batch.mask, other.mask[:, columns])


def test_what_is_not_there_and_batches_that_cannot_be_are_refused(shards: Shards) -> None:
    opened = open_shards(shards[0])
    assert "train" in opened
    assert "test" not in opened
    assert opened.get("test") is None
    train = opened["train"]
    rows = len(train.rows)
    for batch_size, message in (
        (0, "`batch_size` 0: a batch has at least 1 sample"),
        (-1, "`batch_size` -1: a batch has at least 1 sample"),
        (rows + 1, f"`batch_size` {rows + 1} is more than the {rows} samples of <train: {rows} of {rows} images>"),
    ):
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            train.batches(batch_size, 16, epoch=0)
    for name, size, epoch, threads in (("epoch", 16, -1, 1), ("size", 0, 0, 1), ("threads", 16, 0, 0)):
        with pytest.raises(DataError, match=rf"^`{name}` (-1 is less than 0|0 is less than 1)$"):
            train.batches(4, size, epoch=epoch, threads=threads)
    with pytest.raises(DataError, match=r"^views 'sideways' is unknown; choose from frontal, lateral, all$"):
        train.where(views="sideways")
    assert len(list(train.batches(rows + 1, 16, epoch=None))) == 1
    with pytest.raises(DataError, match=r"^label 'Oedema' is none of No Finding, .*mean Edema\?$"):
        train.batches(4, 16, epoch=0, labels=("Oedema",))


def test_each_object_shows_itself_on_one_line(study_shards: Shards) -> None:
    folder, manifest = study_shards
    opened = open_shards(folder)
    rows = manifest.splits["train"].samples
    assert repr(opened).startswith(f"<Shards {folder}: train {rows}, dev ")
    train = opened["train"]
    assert repr(train.where(views="frontal")) == f"<train: {len(train.where(views='frontal').rows)} of {rows} images>"
    studies = train.studies()
    assert repr(studies) == f"<train: {len(studies.samples.rows)} studies of {rows} of {rows} images>"
    stream = train.batches(4, 16, epoch=1)
    assert repr(next(iter(stream))) == "<Batch 0 of epoch 1: images [4, 1, 16, 16], target [4, 14]>"
    assert repr(stream) == f"<BatchStream at step 1 of {len(stream)}>"
    assert "\n" not in repr(train.split)


def test_reading_does_without_torch(shards: Shards) -> None:
    code = (
        "import sys; from pipeline import open_shards; "
        f"batch = next(iter(open_shards({str(shards[0])!r})['train'].batches(4, 32, epoch=0))); "
        "print(batch.images.shape, sorted({'torch', 'click', 'webdataset'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "(4, 1, 32, 32) []\n"


def test_without_torch_its_extra_is_named(shards: Shards, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; import pipeline\n"
        "try: pipeline.BatchDataset\nexcept ImportError as error: print(error)\n"
        f"sys.argv = ['train.py', '--shards', {str(shards[0])!r}, '--run', {str(tmp_path / 'run')!r}]\n"
        "runpy.run_module('train', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = "torch is missing: pip install 'chexpert-pipeline[train]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, message, f"Error: {message}")


def test_what_the_package_does_not_have_is_named() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pipeline' has no attribute 'open_shard'$"):
        pipeline.open_shard  # type: ignore[attr-defined] # noqa: B018
