from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import binomtest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

from pipeline.measure.delong import measure_areas, measure_precision, report_auroc
from pipeline.measure.metrics import (
    brier_score,
    calibration_error,
    cross_entropy,
    decide,
    measure_rates,
    net_benefit,
    reliability,
    subtract_independent,
    threshold_curve,
    wilson_limits,
)


def test_auroc_equals_scikit_learn_and_skips_one_class_labels() -> None:
    random = np.random.default_rng(0)
    names = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion", "Fracture", "Rare"]
    target = (random.random((300, 7)) < 0.3).astype(np.float32)
    scores = (random.random((300, 7)) * 0.5 + target * 0.2).astype(np.float32).round(2)  # with ties
    mask = random.random((300, 7)) < 0.8
    target[:, 5] = 0
    target[:, 6] = np.arange(300) < 9
    mask[:, 6] = True
    report = report_auroc(names, scores, target, mask, np.arange(len(mask)))
    expected = {
        name: sk.roc_auc_score(target[mask[:, column], column], scores[mask[:, column], column])
        for column, name in enumerate(names)
        if name != "Fracture"
    }
    for name, value in expected.items():
        assert report["labels"][name]["auroc"] == pytest.approx(value, abs=1e-12)
    assert report["labels"]["Fracture"] == {
        "auroc": None,
        "positives": 0,
        "negatives": int(mask[:, 5].sum()),
        "few": True,
    }
    assert report["macro_auroc"] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert report["mean5_auroc"] == pytest.approx(np.mean(list(expected.values())[:5]), abs=1e-12)
    assert report["macro10_auroc"] == report["mean5_auroc"]  # Rare has 9 positives
    target[9, 6] = 1
    tenth = report_auroc(names, scores, target, mask, np.arange(len(mask)))
    assert tenth["macro10_auroc"] == tenth["macro_auroc"]
    mask[:, 0] = False
    assert report_auroc(names, scores, target, mask, np.arange(len(mask)))["mean5_auroc"] is None
    with pytest.raises(ValueError, match=r"^scores are not finite$"):
        report_auroc(names, np.full_like(scores, np.nan), target, mask, np.arange(len(mask)))


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
    assert cross_entropy(score[:, None], truth[:, None] * 1.0, used[:, None]) == pytest.approx(loss, rel=1e-6)
    bins = reliability(score, truth)
    share, mean = calibration_curve(truth, score, n_bins=15)
    np.testing.assert_allclose(bins.share, share, atol=1e-12)
    np.testing.assert_allclose(bins.score, mean, atol=1e-7)
    assert bins.cells.sum() == 2000
    expected = binary_calibration_error(torch.from_numpy(score), torch.from_numpy(truth).int(), n_bins=15)
    assert calibration_error(score, truth) == pytest.approx(float(expected), abs=1e-6)

    few, found = np.array([0.3, 1 / 3, 0.8]), np.array([False, True, True])  # a third closes its bin
    np.testing.assert_allclose(reliability(few, found).score, [(0.3 + 1 / 3) / 2, 0.8])
    assert calibration_error(few, found) == pytest.approx(2 / 3 * (0.5 - (0.3 + 1 / 3) / 2) + 0.2 / 3)
    assert brier_score(score[:0], truth[:0]) is None
    assert calibration_error(score[:0], truth[:0]) is None


def test_rates_equal_scikit_learn_and_are_none_without_a_denominator() -> None:
    random = np.random.default_rng(0)
    score = random.random(400).astype(np.float32).round(2)
    truth = random.random(400) < score / 2

    def rates_at(threshold: float, score: Any, truth: Any) -> dict[str, float | None]:
        rates = measure_rates(threshold, score, truth, np.arange(len(score)))
        return {name: rate["value"] for name, rate in rates.items()}

    for threshold in (0.0, 0.3, float(score[7]), 0.99):
        called = score >= threshold
        found = rates_at(threshold, score, truth)
        assert found["sensitivity"] == pytest.approx(sk.recall_score(truth, called))
        assert found["ppv"] == pytest.approx(sk.precision_score(truth, called))
        assert found["f1"] == pytest.approx(sk.f1_score(truth, called))
        assert found["specificity"] == pytest.approx(sk.recall_score(~truth, ~called))
        if threshold:
            assert found["npv"] == pytest.approx(sk.precision_score(~truth, ~called))
    assert rates_at(0.0, score, truth)["npv"] is None
    assert rates_at(2.0, score, truth) | {"npv": 0} == {
        "sensitivity": 0, "specificity": 1, "ppv": None, "npv": 0, "f1": 0,
    }  # fmt: skip
    alone = rates_at(0.5, np.array([0.9, 0.2]), np.array([False, False]))
    assert alone == {"sensitivity": None, "specificity": 0.5, "ppv": 0, "npv": 1, "f1": None}
    owner, called = np.arange(400) // 2, score >= 0.3
    limits = wilson_limits(truth[called], owner[called])
    assert measure_rates(0.3, score, truth, owner)["ppv"] == {"value": truth[called].mean(), **limits}


