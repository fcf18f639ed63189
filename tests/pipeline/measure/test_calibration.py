import json

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from pipeline.measure.calibration import (
    PRIOR,
    RULES,
    apply_calibration,
    choose_fit,
    choose_thresholds,
    deal_folds,
    fit_calibration,
    fit_logistic,
)
from pipeline.measure.metrics import calibration_error, measure_rates


def draw(
    temperature: float, shift: float = 0, cells: int = 4000
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Scores whose logits are `temperature` times those that the truth was drawn by, and `shift` more."""
    random = np.random.default_rng(0)
    logits = random.normal(-1, 1.5, cells)
    truth = random.random(cells) < 1 / (1 + np.exp(-logits))
    return (1 / (1 + np.exp(-temperature * logits - shift))).astype(np.float32), truth


@pytest.mark.parametrize("hard", [False, True])
def test_the_fit_is_the_likeliest_under_its_prior_and_scikit_learns_with_many_cells(hard: bool) -> None:
    score, truth = draw(0.7, 1.5, 300)
    logits = np.log(score / (1 - score.astype(float)))
    if hard:
        random = np.random.default_rng(5)
        truth = random.random(200) < 0.5
        logits = np.where(truth ^ (random.random(200) < 0.08), 36.7, -36.7)
    fit = fit_logistic(logits, truth)

    def loss(slope: float, bias: float) -> float:
        chance = 1 / (1 + np.exp(-slope * logits - bias))
        return len(truth) * float(log_loss(truth, chance)) + PRIOR / 2 * (slope - 1) ** 2

    best = loss(*fit)
    for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3), (1e-3, -1e-3)):
        assert best < loss(fit.slope + step[0], fit.bias + step[1])
    many, called = draw(0.7, 1.5)  # where the prior hardly counts
    logits = np.log(many / (1 - many.astype(float)))
    regression = LogisticRegression(C=np.inf).fit(logits[:, None], called)
    expected = regression.coef_[0, 0], regression.intercept_[0]
    assert fit_logistic(logits, called) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 2.0), (3.0, -1.0), (0.4, 0.0)])
def test_a_shift_as_of_weighted_positives_is_undone(temperature: float, shift: float) -> None:
    score, truth = draw(temperature, shift)
    fit, note = choose_fit(score, truth, np.arange(4000))
    assert fit is not None
    assert note is None
    assert 1 / fit.slope == pytest.approx(temperature, rel=0.1)
    assert fit.bias == pytest.approx(-shift / temperature, abs=0.15)
    calibrated = apply_calibration(score, {"temperature": 1 / fit.slope, "bias": fit.bias})
    assert (calibration_error(calibrated, truth) or 1) < 0.02 < 0.03 < (calibration_error(score, truth) or 0)


def test_scores_stay_as_they_are_where_a_fit_is_worth_nothing() -> None:
    score, truth = draw(1.0, cells=60)
    patient = np.arange(60)
    alone = np.where(truth, 0, patient)
    contrary = None, "the scores tell nothing or the contrary: scores as they are"
    assert choose_fit(1 - score, truth, patient) == contrary
    assert choose_fit(score, truth, alone) == (None, "one patient has all of a class: scores as they are")
    random = np.random.default_rng(1)  # calibrated already: a fit to 60 follows their noise
    fits = []
    for _ in range(20):
        logits = random.normal(-1, 1.5, 60)
        drawn = random.random(60) < 1 / (1 + np.exp(-logits))
        fits.append(choose_fit(1 / (1 + np.exp(-logits)), drawn, patient))
    refused = [note for fit, note in fits if fit is None]
    assert len(refused) > 10
    assert set(refused) == {"calibration did not help on held-out patients: raw scores shown"}
    separated = choose_fit(score, score > 0.5, patient)[0]
    assert separated is not None
    assert 1 < separated.slope < 20  # held by the prior, where the likelihood alone has no maximum
    np.testing.assert_array_equal(apply_calibration(score, {"temperature": None, "bias": None}), score)
    saturated = np.array([0, 0, 1, 1], np.float32)
    assert np.isfinite(apply_calibration(saturated, {"temperature": 0.05, "bias": 3.0})).all()


def test_a_patient_is_in_one_fold_and_positives_are_dealt_out() -> None:
    codes = np.repeat(np.arange(50), 3)
    truth = codes % 5 == 0  # ten patients with positives alone
    fold = deal_folds(truth, codes)
    assert all(len(set(fold[codes == code])) == 1 for code in range(50))
    np.testing.assert_array_equal(np.bincount(fold[truth]), [6] * 5)
    np.testing.assert_array_equal(np.bincount(fold), [30] * 5)


def test_thresholds_are_the_best_of_all() -> None:
    score, truth = draw(1.0, 300)
    score = score.round(2)
    thresholds = choose_thresholds(score, truth, 0.8)
    logits = logit(np.array(sorted(set(score), reverse=True)))
    cuts = [*expit((logits[:-1] + logits[1:]) / 2).tolist(), 0.0]
    rates = {cut: measure_rates(cut, score, truth, np.arange(len(score))) for cut in cuts}
    youden = {cut: row["sensitivity"]["value"] + row["specificity"]["value"] for cut, row in rates.items()}
    f1 = {cut: row["f1"]["value"] for cut, row in rates.items()}
    reaching = [cut for cut, row in rates.items() if row["sensitivity"]["value"] >= 0.8]
    best = max(cuts, key=lambda cut: round(youden[cut], 12)), max(cuts, key=lambda cut: round(f1[cut], 12))
    assert [*thresholds.values()] == pytest.approx([*best, max(reaching)])
    even = choose_thresholds(np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, False, True, False]), 0.5)
    high, low = expit((logit(0.9) + logit(0.8)) / 2), expit((logit(0.2) + logit(0.1)) / 2)
    assert even == pytest.approx({"youden": high, "max_f1": low, "sensitivity": high})  # of equals the highest
    alike = choose_thresholds(np.array([0.9, 0.5 + 1e-5, 0.5, 0.1]), np.array([True, True, False, False]), 0.9)
    assert alike["sensitivity"] == pytest.approx(expit((logit(0.5) + logit(0.1)) / 2))  # too close to be separated


@pytest.mark.parametrize(("rows", "center"), [(200, 0.0), (20_000, 0.0), (2000, 12.0), (2000, -12.0)])
def test_no_decision_rests_on_the_last_bits_of_a_score(rows: int, center: float) -> None:
    random = np.random.default_rng(0)
    truth = random.random(rows) < 0.2
    score = expit(random.normal(center, 1, rows) + truth).astype(np.float32)
    other = score + random.integers(-4, 5, rows).astype(np.float32) * np.spacing(score)
    for cut in choose_thresholds(score, truth, 0.9).values():
        np.testing.assert_array_equal(score >= cut, other >= cut)


def test_what_cannot_be_fitted_is_said() -> None:
    score, truth = draw(2.0)
    scores = np.stack([score, score, 1 - score], axis=1)
    target = np.stack([truth, np.zeros_like(truth), truth], axis=1).astype(np.float32)
    mask = np.ones(scores.shape, bool)
    mask[::2, 0] = False
    fits = fit_calibration(["Edema", "Fracture", "Devices"], scores, target, mask, np.arange(4000))
    fit, note = choose_fit(score[1::2], truth[1::2], np.arange(2000))
    assert fit is not None
    expected = {"temperature": 1 / fit.slope, "bias": fit.bias, "note": note}
    assert fits["Edema"] == expected | {"thresholds": choose_thresholds(score[1::2], truth[1::2], 0.9)}
    nothing = {"temperature": None, "bias": None}
    note = "one class: no thresholds, scores as they are"
    assert fits["Fracture"] == nothing | {"thresholds": dict.fromkeys(RULES), "note": note}
    note = "the scores tell nothing or the contrary: scores as they are"
    assert fits["Devices"] == nothing | {"thresholds": choose_thresholds(1 - score, truth, 0.9), "note": note}
    assert json.loads(json.dumps(fits)) == fits
