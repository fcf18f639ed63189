"""`open_shards`: shards in a user's own code, of one folder and of several."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pipeline
from pipeline import DataError, open_shards
from pipeline.identity import NAMED
from pipeline.labels import LABELS, count_rows
from pipeline.manifest import read_manifest, read_table
from pipeline.policies import UNCERTAIN_POLICIES, make_targets, parse_uncertain_policy
from pipeline.sources.sets import load_tables
from pipeline.stream.dataset import Selection
from pipeline.stream.samples import NothingSelectedError
from tests.conftest import Shards, default_options, make_shards, refused, run_pipeline, start, write_chexpert
from tests.layouts import draw


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

    for epoch in (2, None):
        shares: list[dict[str, Any]] = [{}, {"rank": 0, "ranks": 2}, {"rank": 1, "ranks": 2}]
        streams = [studies.batches(4, 32, epoch=epoch, seed=1, **share) for share in shares]
        every, first, second = ([batch.step.rows for batch in stream] for stream in streams)
        assert {len(rows) for half in (first, second) for rows in half[:-1]} == {2}
        parts = [*first, *second] if epoch is None else [*chain(*zip(first, second, strict=True))]
        np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(every))


def test_what_is_not_there_and_batches_that_cannot_be_are_refused(shards: Shards) -> None:
    opened = open_shards(shards[0])
    assert ("train" in opened, "test" in opened, opened.get("test")) == (True, False, None)
    train = opened["train"]
    rows = len(train.rows)
    policies = ", ".join(UNCERTAIN_POLICIES)
    sound: dict[str, Any] = {"batch_size": 4, "size": 16, "epoch": 0}
    for changes, message in (
        ({"batch_size": 0}, "`batch_size` 0: a batch has at least 1 sample"),
        ({"batch_size": -1}, "`batch_size` -1: a batch has at least 1 sample"),
        ({"batch_size": rows + 1}, f"`batch_size` {rows + 1} is more than the {rows} samples of {train!r}"),
        ({"epoch": -1}, "`epoch` -1 is less than 0"),
        ({"size": 0}, "`size` 0 is less than 1"),
        ({"threads": 0}, "`threads` 0 is less than 1"),
        ({"labels": ("Oedema",)}, f"label 'Oedema' is none of {', '.join(LABELS)}; did you mean Edema?"),
        ({"uncertain": "perhaps"}, f"uncertain policy 'perhaps' is unknown; choose from best, {policies}"),
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


def write_set(folder: Path, patients: range, called: str = "", split: str = "train", **source: Any) -> Path:
    """Shards of synthetic patients; another hospital's have images of their own."""
    write_chexpert(folder / "films", split, patients, seed=bool(called))
    make_shards(folder / "films", folder / "shards", called=called, **source)
    return folder / "shards"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CheXpert's first 30 patients, and 20 of another hospital under the same numbers."""
    base = tmp_path_factory.mktemp("two")
    return write_set(base / "a", range(1, 31)), write_set(base / "b", range(1, 21), "childrens")


def test_tables_follow_each_other_and_patients_are_apart(two: tuple[Path, Path]) -> None:
    alone = open_shards(two[0])
    assert (alone.manifest, alone.namespace) == (read_manifest(two[0]), "chexpert")
    shards, manifests = open_shards(two), [read_manifest(folder) for folder in two]
    split, parts = shards.open("train"), [manifest.split("train") for manifest in manifests]
    frames = [read_table(folder, part).to_pandas() for folder, part in zip(two, parts, strict=True)]
    frames[1]["shard"] += len(parts[0].shards)
    for name, frame in zip(("chexpert", "childrens"), frames, strict=True):
        frame["set"], frame["patient"] = name, f"{name}/" + frame["patient"]
    expected = pd.concat(frames, ignore_index=True)
    pd.testing.assert_frame_equal(split.table.to_pandas(), expected, check_dtype=False)
    np.testing.assert_array_equal(split.shard, expected["shard"])
    assert shards.namespace == NAMED
    assert shards.manifest.split("train").samples == len(expected)
    assert shards.manifest.dataset["name"] == "chexpert; childrens"
    counts = [part.samples for part in parts]
    means, deviations = (np.array([manifest.pixels[name] for manifest in manifests]) for name in ("mean", "std"))
    mean = np.average(means, weights=counts)
    deviation = np.sqrt(np.average(deviations**2 + means**2, weights=counts) - mean**2)
    assert shards.manifest.pixels == pytest.approx({"mean": mean, "std": deviation}, abs=1e-4)


def test_every_image_is_read_from_its_own_folder(two: tuple[Path, Path]) -> None:
    together = open_shards(two)["train"]
    (alone,) = open_shards(two[1])["train"].batches(1000, 32, epoch=None, uncertain="zeros")
    (batch,) = together.where("set=childrens").batches(1000, 32, epoch=None, uncertain="zeros")
    np.testing.assert_array_equal(batch.images, alone.images)
    np.testing.assert_array_equal(batch.target, alone.target)
    first = [batch.step.images[0] for batch in together.batches(8, 32, epoch=1)]
    assert set(np.array(together.table["set"])[first]) == {"chexpert", "childrens"}


