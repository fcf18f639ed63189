import json

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import log_loss

from model.calibration import apply_temperature, choose_thresholds, fit_calibration, fit_temperature
from model.metrics import rates_at


def draw(temperature: float, cells: int = 4000) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Scores whose logits are `temperature` times those that the truth was drawn by."""
    random = np.random.default_rng(0)
    logits = random.normal(-1, 1.5, cells)
    truth = random.random(cells) < 1 / (1 + np.exp(-logits))
    return (1 / (1 + np.exp(-temperature * logits))).astype(np.float32), truth


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_has_the_highest_likelihood(true: float) -> None:
    score, truth = draw(true)

    def loss(temperature: float) -> float:
        return float(log_loss(truth, apply_temperature(score, temperature)))

    found = fit_temperature(score, truth)
    assert found == pytest.approx(true, rel=0.1)
    assert found is not None
    assert loss(found) < min(loss(0.999 * found), loss(1.001 * found))
    np.testing.assert_allclose(apply_temperature(score, 1.0), score, atol=1e-6)


def test_scores_without_a_best_temperature_stay_as_they_are() -> None:
    score, truth = draw(1.0)
    assert fit_temperature(score, score > 0.5) is None  # separated: ever colder is ever likelier
    assert fit_temperature(1 - score, truth) is None  # the contrary: ever hotter
    assert fit_temperature(np.full(10, 0.5, np.float32), np.arange(10) < 3) is None
    saturated = np.array([0, 0, 1, 1], np.float32)
    assert fit_temperature(saturated, np.array([False, False, True, True])) is None
    assert fit_temperature(saturated, np.array([False, True, True, True])) == pytest.approx(15.14, abs=0.01)
    np.testing.assert_array_equal(apply_temperature(score, None), score)
    assert np.isfinite(apply_temperature(saturated, 0.05)).all()


def test_thresholds_are_the_best_of_all() -> None:
    score, truth = draw(1.0, 300)
    score = score.round(2)
    found = choose_thresholds(score, truth, 0.8)
    rates = {float(cut): rates_at(float(cut), score, truth) for cut in sorted(set(score), reverse=True)}
    youden = {cut: row["sensitivity"] + row["specificity"] for cut, row in rates.items()}  # type: ignore[operator]
    f1 = {cut: row["f1"] for cut, row in rates.items()}
    reaching = [cut for cut, row in rates.items() if row["sensitivity"] >= 0.8]  # type: ignore[operator]
    assert found == {
        "youden": max(youden, key=lambda cut: round(youden[cut], 12)),
        "max_f1": max(f1, key=lambda cut: round(f1[cut], 12)),  # type: ignore[arg-type]
        "sensitivity": max(reaching),
    }
    even = choose_thresholds(np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, False, True, False]), 0.5)
    assert even == {"youden": 0.9, "max_f1": 0.2, "sensitivity": 0.9}  # of equals the highest


def test_what_cannot_be_fitted_is_said() -> None:
    score, truth = draw(2.0)
    scores = np.stack([score, score, score], axis=1)
    target = np.stack([truth, np.zeros_like(truth), score > 0.5], axis=1).astype(np.float32)
    mask = np.ones(scores.shape, bool)
    mask[::2, 0] = False
    found = fit_calibration(["Edema", "Fracture", "Devices"], scores, target, mask)
    assert found["Edema"] == {
        "temperature": fit_temperature(score[1::2], truth[1::2]),
        "thresholds": choose_thresholds(score[1::2], truth[1::2], 0.9),
        "note": None,
    }
    assert found["Fracture"] == {
        "temperature": None,
        "thresholds": {"youden": None, "max_f1": None, "sensitivity": None},
        "note": "one class: no thresholds, scores as they are",
    }
    assert found["Devices"]["note"] == "no temperature has the highest likelihood: scores as they are"
    assert found["Devices"]["temperature"] is None
    assert found["Devices"]["thresholds"]["youden"] == score[score > 0.5].min()
    assert json.loads(json.dumps(found)) == found
