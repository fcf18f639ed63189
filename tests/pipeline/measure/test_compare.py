"""Scores beside others': methods, members, altered images, the run's own valid; against scikit-learn and pandas."""

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import recall_score, roc_auc_score, roc_curve

from pipeline import DataError
from pipeline.measure.delong import combine
from pipeline.measure.evaluate import (
    AREAS,
    MEMBERS,
    Scored,
    add_comparisons,
    add_other,
    add_own,
    add_readers,
    assess,
    calibrate,
    combine_views,
    leave_uncalibrated,
    study_level,
)
from pipeline.measure.evaluation import COMMON, OWN, Evaluation
from pipeline.measure.metrics import wilson_limits

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


def start(studies: Scored) -> Evaluation:
    return Evaluation({"split": "valid", "unit": "study", "labels": NAMES})


def test_late_fusion_is_the_max_and_the_mean_of_views(studies: Scored) -> None:
    table = pa.table({"patient": ["a", "b", "a", "a", "c"], "study": [1, 1, 1, 2, 1]})
    scores = np.array([[0.2, np.nan], [0.9, np.nan], [0.6, np.nan], [0.1, np.nan], [np.nan, np.nan]])
    order = np.array(["b", "a", "c", "a"]), np.array([1, 2, 1, 1])
    rows = studies.take(slice(4))._replace(patient=order[0], study=order[1])
    combined = combine_views(table, scores, rows)
    assert {how: values[:, 0].tolist() for how, values in combined.items()} == {
        ", max of views": pytest.approx([0.9, 0.1, np.nan, 0.6], nan_ok=True),
        ", mean of views": pytest.approx([0.9, 0.1, np.nan, 0.4], nan_ok=True),
    }
    assert np.isnan(combined[", max of views"][:, 1]).all()
    assert list(combine_views(table.slice(1, 1), scores[1:2], rows)) == [""]


def test_others_are_compared_on_the_rows_that_both_have(studies: Scored) -> None:
    images = studies._replace(study=np.zeros(STUDIES))  # two of each study
    worse = np.clip(images.scores + np.random.default_rng(1).normal(0, 0.5, images.scores.shape), 0, 1)
    worse[:20] = np.nan
    found = assess(NAMES, images, leave_uncalibrated(NAMES, None))
    for name, scores in (("worse", worse), ("same", images.scores)):
        add_other(found, images, name, scores)
    assert found.get("images", scorer="worse").value == 280
    ours = images.take(slice(20, None))
    theirs = ours._replace(scores=worse[20:])
    for level, sides in (("image", (ours, theirs)), ("study", (study_level(ours), study_level(theirs)))):
        aurocs = [roc_auc_score(side.target[:, 0], side.scores[:, 0]) for side in sides]
        assert found.get("auroc", "Edema", level, scorer="worse").value == pytest.approx(aurocs[1])
        less, mean = (found.get("auroc_difference", label, level, scorer="worse") for label in ("Edema", "macro10"))
        assert less.value == pytest.approx(aurocs[0] - aurocs[1])
        assert (mean.value, mean.low) == (less.value, less.low)
        assert less.excludes_zero
        for metric, measure in AREAS.items():
            row = found.get(f"{metric}_difference", "Edema", level, scorer="worse")
            both = measure(*sides[0][:4]).join(measure(*sides[1][:4]))
            assert {"value": row.value, "low": row.low, "high": row.high} == combine(both, [1, 0, -1, 0])
        assert found.get("auroc_difference", "Fracture", level, scorer="worse").low is None
    zero = found.get("auroc_difference", "macro10", scorer="same")
    assert [zero.value, zero.low, zero.high] == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(DataError, match=r"^`against` none: no scores of these images and labels$"):
        add_other(found, images, "none", np.full_like(worse, np.nan))


def test_a_gain_is_over_the_mean_of_members() -> None:
    random = np.random.default_rng(0)
    target = (random.random((400, 2)) < 0.4).astype(float)
    target[:, 1] = 0
    patient = np.arange(400) // 2
    members = {name: target + random.normal(0, 1.5, target.shape) for name in "ab"}
    rows = Scored(np.mean([*members.values()], axis=0), target, np.ones((400, 2), bool), *[patient] * 5)

    def measure(members: dict[str, np.ndarray]) -> Evaluation:
        found = start(rows)
        add_comparisons(found, "study", rows, members, MEMBERS)
        return found

    found = measure(members)
    scores = [rows.scores[:, 0], *(one[:, 0] for one in members.values())]
    ours, *theirs = (roc_auc_score(target[:, 0], score) for score in scores)
    assert [found.get("auroc", "Edema", scorer=name).value for name in "ab"] == pytest.approx(theirs)
    gain = found.get("auroc_difference", "Edema", scorer=MEMBERS)
    assert gain.value == pytest.approx(ours - sum(theirs) / 2)
    assert found.get("auroc_difference", "Fracture", scorer=MEMBERS).low is None
    drawn = []
    for _ in range(300):
        places = (2 * random.integers(200, size=200)[:, None] + [0, 1]).ravel()
        one, *others = (roc_auc_score(target[places, 0], score[places]) for score in scores)
        drawn.append(one - sum(others) / 2)
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


