import bisect
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline import DataError
from pipeline.labels import LABELS
from pipeline.policies import make_targets, parse_uncertain_policy
from pipeline.stream import plan
from pipeline.stream.plan import Rows, Samples, balance_weights, epoch_order
from tests.conftest import refused

SIZES = (100, 100, 100, 60)
IMAGES = Samples(np.arange(360)[:, None], list(SIZES))


def select(rows: Rows, sizes: Sequence[int] = SIZES) -> Samples:
    """Single images: these rows of shards of those sizes."""
    ends = np.cumsum(sizes)
    return Samples(rows[:, None], np.diff(np.searchsorted(rows, ends), prepend=0).tolist())


def test_an_epoch_visits_every_sample_once_in_another_order_each_time() -> None:
    orders = [epoch_order(SIZES, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(360))
    assert len({order.tobytes() for order in orders}) == 6


def test_the_order_is_written_in_stone() -> None:
    """A resume after an upgrade must see the same batches: these values may never change."""
    assert epoch_order((4, 4, 2), seed=7, epoch=3).tolist() == [4, 3, 5, 0, 2, 1, 7, 6, 8, 9]
    rows, weights = np.array([1, 2, 3, 8, 9]), np.array([0.5, 0.5, 2.0, 2.0, 0.0])
    sizes = select(rows, (4, 4, 2)).shard_sizes
    assert rows[epoch_order(sizes, seed=7, epoch=4)].tolist() == [3, 1, 2, 9, 8]
    assert rows[epoch_order(sizes, seed=7, epoch=4, weights=weights)].tolist() == [3, 3, 3, 8, 3]
    drawn = epoch_order((4, 4, 2), seed=7, epoch=4, weights=np.arange(10.0))
    assert drawn.tolist() == [6, 6, 4, 9, 7, 5, 5, 4, 6, 8]


def test_nothing_selected_is_an_epoch_without_steps() -> None:
    assert list(plan.plan_training(select(np.arange(0)), 32, 0, 0)) == []
    assert epoch_order((0, 0), 0, 0).dtype == np.int64
    assert len(list(plan.plan_training(IMAGES, 1, 0, 0))) == 360


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("window", [1, 3, 16])
def test_orders_equal_a_plain_loop_over_the_same_random_bits(window: int, weighted: bool) -> None:
    """Of each window of shards, all samples, or draws by its share of all weights, however unevenly these lie."""
    sizes = (100, 0, 100, 100, 0, 60)  # shards without samples take no place in a window
    weights = np.random.default_rng(0).random(360) * (np.arange(360) % 3)
    weights[150:200], weights[[99, 299]] = 0, 25
    key = hashlib.blake2b(b"7/4", digest_size=16).digest()
    random = np.random.Philox(key=int.from_bytes(key, "little"))
    shards = [shard for shard in np.argsort(random.random_raw(6)) if sizes[shard]]
    expected: list[int] = []
    total = 0.0
    for first in range(0, 4, window):
        starts = [(sum(sizes[:shard]), sizes[shard]) for shard in shards[first : first + window]]
        places = [row for start, size in starts for row in range(start, start + size)]
        sums = list(itertools.accumulate(weights[places].tolist()))
        total += sums[-1]
        if weighted:
            count = round(total / weights.sum() * 360) - len(expected)
            levels = [(int(bits) >> 11) / 2**53 * sums[-1] for bits in random.random_raw(count)]
            expected += [places[bisect.bisect_right(sums, level)] for level in levels]
        else:
            expected += [places[number] for number in np.argsort(random.random_raw(len(places)))]
    assert epoch_order(sizes, 7, 4, window, weights=weights if weighted else None).tolist() == expected


def test_unusable_weights_are_refused() -> None:
    for weights in (np.ones(359), np.zeros(360), *(np.array([bad] + [1] * 359) for bad in (np.nan, np.inf, -1.0))):
        with refused("weights must be 360 finite numbers, none negative and not all 0", ValueError):
            epoch_order(SIZES, 0, 0, weights=weights)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("start", [0, 5])
def test_ranks_together_see_the_batches_of_one_from_any_step(ranks: int, start: int) -> None:
    rows = np.arange(0, 360, 2)
    for samples, weights in ((IMAGES, None), (select(rows), rows.astype(np.float64))):
        order = epoch_order(samples.shard_sizes, 5, 2, weights=weights)
        every = len(order) // 24  # full batches; the rest is dropped
        expected = samples.rows[order[: 24 * every]].reshape(every, ranks, 24 // ranks, 1)[start:]
        for rank in range(ranks):
            steps = list(plan.plan_training(samples, 24, 5, 2, start, weights=weights, rank=rank, ranks=ranks))
            assert [step[:2] for step in steps] == [(2, number) for number in range(start, every)]
            np.testing.assert_array_equal([step.rows for step in steps], expected[:, rank])


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_evaluation_sees_every_sample_once_over_the_ranks(ranks: int) -> None:
    for samples in (IMAGES, select(np.arange(0, 360, 3)), select(np.arange(0)), select(np.arange(5))):
        shares = [[*plan.plan_evaluation(samples, 32, rank=rank, ranks=ranks)] for rank in range(ranks)]
        steps = list(itertools.chain(*shares))
        assert [step[:2] for step in steps] == [(0, number) for number in range(-(-len(samples.rows) // 32))]
        assert {len(step.rows) for step in steps[:-1]} <= {32}
        np.testing.assert_array_equal(np.concatenate([samples.rows[:0], *(step.rows for step in steps)]), samples.rows)
        late = (plan.plan_evaluation(samples, 32, 2, rank=rank, ranks=ranks) for rank in range(ranks))
        assert [step.step for step in itertools.chain(*late)] == list(range(2, len(steps)))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_and_ranks_that_cannot_be_are_refused() -> None:
    for batch_size, rank, ranks, message in (
        (32, 0, 3, "`batch_size` 32: 3 ranks do not divide it"),
        (0, 0, 1, "`batch_size` 0: a batch has at least 1 sample"),
        (-1, 0, 1, "`batch_size` -1: a batch has at least 1 sample"),
        (32, -1, 2, "rank -1 is not one of 2 ranks"),
        (32, 2, 2, "rank 2 is not one of 2 ranks"),
    ):
        plans = [plan.plan_training(IMAGES, batch_size, 0, 0, rank=rank, ranks=ranks)]
        if ranks < 3:  # in table order, each rank has batches of this size
            plans.append(plan.plan_evaluation(IMAGES, batch_size, rank=rank, ranks=ranks))
        for steps in plans:
            with refused(message):
                next(steps)


def test_weights_of_each_class() -> None:
    target = np.array([1, 0.9, 0, 0.2, 0, 0, 1, 0, -1], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 1, 0, 0, 1], np.bool_)
    # 2 positives and 4 negatives share the weight of 6; masked cells and the third class of `multiclass` have 1
    assert balance_weights(target, mask).tolist() == [1.5, 1.5, 0.75, 0.75, 0.75, 0.75, 1, 1, 1]
    for cells, absent in ((slice(2, 6), "positives"), (slice(2), "negatives")):
        with refused(f"no {absent} to balance", ValueError):
            balance_weights(target[cells], mask[cells])


def test_within_strata_the_classes_weigh_the_same_and_each_stratum_its_share() -> None:
    target = np.array([1, 0, 0, 0, 1, 1, 0, 1, 1, 1], np.float32)
    mask = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], np.bool_)
    strata = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
    third = 1.5 / 2
    # stratum 2 has no negative: no weights make it balanced; a masked cell keeps 1 wherever it is
    expected = [2, 2 / 3, 2 / 3, 2 / 3, third, third, 1.5, 0, 1, 1]
    np.testing.assert_allclose(balance_weights(target, mask, strata), expected)
    with refused("no stratum has both positives and negatives", ValueError):
        balance_weights(target, mask, np.arange(10))


def test_drawn_over_columns_a_label_is_independent_of_them(real_table: Any) -> None:
    target, mask = make_targets(real_table, parse_uncertain_policy("ignore"), "zeros", seed=0)
    column = LABELS.index("Edema")
    strata = plan.find_strata(real_table, ["Projection", "sex"])
    facts = real_table.select(["projection", "sex"]).to_pandas().fillna("blank")
    groups = facts.groupby(["projection", "sex"]).ngroup()
    assert pd.crosstab(strata, groups).astype(bool).to_numpy().sum() == groups.nunique() == strata.max() + 1
    with pytest.raises(DataError, match=r"^no column 'hospital'; there are path, key, patient, "):
        plan.find_strata(real_table, ["sex", "hospital"])
    weights = balance_weights(target[:, column], mask[:, column], strata)
    np.testing.assert_array_equal(weights[~mask[:, column]], 1)
    known = facts.assign(weight=weights, positive=target[:, column] > 0.5)[mask[:, column] & (weights > 0)]
    shares = known.groupby(["projection", "sex"]).apply(lambda rows: np.average(rows.positive, weights=rows.weight))
    np.testing.assert_allclose(shares, 0.5)
    drawn = epoch_order([1000] * 223 + [len(target) - 223_000], 0, 0, weights=weights)
    drawn = drawn[mask[drawn, column]]
    unbalanced = known.groupby("projection").positive.mean()
    assert unbalanced.max() - unbalanced.min() > 0.1
    drawn_shares = pd.Series(target[drawn, column] > 0.5).groupby(facts.projection.to_numpy()[drawn]).mean()
    assert (drawn_shares - 0.5).abs()[["AP", "PA"]].max() < 0.02


def test_a_folder_has_its_share_of_the_draws() -> None:
    folder = np.repeat([0, 1], [900, 100])
    weights = plan.mix_weights(folder, (0.7, 0.3))
    assert weights[folder == 0].sum() == pytest.approx(700)
    assert weights[folder == 1].sum() == pytest.approx(300)
    with refused("none of the images is in folder 3", ValueError):
        plan.mix_weights(folder, (1, 1, 1))
