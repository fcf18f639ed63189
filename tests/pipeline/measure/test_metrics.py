from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import binomtest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from pipeline.measure import metrics
from pipeline.measure.delong import measure_areas, measure_precision, report_auroc
from pipeline.measure.metrics import COMPETITION, brier_score, calibration_error, reliability, wilson_limits


def test_auroc_equals_scikit_learn_and_skips_one_class_labels() -> None:
    random = np.random.default_rng(0)
    names, patient = [*COMPETITION, "Fracture", "Rare"], np.arange(300)
    target = (random.random((300, 7)) < 0.3).astype(np.float32)
    scores = (random.random((300, 7)) * 0.5 + target * 0.2).astype(np.float32).round(2)  # with ties
    mask = random.random((300, 7)) < 0.8
    target[:, 5], target[:, 6], mask[:, 6] = 0, patient < 9, True
    report = report_auroc(names, scores, target, mask, patient)
    cells = [(target[mask[:, column], column], scores[mask[:, column], column]) for column in (0, 1, 2, 3, 4, 6)]
    expected = [sk.roc_auc_score(*side) for side in cells]
    aurocs = {name: label["auroc"] for name, label in report["labels"].items()}
    assert aurocs.pop("Fracture") is None
    assert [*aurocs.values()] == pytest.approx(expected, abs=1e-12)
    counts = {"positives": 0, "negatives": int(mask[:, 5].sum()), "few": True}
    assert report["labels"]["Fracture"] == {"auroc": None, **counts}
    assert report["macro_auroc"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert report["mean5_auroc"] == pytest.approx(np.mean(expected[:5]), abs=1e-12)
    assert report["macro10_auroc"] == report["mean5_auroc"]  # Rare has 9 positives
    target[9, 6] = 1
    tenth = report_auroc(names, scores, target, mask, patient)
    assert tenth["macro10_auroc"] == tenth["macro_auroc"]
    mask[:, 0] = False
    assert report_auroc(names, scores, target, mask, patient)["mean5_auroc"] is None
    with pytest.raises(ValueError, match=r"^scores are not finite$"):
        report_auroc(names, np.full_like(scores, np.nan), target, mask, patient)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
@pytest.mark.parametrize("places", [1, 2, 7])  # many ties, some, hardly any
def test_areas_equal_scikit_learn(share: float, places: int) -> None:
    random = np.random.default_rng(places)
    truth = random.random(500) < share
    score = (random.random(500) * 0.8 + truth * 0.2).astype(np.float32).round(places)
    score[:6] = [0.0, 1.0, 0.0, 1.0, 1e-45, 1 - 2**-24]  # as a sigmoid saturates
    cells = score[:, None], truth[:, None] * 1.0, np.ones((500, 1), bool), np.arange(500)
    assert measure_areas(*cells).value[0] == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
    assert measure_precision(*cells).value[0] == pytest.approx(sk.average_precision_score(truth, score), abs=1e-12)
    for one_class in (np.ones((500, 1)), np.zeros((500, 1))):
        for measure in (measure_areas, measure_precision):
            assert np.isnan(measure(score[:, None], one_class, *cells[2:]).value[0])


def test_brier_score_and_calibration_error_equal_their_references() -> None:
    random = np.random.default_rng(0)
    score = random.beta(0.5, 2, 2000).astype(np.float32)
    score[:4] = [0.0, 1.0, 0.2, 1e-30]
    truth = random.random(2000) < score**1.5
    assert brier_score(score, truth) == pytest.approx(sk.brier_score_loss(truth, score), abs=1e-9)
    used = random.random(2000) < 0.5
    loss = sk.log_loss(truth[used], score[used].astype(float))
    assert metrics.cross_entropy(score[:, None], truth[:, None] * 1.0, used[:, None]) == pytest.approx(loss, rel=1e-6)
    mean, share, cells = reliability(score, truth)
    expected_share, expected_mean = calibration_curve(truth, score, n_bins=15)
    np.testing.assert_allclose(share, expected_share, atol=1e-12)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-7)
    assert cells.sum() == 2000
    expected = binary_calibration_error(torch.from_numpy(score), torch.from_numpy(truth).int(), n_bins=15)
    assert calibration_error(score, truth) == pytest.approx(float(expected), abs=1e-6)

    few, sick = np.array([0.3, 1 / 3, 0.8]), np.array([False, True, True])  # a third closes its bin
    np.testing.assert_allclose(reliability(few, sick)[0], [(0.3 + 1 / 3) / 2, 0.8])
    assert calibration_error(few, sick) == pytest.approx(2 / 3 * (0.5 - (0.3 + 1 / 3) / 2) + 0.2 / 3)
    assert brier_score(score[:0], truth[:0]) is None
    assert calibration_error(score[:0], truth[:0]) is None


