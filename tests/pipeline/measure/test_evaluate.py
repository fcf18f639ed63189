import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from pipeline.measure.bootstrap import resample_auprc
from pipeline.measure.calibration import apply_calibration
from pipeline.measure.delong import combine_limits, measure_areas
from pipeline.measure.evaluate import Scored, assess, assess_groups, calibrate, study_level
from pipeline.measure.metrics import COMPETITION, brier_score, decide, report_auroc, wilson_limits

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


@pytest.fixture(scope="module")
def evaluation(images: Scored, calibration: dict[str, Any]) -> dict[str, Any]:
    return assess(NAMES, images, calibration, resamples=200)


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_studies_are_combined_as_pandas_does(images: Scored, combine: str) -> None:
    order = np.random.default_rng(2).permutation(len(images.scores))
    found = study_level(images.take(order), combine)
    keys = [images.patient, images.study]
    scores = pd.DataFrame(np.where(images.mask, images.scores, np.nan)).groupby(keys).agg(combine)
    np.testing.assert_allclose(np.where(found.mask, found.scores, np.nan), scores, atol=1e-7)
    np.testing.assert_array_equal(found.mask, scores.notna())
    np.testing.assert_array_equal(found.patient, scores.index.get_level_values(0))
    np.testing.assert_array_equal(found.study, scores.index.get_level_values(1))
    truth = pd.DataFrame(images.target).groupby(keys).first()
    np.testing.assert_array_equal(found.target, np.where(found.mask, truth, 0))
    assert found.scores.dtype == np.float32


def test_an_unknown_way_to_combine_is_refused(images: Scored) -> None:
    with pytest.raises(ValueError, match=r"^combine is 'median'; choose max or mean$"):
        study_level(images, "median")


