"""`open_shards`: shards in a user's own code."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline import DataError, open_shards
from pipeline.manifest import Manifest, read_table
from pipeline.policies import make_targets, parse_uncertain_policy

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
    with pytest.raises(
        DataError, match=r"^split 'test' does not exist; these shards hold train, dev, valid$"
    ):
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


def test_conditions_studies_and_ranks_narrow_what_is_read(study_shards: Shards) -> None:
    train = open_shards(study_shards[0])["train"]
    frame = train.table.to_pandas()
    women = train.where("sex=Female", views="frontal")
    chosen = frame[(frame.sex == "Female") & (frame["view"] == "frontal")]
    assert women.table.to_pandas().equals(chosen.reset_index(drop=True))
    studies = train.where("sex=Female").studies()
    assert len(studies.table) == frame[frame.sex == "Female"].groupby(["patient", "study"]).ngroups
    whole = [batch.step.rows for batch in studies.batches(4, 32, epoch=2, seed=1)]
    halves = [
        [batch.step.rows for batch in studies.batches(4, 32, epoch=2, seed=1, rank=rank, ranks=2)]
        for rank in (0, 1)
    ]
    for rows, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), rows)


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
