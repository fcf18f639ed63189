"""`open_shards`: shards in a user's own code."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import open_shards
from pipeline.labels import LABELS
from pipeline.manifest import read_table
from pipeline.policies import UNCERTAIN_POLICIES, make_targets, parse_uncertain_policy
from pipeline.stream.dataset import Selection
from pipeline.stream.select import NothingSelectedError
from tests.conftest import Shards, refused, start


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
    with refused("split 'test' does not exist; these shards hold train, dev, valid"):
        opened["test"]


@pytest.mark.parametrize(
    ("given", "policies"),  # the shards' own, and others
    [({}, ("best", "zeros", 0)), ({"uncertain": "ignore,Edema=multiclass"}, ("ignore,Edema=multiclass", "ignore", 3))],
)
@pytest.mark.parametrize("labels", [LABELS, ("Pleural Effusion", "Edema")])
def test_targets_are_those_of_the_policies_and_labels(
    shards: Shards, given: dict[str, Any], policies: tuple[str, str, int], labels: Sequence[str]
) -> None:
    uncertain, blank, seed = policies
    train = open_shards(shards[0])["train"]
    options = given and given | {"blank": blank, "seed": seed}
    batches = list(train.batches(5, 32, epoch=None, labels=labels, **options))
    target, mask = make_targets(train.table, parse_uncertain_policy(uncertain), blank, seed=seed)
    columns = [LABELS.index(label) for label in labels]
    np.testing.assert_array_equal(np.concatenate([batch.target for batch in batches]), target[:, columns])
    np.testing.assert_array_equal(np.concatenate([batch.mask for batch in batches]), mask[:, columns])


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

    def list_rows(epoch: int | None, **share: Any) -> list[Any]:
        return [batch.step.rows for batch in studies.batches(4, 32, epoch=epoch, seed=1, **share)]

    for epoch in (2, None):
        first, second = (list_rows(epoch, rank=rank, ranks=2) for rank in (0, 1))
        assert {len(rows) for half in (first, second) for rows in half[:-1]} == {2}
        parts = (
            [*first, *second] if epoch is None else [rows for pair in zip(first, second, strict=True) for rows in pair]
        )
        np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(list_rows(epoch)))


def test_what_is_not_there_and_batches_that_cannot_be_are_refused(shards: Shards) -> None:
    opened = open_shards(shards[0])
    assert ("train" in opened, "test" in opened, opened.get("test")) == (True, False, None)
    train = opened["train"]
    rows = len(train.rows)
    sound: dict[str, Any] = {"batch_size": 4, "size": 16, "epoch": 0}
    for changes, message in (
        ({"batch_size": 0}, "`batch_size` 0: a batch has at least 1 sample"),
        ({"batch_size": -1}, "`batch_size` -1: a batch has at least 1 sample"),
        ({"batch_size": rows + 1}, f"`batch_size` {rows + 1} is more than the {rows} samples of {train!r}"),
        ({"epoch": -1}, "`epoch` -1 is less than 0"),
        ({"size": 0}, "`size` 0 is less than 1"),
        ({"threads": 0}, "`threads` 0 is less than 1"),
        ({"labels": ("Oedema",)}, f"label 'Oedema' is none of {', '.join(LABELS)}; did you mean Edema?"),
        (
            {"uncertain": "perhaps"},
            f"uncertain policy 'perhaps' is unknown; choose from best, {', '.join(UNCERTAIN_POLICIES)}",
        ),
    ):
        with refused(message):
            train.batches(**(sound | changes))
    with refused("views 'sideways' is unknown; choose from frontal, lateral, all"):
        train.where(views="sideways")
    assert len(list(train.batches(rows + 1, 16, epoch=None))) == 1


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
        "import sys, pipeline.stream.cache; from pipeline import open_shards; "
        f"batch = next(iter(open_shards({str(shards[0])!r})['train'].batches(4, 32, epoch=0))); "
        "heavy = {'torch', 'click', 'webdataset', 'requests', 'botocore'}; "
        "print(batch.images.shape, heavy & sys.modules.keys())"
    )
    ran = start(sys.executable, "-c", code)
    assert (ran.stdout, ran.stderr) == ("(4, 1, 32, 32) set()\n", "")


def test_without_torch_its_extra_is_named(shards: Shards, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; import pipeline\n"
        "try: pipeline.BatchDataset\nexcept ImportError as error: print(error)\n"
        f"sys.argv = ['train.py', '--shards', {str(shards[0])!r}, '--run', {str(tmp_path / 'run')!r}]\n"
        "runpy.run_module('train', run_name='__main__')"
    )
    ran = start(sys.executable, "-c", code)
    message = "torch is missing: pip install 'chexpert-pipeline[train]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, message, f"Error: {message}")


def test_what_the_package_does_not_have_is_named() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pipeline' has no attribute 'open_shard'$"):
        pipeline.open_shard  # type: ignore[attr-defined] # noqa: B018
