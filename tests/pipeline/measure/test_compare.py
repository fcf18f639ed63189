"""Methods compared on the same studies, against scikit-learn and pandas."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from pipeline import DataError
from pipeline.measure.compare import combine_views, compare_methods, group_by_views, measure_gain
from pipeline.measure.evaluate import Scored

NAMES = ["Edema", "Fracture"]
STUDIES = 300


@pytest.fixture
def studies() -> Scored:
    """Studies of 150 patients, whose Edema has a score that says something; no Fracture."""
    random = np.random.default_rng(0)
    target = np.zeros((STUDIES, 2), np.float32)
    target[:, 0] = random.random(STUDIES) < 0.3
    scores = np.clip(0.4 * target + 0.6 * random.random(target.shape), 0, 1).astype(np.float32)
    patient = np.char.mod("patient%05d", np.arange(STUDIES) // 2)
    facts = np.full(STUDIES, "Female"), np.full(STUDIES, 60), np.full(STUDIES, "AP")
    return Scored(scores, target, np.ones_like(target, bool), patient, np.arange(STUDIES) % 2, *facts)


def frame_of(studies: Scored, scores: np.ndarray) -> pd.DataFrame:
    facts = {"patient": studies.patient, "study": studies.study}
    return pd.DataFrame(facts | dict(zip(NAMES, scores.T, strict=True)))


def test_late_fusion_is_the_max_and_the_mean_of_views() -> None:
    frame = pd.DataFrame(
        {"patient": ["a", "b", "a", "a"], "study": [1, 1, 1, 2], "Edema": [0.2, 0.9, 0.6, 0.1]},
    )
    found = combine_views(frame, "late")
    assert {name: scores["Edema"].round(6).to_dict() for name, scores in found.items()} == {
        "late, max of views": {("a", 1): 0.6, ("a", 2): 0.1, ("b", 1): 0.9},
        "late, mean of views": {("a", 1): 0.4, ("a", 2): 0.1, ("b", 1): 0.9},
    }
    assert list(combine_views(frame.iloc[[1, 3]], "one each")) == ["one each"]


def test_studies_are_grouped_by_their_views() -> None:
    views = ["frontal", "lateral", "frontal", "frontal", "lateral"]
    table = pa.table({"patient": ["a", "a", "b", "b", "c"], "study": [1, 1, 1, 1, 1], "view": views})
    assert group_by_views(table).to_dict() == {
        ("a", 1): "frontal and lateral",
        ("b", 1): "frontal alone",
        ("c", 1): "lateral alone",
    }


def test_methods_are_compared_on_the_studies_that_all_have(studies: Scored) -> None:
    worse = np.clip(studies.scores + np.random.default_rng(1).normal(0, 0.5, studies.scores.shape), 0, 1)
    others = {"worse": frame_of(studies, worse).iloc[20:].set_index(["patient", "study"])[::-1]}
    views = pd.Series(
        np.where(np.arange(STUDIES) < 200, "frontal alone", "frontal and lateral"),
        pd.MultiIndex.from_arrays([studies.patient, studies.study], names=["patient", "study"]),
    )
    found = compare_methods(NAMES, studies, "learned", others, views)
    assert {group: part["studies"] for group, part in found.items()} == {
        "all": 280,
        "frontal alone": 180,
        "frontal and lateral": 100,
    }
    for group, rows in {"all": slice(20, 300), "frontal and lateral": slice(200, 300)}.items():
        truth = studies.target[rows, 0]
        ours, theirs = (roc_auc_score(truth, scores[rows, 0]) for scores in (studies.scores, worse))
        learned, other = found[group]["methods"].values()
        assert learned["auroc"] == learned["labels"]["Edema"] == pytest.approx(ours)
        assert other["auroc"] == pytest.approx(theirs)
        assert other["labels"]["Fracture"] is None
        less = other["first_less_this"]
        assert less["mean"] == less["Edema"]
        assert less["mean"]["difference"] == pytest.approx(ours - theirs)
        assert less["mean"]["low"] < ours - theirs < less["mean"]["high"]
        assert less["mean"]["low"] > 0
        assert less["Fracture"]["difference"] is None
        assert learned["first_less_this"]["mean"] == {
            "difference": 0.0,
            "low": pytest.approx(0, abs=1e-6),
            "high": pytest.approx(0, abs=1e-6),
            "excludes_zero": False,
        }


def test_methods_without_a_study_in_common_are_named(studies: Scored) -> None:
    index = pd.MultiIndex.from_arrays([studies.patient, studies.study], names=["patient", "study"])
    frame = frame_of(studies, studies.scores).set_index(["patient", "study"])
    others = {"late": frame[:150], "one each": frame[150:]}
    with pytest.raises(DataError, match=r"^learned: none of its studies is scored by all of late, one each$"):
        compare_methods(NAMES, studies, "learned", others, pd.Series("frontal alone", index))


def test_studies_of_one_class_have_no_figures(studies: Scored) -> None:
    """Such as the one study of a split that has a frontal alone."""
    index = pd.MultiIndex.from_arrays([studies.patient, studies.study], names=["patient", "study"])
    views = pd.Series(np.where(np.arange(STUDIES) < 1, "frontal alone", "frontal and lateral"), index)
    others = {"same": frame_of(studies, studies.scores).set_index(["patient", "study"])}
    (ours, theirs) = compare_methods(NAMES, studies, "learned", others, views)["frontal alone"][
        "methods"
    ].values()
    nothing = {"low": None, "high": None}
    assert ours["auroc"] is theirs["auroc"] is None
    assert ours["interval"] == nothing
    assert theirs["first_less_this"]["mean"] == nothing | {"difference": None, "excludes_zero": None}


def test_a_gain_is_over_the_mean_of_members() -> None:
    random = np.random.default_rng(0)
    target = (random.random((400, 2)) < 0.4).astype(float)
    target[:, 1] = 0
    patient = np.arange(400) // 2
    members = {name: target + random.normal(0, 1.5, target.shape) for name in "ab"}
    rows = Scored(np.mean([*members.values()], axis=0), target, np.ones((400, 2), bool), *[patient] * 5)
    gain = measure_gain(["Edema", "Fracture"], rows, members)
    scores = [rows.scores[:, 0], *(of[:, 0] for of in members.values())]
    ours, *theirs = (roc_auc_score(target[:, 0], score) for score in scores)
    assert gain["Edema"]["members"] == pytest.approx(dict(zip("ab", theirs, strict=True)))
    assert gain["Edema"]["difference"] == pytest.approx(ours - sum(theirs) / 2)
    assert gain["macro"] == gain["Edema"]
    assert gain["Fracture"]["difference"] is gain["Fracture"]["low"] is None
    drawn = []
    for _ in range(300):
        places = (2 * random.integers(200, size=200)[:, None] + [0, 1]).ravel()
        one, *others = (roc_auc_score(target[places, 0], score[places]) for score in scores)
        drawn.append(one - sum(others) / 2)
    half = (gain["Edema"]["high"] - gain["Edema"]["low"]) / 2
    assert half == pytest.approx(1.96 * np.std(drawn), rel=0.2)
    same = measure_gain(["Edema", "Fracture"], rows, dict.fromkeys("ab", rows.scores))["Edema"]
    assert same["difference"] == pytest.approx(0)
    assert same["high"] == pytest.approx(0, abs=1e-9)
