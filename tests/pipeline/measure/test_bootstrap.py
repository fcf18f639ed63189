from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score

from pipeline.measure import metrics
from pipeline.measure.metrics import draw_counts, interval, resample_auprc


def draw_rows(rows: int, labels: int, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Scores, target, mask and patients, one to several rows each, with tied scores."""
    random = np.random.default_rng(seed)
    target = (random.random((rows, labels)) < np.linspace(0.3, 0.6, labels)).astype(np.float32)
    scores = (random.random((rows, labels)) * 0.7 + target * 0.3).astype(np.float32).round(2)
    mask = random.random((rows, labels)) < 0.9
    return scores, target, mask, np.char.mod("patient%05d", random.integers(0, rows // 2, rows))


def resample(rows: Sequence[Any], resamples: int = 50, seed: int = 1) -> npt.NDArray[np.float64]:
    scores, target, mask, patient = rows
    return np.array(resample_auprc(scores, target, mask, patient, resamples, seed))


def test_resamples_equal_a_loop_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK_CELLS", 120 * 7)  # blocks that do not divide the resamples
    scores, target, mask, patient = draw_rows(120, 3)
    target[:, 1] = np.arange(120) < 2  # lost in many resamples
    mask[:, 1] = True
    found = resample_auprc(scores, target, mask, patient, 40, seed=5)

    names = sorted(set(patient.tolist()))
    generator = np.random.Generator(np.random.PCG64(5))
    for number in range(40):
        drawn = generator.integers(len(names), size=len(names))
        rows = np.concatenate([np.flatnonzero(patient == names[place]) for place in drawn])
        for label in range(3):
            used = rows[mask[rows, label]]
            truth, score = target[used, label], scores[used, label]
            value = found[number, label]
            if len(set(truth.tolist())) == 2:
                assert value == pytest.approx(average_precision_score(truth, score), abs=1e-12)
            else:
                assert np.isnan(value)
    assert 0 < np.isnan(found[:, 1]).sum() < 40
    assert not np.isnan(found[:, [0, 2]]).any()


def test_resamples_depend_on_patients_and_seed_alone() -> None:
    rows = draw_rows(200, 2)
    order = np.random.default_rng(0).permutation(200)
    mixed, twice = ([part[index] for part in rows] for index in (order, np.tile(order, 2)))
    np.testing.assert_allclose(resample(mixed), resample(rows), atol=1e-12)
    np.testing.assert_array_equal(resample(rows, 20), resample(rows)[:20])
    assert not np.allclose(resample(rows, seed=2), resample(rows))
    # Every row twice under its patient: nothing new, where resampled rows would narrow the interval.
    np.testing.assert_allclose(resample(twice), resample(rows), atol=1e-12)
    counts = np.concatenate(list(draw_counts(30, 10, 4, seed=0)), axis=1)
    assert counts.shape == (30, 10)
    assert (counts.sum(axis=0) == 30).all()


def test_labels_with_one_class_have_no_resamples() -> None:
    scores, target, mask, patient = draw_rows(50, 2)
    target[:, 0], mask[:, 1] = 1, False
    assert np.isnan(resample_auprc(scores, target, mask, patient, 5, seed=0)).all()


def test_positives_of_one_patient_have_no_resamples() -> None:
    scores, target, mask, patient = draw_rows(120, 2)
    target[:, 0], mask[:] = np.arange(120) < 9, True
    patient[:9] = "one"
    assert np.isnan(resample((scores, target, mask, patient))).all(axis=0).tolist() == [True, False]


def test_intervals_leave_out_what_is_undefined() -> None:
    values = np.append(np.arange(201.0), [np.nan] * 30)
    assert interval(values) == {"low": 5, "high": 195}
    assert interval(values[:100])["low"] == pytest.approx(2.475)
    for vague in (np.ones(500), values[102:]):  # not [1.000, 1.000]; 99 resamples
        assert interval(vague) == {"low": None, "high": None}
