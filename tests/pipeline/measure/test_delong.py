"""Intervals of AUROC and AUPRC, against loops over pairs and the formulas of the papers."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, t
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.measure.delong import (
    combine,
    influence_precision,
    measure_areas,
    measure_precision,
    score_limits,
    score_variance,
)
from pipeline.measure.metrics import Floats, Z

Array = npt.NDArray[np.float64]


def draw(seed: int = 0, labels: int = 2) -> tuple[Array, Array, npt.NDArray[np.bool_], npt.NDArray[np.str_]]:
    """150 patients with one to three rows each, alike in labels and scores, with ties."""
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(150), random.integers(1, 4, 150))
    latent = random.normal(size=(150, labels))[owner] + random.normal(size=(len(owner), labels))
    target = (latent > 0.9).astype(float)
    noise = random.normal(size=(150, labels))[owner] + 0.5 * random.normal(size=target.shape)
    scores = (1.2 * target + noise).round(1)
    return scores, target, random.random(target.shape) < 0.9, np.char.mod("patient%05d", owner)


def components(score: Array, truth: npt.NDArray[np.bool_]) -> tuple[float, Array]:
    """AUROC and each row's structural component (DeLong et al., 1988), from the matrix of all pairs."""
    positive, negative = score[truth][:, None], score[~truth]
    wins = (positive > negative) + 0.5 * (positive == negative)
    values = np.empty(len(score))
    values[truth], values[~truth] = wins.mean(axis=1), wins.mean(axis=0)
    return float(wins.mean()), values


def test_rows_of_one_patient_each_have_delongs_covariance() -> None:
    random = np.random.default_rng(0)
    truth = np.arange(300) < 60
    scores = (random.normal(size=(300, 1)) + random.normal(size=(300, 2)) + truth[:, None]).round(1)
    target = np.repeat(truth[:, None], 2, axis=1).astype(float)
    found = measure_areas(scores, target, np.ones(target.shape, bool), np.arange(300))
    (first, one), (second, two) = (components(scores[:, run], truth) for run in (0, 1))
    expected = np.cov(one[truth], two[truth]) / 60 + np.cov(one[~truth], two[~truth]) / 240
    np.testing.assert_allclose(found.influence.T @ found.influence, expected, rtol=1e-9)
    np.testing.assert_allclose(found.value, [first, second], rtol=1e-12)
    assert found.value[0] == pytest.approx(roc_auc_score(truth, scores[:, 0]), abs=1e-12)


def sum_patients(values: Floats, truth: npt.NDArray[np.bool_], owner: npt.NDArray[np.str_]) -> tuple[float, ...]:
    """An area's squared error from its cells' parts, degrees of freedom (Satterthwaite), the rarer class's patients."""
    sums = np.array([[values[(owner == name) & side].sum() for name in np.unique(owner)] for side in (truth, ~truth)])
    counts = np.array([len(set(owner[side])) for side in (truth, ~truth)])
    sums *= np.sqrt(counts / (counts - 1))[:, None]
    errors = (sums**2).sum(axis=1)
    return (sums.sum(axis=0) ** 2).sum(), errors.sum() ** 2 / (errors**2 / (counts - 1)).sum(), counts.min()


