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
from pipeline.labels import LABELS, PROJECTIONS, hash_fraction
from pipeline.manifest import PLACES, Shard
from pipeline.sources.sets import read_any_table
from pipeline.stream.batches import Batch, Unusable, stream_batches
from pipeline.stream.plan import Rows, plan_evaluation
from pipeline.stream.samples import OpenSplit, ShardFile, find_images, find_studies, open_split, select_rows
from tests.conftest import Shards, refused, run_pipeline
from tests.layouts import read_cases
from tests.pipeline.stream.test_batches import best_labels, flip_bit


@pytest.fixture(scope="module")
def real_frame(real_table: Any) -> pd.DataFrame:
    """The same table as pandas has it: empty cells are NaN."""
    frame: pd.DataFrame = real_table.to_pandas()
    return frame


@pytest.mark.parametrize(("conditions", "views", "query"), read_cases("selections.txt"))
def test_selections_of_the_real_table_equal_pandas(
    real_table: Any, real_frame: pd.DataFrame, conditions: str, views: str, query: str
) -> None:
    rows = select_rows(real_table, [*filter(None, conditions.split("; "))], views)
    assert rows.dtype == np.int64
    assert len(rows)
    np.testing.assert_array_equal(rows, np.flatnonzero(real_frame.eval(query)))


CELLS = pa.table(
    {
        "patient": ["a", "b", "c"],
        "view": ["frontal"] * 3,
        "projection": ["AP", "PA", None],
        "age": pa.array([30, 60, None], pa.int16()),
        **{label: pa.array([1, -1, None], pa.int8()) for label in LABELS},
    }
)


def test_an_empty_cell_matches_only_blank_and_not_equal() -> None:
    for rows, conditions in {
        (0,): "projection=AP age<60 Edema=1",
        (1,): "age=60 age>30 Edema=-1",
        (2,): "age=blank Edema=blank",
        (0, 1): "age<=60 age>=-1 age<100000000 age!=blank Edema!=blank",
        (0, 2): "age!=60 Edema!=uncertain",
        (1, 2): "projection!=AP Edema!=1",
    }.items():
        for condition in conditions.split():
            assert tuple(select_rows(CELLS, [condition]).tolist()) == rows, condition


@pytest.mark.parametrize(("condition", "message"), read_cases("conditions.txt"))
def test_conditions_that_cannot_be_met_say_why(condition: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        select_rows(CELLS, ["age!=blank", condition])
    assert str(caught.value).removeprefix(f"condition '{condition}'").strip(" ") == message


def test_what_is_left_is_described_however_many_values_it_has(real_table: Any) -> None:
    with refused("condition 'age>90' leaves none of 223,414 images, whose values go from 0 to 90"):
        select_rows(real_table, ["age>90"])
    with refused("condition 'projection=AP' leaves none of 32,387 images, all of whose cells are blank"):
        select_rows(real_table, ["view=lateral", "projection=AP"])
    with refused("no lateral images among the 3"):
        select_rows(CELLS, [], "lateral")
    for kind in (pa.float32(), pa.bool_(), pa.list_(pa.int8())):
        with refused(f"condition 'bmi=1': bmi is {kind}; only texts and whole numbers are compared"):
            select_rows(CELLS.append_column("bmi", pa.nulls(3, kind)), ["bmi=1"])


def test_a_limit_takes_whole_patients_of_all_times(real_table: Any, real_frame: pd.DataFrame) -> None:
    frame = real_frame[real_frame.age >= 60]
    frontal = frame[frame.view == "frontal"]
    few, many = (frame.loc[select_rows(real_table, ["age>=60"], "frontal", limit)] for limit in (2000, 20_000))
    assert 1990 <= len(few) <= 2000
    assert 19_990 <= len(many) <= 20_000
    ranked = sorted(frontal.patient.unique(), key=lambda patient: hash_fraction("limit", 0, patient))
    assert set(few.patient) == set(ranked[: few.patient.nunique()])
    assert set(many.patient) == set(ranked[: many.patient.nunique()])
    for part in (few, many):
        assert part.index.is_monotonic_increasing
        assert part.index.equals(frontal.index[frontal.patient.isin(part.patient)])
    # PA films stop half-way through the patient ids: the first 20,000 images have 28 % of them, all have 15 %.
    share, average, early = ((part.projection == "PA").mean() for part in (many, frontal, frontal[:20_000]))
    assert early > average + 0.1
    assert abs(share - average) < 0.02
    assert select_rows(CELLS, [], limit=1).tolist() in ([0], [1], [2])


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
    rows = select_rows(table, ["age>=60"], "lateral")
    groups = frame.loc[rows].groupby(["patient", "study"], sort=False).row.agg(list)
    chosen = find_studies(split, rows)[0].rows
    assert chosen.shape == (len(groups), 2)
    assert [[row for row in rows if row >= 0] for rows in chosen.tolist()] == groups.to_list()


def test_unusable_images_are_absent_and_studies_of_them_black_and_masked(
    study_shards: Shards, split: OpenSplit, caplog: pytest.LogCaptureFixture
) -> None:
    expected = evaluate(split)
    studies = find_studies(split)[0].rows
    first, alone = studies[studies[:, 1] >= 0][0, 0], studies[studies[:, 1] < 0][0, 0]  # of two images, and of one
    messages = {flip_bit(study_shards[0], split, row) for row in (first, alone)}
    for batch, sound in zip(evaluate(split, bad=2), expected, strict=True):
        rows = sound.step.rows[sound.sample, sound.place]
        kept, black = rows != first, rows == alone
        for name in ("sample", "place", "projection"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(sound, name)[kept])
        pixels = np.where(black[:, None, None, None], np.uint8(0), sound.images)
        np.testing.assert_array_equal(batch.images, pixels[kept])
        without = batch.step.rows[:, 0] == alone
        np.testing.assert_array_equal(batch.mask, sound.mask & ~without[:, None])
        np.testing.assert_array_equal(batch.target, sound.target)
        assert batch.bad == np.flatnonzero(without).tolist()
    assert {text.partition("; ")[0] for text in caplog.messages} == messages
    with pytest.raises(DataError) as caught:
        evaluate(split)
    assert str(caught.value) in messages


def test_a_study_spread_over_shards_is_read_from_all_of_them(split: OpenSplit) -> None:
    """As in shards of both views that were made one by one."""
    table = split.table
    shuffled = np.random.default_rng(0).permutation(table.num_rows)
    spread = replace(split, table=table.take(shuffled))

    def sum_pixels(split: OpenSplit) -> dict[frozenset[str], int]:
        """By the keys of each study."""
        sums, keys = {}, split.table["key"].to_pylist()
        for batch in evaluate(split):
            for study, rows in enumerate(batch.step.rows.tolist()):
                pixels = batch.images[batch.sample == study]
                sums[frozenset(keys[row] for row in rows if row >= 0)] = int(pixels.sum())
        return sums

    assert sum_pixels(spread) == sum_pixels(split)


def test_of_a_study_the_first_three_views_are_taken_and_shards_where_none_begins_take_no_place() -> None:
    keys = [f"patient1_study1_view{view}_frontal" for view in range(1, 6)]
    studies, left_out = find_studies(make_split(make_table(*keys, "patient1_study2_view1_frontal"), [6]))
    assert (studies.rows.tolist(), left_out) == ([[0, 1, 2], [5, -1, -1]], 2)
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