def test_the_document_holds_each_figure(
    images: Scored, calibration: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    report = report_auroc(NAMES, *images[:4])
    assert {
        name: evaluation[name] for name in ("macro_auroc", "macro10_auroc", "mean5_auroc", "skipped")
    } == {name: value for name, value in report.items() if name != "labels"}
    used = images.mask[:, 3]
    truth, score = images.target[used, 3] == 1, images.scores[used, 3]
    edema, fitted = evaluation["labels"]["Edema"], calibration["image"]["Edema"]
    assert edema["auroc"] == report["labels"]["Edema"]["auroc"]
    assert edema["auprc"] == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    assert edema["brier"] == brier_score(score, truth)
    calibrated = brier_score(apply_calibration(score, fitted), truth)
    assert edema["brier_calibrated"] == calibrated
    assert calibrated is not None
    assert calibrated < edema["brier"]
    assert edema["ece_calibrated"] < edema["ece"]
    by_hand = decide(apply_calibration(score, fitted), truth, images.patient[used], 0.2)
    assert edema["net_benefit"][2] == by_hand
    assert by_hand["gain"]["low"] > 0
    best = edema["operating_points"]["sensitivity"]
    assert best["threshold"] == fitted["thresholds"]["sensitivity"]
    assert best["sensitivity"] == pytest.approx(recall_score(truth, score >= best["threshold"]))

    called, owner = score >= best["threshold"], images.patient[used]
    assert best["intervals"] == {
        "sensitivity": wilson_limits(called[truth], owner[truth]),
        "specificity": wilson_limits(~called[~truth], owner[~truth]),
        "ppv": wilson_limits(truth[called], owner[called]),
        "npv": wilson_limits(~truth[~called], owner[~called]),
    }
    few = {name for name, label in evaluation["labels"].items() if label["few"]}
    assert few == {"Fracture", "Rare"}

    fracture = evaluation["labels"]["Fracture"]
    assert (fracture["auroc"], fracture["auprc"], fracture["positives"]) == (None, None, 0)
    assert fracture["operating_points"] == {"youden": None, "max_f1": None, "sensitivity": None}
    assert evaluation["skipped"] == ["Fracture"]
    assert evaluation["macro10_auprc"] == pytest.approx(
        np.mean([evaluation["labels"][name]["auprc"] for name in COMPETITION]), abs=1e-12
    )
    assert (evaluation["rows"], evaluation["patients"]) == (600, len(set(images.patient.tolist())))
    studies = study_level(images)
    assert evaluation["study"]["rows"] == len(studies.scores)
    assert evaluation["study"]["labels"]["Edema"]["auroc"] == pytest.approx(
        roc_auc_score(studies.target[studies.mask[:, 3], 3], studies.scores[studies.mask[:, 3], 3])
    )
    chosen = evaluation["study"]["labels"]["Edema"]["operating_points"]["youden"]["threshold"]
    assert chosen == calibration["study"]["Edema"]["thresholds"]["youden"] != best["threshold"]
    assert evaluation["calibration"] == calibration
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation


def test_intervals_are_of_patients(images: Scored, evaluation: dict[str, Any]) -> None:
    measured, auprc = measure_areas(*images[:4]), resample_auprc(*images[:4], 200, 0)
    found = evaluation["intervals"]
    assert (found["resamples"], found["seed"]) == (200, 0)
    edema, macro = found["auroc"]["Edema"], found["auroc"]["macro"]
    assert [edema["low"], edema["high"]] == pytest.approx([measured.low[3], measured.high[3]])
    assert found["auroc"]["mean5"] == combine_limits(measured, [0.2] * 5 + [0, 0])
    assert found["auprc"]["macro10"]["high"] == np.percentile(auprc[:, :5].mean(axis=1), 97.5)
    lost = int(np.isnan(auprc[:, 6]).sum())  # resamples without the rare label's patients
    assert lost > 0
    assert found["auprc"]["Rare"]["resamples"] == found["auprc"]["macro"]["resamples"] == 200 - lost
    assert found["auprc"]["Fracture"] == {"low": None, "high": None, "resamples": 0}
    assert found["auroc"]["Fracture"] == {"low": None, "high": None}
    assert macro["low"] < evaluation["macro_auroc"] < macro["high"]


def test_two_runs_are_compared_on_the_same_patients(images: Scored, calibration: dict[str, Any]) -> None:
    random = np.random.default_rng(3)
    noise = random.random(images.scores.shape, np.float32)
    worse, same = (images.scores + noise) / 2, images.scores**2
    found = assess(NAMES, images, calibration, against=("runs/worse", worse), resamples=200)
    against = found["against"]
    assert against["run"] == "runs/worse"
    edema, used = against["auroc"]["Edema"], images.mask[:, 3]
    theirs = roc_auc_score(images.target[used, 3], worse[used, 3])
    assert edema["difference"] == pytest.approx(found["labels"]["Edema"]["auroc"] - theirs, abs=1e-12)
    both = measure_areas(*images[:4]).join(measure_areas(worse, *images[1:4]))
    weights = np.eye(14)[3] - np.eye(14)[10]
    assert {side: edema[side] for side in ("low", "high")} == combine_limits(both, weights)
    values = resample_auprc(*images[:4], 200, 0) - resample_auprc(worse, *images[1:4], 200, 0)
    assert against["auprc"]["Edema"]["low"] == pytest.approx(np.percentile(values[:, 3], 2.5))
    assert edema["excludes_zero"] is True
    assert against["auroc"]["Fracture"]["difference"] is None
    studies = study_level(images)
    other = study_level(images._replace(scores=worse))
    assert found["study"]["against"]["auroc"]["macro"]["difference"] == pytest.approx(
        report_auroc(NAMES, *studies[:4])["macro_auroc"] - report_auroc(NAMES, *other[:4])["macro_auroc"]  # type: ignore[operator]
    )
    zero = assess(NAMES, images, calibration, against=("same", same), resamples=200)["against"]["auroc"]
    assert zero["macro10"]["difference"] == pytest.approx(0, abs=1e-12)
    assert [zero["macro10"][side] for side in ("low", "high")] == pytest.approx([0, 0], abs=1e-6)


def test_subgroups_are_those_of_a_filter(
    images: Scored, calibration: dict[str, Any], evaluation: dict[str, Any]
) -> None:
    found = evaluation["subgroups"]
    assert list(found) == ["sex", "age", "projection"]
    assert list(found["age"]["groups"]) == ["18-39", "40-59", "60-79", "80+"]
    unknown, young = int((images.age < 0).sum()), int(((images.age >= 0) & (images.age < 18)).sum())
    assert found["age"]["others"] == {"0-17": young, "unknown": unknown}
    assert found["projection"]["others"] == {"LL": int((images.projection == "LL").sum())}
    thresholds = calibration["image"]["Cardiomegaly"]["thresholds"]
    threshold = thresholds["youden"]
    assert threshold != thresholds["max_f1"]
    rates = []
    for name, low, high in (("18-39", 18, 40), ("40-59", 40, 60), ("60-79", 60, 80), ("80+", 80, 999)):
        chosen = (images.age >= low) & (images.age < high)
        group = found["age"]["groups"][name]
        assert group["images"] == int(chosen.sum())
        used = chosen & images.mask[:, 1]
        truth, score = images.target[used, 1] == 1, images.scores[used, 1]
        label = group["labels"]["Cardiomegaly"]
        assert label["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
        assert label["tpr"] == pytest.approx(recall_score(truth, score >= threshold))
        assert (label["positives"], label["negatives"]) == (int(truth.sum()), int((~truth).sum()))
        if len(np.unique(images.patient[used][truth])) >= 10:
            rates.append(label["tpr"])
        if name == "80+":  # of 14 patients
            assert all(label["few"] for label in group["labels"].values())
            assert group["macro_auroc"] is None
            continue
        assert group["macro_auroc"] == pytest.approx(
            np.mean([group["labels"][name]["auroc"] for name in found["age"]["macro_labels"]])
        )
    limits = found["age"]["tpr_gap_limits"]["Cardiomegaly"]
    assert limits["low"] < max(rates) - min(rates) < limits["high"]
    assert found["age"]["tpr_gap"]["Cardiomegaly"] == pytest.approx(max(rates) - min(rates))
    assert found["age"]["tpr_gap"]["Fracture"] is None
    assert found["sex"]["tpr_gap"]["Rare"] is None  # fewer than 10 positives
    assert "Fracture" not in found["sex"]["macro_labels"]


def test_groups_are_compared_on_labels_with_enough_of_both(
    images: Scored, calibration: dict[str, Any]
) -> None:
    """A label with 1 positive of one group is in neither's mean; the difference is paired by patient."""
    target, few = images.target.copy(), np.flatnonzero(images.projection == "PA")
    target[few[:-1], 0] = 0
    target[few[-1], 0] = 1
    changed = images._replace(target=target, mask=np.ones_like(images.mask))
    found = assess(NAMES, changed, calibration, resamples=0)["subgroups"]["projection"]
    pa, ap = found["groups"]["PA"], found["groups"]["AP"]
    assert pa["labels"]["Atelectasis"]["positives"] == 1
    assert pa["labels"]["Atelectasis"]["few"] is True
    assert pa["labels"]["Atelectasis"]["auroc"] is not None
    assert found["macro_labels"] == list(COMPETITION[1:])
    means = []
    for group in ("AP", "PA"):
        rows = changed.projection == group
        means.append(roc_auc_score(target[rows, 1:5], changed.scores[rows, 1:5], average="macro"))
    assert [ap["macro_auroc"], pa["macro_auroc"]] == pytest.approx(means, abs=1e-12)
    assert ap["interval"]["low"] < ap["macro_auroc"] < ap["interval"]["high"]
    less = found["less_first"]["PA"]
    assert less["difference"] == pytest.approx(means[1] - means[0], abs=1e-12)
    areas = [
        measure_areas(
            *changed[:2], np.repeat((changed.projection == group)[:, None], 7, axis=1), changed.patient
        )
        for group in ("PA", "AP")
    ]
    share = np.array([0, 1, 1, 1, 1, 0, 0]) / 4
    expected = combine_limits(areas[0].join(areas[1]), np.concatenate([share, -share]))
    assert {side: less[side] for side in ("low", "high")} == expected


def test_groups_without_images_are_undefined(images: Scored, calibration: dict[str, Any]) -> None:
    women = images._replace(sex=np.full(600, "Female"), projection=np.array([None, ""] * 300))
    groups = assess(NAMES, women, calibration, resamples=0)["subgroups"]
    sex = groups["sex"]
    assert groups["projection"]["others"] == {"unknown": 600}
    assert groups["projection"]["macro_labels"] == []
    assert sex["groups"]["Male"]["images"] == 0
    assert sex["groups"]["Male"]["macro_auroc"] is None
    assert sex["groups"]["Male"]["labels"]["Edema"] == {
        "auroc": None, "positives": 0, "negatives": 0, "few": True, "tpr": None,
        "intervals": {key: {"low": None, "high": None} for key in ("auroc", "tpr")},
    }  # fmt: skip
    assert sex["groups"]["Female"]["macro_auroc"] is not None
    assert set(sex["tpr_gap"].values()) == {None}


def test_nothing_to_evaluate_is_refused(images: Scored, calibration: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^no images to evaluate$"):
        assess(NAMES, images.take(slice(0)), calibration)
    broken = images._replace(scores=np.full_like(images.scores, np.nan))
    with pytest.raises(ValueError, match=r"^scores are not finite$"):
        assess(NAMES, broken, calibration)


def test_facts_make_subgroups(images: Scored, calibration: dict[str, Any]) -> None:
    draw = np.random.default_rng(3)
    race = draw.choice(np.array(["White", "Black", "Asian", None], object), len(images.scores))
    facts = {
        "race": race,
        "nine": draw.choice([f"group {number}" for number in range(9)], len(race)).astype(object),
        "one": np.array(["yes", None], object)[draw.integers(0, 2, len(race))],
        "none": np.full(len(race), None),
    }
    found = assess(NAMES, images, calibration, resamples=0, facts=facts)
    assert list(found["subgroups"]) == ["sex", "age", "projection", "race"]
    assert found["many_groups"] == {"nine": 9}
    races = found["subgroups"]["race"]
    assert list(races["groups"]) == ["Asian", "Black", "White"]
    assert races["others"] == {"unknown": (race == None).sum()}  # noqa: E711
    for name, group in races["groups"].items():
        for column, label in enumerate(NAMES):
            cells = (race == name) & images.mask[:, column]
            truth, score = images.target[cells, column], images.scores[cells, column]
            of_label = group["labels"][label]
            assert of_label["positives"] == truth.sum()
            if of_label["auroc"] is None:
                assert not truth.any()
            else:
                assert of_label["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    plain = assess(NAMES, images, calibration, resamples=0)["subgroups"]["sex"]
    limits, wider = plain.pop("tpr_gap_limits"), found["subgroups"]["sex"].pop("tpr_gap_limits")
    assert found["subgroups"]["sex"] == plain
    assert wider["Edema"]["low"] < limits["Edema"]["low"]  # among more gaps, the widest is wider by chance


def test_the_widest_gap_of_a_fair_network_is_not_significant() -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        truth = random.random((600, 7)) < 0.25
        score = 1 / (1 + np.exp(-random.normal(size=truth.shape) - 1.2 * truth))
        sex, projection = random.choice(["Female", "Male"], 600), random.choice(["AP", "PA"], 600)
        rows, ages = np.arange(600), random.integers(20, 95, 600)
        mask = np.ones(truth.shape, bool)
        fair = Scored(score, truth.astype(float), mask, rows, rows, sex, ages, projection)
        groups = assess_groups(NAMES, fair, {name: {"thresholds": {"youden": 0.6}} for name in NAMES})
        assert all(limits["low"] < 0 for of in groups.values() for limits in of["tpr_gap_limits"].values())
