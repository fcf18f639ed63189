"""What a label's AUROC rests on: within strata, balanced, and predicted by covariates."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.measure.belief import Within, add_belief, assess_belief, judge, measure_balanced, split_values
from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.metrics import Facts, Floats, Named


def draw(seed: int, rows: int = 400, shortcut: float = 0, signal: float = 1) -> tuple[Floats, Floats, Floats]:
    """Truth, a covariate of 0 and 1 that agrees with it, and a score of both."""
    random = np.random.default_rng(seed)
    truth = random.random(rows) < 0.4
    cue = np.where(random.random(rows) < (1 + shortcut) / 2, truth, ~truth).astype(float)
    score = signal * truth + 3 * shortcut * cue + random.normal(size=rows)
    return truth.astype(float), cue, 1 / (1 + np.exp(-score))


def scored(target: Floats, scores: Floats) -> Scored:
    rows = np.arange(len(target))
    target, scores = (cells.reshape(len(rows), -1) for cells in (target, scores))
    return Scored(scores, target, np.ones(target.shape, bool), *[rows] * 5)


def believe(names: list[str], images: Scored, covariates: Named, strata: Facts) -> Evaluation:
    evaluation = Evaluation({"split": "valid", "unit": "image", "labels": names})
    add_belief(evaluation, images, covariates, strata)
    return evaluation


def test_unlike_projections_are_measured_apart() -> None:
    truth, cue, score = draw(1)
    projection = np.where(cue == 1, "AP", "PA")
    projection[cue == 0] = np.where(np.arange((cue == 0).sum()) < 9, "LL", "PA")
    evaluation = believe(["Edema"], scored(truth, score), {"cue": cue}, {"projection": projection})
    assert evaluation.get("auroc_within", "Edema", group="projection=LL").value is None
    for name in ("AP", "PA"):
        rows = projection == name
        within = evaluation.get("auroc_within", "Edema", group=f"projection={name}").value
        assert within == pytest.approx(roc_auc_score(truth[rows], score[rows]))


def test_a_balanced_auroc_is_that_of_weights_which_take_away_what_a_covariate_tells() -> None:
    truth, cue, score = draw(8, rows=4000, shortcut=0.6, signal=0)
    assert roc_auc_score(truth, score) > 0.7
    balanced = measure_balanced(score.round(1), truth == 1, np.arange(len(truth)), {"cue": cue})
    assert balanced["low"] < 0.5 < balanced["high"]
    assert balanced["positives"] < truth.sum()
    chance = np.where(cue == 1, *(truth[cue == state].mean() for state in (1, 0)))  # as a regression on cue has it
    weight = np.where(truth == 1, 1 - chance, chance)
    assert balanced["auroc"] == pytest.approx(roc_auc_score(truth, score.round(1), sample_weight=weight), abs=1e-5)


def test_values_are_split_into_groups_of_equal_size() -> None:
    truth = np.arange(400) < 200
    number = np.random.default_rng(0).permutation(400).astype(float)
    number[:8] = np.nan
    assert (split_values(number, truth) == -1).sum() == 8
    assert np.bincount(split_values(number, truth) + 1)[1:].tolist() == pytest.approx([39.2] * 10, abs=1)
    assert split_values(np.where(truth, 1.0, np.nan), truth).tolist() == [0] * 200 + [-1] * 200
    assert np.unique(split_values(np.arange(400.0), np.arange(400) < 20)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("shortcut", "signal", "mark", "ends"),
    [
        (0.0, 1.5, "none", ": no shortcut found among marker, propensity, predicted score."),
        (0.6, 1.5, "partly", ": partly a shortcut: {:.2f} among images of equal marker."),
        (0.6, 0.0, "shown", ": shortcut shown: {:.2f} among images of equal marker."),
        (0.0, 0.0, "unclear", ": cannot tell: not distinguishable from chance."),
        (0.0, -1.5, "unclear", ": cannot tell: below chance."),
    ],
)
def test_the_verdict_says_what_a_planted_shortcut_did(shortcut: float, signal: float, mark: str, ends: str) -> None:
    truth, cue, score = draw(5, rows=1500, shortcut=shortcut, signal=signal)
    strata = {"marker": np.where(cue == 1, "L", "R")}
    evaluation = believe(["Pneumonia"], scored(truth, score), {"AP": cue}, strata)
    (verdict,) = evaluation.select(metric="verdict")
    assert verdict.group == mark
    pairs = right = 0.0
    for rows in (cue == 0, cue == 1):
        count = truth[rows].sum() * (1 - truth[rows]).sum()
        pairs, right = pairs + count, right + count * roc_auc_score(truth[rows], score[rows])
    auroc, share = (evaluation.get(f"{name}_within", "Pneumonia", group="marker").value for name in ("auroc", "pairs"))
    assert (auroc, share) == pytest.approx((right / pairs, pairs / (truth.sum() * (1 - truth).sum())))
    assert verdict.note.startswith(f"Pneumonia {roc_auc_score(truth, score):.2f}".replace("0.", "."))
    assert verdict.note.endswith(ends.format(right / pairs).replace(" 0.", " ."))


@pytest.mark.parametrize(("rows", "positives"), [(200, 20), (200, 25), (1000, 60), (3000, 300)])
def test_only_a_score_that_is_the_patient_number_is_condemned(rows: int, positives: int) -> None:
    truth = (np.arange(rows) < positives).astype(float)
    random = np.random.default_rng(rows)
    number, other = random.normal(size=(2, rows))
    number += 0.7 * truth
    strata = {name: random.choice(values, rows) for name, values in (("sex", ["F", "M"]), ("view", ["AP", "PA"]))}
    shortcut = assess_belief(["Edema"], scored(truth, number), {"patient number": number}, {})["Edema"]
    honest = assess_belief(["Edema"], scored(truth, number + 0.25 * truth), {"x": other}, strata)["Edema"]
    assert shortcut["mark"] in (("shown",) if rows == 3000 else ("shown", "partly", "unclear"))
    assert honest["mark"] in ("none", "unclear")


def test_many_weak_covariates_and_a_u_shaped_one_are_found_together() -> None:
    random = np.random.default_rng(0)
    truth = random.random(2000) < 0.3
    weak = {f"c{number}": random.normal(size=2000) + 0.33 * truth for number in range(6)}
    summed = believe(["Edema"], scored(truth * 1.0, np.sum(list(weak.values()), axis=0)), weak, {})
    assert next(summed.select(metric="verdict")).group in ("shown", "partly")
    assert (summed.get("auroc_balanced", "Edema").low or 1) < 0.5
    number = np.where(truth, random.choice([2500, 7500], 2000), 5000) + random.normal(size=2000) * 600
    ends = assess_belief(["Edema"], scored(truth * 1.0, abs(number - 5000)), {"n": number}, {})["Edema"]
    assert ends["mark"] in ("shown", "partly")
    # Images of unknown number are not equal in it, although they are in one group.
    half = np.where(random.random(2000) < 0.5, number, np.nan)
    unknown = assess_belief(["Edema"], scored(truth * 1.0, abs(number - 5000)), {"n": half}, {})["Edema"]
    assert unknown["mark"] in ("shown", "partly")
    few = np.where(np.arange(2000) < 20, number, np.nan)
    assert not list(believe(["Edema"], scored(truth * 1.0, number), {"n": few}, {}).select(group="n"))


def test_classes_that_covariates_tell_apart_completely_are_not_balanced() -> None:
    truth, _, score = draw(3, rows=100)
    balanced = measure_balanced(score, truth == 1, np.arange(100), {"label": truth})
    assert balanced["auroc"] is None
    belief = assess_belief(["Edema"], scored(truth, score), {"label": truth}, {})["Edema"]
    assert belief["mark"] == "unclear"
    nine = (np.arange(100) < 9).astype(float)
    assert assess_belief(["Edema"], scored(nine, score), {"label": truth}, {}) == {}


def test_strata_of_the_label_that_confounds_most() -> None:
    random = np.random.default_rng(7)
    pneumonia = random.random(800) < 0.5
    effusion = random.random(800) < np.where(pneumonia, 0.5, 0.1)
    score = np.column_stack([pneumonia, pneumonia]) * 0.5 + random.random((800, 2)) * 0.5
    images = scored(np.column_stack([pneumonia, effusion]).astype(float), score)
    evaluation = believe(["Pneumonia", "Pleural Effusion"], images, {}, {})
    within = evaluation.select(metric="fall_within", label="Pleural Effusion")
    assert [row.group for row in within] == ["Pneumonia"]
    assert next(evaluation.select(metric="verdict", label="Pleural Effusion")).group == "shown"


def test_a_verdict_by_a_prediction_names_the_covariate_that_explains_most() -> None:
    def part(auroc: float) -> Within:
        fall = {"value": 0.9 - auroc, "low": 0.01, "high": 0.2}
        return Within({"value": auroc, "low": auroc - 0.01}, {"value": 1.0}, fall, {"low": -0.1, "high": 0.1})

    within = {"sex": part(0.88), "projection": part(0.86), "predicted score": part(0.8)}
    area, balanced = {"value": 0.9, "low": 0.89, "high": 0.91}, {"auroc": None, "positives": None}
    sentence = "partly a shortcut: .80 among images of equal predicted score, .86 of equal projection"
    assert judge(area, within, balanced) == ("partly", sentence)
