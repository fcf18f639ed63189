from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import DataError
from pipeline.labels import LABELS, hash_fraction
from pipeline.manifest import read_table
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream.plan import epoch_order
from pipeline.stream.select import balance_weights, find_strata, select_rows
from tests.conftest import Shards, refused
from tests.layouts import read_cases


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


@pytest.mark.parametrize("kind", [pa.float32(), pa.bool_(), pa.list_(pa.int8())])
def test_columns_of_other_kinds_have_no_conditions(kind: pa.DataType) -> None:
    table = CELLS.append_column("bmi", pa.nulls(3, kind))
    with refused(f"condition 'bmi=1': bmi is {kind}; only texts and whole numbers are compared"):
        select_rows(table, ["bmi=1"])


def test_a_table_of_shards_has_more_columns(shards: Shards) -> None:
    table = read_table(shards[0], shards[1].split("train"))
    frame = table.to_pandas()
    median = round(frame.length.median())
    rows = select_rows(table, ["shard=1", f"length>{median}", "crc>0"])
    assert rows.tolist() == np.flatnonzero((frame.shard == 1) & (frame.length > median)).tolist() != []


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
    with pytest.raises(DataError, match=r"^no column 'hospital'; there are path, key, patient, "):
        find_strata(real_table, ["sex", "hospital"])


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
    share, of_all = ((part.projection == "PA").mean() for part in (many, frontal))
    assert (frontal[:20_000].projection == "PA").mean() > of_all + 0.1
    assert abs(share - of_all) < 0.02
    assert select_rows(CELLS, [], limit=1).tolist() in ([0], [1], [2])


@pytest.mark.parametrize("seed", range(3))
def test_balanced_epochs_draw_as_many_positives_as_negatives(real_table: Any, seed: int) -> None:
    rows = select_rows(real_table, ["sex=Female"], "frontal")
    target, mask = make_targets(real_table.take(rows), parse_uncertain_policy("ignore"), "zeros", seed=0)
    column = LABELS.index("Fracture")
    weights = balance_weights(target[:, column], mask[:, column])
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_array_equal(weights[~mask[:, column]], 1)
    sizes = np.bincount(rows // 1000, minlength=224)
    drawn = epoch_order(sizes.tolist(), seed, 0, weights=weights)
    assert len(drawn) == len(rows)
    of_known = target[drawn, column][mask[drawn, column]]
    assert target[:, column].mean() < 0.05
    deviation = 0.5 / len(of_known) ** 0.5  # of a binomial share
    assert abs(of_known.mean() - 0.5) < 5 * deviation


def test_weights_of_each_class() -> None:
    target = np.array([1, 0.9, 0, 0.2, 0, 0, 1, 0, -1], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1], np.bool_)
    # 2 positives and 4 negatives share the weight of 6; masked cells and the third class of `multiclass` have 1
    assert balance_weights(target, mask).tolist() == [1.5, 1.5, 0.75, 0.75, 0.75, 0.75, 1, 1, 1]


def test_within_strata_the_classes_weigh_the_same_and_each_stratum_its_share() -> None:
    target = np.array([1, 0, 0, 0, 1, 1, 0, 1, 1, 1], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], np.bool_)
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    third = 1.5 / 2
    # stratum 2 has no negative: no weights make it balanced; a masked cell keeps 1 wherever it is
    expected = [2, 2 / 3, 2 / 3, 2 / 3, third, third, 1.5, 0, 1, 1]
    np.testing.assert_allclose(balance_weights(target, mask, strata), expected)
    with pytest.raises(ValueError, match=r"^no stratum has both positives and negatives$"):
        balance_weights(target, mask, np.arange(10))


def test_drawn_over_columns_a_label_is_independent_of_them(real_table: Any) -> None:
    target, mask = make_targets(real_table, parse_uncertain_policy("ignore"), "zeros", seed=0)
    column = LABELS.index("Edema")
    strata = find_strata(real_table, ["Projection", "sex"])
    facts = real_table.select(["projection", "sex"]).to_pandas().fillna("blank")
    groups = facts.groupby(["projection", "sex"]).ngroup()
    assert pd.crosstab(strata, groups).astype(bool).to_numpy().sum() == groups.nunique() == strata.max() + 1
    weights = balance_weights(target[:, column], mask[:, column], strata)
    known = facts.assign(weight=weights, positive=target[:, column] > 0.5)[mask[:, column] & (weights > 0)]
    shares = known.groupby(["projection", "sex"]).apply(lambda rows: np.average(rows.positive, weights=rows.weight))
    np.testing.assert_allclose(shares, 0.5)
    drawn = epoch_order([1000] * 223 + [len(target) - 223_000], 0, 0, weights=weights)
    drawn = drawn[mask[drawn, column]]
    unbalanced = known.groupby("projection").positive.mean()
    assert unbalanced.max() - unbalanced.min() > 0.1
    drawn_shares = pd.Series(target[drawn, column] > 0.5).groupby(facts.projection.to_numpy()[drawn]).mean()
    assert (drawn_shares - 0.5).abs()[["AP", "PA"]].max() < 0.02


def test_one_class_cannot_be_balanced() -> None:
    for target, absent in (([0, 0, 1], "positives"), ([1, 1, 0], "negatives")):
        with refused(f"no {absent} to balance", ValueError):
            balance_weights(np.array(target, np.float32), np.array([True, True, False]))
