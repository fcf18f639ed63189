"""What a label's AUROC rests on: within strata, balanced, and told by covariates."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.measure.belief import assess_belief, measure_balanced, measure_within, split_halves, weigh_pairs
from pipeline.measure.evaluate import Scored

Floats = npt.NDArray[np.float64]


def draw(seed: int, rows: int = 400, shortcut: float = 0, signal: float = 1) -> tuple[Floats, Floats, Floats]:
    """Truth, a covariate of 0 and 1 that agrees with it, and a score of both."""
    random = np.random.default_rng(seed)
    truth = random.random(rows) < 0.4
    cue = np.where(random.random(rows) < (1 + shortcut) / 2, truth, ~truth).astype(float)
    score = signal * truth + 3 * shortcut * cue + random.normal(size=rows)
    return truth.astype(float), cue, 1 / (1 + np.exp(-score))


def scored(target: Floats, scores: Floats) -> Scored:
    rows = np.arange(len(target))
    mask = np.ones((len(target), 1), bool)
    return Scored(scores[:, None], target[:, None], mask, rows, rows, rows, rows, rows)


def test_within_strata_only_pairs_of_one_stratum_count() -> None:
    truth, cue, score = draw(0, shortcut=0.6)
    score = score.round(1)  # ties
    group = np.where(cue == 1, "AP", "PA")
    group[:20] = ""
    found = measure_within(score, truth == 1, np.arange(len(truth)), group)
    right = pairs = 0.0
    for i in np.flatnonzero(truth == 1):
        for j in np.flatnonzero((truth == 0) & (group == group[i]) & (group != "")):
            pairs += 1
            right += (score[i] > score[j]) + (score[i] == score[j]) / 2
    assert found["pooled"]["auroc"] == pytest.approx(right / pairs)
    assert found["pairs"] == pytest.approx(pairs / (truth.sum() * (1 - truth).sum()))
    assert found["less"]["difference"] == pytest.approx(right / pairs - roc_auc_score(truth, score))
    for name in ("AP", "PA"):
        rows = group == name
        assert found["strata"][name]["auroc"] == pytest.approx(roc_auc_score(truth[rows], score[rows]))
    assert found["pooled"]["low"] < found["pooled"]["auroc"] < found["pooled"]["high"]


def test_strata_with_few_of_a_class_are_counted_but_not_measured() -> None:
    truth, _, score = draw(1, rows=60)
    group = np.array(["AP"] * 50 + ["PA"] * 10)
    found = measure_within(score, truth == 1, np.arange(60), group)
    assert found["strata"]["PA"]["auroc"] is None
    assert found["strata"]["PA"]["positives"] == int(truth[50:].sum())
    assert found["pooled"]["auroc"] == found["strata"]["AP"]["auroc"]


def test_weights_of_pairs_are_scikit_learns() -> None:
    truth, _, score = draw(2)
    weight = np.random.default_rng(3).random(len(truth))
    auroc, influence = weigh_pairs(score.round(1), truth == 1, weight)
    assert auroc == pytest.approx(roc_auc_score(truth, score.round(1), sample_weight=weight))
    assert influence.sum() == pytest.approx(0)


def test_balancing_takes_away_what_a_covariate_tells() -> None:
    truth, cue, score = draw(8, rows=4000, shortcut=0.6, signal=0)
    assert roc_auc_score(truth, score) > 0.7
    found = measure_balanced(score, truth == 1, np.arange(len(truth)), {"cue": cue})
    assert found["low"] < 0.5 < found["high"]
    assert found["positives"] < truth.sum()


def test_halves_are_above_the_median_and_two_values_stay() -> None:
    found = split_halves(
        {"two": np.array([0.0, 1, 1, np.nan]), "many": np.array([5.0, 1, 2, 3]), "one": np.ones(4)}
    )
    assert found["two"].tolist()[:3] == [0, 1, 1]
    assert np.isnan(found["two"][3])
    assert found["many"].tolist() == [1, 0, 0, 1]
    assert "one" not in found


@pytest.mark.parametrize(
    ("shortcut", "signal", "mark", "ends"),
    [
        (0.0, 1.5, "none", ": no covariate here explains it."),
        (0.6, 1.5, "caution", "; marker alone .80: treat with caution."),
        (0.6, 0.0, "nothing", ": nothing is left within marker: do not believe it."),
        (0.0, 0.0, "nothing", ": not told from guessing."),
        (0.0, -1.5, "nothing", ": worse than guessing."),
    ],
)
def test_the_verdict_says_what_a_planted_shortcut_did(
    shortcut: float, signal: float, mark: str, ends: str
) -> None:
    truth, cue, score = draw(5, rows=1500, shortcut=shortcut, signal=signal)
    strata: dict[str, npt.NDArray[Any]] = {"marker": np.where(cue == 1, "L", "R")}
    found = assess_belief(["Pneumonia"], scored(truth, score), {"marker": cue}, strata)["Pneumonia"]
    assert found["mark"] == mark
    assert found["verdict"].startswith(f"Pneumonia {roc_auc_score(truth, score):.2f}".replace("0.", "."))
    assert found["verdict"].endswith(ends)
    tells = found["tells"]["marker"]["auroc"]
    assert tells == pytest.approx(roc_auc_score(cue[truth == 0], score[truth == 0]))


def test_labels_with_few_positives_have_no_verdict() -> None:
    truth, cue, score = draw(6, rows=30)
    truth[:] = 0
    truth[:9] = 1
    assert assess_belief(["Edema"], scored(truth, score), {"cue": cue}, {}) == {}


def test_strata_of_the_label_that_confounds_most() -> None:
    random = np.random.default_rng(7)
    pneumonia = random.random(800) < 0.5
    effusion = random.random(800) < np.where(pneumonia, 0.5, 0.1)
    score = np.column_stack([pneumonia, pneumonia]) * 0.5 + random.random((800, 2)) * 0.5
    rows = np.arange(800)
    target = np.column_stack([pneumonia, effusion]).astype(float)
    images = Scored(score, target, np.ones((800, 2), bool), rows, rows, rows, rows, rows)
    found = assess_belief(["Pneumonia", "Pleural Effusion"], images, {}, {})["Pleural Effusion"]
    assert list(found["within"]) == ["Pneumonia"]
    inside = pneumonia == 1
    assert found["within"]["Pneumonia"]["strata"]["positive"]["auroc"] == pytest.approx(
        roc_auc_score(effusion[inside], score[inside, 1])
    )
    assert found["mark"] == "nothing"
