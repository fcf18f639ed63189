import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_curve

from pipeline.measure.evaluate import Scored
from pipeline.measure.evaluation import Evaluation
from pipeline.measure.metrics import wilson_limits
from pipeline.measure.readers import add_readers

NAMES = ("Edema", "Fracture")


def draw_studies(count: int = 200) -> Scored:
    """Studies with signal; no Fracture; the last ten of Edema are uncertain."""
    random = np.random.default_rng(0)
    target = np.stack([random.random(count) < 0.4, np.zeros(count)], axis=1).astype(np.float32)
    scores = (0.3 * target + 0.7 * random.random(target.shape)).round(2).astype(np.float32)
    mask = np.ones(target.shape, bool)
    mask[-10:, 0] = False
    patient = np.char.mod("chexpert/patient%05d", np.arange(count) // 2)
    unknown = np.full(count, None)
    return Scored(
        scores, target, mask, patient, np.arange(count) % 2 + 1, unknown, np.full(count, -1), unknown
    )


def test_readers_are_below_a_curve_that_is_more_sensitive_at_their_specificity() -> None:
    studies = draw_studies()
    random = np.random.default_rng(1)
    readers, called = {}, {}
    for reader, right in {"good": 0.98, "poor": 0.6}.items():
        cells = np.where(random.random(200) < right, studies.target[:, 0], 1 - studies.target[:, 0])
        called[reader] = cells[5:190] == 1  # the first five are not read
        readers[reader] = np.column_stack([np.where(np.arange(200) < 5, np.nan, cells), np.full(200, np.nan)])
    found = Evaluation({"split": "test", "unit": "study", "labels": list(NAMES)})
    add_readers(found, studies, readers)
    assert [found.get("studies", None, scorer=reader).value for reader in readers] == [195, 195]
    truth, score = studies.target[5:190, 0] == 1, studies.scores[5:190, 0]
    alarms, hits, _ = roc_curve(truth, score, drop_intermediate=False)
    for reader, calls in called.items():
        rows = {row.metric: row for row in found.select(label="Edema", scorer=reader)}
        assert rows["sensitivity"].value == pytest.approx(recall_score(truth, calls))
        assert rows["specificity"].value == pytest.approx(recall_score(~truth, ~calls))
        owner = studies.patient[5:190][truth]
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
    add_readers(found, studies, {"itself": np.ones((200, 2))})  # a corner of every curve
    assert found.get("below", "Edema", scorer="itself").value == 0
