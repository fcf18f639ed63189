"""The audit's figures against scikit-learn and SciPy, its level over many tables, and its words."""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from scipy.stats import binom, norm
from sklearn.metrics import roc_auc_score

from pipeline.labels import LABELS
from pipeline.measure.audit import audit_labels, find_covariates, find_strata, predict
from pipeline.measure.delong import score_limits, score_variance

Array = npt.NDArray[Any]


def make_table(patient: Array, after: str = "", **columns: Any) -> pa.Table:
    """A label table with these patients, whose names end in `after`, and nothing else known."""
    rows = len(patient)
    nothing = {"study": pa.int32(), "sex": pa.string(), "age": pa.int16(), "projection": pa.string()}
    table = {"patient": [f"p{number}{after}" for number in patient.tolist()], "view": ["frontal"] * rows}
    return pa.table(table | {name: pa.nulls(rows, kind) for name, kind in nothing.items()} | columns)


def make_cells(truth: Array, labels: tuple[str, ...] = ("Pneumonia",)) -> tuple[Array, Array]:
    """Targets and masks [N, 14] that know these labels alone, truth [N, L]."""
    columns = [LABELS.index(label) for label in labels]
    target, mask = (np.zeros((len(truth), len(LABELS)), kind) for kind in (np.float32, np.bool_))
    target[:, columns], mask[:, columns] = truth.reshape(len(truth), -1), True
    return target, mask


def test_figures_are_scikit_learn_s_and_holm_s_by_hand() -> None:
    random = np.random.default_rng(0)
    labels = ("Edema", "Fracture", "Pneumonia")
    truth = random.random((400, 3)) < 0.4
    values = {f"c{shift}": shift * truth[:, 0] + random.normal(size=400) for shift in (0.0, 0.6, 0.8, 1.0, -1.5)}
    values["c0.6"][:100] = np.nan
    values["edge"] = random.normal(size=400)
    audit = audit_labels(make_table(np.arange(400), "x"), *make_cells(truth, labels), values, together=False)
    clues = {(clue.label, clue.covariate): clue for clue in audit.clues}
    assert len(clues) == 18
    p_values = {}
    for (label, name), clue in clues.items():
        known = ~np.isnan(values[name])
        side = truth[known, labels.index(label)]
        assert clue.auroc == pytest.approx(roc_auc_score(side, values[name][known]), abs=1e-12)
        assert clue.strength == max(clue.auroc, 1 - clue.auroc)
        variance = partial(score_variance, positives=int(side.sum()), negatives=int((~side).sum()))
        assert (clue.low, clue.high) == pytest.approx(score_limits(clue.auroc, variance))
        # One image a patient: no design effect.
        assert variance(0.6) == pytest.approx(variance(0.4))
        p_values[label, name] = 2 * norm.sf((clue.strength - 0.6) / variance(0.6) ** 0.5), variance
    rejected: list[tuple[str, str]] = []
    for rank, (pair, (p_value, variance)) in enumerate(sorted(p_values.items(), key=lambda item: item[1][0])):
        if len(rejected) == rank:  # of all smaller ones
            level = 0.05 / (18 - rank)
            rejected += [pair] if p_value <= level else []
        limits = score_limits(clues[pair].auroc, variance, norm.isf(level / 2))
        assert clues[pair].adjusted == pytest.approx(max(limits[0], 1 - limits[1]))
        assert (clues[pair].adjusted > 0.6) == clues[pair].exceeds == (pair in rejected)
    assert ("Edema", "c-1.5") in rejected
    assert ("Edema", "c0.6") not in rejected
    assert [clue.adjusted for clue in audit.clues] == sorted((clue.adjusted for clue in audit.clues), reverse=True)


def test_covariates_together_are_tried_on_other_patients() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(800, 2))
    truth, used = values.prod(axis=1) > 0, np.ones(800, np.bool_)
    score = predict(values, truth, used, np.arange(800))
    assert max(roc_auc_score(truth, column) for column in values.T) < 0.56
    assert roc_auc_score(truth, score) > 0.9  # neither alone, but both together
    # Eight images of each patient, who are known by their values: what was learned of them must not count.
    owner = np.repeat(np.arange(100), 8)
    sick = random.random(100) < 0.5
    score = predict(random.normal(size=(100, 2))[owner], sick[owner], used, owner)
    assert abs(roc_auc_score(sick[owner], score) - 0.5) < 0.2
    used[:80] = False
    assert np.isnan(predict(values, truth, used, owner)).sum() == 80


