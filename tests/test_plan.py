import numpy as np

from pipeline.plan import epoch_order, plan_evaluation, plan_training, training_steps

SIZES = (100, 100, 100, 60)


def test_an_epoch_visits_every_sample_once_in_another_order_each_time() -> None:
    orders = [epoch_order(SIZES, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(360))
    assert len({order.tobytes() for order in orders}) == 6


def test_the_order_is_written_in_stone() -> None:
    """A resume after an upgrade must see the same batches: these values may never change."""
    assert epoch_order((4, 4, 2), seed=7, epoch=3).tolist() == [4, 3, 5, 0, 2, 1, 7, 6, 8, 9]


def test_samples_are_mixed_within_windows_of_shards_only() -> None:
    sizes = [10] * 6
    order = epoch_order(sizes, seed=0, epoch=0, window=2)
    shards = order // 10
    windows = [set(shards[start : start + 20]) for start in range(0, 60, 20)]
    assert [len(window) for window in windows] == [2, 2, 2]
    assert set.union(*windows) == set(range(6))
    assert all(np.any(np.diff(shards[start : start + 20]) < 0) for start in range(0, 60, 20))


def test_a_step_does_not_depend_on_where_the_epoch_was_entered() -> None:
    whole = list(plan_training(SIZES, 32, seed=5, epoch=2))
    assert [step.step for step in whole] == list(range(11))  # 360 = 11 × 32 + 8: the tail is dropped
    assert training_steps(360, 32) == 11
    for start in (0, 1, 10, 11):
        rest = list(plan_training(SIZES, 32, seed=5, epoch=2, start_step=start))
        assert [step.step for step in rest] == list(range(start, 11))
        for step, expected in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(step.rows, expected.rows)


def test_evaluation_sees_every_sample_once_in_table_order() -> None:
    rows = [step.rows for step in plan_evaluation(70, 32)]
    assert [len(batch) for batch in rows] == [32, 32, 6]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(70))