def test_rates_equal_scikit_learn_and_are_none_without_a_denominator() -> None:
    random = np.random.default_rng(0)
    score = random.random(400).astype(np.float32).round(2)
    truth = random.random(400) < score / 2

    def rates_at(threshold: float, score: Any, truth: Any) -> dict[str, float | None]:
        rates = metrics.measure_rates(threshold, score, truth, np.arange(len(score)))
        return {name: rate["value"] for name, rate in rates.items()}

    for threshold in (0.0, 0.3, float(score[7]), 0.99):
        called = score >= threshold
        npv = sk.precision_score(~truth, ~called) if threshold else None
        sensitivity, ppv, f1 = (rate(truth, called) for rate in (sk.recall_score, sk.precision_score, sk.f1_score))
        expected = [sensitivity, sk.recall_score(~truth, ~called), ppv, npv, f1]
        assert [*rates_at(threshold, score, truth).values()] == pytest.approx(expected)
    assert [*rates_at(2.0, score, truth).values()] == [0, 1, None, (~truth).mean(), 0]
    assert [*rates_at(0.5, np.array([0.9, 0.2]), np.array([False, False])).values()] == [None, 0.5, 0, 1, None]
    owner, called = np.arange(400) // 2, score >= 0.3
    limits = wilson_limits(truth[called], owner[called])
    assert metrics.measure_rates(0.3, score, truth, owner)["ppv"] == {"value": truth[called].mean(), **limits}


@pytest.mark.parametrize("level", [0.05, 0.01])
@pytest.mark.parametrize("owner", [np.arange(120), np.arange(120) // 3, np.arange(120) ** 2 % 43])
def test_shares_have_wilsons_limits_on_as_many_cells_as_patients_are_worth(owner: Any, level: float) -> None:
    """The limits solve Wilson's equation, with a design effect (Rao and Scott) from a loop over patients."""
    called, names = np.random.default_rng(0).random(120) < 0.7, set(owner)
    for hits in (called, called[owner], np.ones(120, bool), np.zeros(120, bool)):
        share, alike = hits.mean(), sum((owner == name).sum() ** 2 for name in names) / 120
        size, freedom = 120 / alike, np.inf
        if 0 < share < 1:
            rest = sum((hits[owner == name].sum() - share * (owner == name).sum()) ** 2 for name in names)
            size = 120 / max(1, rest * len(names) / (len(names) - 1) / 120 / share / (1 - share))
            freedom = np.inf if len(names) == 120 else len(names) - 1
        factor = stats.t.isf(level / 2, freedom) ** 2 / size
        roots = np.roots([1 + factor, -2 * share - factor, share**2])  # (share - x)² = z² x (1 - x) / size
        assert [*wilson_limits(hits, owner, level).values()] == pytest.approx(sorted(roots.clip(0, 1)))


def test_shares_of_one_cell_or_patient() -> None:
    exact = binomtest(14, 20).proportion_ci(method="wilson")
    limits = wilson_limits(np.arange(20) < 14, np.arange(20))
    assert [*limits.values()] == pytest.approx([*exact], abs=0.01)
    assert wilson_limits(np.arange(30) < 15, np.zeros(30)) == {"low": 0, "high": 1}
    assert wilson_limits(np.array([True]), np.zeros(1)) == {"low": pytest.approx(0.2065, abs=1e-4), "high": 1}
    assert wilson_limits(np.zeros(0, bool), np.arange(0)) == {"low": None, "high": None}


def test_limits_of_a_difference_are_those_newcombe_published() -> None:
    # Table II of Newcombe (1998), method 10: 56 of 70 less 48 of 80.
    sides = []
    for hits, cells in ((56, 70), (48, 80)):
        limits = binomtest(hits, cells).proportion_ci(method="wilson")
        sides.append({"value": hits / cells, "low": limits.low, "high": limits.high})
    difference = metrics.subtract_independent(*sides)
    assert difference == pytest.approx({"value": 0.2, "low": 0.0524, "high": 0.3339}, abs=5e-5)


def test_net_benefit_is_hits_less_the_price_of_false_alarms() -> None:
    random = np.random.default_rng(4)
    truth, probability = random.random(400) < 0.3, random.random(400).round(2)
    for threshold in (0.05, 0.2, 0.5):
        called, price = probability >= threshold, threshold / (1 - threshold)
        rows = metrics.decide(probability, truth, np.arange(400), threshold)
        model, every, gain = (figure["value"] for figure in rows.values())
        assert model == pytest.approx((called & truth).mean() - (called & ~truth).mean() * price)
        assert every == pytest.approx(truth.mean() - (1 - truth.mean()) * price)
        assert gain == pytest.approx(model - max(0, every))
        ours, everyone = (metrics.net_benefit(p, truth, threshold) for p in (probability, np.ones(400)))
        for size in (2, 80, 200):  # cells of a patient
            means = (ours - everyone if every > 0 else ours).reshape(-1, size).mean(axis=1)
            gained = metrics.decide(probability, truth, np.arange(400) // size, threshold)["net_benefit_gain"]
            limits = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
            assert (gained["low"], gained["high"]) == pytest.approx(limits)
    alone = metrics.decide(probability, truth, np.zeros(400), 0.2)["net_benefit_gain"]
    assert alone == {"value": pytest.approx(alone["value"]), "low": None, "high": None}
