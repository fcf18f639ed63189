"""A run's scores on another data set, beside those on its own valid."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from pipeline.labels import hash_fraction
from pipeline.measure.elsewhere import subtract_own, try_recalibration
from pipeline.measure.evaluate import Scored, assess, calibrate
from pipeline.measure.metrics import independent_limits

NAMES = ("Edema", "Pneumonia", "Fracture", "Pleural Other")
RAW: dict[str, dict[str, Any]] = {
    name: {"temperature": None, "bias": None, "thresholds": {}} for name in NAMES
}


def draw(seed: int, cells: int, less: float) -> Scored:
    """Scores whose logits are `less` too low; Fracture is not annotated, Pleural Other has 4 positives."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(cells, 4))
    target = (random.random((cells, 4)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    target[:, 3] = np.arange(cells) < 4
    mask = np.ones((cells, 4), np.bool_)
    mask[:, 2] = False
    patient = np.array([f"patient{row // 2}" for row in range(cells)])
    nothing = np.array([None] * cells, object)
    scores = (1 / (1 + np.exp(less - logits))).astype(np.float32)
    return Scored(scores, target, mask, patient, patient, nothing, np.full(cells, -1), nothing)


def evaluate(scored: Scored) -> dict[str, Any]:
    return assess(NAMES, scored, calibrate(NAMES, scored), resamples=0)


def test_limits_of_a_difference_are_those_newcombe_published() -> None:
    # Table II of Newcombe (1998), method 10: 56 of 70 less 48 of 80.
    sides = []
    for hits, cells in ((56, 70), (48, 80)):
        limits = binomtest(hits, cells).proportion_ci(method="wilson")
        sides.append((hits / cells, limits.low, limits.high))
    found = independent_limits(sides[0], sides[1])
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.0524, 0.3339)


def test_labels_of_both_sets_are_compared() -> None:
    there, own = draw(1, 400, 2.0), draw(2, 300, 0.0)
    theirs, ours = evaluate(there), evaluate(own)
    found = subtract_own(there, theirs, ours)
    assert list(found["labels"]) == ["Edema", "Pneumonia", "Pleural Other"]
    assert [row["few"] for row in found["labels"].values()] == [False, False, True]
    aurocs = [[roc_auc_score(of.target[:, c], of.scores[:, c]) for c in (0, 1)] for of in (there, own)]
    row = found["labels"]["Pneumonia"]
    assert row["less_own"]["difference"] == pytest.approx(aurocs[0][1] - aurocs[1][1], abs=1e-12)
    assert (row["positives"], row["own_positives"]) == (there.target[:, 1].sum(), own.target[:, 1].sum())
    assert found["macro_labels"] == ["Edema", "Pneumonia"]
    assert not found["widened"]
    macro = found["macro"]
    assert macro["less_own"]["difference"] == pytest.approx(
        np.mean(aurocs[0]) - np.mean(aurocs[1]), abs=1e-12
    )
    assert (macro["low"], macro["own"]["low"]) == (
        theirs["intervals"]["auroc"]["macro10"]["low"],
        ours["intervals"]["auroc"]["macro10"]["low"],
    )


def test_where_the_own_macro_is_over_other_labels_its_limits_are_widened() -> None:
    there, own = draw(1, 400, 2.0), draw(2, 300, 0.0)
    there.mask[:, 0] = False
    ours = evaluate(own)
    found = subtract_own(there, evaluate(there), ours)
    assert found["macro_labels"] == ["Pneumonia"]
    assert found["widened"]
    assert found["macro"]["own"] == found["labels"]["Pneumonia"]["own"]
    there.mask[:] = False
    nothing = subtract_own(there, evaluate(there), ours)
    assert nothing == {"labels": {}, "macro": None, "macro_labels": [], "widened": False}


def test_half_of_the_patients_recalibrate_the_other_half() -> None:
    there = draw(1, 4000, 2.0)
    there.scores[:, 0] = 1 - there.scores[:, 0]  # the contrary: no fit
    found = try_recalibration(NAMES, there, RAW)
    half = np.array([hash_fraction("recalibrate", name) < 0.5 for name in there.patient])
    assert found["patients"] == {
        name: len(set(there.patient[of])) for name, of in (("fitted", half), ("measured", ~half))
    }
    assert list(found["labels"]) == ["Edema", "Pneumonia", "Pleural Other"]
    edema, row = found["labels"]["Edema"], found["labels"]["Pneumonia"]
    assert (edema["after"], edema["note"]) == (None, "the scores tell nothing or the contrary")
    score, truth = there.scores[:, 1].astype(float), there.target[:, 1] == 1
    assert row["fitted"] == {"positives": truth[half].sum(), "negatives": (~truth[half]).sum(), "few": False}
    assert row["measured"]["positives"] == truth[~half].sum()
    assert row["before"]["brier"] == pytest.approx(brier_score_loss(truth[~half], score[~half]))
    logits = np.log(score / (1 - score))[:, None]
    reference = LogisticRegression(C=np.inf).fit(logits[half], truth[half]).predict_proba(logits[~half])[:, 1]
    assert row["after"]["brier"] == pytest.approx(brier_score_loss(truth[~half], reference), abs=1e-4)
    assert row["before"]["ece"] > 0.2 > 0.05 > row["after"]["ece"]
