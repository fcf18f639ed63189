import shutil
import tarfile
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from pipeline import DataError
from pipeline.images import resize
from pipeline.labels import LABELS, PROJECTIONS
from pipeline.manifest import PLACES, Shard
from pipeline.measure.counts import describe_views
from pipeline.sources.sets import read_any_table
from pipeline.stream.batches import Batch, Unusable, stream_batches
from pipeline.stream.plan import Rows, plan_evaluation, plan_training
from pipeline.stream.samples import OpenSplit, ShardFile, find_images, find_studies, open_split
from pipeline.stream.select import balance_weights, select_rows
from tests.conftest import Shards, refused, run_pipeline
from tests.pipeline.stream.test_batches import best_labels, flip_bit


@pytest.fixture
def split(study_shards: Shards) -> OpenSplit:
    return open_split(*study_shards, "train")


def evaluate(split: OpenSplit, rows: Rows | None = None, bad: int = 0) -> list[Batch]:
    studies, _ = find_studies(split, rows)
    plan = partial(plan_evaluation, studies, 5)
    return list(stream_batches(split, best_labels(split), plan, size=32, bad=Unusable(bad)))


def make_split(table: pa.Table, sizes: list[int]) -> OpenSplit:
    """A split with this table and so many images per shard, which do not exist."""
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    for name, column in dict.fromkeys(PLACES.names, np.zeros(table.num_rows, np.int64)).items():
        table = table.append_column(name, pa.array(shard if name == "shard" else column))
    shards = (Shard(f"train-{number:06d}.tar", size, 0, "") for number, size in enumerate(sizes))
    return OpenSplit("train", "jpeg", table, tuple(ShardFile(shard, Path(), None) for shard in shards))


def make_table(*keys: str, states: tuple[int | None, ...] = ()) -> pa.Table:
    """A label table of these images; `states` are those of Edema."""
    columns: dict[str, Any] = {
        "key": keys,
        "patient": [key.split("_")[0] for key in keys],
        "study": pa.array([int(key.split("_")[1][5:]) for key in keys], pa.int32()),
        "view": [key.rpartition("_")[2] for key in keys],
        "projection": ["AP" if key.endswith("frontal") else None for key in keys],
    }
    columns |= {label: pa.nulls(len(keys), pa.int8()) for label in LABELS}
    return pa.table(columns | ({"Edema": pa.array(states, pa.int8())} if states else {}))