def test_folders_that_cannot_be_one_are_refused_by_name(two: tuple[Path, Path], tmp_path: Path) -> None:
    small = write_set(tmp_path / "small", range(40, 44), options=default_options(size=32))
    with refused(f"{two[0]} and {small} differ in size: 48 and 32; shard one of them again as the other"):
        open_shards([two[0], small])
    with refused(f"{two[0]}: given twice"):
        open_shards([two[0], two[0]])
    again = write_set(tmp_path / "again", range(25, 35))
    with pytest.raises(DataError, match=r"^patient000(2[5-9]|30)_study\d_view1_frontal and \d+ others are in "):
        open_shards([two[0], again])
    other = write_set(tmp_path, range(30, 33), split="valid")
    how = r"\(if these are two people, shard one of the folders with a `name` of its own\)"
    places = rf"is in (train|dev) of {two[0]} and in valid of {other}; splits must not share patients"
    with pytest.raises(DataError, match=f"^patient00030 {places} {how}$"):
        open_shards([two[0], other])
    assert open_shards([two[1], other]).open("valid").table.num_rows == 6


def test_the_same_images_under_other_names_are_noticed(two: tuple[Path, Path], tmp_path: Path) -> None:
    films, copied, other, both = two[0].parent / "films", tmp_path / "films", tmp_path / "other", tmp_path / "both"
    shutil.copytree(films, copied)
    for patient in sorted((copied / "train").iterdir()):
        patient.rename(patient.with_name(f"patient9{patient.name[-4:]}"))
    rows = (copied / "train.csv").read_text()
    (copied / "train.csv").rename(copied / "test.csv").write_text(rows.replace("/patient0", "/patient9"))
    make_shards(copied, other, called="other")
    count = len(read_table(two[0], read_manifest(two[0]).split("train")))
    places = rf"are in test of {other} and, maybe under another name, in train of {two[0]}"
    how = "an image may be in one folder only: take it out of one's table, and shard that again"
    with pytest.raises(DataError, match=rf"^patient9\d+_study\d_view1_frontal and {count - 1} others {places}; {how}$"):
        open_shards([two[0], other])
    (copied / "train.csv").write_text(rows)
    shutil.copytree(films / "train", copied / "train", dirs_exist_ok=True)
    make_shards(copied, both, default_options(dev=0), called="both")
    with pytest.warns(UserWarning, match=r"both: 60 images of test, such as patient9\d{4}_.*, are in train too: "):
        open_shards(both)


def test_a_patient_is_one_whatever_the_spelling(two: tuple[Path, Path], tmp_path: Path) -> None:
    films = tmp_path / "films"
    write_chexpert(films, "train", range(30, 33))
    for folder in sorted((films / "train").iterdir()):
        folder.rename(folder.with_name(folder.name.replace("patient000", "patient")))
    (films / "train.csv").write_text((films / "train.csv").read_text().replace("/patient000", "/patient"))
    make_shards(films, tmp_path / "w", default_options(dev=0))
    grown = open_shards([two[0], tmp_path / "w"])
    patients = set(grown.open("train").table["patient"].to_pylist())
    assert ("patient00030" in patients, "patient30" in patients) == (True, False)
    assert grown.manifest.split("train").patients == len(patients)


def test_studies_that_each_folder_numbers_are_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    columns = (("path", "Image"), ("patient", "MRN"), ("Edema", "Edema"))
    for out in folders:
        films, name = tmp_path / f"films-{out.name}", out.name
        for number in range(2):
            draw(films / f"{name}{number}.png", 2 * ord(name) + number)
        (films / "table.csv").write_text(f"Image,MRN,Edema\n{name}0.png,7,1\n{name}1.png,7,1\n")
        make_shards(films, out, default_options(dev=0.0), name="table", columns=columns)
    shards = open_shards(folders)
    assert len(shards["train"].studies().samples.rows) == shards.manifest.split("train").studies == 4
    assert count_rows(load_tables(folders, None, "all"))["studies"] == 4


def test_different_policies_have_to_be_decided(two: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_set(tmp_path, range(50, 54), policies={"uncertain": "ones", "blank": "zeros"})
    train = open_shards([two[0], other])["train"]
    with refused("`uncertain`: the folders of shards have different policies; give one"):
        train.batches(2, 32, epoch=0)
    train.batches(2, 32, epoch=0, uncertain="ones")


def test_stats_count_several_sets_and_each(two: tuple[Path, Path]) -> None:
    done = run_pipeline("stats", *two, "--by", "set", "--format", "json")
    groups = json.loads(done.stdout)["by"]["groups"]
    for name, folder in zip(("chexpert", "childrens"), two, strict=True):
        images = sum(split.samples for split in read_manifest(folder).splits.values())
        assert groups.pop(name)["images"] == images
    assert groups == {}
