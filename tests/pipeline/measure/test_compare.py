"""Scores beside others': methods, members, altered images, the run's own valid; against scikit-learn and pandas."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import recall_score, roc_auc_score, roc_curve

from pipeline.measure import evaluate
from pipeline.measure.delong import combine
from pipeline.measure.evaluate import AREAS, MEMBERS, Scored, assess, calibrate, leave_uncalibrated, study_level
from pipeline.measure.evaluation import COMMON, OWN, Evaluation
from pipeline.measure.metrics import wilson_limits
from tests.conftest import refused

NAMES = ["Edema", "Fracture"]
STUDIES = 300


@pytest.fixture
def studies() -> Scored:
    """Studies of 150 patients, whose Edema has a score that says something; no Fracture."""
    random = np.random.default_rng(0)
    target = np.zeros((STUDIES, 2), np.float32)
    target[:, 0] = random.random(STUDIES) < 0.3
    scores = np.clip(0.4 * target + 0.6 * random.random(target.shape), 0, 1).round(2).astype(np.float32)
    patient = np.char.mod("patient%05d", np.arange(STUDIES) // 2)
    facts = np.full(STUDIES, "Female"), np.full(STUDIES, 60), np.full(STUDIES, "AP")
    return Scored(scores, target, np.ones_like(target, bool), patient, np.arange(STUDIES) % 2, *facts)


def start() -> Evaluation:
    return Evaluation({"split": "valid", "unit": "study", "labels": NAMES})


def test_late_fusion_is_the_max_and_the_mean_of_views(studies: Scored) -> None:
    table = pa.table({"patient": ["a", "b", "a", "a", "c"], "study": [1, 1, 1, 2, 1]})
    scores = np.array([[0.2, np.nan], [0.9, np.nan], [0.6, np.nan], [0.1, np.nan], [np.nan, np.nan]])
    order = np.array(["b", "a", "c", "a"]), np.array([1, 2, 1, 1])
    rows = studies.take(slice(4))._replace(patient=order[0], study=order[1])
    combined = evaluate.combine_views(table, scores, rows)
    for (how, values), last in zip(combined.items(), (0.6, 0.4), strict=True):
        assert how == (", max of views" if last == 0.6 else ", mean of views")
        np.testing.assert_allclose(values, [[0.9, np.nan], [0.1, np.nan], [np.nan, np.nan], [last, np.nan]])
    assert list(evaluate.combine_views(table.slice(1, 1), scores[1:2], rows)) == [""]


def test_others_are_compared_on_the_rows_that_both_have(studies: Scored) -> None:
    images = studies._replace(study=np.zeros(STUDIES))  # two of each study
    worse = np.clip(images.scores + np.random.default_rng(1).normal(0, 0.5, images.scores.shape), 0, 1)
    worse[:20] = np.nan
    evaluation = assess(NAMES, images, leave_uncalibrated(NAMES, None))
    for name, scores in (("worse", worse), ("same", images.scores)):
        evaluate.add_other(evaluation, images, name, scores)
    assert evaluation.get("images", scorer="worse").value == 280
    ours = images.take(slice(20, None))
    other = ours._replace(scores=worse[20:])
    for level, sides in (("image", (ours, other)), ("study", (study_level(ours), study_level(other)))):
        get = partial(evaluation.get, level=level, scorer="worse")
        aurocs = [roc_auc_score(side.target[:, 0], side.scores[:, 0]) for side in sides]
        assert get("auroc", "Edema").value == pytest.approx(aurocs[1])
        less, mean = get("auroc_difference", "Edema"), get("auroc_difference", "macro10")
        assert less.value == pytest.approx(aurocs[0] - aurocs[1])
        assert (mean.value, mean.low, less.excludes_zero) == (less.value, less.low, True)
        for metric, measure in AREAS.items():
            row, both = get(f"{metric}_difference", "Edema"), measure(*sides[0][:4]).join(measure(*sides[1][:4]))
            assert {"value": row.value, "low": row.low, "high": row.high} == combine(both, [1, 0, -1, 0])
        assert get("auroc_difference", "Fracture").low is None
    zero = evaluation.get("auroc_difference", "macro10", scorer="same")
    assert [zero.value, zero.low, zero.high] == pytest.approx([0, 0, 0], abs=1e-6)
    with refused("`against` none: no scores of these images and labels"):
        evaluate.add_other(evaluation, images, "none", np.full_like(worse, np.nan))


def test_a_gain_is_over_the_mean_of_members() -> None:
    random = np.random.default_rng(0)
    target = (random.random((400, 2)) < 0.4).astype(float)
    target[:, 1] = 0
    patient = np.arange(400) // 2
    members = {name: target + random.normal(0, 1.5, target.shape) for name in "ab"}
    rows = Scored(np.mean([*members.values()], axis=0), target, np.ones((400, 2), bool), *[patient] * 5)

    def measure(members: dict[str, np.ndarray]) -> Evaluation:
        evaluation = start()
        evaluate.add_comparisons(evaluation, "study", rows, members, MEMBERS)
        return evaluation

    evaluation = measure(members)
    scores = [rows.scores[:, 0], *(member[:, 0] for member in members.values())]
    ours, *others = (roc_auc_score(target[:, 0], score) for score in scores)
    assert [evaluation.get("auroc", "Edema", scorer=name).value for name in "ab"] == pytest.approx(others)
    gain = evaluation.get("auroc_difference", "Edema", scorer=MEMBERS)
    assert gain.value == pytest.approx(ours - sum(others) / 2)
    assert evaluation.get("auroc_difference", "Fracture", scorer=MEMBERS).low is None
    drawn = []
    for _ in range(300):
        places = (2 * random.integers(200, size=200)[:, None] + [0, 1]).ravel()
        ours, *others = (roc_auc_score(target[places, 0], score[places]) for score in scores)
        drawn.append(ours - sum(others) / 2)
    assert ((gain.high or 0) - (gain.low or 0)) / 2 == pytest.approx(1.96 * np.std(drawn), rel=0.2)
    same = measure(dict.fromkeys("ab", rows.scores)).get("auroc_difference", "Edema", scorer=MEMBERS)
    assert [same.value, same.high] == pytest.approx([0, 0], abs=1e-9)


OTHERS = ["Edema", "Pneumonia", "Fracture", "Pleural Other"]


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


def test_labels_of_both_sets_are_compared() -> None:
    sets = draw(1, 400, 2.0), draw(2, 300, 0.0)
    evaluation, own = (assess(OTHERS, images, calibrate(OTHERS, images)) for images in sets)
    macro10 = evaluation.get("auroc", "macro10")
    evaluate.add_own(evaluation, sets[0], own)
    less = {row.label: row for row in evaluation.select(metric="auroc_difference", group=OWN)}
    few = {"Edema": False, "Pneumonia": False, "Pleural Other": True, COMMON: False}
    assert {label: row.few for label, row in less.items()} == few
    aurocs = [[roc_auc_score(images.target[:, c], images.scores[:, c]) for c in (0, 1)] for images in sets]
    assert less["Pneumonia"].value == pytest.approx(aurocs[0][1] - aurocs[1][1], abs=1e-12)
    assert evaluation.get("auroc", "Pneumonia", group=OWN).positives == sets[1].target[:, 1].sum()
    common, mean = (evaluation.get("auroc", COMMON, group=group) for group in (None, OWN))
    assert (common.note, less[COMMON].note) == ("Edema, Pneumonia", "")
    assert less[COMMON].value == pytest.approx(np.mean(aurocs[0]) - np.mean(aurocs[1]), abs=1e-12)
    assert (common.low, mean.low) == (macro10.low, own.get("auroc", "macro10").low)


def test_where_the_own_macro_is_over_other_labels_its_limits_are_widened() -> None:
    images, own = draw(1, 400, 2.0), draw(2, 300, 0.0)
    ours = assess(OTHERS, own, calibrate(OTHERS, own))
    images.mask[:, 0] = False
    evaluation = assess(OTHERS, images, leave_uncalibrated(OTHERS, None))
    evaluate.add_own(evaluation, images, ours)
    assert evaluation.get("auroc_difference", COMMON, group=OWN).note == "widened"
    mean, label = (evaluation.get("auroc", name, group=OWN) for name in (COMMON, "Pneumonia"))
    assert (mean.note, mean.value, mean.low) == ("Pneumonia", label.value, label.low)
    images.mask[:] = False
    nothing = assess(OTHERS, images, leave_uncalibrated(OTHERS, None))
    evaluate.add_own(nothing, images, ours)
    assert not list(nothing.select(group=OWN))


def test_readers_are_below_a_curve_that_is_more_sensitive_at_their_specificity(studies: Scored) -> None:
    studies.mask[-10:, 0] = False  # uncertain
    random = np.random.default_rng(1)
    readers, called = {}, {}
    for reader, right in {"good": 0.98, "poor": 0.6}.items():
        cells = np.where(random.random(STUDIES) < right, studies.target[:, 0], 1 - studies.target[:, 0])
        called[reader] = cells[5:290] == 1  # the first five are not read
        readers[reader] = np.column_stack([np.where(np.arange(STUDIES) < 5, np.nan, cells), np.full(STUDIES, np.nan)])
    evaluation = start()
    evaluate.add_readers(evaluation, studies, readers)
    assert [evaluation.get("studies", None, scorer=reader).value for reader in readers] == [295, 295]
    truth, score = studies.target[5:290, 0] == 1, studies.scores[5:290, 0]
    alarms, hits, _ = roc_curve(truth, score, drop_intermediate=False)
    for reader, calls in called.items():
        rows = {row.metric: row for row in evaluation.select(label="Edema", scorer=reader)}
        assert rows["sensitivity"].value == pytest.approx(recall_score(truth, calls))
        assert rows["specificity"].value == pytest.approx(recall_score(~truth, ~calls))
        limits = {"low": rows["sensitivity"].low, "high": rows["sensitivity"].high}
        assert limits == wilson_limits(calls[truth], studies.patient[5:290][truth])
        alarm = 1 - (rows["specificity"].value or 0)
        after = np.searchsorted(alarms, alarm - 1e-12)
        share = (alarm - alarms[after - 1]) / (alarms[after] - alarms[after - 1])
        at_most = hits[alarms <= alarm + 1e-12].max()
        on_line = hits[after - 1] + share * (hits[after] - hits[after - 1])
        assert rows["network"].value == pytest.approx(max(at_most, on_line))
        assert (rows["below"].positives, rows["below"].negatives) == (truth.sum(), (~truth).sum())
        assert rows["below"].value == (reader == "poor")
    assert not list(evaluation.select(label="Fracture"))
    evaluate.add_readers(evaluation, studies, {"itself": np.ones((STUDIES, 2))})  # a corner of every curve
    assert evaluation.get("below", "Edema", scorer="itself").value == 0