@pytest.mark.parametrize(("strata", "sick"), [(1, 0), (3, 0), (1, 2)])
def test_patients_with_several_rows_have_obuchowskis_variance(strata: int, sick: int) -> None:
    """But for the factor of the covariance of both classes. Strata are weighed by their pairs of the two classes."""
    scores, target, mask, patient = draw()
    stratum = np.arange(len(patient)) % strata
    for value in (0, 1):  # strata of one class
        stratum[(np.arange(len(patient)) % 10 == value) & (target[:, 0] == value)] = 8 + value
    truth, score, parts, counts = target[:, 0] == 1, scores[:, 0], [], []
    if sick:  # patients with one positive each
        first = np.unique(np.where(mask[:, 0] & truth, patient, "z"), return_index=True)[1][:sick]
        mask[:, 0] &= ~truth | np.isin(np.arange(len(patient)), first)
    found = measure_areas(scores, target, mask, patient, stratum)
    values, used = np.zeros(len(patient)), mask[:, 0] & (stratum < 8)
    for number in range(strata):
        rows = used & (stratum == number)
        area, wins = components(score[rows], truth[rows])
        sizes = np.array([truth[rows].sum(), (~truth[rows]).sum()])
        values[rows] = (wins - area) * np.where(truth[rows], sizes[1], sizes[0])  # of the weight, pairs / (own · all)
        parts.append((area, sum(wins[side].var(ddof=1) / side.sum() for side in (truth[rows], ~truth[rows]))))
        counts.append(sizes)
    weights = np.prod(counts, axis=1) / np.prod(counts, axis=1).sum()
    auroc, independent = weights @ [area for area, _ in parts], weights**2 @ [variance for _, variance in parts]
    error, freedom, owners = sum_patients(values[used] / np.prod(counts, axis=1).sum(), truth[used], patient[used])
    assert found.influence[:, 0] @ found.influence[:, 0] == pytest.approx(error)
    design = max(error / independent, 1)
    assert (found.value[0], found.design[0]) == pytest.approx((auroc, design))

    def variance(theta: float) -> float:
        return float(design * (weights**2 @ [score_variance(theta, *sizes) for sizes in counts]))

    assert (found.low[0], found.high[0]) == pytest.approx(score_limits(auroc, variance, t.ppf(0.975, freedom)))
    assert found.freedom[0] == owners - 1
    order = np.tile(np.arange(len(patient)), 2)
    twice = measure_areas(scores[order], target[order], mask[order], patient[order], stratum[order])
    np.testing.assert_allclose(twice.influence, found.influence, atol=1e-12)  # nothing new
    np.testing.assert_allclose(twice.low, found.low, atol=0.1 if sick else 0.01)


@pytest.mark.parametrize(
    ("auroc", "positives", "negatives"), [(0.8, 10, 190), (1.0, 5, 200), (1 + 2**-52, 5, 200), (0.03, 4, 4)]
)
def test_limits_solve_newcombes_equation(auroc: float, positives: int, negatives: int) -> None:
    def distance(theta: float) -> float:
        half = (positives + negatives) / 2 - 1
        variance = theta * (1 - theta) * (1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta))
        return (theta - auroc) ** 2 - 1.3 * Z**2 * variance / (positives * negatives)

    low, high = score_limits(auroc, lambda theta: 1.3 * score_variance(theta, positives, negatives))
    expected = [brentq(distance, 1e-9, auroc - 1e-9), 1 if auroc >= 1 else brentq(distance, auroc, 1 - 1e-9)]
    assert [low, high] == pytest.approx(expected, abs=1e-7)


