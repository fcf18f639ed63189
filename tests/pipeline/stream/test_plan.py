import bisect
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline import DataError
from pipeline.stream.plan import Rows, Samples, Weights, epoch_order, plan_evaluation, plan_training, training_steps

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


def test_samples_are_mixed_within_windows_of_shards_only() -> None:
    sizes = [10] * 6
    order = epoch_order(sizes, seed=0, epoch=0, window=2)
    shards = order // 10
    windows = [set(shards[start : start + 20]) for start in range(0, 60, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert all(np.any(np.diff(shards[start : start + 20]) < 0) for start in range(0, 60, 20))


def test_a_step_does_not_depend_on_where_the_epoch_was_entered() -> None:
    whole = list(plan_training(IMAGES, 32, seed=5, epoch=2))
    assert [step.step for step in whole] == list(range(11))  # 360 = 11 × 32 + 8: the tail is dropped
    assert training_steps(360, 32) == 11
    for start in (0, 1, 10, 11):
        rest = list(plan_training(IMAGES, 32, seed=5, epoch=2, start_step=start))
        assert [step.step for step in rest] == list(range(start, 11))
        for step, expected in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(step.rows, expected.rows)


@pytest.mark.parametrize("seed", range(3))
def test_a_selection_is_visited_once_and_shards_without_it_take_no_place_in_a_window(seed: int) -> None:
    rows = np.flatnonzero(np.random.default_rng(seed).random(2000) < 0.1)
    rows = rows[rows // 100 % 3 > 0]  # nothing of shards 0, 3, 6, …, 18: 13 of the 20 are left
    order = rows[epoch_order(select(rows, [100] * 20).shard_sizes, seed, 0, window=4)]
    np.testing.assert_array_equal(np.sort(order), rows)
    shards = order // 100
    windows = [set(shards[:1])]
    for shard in shards[1:]:
        if shard not in windows[-1] and len(windows[-1]) == 4:
            windows.append(set())
        windows[-1].add(shard)
    assert [len(window) for window in windows] == [4, 4, 4, 1]
    assert set.union(*windows) == set(rows // 100)
    assert sum(map(len, windows)) == 13  # none is met in two windows


def test_nothing_selected_is_an_epoch_without_steps() -> None:
    assert list(plan_training(select(np.arange(0)), 32, 0, 0)) == []


@pytest.mark.parametrize("seed", range(3))
def test_weighted_draws_equal_a_plain_loop_over_the_same_random_bits(seed: int) -> None:
    """With one window: its shards in the order's own permutation, then an inverse cumulative sum per draw."""
    weights = np.random.default_rng(seed).random(360) * (np.arange(360) % 3)
    key = hashlib.blake2b(f"{seed}/4".encode(), digest_size=16).digest()
    random = np.random.Philox(key=int.from_bytes(key, "little"))
    keys = random.random_raw(4).tolist()
    places = [row for shard in np.argsort(keys) for row in range(shard * 100, min(shard * 100 + 100, 360))]
    sums = list(itertools.accumulate(weights[places].tolist()))
    levels = [(int(bits) >> 11) / 2**53 * sums[-1] for bits in random.random_raw(360)]
    expected = [places[bisect.bisect_right(sums, level)] for level in levels]
    assert epoch_order(SIZES, seed, 4, weights=weights).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_drawn_in_proportion_to_their_weight_within_windows(seed: int) -> None:
    """However unevenly the rare heavy rows lie among the shards."""
    heavy = np.zeros(10_000, np.bool_)
    heavy[:150] = heavy[9000::20] = True
    weights = np.where(heavy, 25.0, 0.5)
    weights[5000:5500] = 0
    order = epoch_order([500] * 20, seed, 0, window=4, weights=weights)
    assert len(order) == 10_000
    counts = np.bincount(order, minlength=10_000)
    share = weights / weights.sum()
    for group in (heavy, np.arange(10_000) < 150, np.arange(10_000) >= 9000, np.arange(10_000) < 5000):
        expected = share[group].sum()
        # Five standard deviations of a binomial; fixing the windows' shares only makes it narrower.
        bound = 5 * np.sqrt(10_000 * expected * (1 - expected))
        assert abs(counts[group].sum() - 10_000 * expected) < bound
    assert counts[5000:5500].sum() == 0
    window_of = np.empty(20, np.int64)
    window_of[epoch_order([500] * 20, seed, 0, window=4) // 500] = np.arange(10_000) // 2000
    assert np.all(np.diff(window_of[order // 500]) >= 0)


@pytest.mark.parametrize("weights", [np.ones(359), np.zeros(360), np.full(360, np.nan), np.array([-1.0] + [1] * 359)])
def test_unusable_weights_are_refused(weights: Weights) -> None:
    with pytest.raises(ValueError, match=r"^weights must be 360 finite numbers, none negative and not all 0$"):
        epoch_order(SIZES, 0, 0, weights=weights)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("start_step", [0, 5])
def test_ranks_together_see_the_batches_of_one(ranks: int, start_step: int) -> None:
    rows = np.arange(0, 360, 2)
    for samples, weights in ((IMAGES, None), (select(rows), rows.astype(np.float64))):
        whole = list(plan_training(samples, 24, 5, 2, start_step, weights=weights))
        slices = [
            list(plan_training(samples, 24, 5, 2, start_step, weights=weights, rank=rank, ranks=ranks))
            for rank in range(ranks)
        ]
        for step, *parts in zip(whole, *slices, strict=True):
            assert {part[:2] for part in parts} == {step[:2]}
            assert {len(part.rows) for part in parts} == {24 // ranks}
            np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), step.rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_evaluation_sees_every_sample_once_over_the_ranks(ranks: int) -> None:
    for samples in (IMAGES, select(np.arange(0, 360, 3)), select(np.arange(0)), select(np.arange(5))):
        whole = list(plan_evaluation(samples, 32))
        parts = [list(plan_evaluation(samples, 32, rank=rank, ranks=ranks)) for rank in range(ranks)]
        together = list(itertools.chain.from_iterable(parts))
        assert [step.step for step in together] == list(range(len(whole)))
        seen = [step.rows for step in together]
        np.testing.assert_array_equal(np.concatenate([samples.rows[:0], *seen]), samples.rows)
        lengths = list(map(len, parts))
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("batch_size", "rank", "ranks", "message"),
    [
        (32, 0, 3, "`batch_size` 32: 3 ranks do not divide it"),
        (0, 0, 1, "`batch_size` 0: a batch has at least 1 sample"),
        (-1, 0, 1, "`batch_size` -1: a batch has at least 1 sample"),
        (32, -1, 2, "rank -1 is not one of 2 ranks"),
        (32, 2, 2, "rank 2 is not one of 2 ranks"),
    ],
)
def test_batches_and_ranks_that_cannot_be_are_refused(batch_size: int, rank: int, ranks: int, message: str) -> None:
    plans = [plan_training(IMAGES, batch_size, 0, 0, rank=rank, ranks=ranks)]
    if "divide" not in message:
        plans.append(plan_evaluation(IMAGES, batch_size, rank=rank, ranks=ranks))
    for plan in plans:
        with pytest.raises(DataError, match=f"^{message}$"):
            next(plan)