def test_batches_hold_what_plain_readers_find(study_shards: Shards, split: OpenSplit) -> None:
    folder, manifest = study_shards
    images = {}
    for shard in manifest.split("train").shards:
        with tarfile.open(folder / shard.file) as tar:
            for name in tar.getnames():
                if name.endswith(".jpg"):
                    with Image.open(BytesIO(tar.extractfile(name).read())) as image:  # type: ignore[union-attr]
                        images[name[:-4]] = resize(np.asarray(image), 32, 32)
    expected: dict[str, list[str]] = {}
    for key in split.table["key"].to_pylist():
        expected.setdefault(key.rpartition("_view")[0], []).append(key)
    labels = best_labels(split)
    seen = {}
    for batch in evaluate(split):
        assert batch.images.shape == (len(batch.sample), 1, 32, 32)
        assert batch.images.dtype == np.uint8
        assert batch.bad == []
        np.testing.assert_array_equal(batch.present, batch.step.rows >= 0)
        for study, rows in enumerate(batch.step.rows):
            keys = [split.table["key"][int(row)].as_py() for row in rows if row >= 0]
            seen[keys[0].rpartition("_view")[0]] = keys
            (positions,) = np.nonzero(batch.sample == study)
            for view, (position, key) in enumerate(zip(positions, keys, strict=True)):
                assert batch.place[position] == view
                np.testing.assert_array_equal(batch.images[position, 0], images[key])
                name = PROJECTIONS[batch.projection[position]]
                assert name == ("lateral" if "lateral" in key else "AP")
            np.testing.assert_array_equal(batch.target[study], labels.target[rows[0]])
            np.testing.assert_array_equal(batch.mask[study], labels.mask[rows[0]])
    assert seen == expected
    assert sorted(map(len, seen.values())) == [1] * (len(seen) // 2) + [2] * (len(seen) // 2)


@pytest.mark.soak
def test_studies_of_the_real_table_equal_pandas(real_csv: Path) -> None:
    table = read_any_table(real_csv)
    sizes = [1000] * 223 + [414]
    split = make_split(table, sizes)
    studies, left_out = find_studies(split)
    frame = table.to_pandas().reset_index(names="row")
    groups = frame.groupby(["patient", "study"], sort=False).row.agg(list)
    assert studies.rows.shape == (187_641, 3)
    assert [[row for row in rows if row >= 0] for rows in studies.rows.tolist()] == groups.to_list()
    assert studies.shard_sizes == (groups.str[0] // 1000).value_counts().sort_index().to_list()
    assert left_out == 0
    names = frame.projection.where(frame.view == "frontal", "lateral")
    codes = names.where(names.isin(PROJECTIONS), "other").map(PROJECTIONS.index)
    np.testing.assert_array_equal(split.projection, codes)
    assert codes.value_counts().to_dict() == {0: 161_590, 1: 29_420, 2: 32_387, 3: 17}
    assert describe_views(table) == (
        "studies: 153,634 with 1 frontal, 29,675 with 1 frontal and 1 lateral, 2,537 with 2 frontals, "
        "955 with 1 frontal and 2 laterals, 783 with 2 frontals and 1 lateral, 41 with 3 frontals, "
        "13 with 1 lateral, 3 with 2 laterals"
    )
    rows = select_rows(table, ["age>=60"], "lateral")
    of_rows = frame.loc[rows].groupby(["patient", "study"], sort=False).row.agg(list)
    chosen = find_studies(split, rows)[0].rows
    assert chosen.shape == (len(of_rows), 2)
    assert [[row for row in rows if row >= 0] for rows in chosen.tolist()] == of_rows.to_list()


def test_selected_images_alone_are_seen_and_studies_without_any_are_not(split: OpenSplit) -> None:
    for views in ("frontal", "lateral"):
        rows = select_rows(split.table, [], views)
        batches = evaluate(split, rows)
        assert {batch.step.rows.shape[1] for batch in batches} == {1}
        np.testing.assert_array_equal(np.concatenate([batch.step.rows[:, 0] for batch in batches]), rows)
    assert evaluate(split, rows[:0]) == []


def test_studies_are_drawn_by_weight(split: OpenSplit) -> None:
    (studies, _), labels = find_studies(split), best_labels(split)
    column = LABELS.index("Support Devices")
    first = studies.rows[:, 0]
    weights = balance_weights(labels.target[first, column], labels.mask[first, column])
    weights[labels.target[first, column] < 0.5] = 0
    plan = partial(plan_training, studies, 4, 0, 0, weights=weights)
    batches = list(stream_batches(split, labels, plan, size=32))
    rows = np.concatenate([batch.step.rows for batch in batches])
    assert len(rows) == len(studies.rows) // 4 * 4 > len(np.unique(rows, axis=0))  # some are drawn again
    assert {tuple(drawn) for drawn in rows.tolist()} <= {tuple(study) for study in studies.rows.tolist()}
    assert all((batch.target[:, column] == 1).all() for batch in batches)


def test_unusable_images_are_absent_and_studies_of_them_black_and_masked(
    study_shards: Shards, split: OpenSplit, caplog: pytest.LogCaptureFixture
) -> None:
    expected = evaluate(split)
    studies, _ = find_studies(split)
    one = next(rows for rows in studies.rows.tolist() if rows[1] >= 0)
    alone = next(rows for rows in studies.rows.tolist() if rows[1] < 0)
    messages = {flip_bit(study_shards[0], split, row) for row in (one[0], alone[0])}
    for ours, whole in zip(evaluate(split, bad=2), expected, strict=True):
        rows = whole.step.rows[whole.sample, whole.place]
        kept, black = rows != one[0], rows == alone[0]
        for name in ("sample", "place", "projection"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(whole, name)[kept])
        pixels = np.where(black[:, None, None, None], np.uint8(0), whole.images)
        np.testing.assert_array_equal(ours.images, pixels[kept])
        without = np.isin(ours.step.rows[:, 0], alone[0])
        np.testing.assert_array_equal(ours.mask, whole.mask & ~without[:, None])
        np.testing.assert_array_equal(ours.target, whole.target)
        assert ours.bad == np.flatnonzero(without).tolist()
    assert {text.partition("; ")[0] for text in caplog.messages} == messages
    with pytest.raises(DataError) as caught:
        evaluate(split)
    assert str(caught.value) in messages


def test_a_study_spread_over_shards_is_read_from_all_of_them(split: OpenSplit) -> None:
    """As in shards of both views that were made one by one."""
    table = split.table
    shuffled = np.random.default_rng(0).permutation(table.num_rows)
    spread = replace(split, table=table.take(shuffled))

    def found(of: OpenSplit) -> dict[frozenset[str], int]:
        """The keys of each study, and the sum of its pixels."""
        return {
            frozenset(of.table["key"][row].as_py() for row in rows if row >= 0): int(
                batch.images[batch.sample == study].sum()
            )
            for batch in evaluate(of)
            for study, rows in enumerate(batch.step.rows.tolist())
        }

    assert found(spread) == found(split)


def test_of_a_study_with_more_than_three_views_the_first_ones_are_taken() -> None:
    keys = [f"patient1_study1_view{view}_frontal" for view in range(1, 6)]
    studies, left_out = find_studies(make_split(make_table(*keys, "patient1_study2_view1_frontal"), [6]))
    assert (studies.rows.tolist(), left_out) == ([[0, 1, 2], [5, -1, -1]], 2)


def test_shards_where_no_selected_study_begins_take_no_place_in_a_window() -> None:
    split = make_split(make_table(*(f"patient{patient}_study1_view1_frontal" for patient in range(6))), [2, 2, 2])
    assert find_studies(split, np.array([0, 1, 5]))[0].shard_sizes == [2, 1]
    assert find_images(split, np.array([0, 1, 5])).shard_sizes == [2, 0, 1]


def test_images_of_a_study_that_differ_in_a_label_are_named() -> None:
    keys = ("patient1_study1_view1_frontal", "patient2_study1_view1_frontal", "patient2_study1_view2_lateral")
    for states in ((1, 0, None), (1, None, 0), (1, 1, -1)):
        split = make_split(make_table(*keys, states=states), [3])
        with refused(
            "train: patient2_study1_view1_frontal and patient2_study1_view2_lateral are of one study but differ "
            "in Edema; a study has one label, so read these shards by image"
        ):
            find_studies(split)
        assert find_studies(split, np.array([0, 2]))[0].rows.tolist() == [[0], [2]]


def test_the_command_counts_the_studies_by_their_views(chexpert: Path, tmp_path: Path) -> None:
    second = chexpert / "train/patient00001/study1/view3_lateral.jpg"
    shutil.copy(second.with_name("view2_lateral.jpg"), second)
    rows = pd.read_csv(chexpert / "train.csv")
    third = rows[1:2].assign(Path=rows.Path[1].replace("view2", "view3"))
    pd.concat([rows, third]).to_csv(chexpert / "train.csv", index=False)
    expected = "studies: 20 with 1 frontal, 19 with 1 frontal and 1 lateral, 1 with 1 frontal and 2 laterals"
    arguments = ("shards", chexpert, tmp_path / "out", "--size", 48, "--views", "all")
    assert expected in run_pipeline(*arguments, "--dry-run").stdout.splitlines()
    assert expected in run_pipeline(*arguments).stdout.splitlines()