def evaluate(scored: Scored) -> Evaluation:
    return assess(OTHERS, scored, calibrate(OTHERS, scored))


def test_labels_of_both_sets_are_compared() -> None:
    there, own = draw(1, 400, 2.0), draw(2, 300, 0.0)
    found, ours = evaluate(there), evaluate(own)
    macro10 = found.get("auroc", "macro10")
    add_own(found, there, ours)
    less = {row.label: row for row in found.select(metric="auroc_difference", group=OWN)}
    assert {label: row.few for label, row in less.items()} == {
        "Edema": False, "Pneumonia": False, "Pleural Other": True, COMMON: False,
    }  # fmt: skip
    aurocs = [[roc_auc_score(one.target[:, c], one.scores[:, c]) for c in (0, 1)] for one in (there, own)]
    assert less["Pneumonia"].value == pytest.approx(aurocs[0][1] - aurocs[1][1], abs=1e-12)
    assert found.get("auroc", "Pneumonia", group=OWN).positives == own.target[:, 1].sum()
    common = found.get("auroc", COMMON)
    assert (common.note, less[COMMON].note) == ("Edema, Pneumonia", "")
    assert less[COMMON].value == pytest.approx(np.mean(aurocs[0]) - np.mean(aurocs[1]), abs=1e-12)
    assert (common.low, found.get("auroc", COMMON, group=OWN).low) == (macro10.low, ours.get("auroc", "macro10").low)


def test_where_the_own_macro_is_over_other_labels_its_limits_are_widened() -> None:
    there, own = draw(1, 400, 2.0), draw(2, 300, 0.0)
    there.mask[:, 0] = False
    found, ours = evaluate(there), evaluate(own)
    add_own(found, there, ours)
    assert found.get("auroc_difference", COMMON, group=OWN).note == "widened"
    mean, label = (found.get("auroc", name, group=OWN) for name in (COMMON, "Pneumonia"))
    assert (mean.note, mean.value, mean.low) == ("Pneumonia", label.value, label.low)
    there.mask[:] = False
    nothing = evaluate(there)
    add_own(nothing, there, ours)
    assert not list(nothing.select(group=OWN))


def test_readers_are_below_a_curve_that_is_more_sensitive_at_their_specificity(studies: Scored) -> None:
    studies.mask[-10:, 0] = False  # uncertain
    random = np.random.default_rng(1)
    readers, called = {}, {}
    for reader, right in {"good": 0.98, "poor": 0.6}.items():
        cells = np.where(random.random(STUDIES) < right, studies.target[:, 0], 1 - studies.target[:, 0])
        called[reader] = cells[5:290] == 1  # the first five are not read
        readers[reader] = np.column_stack([np.where(np.arange(STUDIES) < 5, np.nan, cells), np.full(STUDIES, np.nan)])
    found = Evaluation({"split": "test", "unit": "study", "labels": list(NAMES)})
    add_readers(found, studies, readers)
    assert [found.get("studies", None, scorer=reader).value for reader in readers] == [295, 295]
    truth, score = studies.target[5:290, 0] == 1, studies.scores[5:290, 0]
    alarms, hits, _ = roc_curve(truth, score, drop_intermediate=False)
    for reader, calls in called.items():
        rows = {row.metric: row for row in found.select(label="Edema", scorer=reader)}
        assert rows["sensitivity"].value == pytest.approx(recall_score(truth, calls))
        assert rows["specificity"].value == pytest.approx(recall_score(~truth, ~calls))
        owner = studies.patient[5:290][truth]
        limits = {"low": rows["sensitivity"].low, "high": rows["sensitivity"].high}
        assert limits == wilson_limits(calls[truth], owner)
        alarm = 1 - (rows["specificity"].value or 0)
        after = np.searchsorted(alarms, alarm - 1e-12)
        share = (alarm - alarms[after - 1]) / (alarms[after] - alarms[after - 1])
        at_most = hits[alarms <= alarm + 1e-12].max()
        on_line = hits[after - 1] + share * (hits[after] - hits[after - 1])
        assert rows["network"].value == pytest.approx(max(at_most, on_line))
        assert (rows["below"].positives, rows["below"].negatives) == (truth.sum(), (~truth).sum())
        assert rows["below"].value == (reader == "poor")
    assert not list(found.select(label="Fracture"))
    add_readers(found, studies, {"itself": np.ones((STUDIES, 2))})  # a corner of every curve
    assert found.get("below", "Edema", scorer="itself").value == 0