def test_threshold_curve_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    score, truth = random.random(300).astype(np.float32).round(2), random.random(300) < 0.3
    curve = threshold_curve(score, truth)
    fpr, tpr, thresholds = sk.roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_array_equal(curve.threshold, thresholds[1:].astype(np.float32))
    np.testing.assert_allclose(curve.true_positives / truth.sum(), tpr[1:])
    np.testing.assert_allclose(curve.false_positives / (~truth).sum(), fpr[1:])


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
        found = wilson_limits(hits, owner, level)
        assert [found["low"], found["high"]] == pytest.approx(sorted(roots.clip(0, 1)))


def test_shares_of_one_cell_or_patient() -> None:
    exact = binomtest(14, 20).proportion_ci(method="wilson")
    found = wilson_limits(np.arange(20) < 14, np.arange(20))
    assert (found["low"], found["high"]) == pytest.approx(exact, abs=0.01)  # 19 degrees of freedom
    assert wilson_limits(np.arange(30) < 15, np.zeros(30)) == {"low": 0, "high": 1}
    assert wilson_limits(np.array([True]), np.zeros(1)) == {"low": pytest.approx(0.2065, abs=1e-4), "high": 1}
    assert wilson_limits(np.zeros(0, bool), np.arange(0)) == {"low": None, "high": None}


def test_limits_of_a_difference_are_those_newcombe_published() -> None:
    # Table II of Newcombe (1998), method 10: 56 of 70 less 48 of 80.
    sides = []
    for hits, cells in ((56, 70), (48, 80)):
        limits = binomtest(hits, cells).proportion_ci(method="wilson")
        sides.append({"value": hits / cells, "low": limits.low, "high": limits.high})
    found = subtract_independent(*sides)
    assert found == pytest.approx({"value": 0.2, "low": 0.0524, "high": 0.3339}, abs=5e-5)


def test_net_benefit_is_hits_less_the_price_of_false_alarms() -> None:
    random = np.random.default_rng(4)
    truth, probability = random.random(400) < 0.3, random.random(400).round(2)
    for threshold in (0.05, 0.2, 0.5):
        called = [p >= threshold for p in probability]
        hits = sum(c and t for c, t in zip(called, truth, strict=True))
        alarms = sum(c and not t for c, t in zip(called, truth, strict=True))
        price = threshold / (1 - threshold)
        found = decide(probability, truth, np.arange(400), threshold)
        assert found["net_benefit"]["value"] == pytest.approx(hits / 400 - alarms / 400 * price)
        assert found["net_benefit_all"]["value"] == pytest.approx(truth.mean() - (1 - truth.mean()) * price)
        model, every, gain = (figure["value"] for figure in found.values())
        assert gain == pytest.approx(model - max(0, every))
        ours, everyone = (net_benefit(p, truth, threshold) for p in (probability, np.ones(400)))
        for size in (2, 80, 200):  # cells of a patient
            means = (ours - everyone if every > 0 else ours).reshape(-1, size).mean(axis=1)
            gained = decide(probability, truth, np.arange(400) // size, threshold)["net_benefit_gain"]
            limits = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
            assert (gained["low"], gained["high"]) == pytest.approx(limits)
    alone = decide(probability, truth, np.zeros(400), 0.2)["net_benefit_gain"]
    assert alone == {"value": pytest.approx(alone["value"]), "low": None, "high": None}
