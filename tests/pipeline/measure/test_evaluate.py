import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from pipeline import DataError
from pipeline.measure.calibration import apply_calibration
from pipeline.measure.delong import combine, measure_areas, measure_precision, report_auroc
from pipeline.measure.evaluate import (
    Scored,
    add_groups,
    assess,
    assess_groups,
    calibrate,
    leave_uncalibrated,
    study_level,
)
from pipeline.measure.evaluation import MEANS, Evaluation, Row, read_evaluation
from pipeline.measure.metrics import COMPETITION, Figure, brier_score, decide, wilson_limits

NAMES = [*COMPETITION, "Fracture", "Rare"]


def draw_images(count: int = 600, seed: int = 0) -> Scored:
    """Images of patients with one or two studies of one to three views; no Fracture, and 4 rare positives."""
    random = np.random.default_rng(seed)
    patient = np.sort(random.integers(0, count // 4, count))
    study = random.integers(1, 3, count)
    _, codes = np.unique(patient * 3 + study, return_inverse=True)
    truth = random.random((codes.max() + 1, len(NAMES))) < 0.3
    truth[:, 5] = False
    truth[:, 6] = np.arange(len(truth)) % 110 == 0
    target = truth[codes].astype(np.float32)
    logits = random.normal(-1, 1, target.shape) + 1.5 * target
    return Scored(
        scores=(1 / (1 + np.exp(-4 * logits))).astype(np.float32),
        target=target,
        mask=random.random(target.shape) < 0.95,
        patient=np.char.mod("patient%05d", patient),
        study=study,
        sex=np.array(["Female", "Male"])[patient % 2],
        age=patient % 95 - 1,
        projection=random.choice(["AP", "PA", "LL"], count, p=[0.6, 0.39, 0.01]),
    )


@pytest.fixture(scope="module")
def images() -> Scored:
    return draw_images()


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    return calibrate(NAMES, draw_images(seed=1))


def limits(row: Row, *names: str) -> Figure:
    return {name: getattr(row, name) for name in names or ("value", "low", "high")}


@pytest.fixture(scope="module")
def evaluation(images: Scored, calibration: dict[str, Any]) -> Evaluation:
    return assess(NAMES, images, calibration)


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_studies_are_combined_as_pandas_does(images: Scored, combine: str) -> None:
    order = np.random.default_rng(2).permutation(len(images.scores))
    studies = study_level(images.take(order), combine)
    keys = [images.patient, images.study]
    scores = pd.DataFrame(np.where(images.mask, images.scores, np.nan)).groupby(keys).agg(combine)
    np.testing.assert_allclose(np.where(studies.mask, studies.scores, np.nan), scores, atol=1e-7)
    truth = pd.DataFrame(images.target).groupby(keys).first()
    for cells, expected in (
        (studies.mask, scores.notna()),
        (studies.patient, scores.index.get_level_values(0)),
        (studies.study, scores.index.get_level_values(1)),
        (studies.target, np.where(studies.mask, truth, 0)),
    ):
        np.testing.assert_array_equal(cells, expected)
    assert studies.scores.dtype == np.float32
    with pytest.raises(ValueError, match=r"^combine is 'median'; choose max or mean$"):
        study_level(images, "median")


def test_the_rows_hold_each_figure(
    images: Scored, calibration: dict[str, Any], evaluation: Evaluation, tmp_path: Path
) -> None:
    report, get = report_auroc(NAMES, *images[:4]), evaluation.get
    assert [get("auroc", mean).value for mean in MEANS] == [report[f"{mean}_auroc"] for mean in MEANS]
    used = images.mask[:, 3]
    truth, score, patient = images.target[used, 3] == 1, images.scores[used, 3], images.patient[used]
    fitted = calibration["image"]["Edema"]
    edema = {row.metric: row.number for row in evaluation.select(label="Edema", level="image", group=None)}
    assert edema["auroc"] == report["labels"]["Edema"]["auroc"]
    assert edema["auprc"] == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    calibrated = apply_calibration(score, fitted)
    assert (edema["brier"], edema["brier_calibrated"]) == (brier_score(score, truth), brier_score(calibrated, truth))
    assert edema["brier_calibrated"] < edema["brier"]
    assert edema["ece_calibrated"] < edema["ece"]
    assert (edema["temperature"], edema["bias"]) == (fitted["temperature"], fitted["bias"])
    gain = get("net_benefit_gain", "Edema", group="at 0.2")
    assert limits(gain) == decide(calibrated, truth, patient, 0.2)["net_benefit_gain"]
    assert (gain.low or 0) > 0
    threshold = get("threshold", "Edema", group="sensitivity").number
    assert threshold == fitted["thresholds"]["sensitivity"]
    called = score >= threshold
    rates = {row.metric: row for row in evaluation.select(label="Edema", level="image", group="sensitivity")}
    assert rates["sensitivity"].value == pytest.approx(recall_score(truth, called))
    assert {name: limits(row, "low", "high") for name, row in rates.items() if row.low} == {
        "sensitivity": wilson_limits(called[truth], patient[truth]),
        "specificity": wilson_limits(~called[~truth], patient[~truth]),
        "ppv": wilson_limits(truth[called], patient[called]),
        "npv": wilson_limits(~truth[~called], patient[~called]),
    }
    assert {name for name in NAMES if get("auroc", name).few} == {"Fracture", "Rare"}

    fracture = get("auroc", "Fracture")
    assert (fracture.value, get("auprc", "Fracture").value, fracture.positives) == (None, None, 0)
    assert {row.value for row in evaluation.select(metric="threshold", label="Fracture")} == {None}
    studies = study_level(images)
    assert get("auroc", "Fracture", "study").negatives == studies.mask[:, 5].sum()  # none is lost
    for metric, area in (("auroc", measure_areas(*images[:4])), ("auprc", measure_precision(*images[:4]))):
        row, mean = (get(metric, name) for name in ("Edema", "macro10"))
        assert [row.low, row.high] == pytest.approx([area.low[3], area.high[3]])
        assert get(metric, "Fracture").low is None
        assert limits(mean) == combine(area, [0.2] * 5 + [0, 0])
        assert mean.value == pytest.approx(np.mean([get(metric, name).number for name in COMPETITION]), abs=1e-12)
    assert (get("images").value, get("patients").value) == (600, len(set(images.patient.tolist())))
    assert get("studies", level="study").value == len(studies.scores)
    used = studies.mask[:, 3]
    auroc = roc_auc_score(studies.target[used, 3], studies.scores[used, 3])
    assert get("auroc", "Edema", "study").value == pytest.approx(auroc)
    chosen = get("threshold", "Edema", "study", "youden").value
    assert chosen == calibration["study"]["Edema"]["thresholds"]["youden"] != threshold
    path = tmp_path / "evaluation.json"
    path.write_bytes(evaluation.to_json())
    assert read_evaluation(path) == evaluation
    row = json.loads(path.read_text())["rows"][0]
    assert " ".join(row) == "level split label group metric scorer value low high positives negatives few note"
    path.write_text('{"labels": {}}')
    with pytest.raises(DataError, match=f"^{path}: not an evaluation: 'rows'; write it again with evaluate$"):
        read_evaluation(path)


def test_without_dev_there_is_no_calibration_and_without_scores_nothing(images: Scored) -> None:
    plain = assess(NAMES, images, leave_uncalibrated(NAMES, None))
    assert not {"brier_calibrated", "threshold", "sensitivity"} & {row.metric for row in plain.rows}
    given = assess(NAMES, images, leave_uncalibrated(NAMES, 0.5))
    used = images.mask[:, 3]
    hits = recall_score(images.target[used, 3], images.scores[used, 3] >= 0.5)
    assert given.get("sensitivity", "Edema", group="given").value == pytest.approx(hits)
    for broken, message in (
        (images.take(slice(0)), "no images to evaluate"),
        (images._replace(scores=np.full_like(images.scores, np.nan)), "scores are not finite"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            assess(NAMES, broken, leave_uncalibrated(NAMES, None))


def compare_groups(images: Scored, calibration: dict[str, Any], **more: Any) -> Evaluation:
    evaluation = Evaluation({"split": "valid", "unit": "image", "labels": NAMES})
    add_groups(evaluation, images, calibration["image"], more)
    return evaluation


def test_subgroups_are_those_of_a_filter(images: Scored, calibration: dict[str, Any], evaluation: Evaluation) -> None:
    get = evaluation.get
    sizes = {row.group: row for row in evaluation.select(metric="images") if row.group}
    others = {group: row.value for group, row in sizes.items() if row.note == "in no group"}
    young, unknown, side = (images.age >= 0) & (images.age < 18), images.age < 0, images.projection == "LL"
    assert others == {"age=0-17": young.sum(), "age=unknown": unknown.sum(), "projection=LL": side.sum()}
    compared = get("auroc", "macro", group="age=18-39").note.split(", ")
    assert "Fracture" not in get("auroc", "macro", group="sex=Male").note
    threshold, rates = calibration["image"]["Cardiomegaly"]["thresholds"]["youden"], []
    for name, low, high in (("18-39", 18, 40), ("40-59", 40, 60), ("60-79", 60, 80), ("80+", 80, 999)):
        chosen, group = (images.age >= low) & (images.age < high), f"age={name}"
        assert sizes[group].value == chosen.sum()
        used = chosen & images.mask[:, 1]
        truth, score = images.target[used, 1] == 1, images.scores[used, 1]
        auroc, tpr = (get(metric, "Cardiomegaly", group=group) for metric in ("auroc", "tpr"))
        assert auroc.value == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
        assert tpr.value == pytest.approx(recall_score(truth, score >= threshold))
        assert (auroc.positives, auroc.negatives) == (truth.sum(), (~truth).sum())
        if len(np.unique(images.patient[used][truth])) >= 10:
            rates.append(tpr.number)
        macro = get("auroc", "macro", group=group)
        if name == "80+":  # of 14 patients
            assert all(get("auroc", label, group=group).few for label in NAMES)
            assert macro.value is None
            continue
        assert macro.value == pytest.approx(np.mean([get("auroc", label, group=group).number for label in compared]))
    gap = get("tpr_gap", "Cardiomegaly", group="age")
    assert gap.value == pytest.approx(max(rates) - min(rates))
    assert (gap.low or 1) < gap.number < (gap.high or 0)
    assert get("tpr_gap", "Fracture", group="age").value is None
    assert get("tpr_gap", "Rare", group="sex").value is None  # fewer than 10 positives
    gaps = assess_groups(NAMES, images, calibration["image"])["age"]
    assert gaps["tpr_gap_limits"]["Cardiomegaly"] == limits(gap, "low", "high")
    women = compare_groups(images._replace(sex=np.full(600, "Female")), calibration)
    for metric in ("auroc", "tpr"):
        row = women.get(metric, "Edema", group="sex=Male")
        assert (row.value, row.low, row.positives, row.few) == (None, None, 0, True)
    assert women.get("images", group="sex=Male").value == 0
    male, female = (women.get("auroc", "macro", group=f"sex={name}").value for name in ("Male", "Female"))
    assert (male is None, female is None) == (True, False)
    assert {row.value for row in women.select(metric="tpr_gap", group="sex")} == {None}


def test_groups_are_compared_on_labels_with_enough_of_both(images: Scored, calibration: dict[str, Any]) -> None:
    """A label with 1 positive of one group is in neither's mean; the difference is paired by patient."""
    target, few = images.target.copy(), np.flatnonzero(images.projection == "PA")
    target[few, 0] = few == few[-1]
    changed = images._replace(target=target, mask=np.ones_like(images.mask))
    evaluation = compare_groups(changed, calibration)
    rare = evaluation.get("auroc", "Atelectasis", group="projection=PA")
    assert (rare.positives, rare.few, rare.value is None) == (1, True, False)
    ap, pa = (evaluation.get("auroc", "macro", group=f"projection={name}") for name in ("AP", "PA"))
    assert ap.note == pa.note == ", ".join(COMPETITION[1:])
    means, areas = [], []
    for name in ("PA", "AP"):
        rows = changed.projection == name
        means.append(roc_auc_score(target[rows, 1:5], changed.scores[rows, 1:5], average="macro"))
        areas.append(measure_areas(*changed[:2], np.repeat(rows[:, None], 7, axis=1), changed.patient))
    assert [pa.value, ap.value] == pytest.approx(means, abs=1e-12)
    assert (ap.low or 1) < ap.number < (ap.high or 0)
    less = evaluation.get("auroc_less_first", "macro", group="projection=PA")
    assert less.value == pytest.approx(means[0] - means[1], abs=1e-12)
    share = np.array([0, 1, 1, 1, 1, 0, 0]) / 4
    assert limits(less) == combine(areas[0].join(areas[1]), np.concatenate([share, -share]))


def test_facts_make_subgroups(images: Scored, calibration: dict[str, Any]) -> None:
    draw = np.random.default_rng(3)
    race = draw.choice(np.array(["White", "Black", "Asian", None], object), len(images.scores))
    facts = {
        "race": race,
        "nine": draw.choice([f"group {number}" for number in range(9)], len(race)).astype(object),
        "one": np.array(["yes", None], object)[draw.integers(0, 2, len(race))],
        "none": np.full(len(race), None),
    }
    evaluation = assess(NAMES, images, calibration, facts=facts)
    variables = dict.fromkeys(row.group for row in evaluation.select(metric="tpr_gap"))
    assert list(variables) == ["sex", "age", "projection", "race"]
    assert evaluation.head["many_groups"] == {"nine": 9}
    races = {name: (race == name) for name in ("Asian", "Black", "White")}
    assert evaluation.get("images", group="race=unknown").value == (race == None).sum()  # noqa: E711
    for name, chosen in races.items():
        for column, label in enumerate(NAMES):
            cells = chosen & images.mask[:, column]
            truth, score = images.target[cells, column], images.scores[cells, column]
            row = evaluation.get("auroc", label, group=f"race={name}")
            assert row.positives == truth.sum()
            expected = roc_auc_score(truth, score) if truth.any() else None
            assert row.value == pytest.approx(expected, abs=1e-12)
    evaluations = compare_groups(images, calibration), compare_groups(images, calibration, race=race)
    plain, wider = (each.get("tpr_gap", "Edema", group="sex") for each in evaluations)
    assert plain.value == wider.value
    assert (wider.low or 1) < (plain.low or 0)  # among more gaps, the widest is wider by chance