def test_alarms_are_told_in_words() -> None:
    random = np.random.default_rng(2)
    number, truth = random.permutation(300), random.random(300) < 0.5
    shifted = np.where(truth, 200 - number // 3, 300 + number)  # mostly lower in positives
    patient = shifted * 1000 + np.arange(300)
    sex, bits = pa.array(np.where(number % 2, "Male", "Female")), pa.array([8] * 300)
    table = make_table(patient, sex=sex, bits=bits)
    target, mask = make_cells(np.column_stack([truth, np.arange(300) < 9]), ("Pneumonia", "Fracture"))
    sharpness = {"sharpness": truth + 0.1 * random.random(300)}
    audit = audit_labels(table, target, mask, content=sharpness, together=False)
    assert audit.describe_alarms() == ["Pneumonia: patient number alone predicts it with AUROC 1.00 (.99–1.00)"]
    assert [clue.exceeds for clue in audit.clues if clue.kind == "content"] == [True]  # but is no alarm
    unknown = ("study number", "age", "original width", "original height", "JPEG quality", "AP")
    constant = dict.fromkeys(("bit depth", "lateral"), "the same in all images")
    assert audit.left_out == dict.fromkeys(unknown, "unknown") | constant
    assert audit.few == ["Fracture"]  # nobody annotated the others
    known, reasons = find_covariates(make_table(patient, "x"))
    assert (known, reasons["patient number"]) == ({}, "not every name ends in a number")


def test_all_together_are_an_alarm_of_their_own() -> None:
    random = np.random.default_rng(3)
    values = {name: random.normal(size=600) for name in ("border", "corner")}
    truth = values["border"] * values["corner"] > 0
    table = make_table(np.arange(600), "x")
    audit = audit_labels(table, *make_cells(truth), values)
    (alarm,) = audit.alarms["Pneumonia"]
    assert (alarm.kind, alarm.strength > 0.9) == ("together", True)
    rows = random.permutation(600)
    shuffled = {name: value[rows] for name, value in values.items()}
    (other,) = audit_labels(table.take(rows), *make_cells(truth[rows]), shuffled).alarms["Pneumonia"]
    assert other.auroc == pytest.approx(alarm.auroc, abs=1e-12)
    assert audit.describe_alarms()[0].startswith("Pneumonia: all covariates together predict it with AUROC 1.00 (")


def test_edges_are_content_for_support_devices() -> None:
    truth = np.arange(200) % 2 == 0
    cells = make_cells(truth, ("Support Devices",))
    audit = audit_labels(make_table(np.arange(200), "x"), *cells, {"corner": truth * 1.0})
    assert [(clue.kind, clue.exceeds) for clue in audit.clues] == [("content", True)]
    assert audit.alarms == {}


@pytest.mark.soak
def test_the_level_is_kept_where_every_covariate_is_at_the_threshold() -> None:
    """200 patients with one to six images; three labels, each predicted by two of six covariates with AUROC .6.

    Of 18 tests six are at .6, the worst case of H0, and the others at .5: at most 5 % of the tables alarm.
    """
    shift, labels, alarms = 2**0.5 * norm.ppf(0.6), ("Edema", "Fracture", "Pneumonia"), 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        patient = np.repeat(np.arange(200), random.integers(1, 7, 200))
        truth = (random.random((200, 3)) < 0.3)[patient]
        own = random.normal(size=(200, 6))[patient]
        noise = (own + random.normal(size=(len(patient), 6))) / 2**0.5  # a patient's images are alike
        values = {f"c{column}": shift * truth[:, column % 3] + noise[:, column] for column in range(6)}
        audit = audit_labels(make_table(patient), *make_cells(truth, labels), values, together=False)
        alarms += bool(audit.alarms)
    assert 0 < alarms <= binom.ppf(0.999, 400, 0.05)


FILMS = {
    "patient": ["nih/patient00012", "patient3", "patient00100"],
    "study": [1, 1, 1],
    "view": ["frontal", "lateral", "frontal"],
    "sex": ["Male", "Female", "Unknown"],
    "age": pa.array([17, None, 64], pa.int16()),
    "projection": ["AP", None, "PA"],
    "width": pa.array([2000, None, 1024], pa.int32()),
    "set": ["chexpert", "nih", "nih"],
}


def test_covariates_and_strata_of_a_table() -> None:
    """Numbers, without constant ones; and names, empty if unknown."""
    covariates, _ = find_covariates(pa.table(FILMS))
    expected = {
        "patient number": [12, 3, 100],
        "age": [17, np.nan, 64],
        "original width": [2000, np.nan, 1024],
        "lateral": [0, 1, 0],
        "AP": [1, np.nan, 0],
        "Male": [1, 0, np.nan],
        "set chexpert": [1, 0, 0],
        "set nih": [0, 1, 1],
    }
    assert list(covariates) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(covariates[name], values)
    assert "patient number" not in find_covariates(pa.table(FILMS | {"patient": ["a", "b", "c7"]}))[0]
    assert {variable: names.tolist() for variable, names in find_strata(pa.table(FILMS)).items()} == {
        "projection": ["AP", "lateral", "PA"],
        "sex": ["Male", "Female", ""],
        "age": ["0-17", "", "60-79"],
        "set": ["chexpert", "nih", "nih"],
    }
