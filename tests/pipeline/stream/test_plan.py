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


def test_a_step_does_not_depend_on_where_the_epoch_was_entered() -> None:
    whole = list(plan_training(IMAGES, 32, seed=5, epoch=2))
    assert [step[:2] for step in whole] == [
        (2, number) for number in range(11)
    ]  # 360 = 11 × 32 + 8: the tail is dropped
    assert training_steps(360, 32) == 11
    for start in (0, 1, 10, 11):
        rest = list(plan_training(IMAGES, 32, seed=5, epoch=2, start_step=start))
        assert [step.step for step in rest] == list(range(start, 11))
        for step, expected in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(step.rows, expected.rows)


def test_nothing_selected_is_an_epoch_without_steps() -> None:
    assert list(plan_training(select(np.arange(0)), 32, 0, 0)) == []
    order = epoch_order((0, 0), 0, 0)
    assert (order.dtype.name, len(order)) == ("int64", 0)
    assert len(list(plan_training(IMAGES, 1, 0, 0))) == 360
    thinned = IMAGES.thin(7)
    assert (thinned.rows.tolist(), thinned.shard_sizes) == ([[row] for row in range(0, 360, 7)], [])


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


@pytest.mark.parametrize(
    "weights", [np.ones(359), np.zeros(360), *(np.array([bad] + [1] * 359) for bad in (np.nan, np.inf, -1.0))]
)
def test_unusable_weights_are_refused(weights: Weights) -> None:
    with pytest.raises(ValueError, match=r"^weights must be 360 finite numbers, none negative and not all 0$"):
        epoch_order(SIZES, 0, 0, weights=weights)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("start_step", [0, 5])
def test_ranks_together_see_the_batches_of_one(ranks: int, start_step: int) -> None:
    rows = np.arange(0, 360, 2)
    for samples, weights in ((IMAGES, None), (select(rows), rows.astype(np.float64))):
        whole = list(plan_training(samples, 24, 5, 2, start_step, weights=weights))
        order = epoch_order(samples.shard_sizes, 5, 2, weights=weights)[start_step * 24 :]
        seen = np.concatenate([step.rows for step in whole])
        np.testing.assert_array_equal(seen, samples.rows[order[: len(order) // 24 * 24]])
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
        assert [step[:2] for step in together] == [(0, number) for number in range(len(whole))]
        seen = [step.rows for step in together]
        assert {len(rows) for rows in seen[:-1]} <= {32}
        late = [plan_evaluation(samples, 32, 2, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [step.step for steps in late for step in steps] == list(range(2, len(whole)))
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