def test_no_interval_has_zero_width() -> None:
    """A perfect label of five patients, whose AUROC is 1 in any subset."""
    truth = np.arange(200) < 5
    score = truth + np.linspace(0, 0.5, 200)
    ours = measure_areas(score[:, None], truth[:, None].astype(float), np.ones((200, 1), bool), np.arange(200))
    assert ours.value[0] == ours.high[0] == 1
    assert 0.7 < ours.low[0] < 0.85
    alike = measure_areas(score[:, None], truth[:, None].astype(float), np.ones((200, 1), bool), np.arange(200) // 2)
    assert alike.low[0] < ours.low[0]
    both = ours.join(ours)
    assert combine(ours, [1.0]) == {"value": 1, "low": pytest.approx(ours.low[0]), "high": pytest.approx(1)}
    limits = combine(both, [1.0, -1.0])  # of perfect ones nothing tells whether they would err alike
    assert limits["low"] is not None
    assert limits["low"] < -0.15


def test_means_and_differences_honor_covariance() -> None:
    scores, target, mask, patient = draw(labels=3)
    found = measure_areas(scores, target, mask, patient)
    mean = combine(found, [1 / 3] * 3)
    unit = found.influence / np.linalg.norm(found.influence, axis=0)
    low = (found.value - found.low) / 3
    below = sum(low[i] * low[j] * (unit[:, i] @ unit[:, j]) for i in range(3) for j in range(3)) ** 0.5
    assert mean["low"] == pytest.approx(found.value.mean() - below)
    strict = combine(found, [1 / 3] * 3, 0.01)
    assert strict["high"] - strict["value"] == pytest.approx((mean["high"] - mean["value"]) * norm.isf(0.005) / Z)
    weights, halves = np.array([0.5, -1]), (found.high - found.low)[:2] / 2 * [0.5, -1]
    width = max((halves**2).sum() + 2 * halves.prod() * (unit[:, 0] @ unit[:, 1]), 0) ** 0.5
    width = max(width, Z * float(np.linalg.norm(found.influence[:, :2] @ weights)))
    middle = found.value[:2] @ weights
    for freedom in (found.freedom, np.ones(3)):
        pooled = max((halves**2).sum() ** 2 / (halves**4 / freedom[:2]).sum() / 2, 1)
        fall, half = combine(found._replace(freedom=freedom), [*weights, 0], 0.01), width * t.isf(0.005, pooled) / Z
        assert [*fall.values()] == pytest.approx([middle, middle - half, middle + half])
    first = [0, 0, 0]
    thrice = measure_areas(scores[:, first], target[:, first], mask[:, first], patient)
    same = combine(thrice, [1 / 3] * 3)  # three times the same label says no more than once
    assert [same["low"], same["high"]] == pytest.approx([found.low[0], found.high[0]])
    none = combine(found.join(found), [1, 0, 0, -1, 0, 0])
    assert [none["low"], none["high"]] == pytest.approx([0, 0], abs=1e-6)  # a run beside itself
    target[:, 1] = 0
    lacking = measure_areas(scores, target, mask, patient)
    assert combine(lacking, [0.5, 0.5, 0]) == combine(lacking, [0, 0, 0])
    assert combine(lacking, [0, 0, 0]) == dict.fromkeys(("value", "low", "high"))
    assert combine(lacking, [1, 0, 0])["low"] is not None


def test_a_class_of_one_patient_leaves_the_interval_open() -> None:
    truth = np.arange(60)[:, None] < 30
    owner = np.where(truth[:, 0], 0, np.arange(60))
    areas = measure_areas(np.arange(60.0)[:, None] % 7, truth.astype(float), np.ones((60, 1), bool), owner)
    assert (areas.low[0], areas.high[0], areas.freedom[0]) == (0, 1, 1)


def test_the_influence_on_auprc_is_its_derivative() -> None:
    scores, target, _, _ = draw()
    score, truth = scores[:, 0], target[:, 0] == 1
    auprc, influence = influence_precision(score, truth)
    assert auprc == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    for cell in range(0, len(score), 7):
        above, below = (
            average_precision_score(truth, score, sample_weight=1 + step * (np.arange(len(score)) == cell))
            for step in (1e-4, -1e-4)
        )
        assert influence[cell] == pytest.approx((above - below) / 2e-4, abs=1e-7)


def test_intervals_of_auprc_are_those_of_patients() -> None:
    """In logits, by the influence of each patient; each row twice adds nothing."""
    scores, target, mask, patient = draw()
    scores[:, 1] = scores[:, 0]
    target[:, 1], mask[:, 1] = target[:, 0], mask[:, 0]
    found = measure_precision(scores, target, mask, patient)
    used = mask[:, 0]
    auprc, influence = influence_precision(scores[used, 0], target[used, 0] == 1)
    error, freedom, owners = sum_patients(influence, target[used, 0] == 1, patient[used])
    half = t.ppf(0.975, freedom) * error**0.5 / (auprc * (1 - auprc))
    assert [found.low[0], found.high[0]] == pytest.approx(expit(logit(auprc) + np.array([-half, half])))
    assert found.freedom[0] == owners - 1
    assert combine(found, [1, -1]) == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-6)
    assert combine(found, [0.5, 0.5]) == pytest.approx(combine(found, [1, 0]))
    rows = np.tile(np.arange(len(patient)), 2)
    twice = measure_precision(scores[rows], target[rows], mask[rows], patient[rows])
    assert [*twice.low, *twice.high] == pytest.approx([*found.low, *found.high], rel=1e-3)


def test_an_auprc_of_few_patients_leaves_its_interval_wide() -> None:
    score = np.arange(60.0)[:, None]
    for sick, low, high in ((np.arange(60) >= 55, 0.025**0.2, 1), (np.arange(60) == 30, 0, 1)):  # perfect; of one
        areas = measure_precision(score, sick[:, None].astype(float), np.ones((60, 1), bool), np.arange(60))
        assert (areas.low[0], areas.high[0]) == pytest.approx((low, high))
    one = measure_precision(score % 7, (score < 30) * 1.0, score >= 0, np.where(score[:, 0] < 30, 0, score[:, 0]))
    assert (one.low[0], one.high[0], one.freedom[0]) == (0, 1, 1)
