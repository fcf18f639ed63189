"""Intervals of AUROC and AUPRC, against loops over pairs and the formulas of the papers."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, t
from sklearn.metrics import average_precision_score

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
    areas = measure_areas(scores, target, np.ones(target.shape, bool), np.arange(300))
    (first, left), (second, right) = (components(scores[:, column], truth) for column in (0, 1))
    expected = np.cov(left[truth], right[truth]) / 60 + np.cov(left[~truth], right[~truth]) / 240
    np.testing.assert_allclose(areas.influence.T @ areas.influence, expected, rtol=1e-9)
    np.testing.assert_allclose(areas.value, [first, second], rtol=1e-12)


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
    areas = measure_areas(scores, target, mask, patient, stratum)
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
    assert areas.influence[:, 0] @ areas.influence[:, 0] == pytest.approx(error)
    design = max(error / independent, 1)
    assert (areas.value[0], areas.design[0]) == pytest.approx((auroc, design))

    def variance(theta: float) -> float:
        return float(design * (weights**2 @ [score_variance(theta, *sizes) for sizes in counts]))

    assert (areas.low[0], areas.high[0]) == pytest.approx(score_limits(auroc, variance, t.ppf(0.975, freedom)))
    assert areas.freedom[0] == owners - 1
    order = np.tile(np.arange(len(patient)), 2)
    twice = measure_areas(scores[order], target[order], mask[order], patient[order], stratum[order])
    np.testing.assert_allclose(twice.influence, areas.influence, atol=1e-12)  # nothing new
    np.testing.assert_allclose(twice.low, areas.low, atol=0.1 if sick else 0.01)


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
    truth = (np.arange(200) < 5)[:, None]
    cells = truth + np.linspace(0, 0.5, 200)[:, None], truth.astype(float), np.ones((200, 1), bool)
    ours, alike = measure_areas(*cells, np.arange(200)), measure_areas(*cells, np.arange(200) // 2)
    assert ours.value[0] == ours.high[0] == 1
    assert 0.7 < ours.low[0] < 0.85
    assert alike.low[0] < ours.low[0]
    assert combine(ours, [1.0]) == {"value": 1, "low": pytest.approx(ours.low[0]), "high": pytest.approx(1)}
    # Of perfect ones nothing tells whether they would err alike.
    assert combine(ours.join(ours), [1.0, -1.0])["low"] < -0.15


def test_means_and_differences_honor_covariance() -> None:
    scores, target, mask, patient = draw(labels=3)
    areas = measure_areas(scores, target, mask, patient)
    mean = combine(areas, [1 / 3] * 3)
    unit = areas.influence / np.linalg.norm(areas.influence, axis=0)
    low = (areas.value - areas.low) / 3
    below = sum(low[i] * low[j] * (unit[:, i] @ unit[:, j]) for i in range(3) for j in range(3)) ** 0.5
    assert mean["low"] == pytest.approx(areas.value.mean() - below)
    strict = combine(areas, [1 / 3] * 3, 0.01)
    assert strict["high"] - strict["value"] == pytest.approx((mean["high"] - mean["value"]) * norm.isf(0.005) / Z)
    weights, halves = np.array([0.5, -1]), (areas.high - areas.low)[:2] / 2 * [0.5, -1]
    width = max((halves**2).sum() + 2 * halves.prod() * (unit[:, 0] @ unit[:, 1]), 0) ** 0.5
    width = max(width, Z * float(np.linalg.norm(areas.influence[:, :2] @ weights)))
    middle = areas.value[:2] @ weights
    for freedom in (areas.freedom, np.ones(3)):
        pooled = max((halves**2).sum() ** 2 / (halves**4 / freedom[:2]).sum() / 2, 1)
        fall, half = combine(areas._replace(freedom=freedom), [*weights, 0], 0.01), width * t.isf(0.005, pooled) / Z
        assert [*fall.values()] == pytest.approx([middle, middle - half, middle + half])
    first = [0, 0, 0]
    thrice = measure_areas(scores[:, first], target[:, first], mask[:, first], patient)
    same = combine(thrice, [1 / 3] * 3)  # three times the same label says no more than once
    assert [same["low"], same["high"]] == pytest.approx([areas.low[0], areas.high[0]])
    none = combine(areas.join(areas), [1, 0, 0, -1, 0, 0])
    assert [none["low"], none["high"]] == pytest.approx([0, 0], abs=1e-6)  # a run beside itself
    target[:, 1] = 0
    lacking = measure_areas(scores, target, mask, patient)
    assert combine(lacking, [0.5, 0.5, 0]) == combine(lacking, [0, 0, 0])
    assert combine(lacking, [0, 0, 0]) == dict.fromkeys(("value", "low", "high"))
    assert combine(lacking, [1, 0, 0])["low"] is not None


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
    areas = measure_precision(scores, target, mask, patient)
    used = mask[:, 0]
    auprc, influence = influence_precision(scores[used, 0], target[used, 0] == 1)
    error, freedom, owners = sum_patients(influence, target[used, 0] == 1, patient[used])
    half = t.ppf(0.975, freedom) * error**0.5 / (auprc * (1 - auprc))
    assert [areas.low[0], areas.high[0]] == pytest.approx(expit(logit(auprc) + np.array([-half, half])))
    assert areas.freedom[0] == owners - 1
    assert combine(areas, [1, -1]) == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-6)
    assert combine(areas, [0.5, 0.5]) == pytest.approx(combine(areas, [1, 0]))
    rows = np.tile(np.arange(len(patient)), 2)
    twice = measure_precision(scores[rows], target[rows], mask[rows], patient[rows])
    assert [*twice.low, *twice.high] == pytest.approx([*areas.low, *areas.high], rel=1e-3)


def test_areas_of_few_patients_have_wide_intervals() -> None:
    score, rows = np.arange(60.0)[:, None], np.arange(60)
    for sick, low in ((rows >= 55, 0.025**0.2), (rows == 30, 0)):  # perfect, of five; of one
        areas = measure_precision(score, sick[:, None].astype(float), score >= 0, rows)
        assert (areas.low[0], areas.high[0]) == pytest.approx((low, 1))
    for measure in (measure_areas, measure_precision):  # all positives are one patient's
        areas = measure(score % 7, (score < 30) * 1.0, score >= 0, np.where(rows < 30, 0, rows))
        assert (areas.low[0], areas.high[0], areas.freedom[0]) == (0, 1, 1)
