from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_curve

from pipeline import DataError
from pipeline.measure.evaluate import Scored
from pipeline.measure.metrics import wilson_limits
from pipeline.measure.readers import assess_readers, read_reader

NAMES = ("Edema", "Fracture")
HEADER = "Study,Edema,Support_Devices,Fracture\n"


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
        keys = [f"patient{n // 2:05d}/study{n % 2 + 1}" for n in range(5, 200)]
        readers[reader] = {
            key: {"Edema": int(cell), "Fracture": None} for key, cell in zip(keys, cells[5:], strict=True)
        }
    found = assess_readers(NAMES, studies, readers)
    assert found["readers"] == {"good": 195, "poor": 195}
    truth, score = studies.target[5:190, 0] == 1, studies.scores[5:190, 0]
    alarms, hits, _ = roc_curve(truth, score, drop_intermediate=False)
    for reader, places in found["labels"]["Edema"].items():
        calls = called[reader]
        assert places["sensitivity"] == pytest.approx(recall_score(truth, calls))
        assert places["specificity"] == pytest.approx(recall_score(~truth, ~calls))
        owner = studies.patient[5:190][truth]
        assert places["intervals"]["sensitivity"] == wilson_limits(calls[truth], owner)
        alarm = 1 - places["specificity"]
        after = np.searchsorted(alarms, alarm - 1e-12)
        share = (alarm - alarms[after - 1]) / (alarms[after] - alarms[after - 1])
        at_most = hits[alarms <= alarm + 1e-12].max()
        on_line = hits[after - 1] + share * (hits[after] - hits[after - 1])
        assert places["network"] == pytest.approx(max(at_most, on_line))
        assert (places["positives"], places["negatives"]) == (truth.sum(), (~truth).sum())
    below = {reader: places["below"] for reader, places in found["labels"]["Edema"].items()}
    assert below == {"good": False, "poor": True}
    assert (found["below"], found["of"], found["labels"]["Fracture"]) == (1, 2, {})
    same = {"itself": {key: dict.fromkeys(NAMES, 1) for key in readers["good"]}}  # a corner of every curve
    assert assess_readers(NAMES, studies, same)["labels"]["Edema"]["itself"]["below"] is False


def test_a_csv_has_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "bc4.csv"
    path.write_text(f"{HEADER}CheXpert-v1.0/test/patient64741/study1,1,0,\np2/study3/,0.0,1,1\n")
    reads = {"patient64741/study1": {"Edema": 1, "Fracture": None}, "p2/study3": {"Edema": 0, "Fracture": 1}}
    assert read_reader(path, NAMES) == reads
    path.write_text("Path,Edema\nval/p2/study3/view1_frontal.jpg,1\nval/p2/study3/view2_lateral.jpg,1\n")
    assert read_reader(path, NAMES) == {"p2/study3": {"Edema": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Image,Edema\na,1\n", ": column Study is missing"),
        ("Study,Wet\np/study1,1\n", ": column Edema is missing"),
        (f"{HEADER}p/study1,1,0,0\np,1,0,0\n", ", line 3, column Study: 'p' does not end in patient/study1"),
        (f"{HEADER}p/study1,-1,0,0\n", ", line 2, column Edema: '-1' is neither 1 nor 0 nor blank"),
        (f"{HEADER}p/study1,yes,0,0\n", ", line 2, column Edema: 'yes' is not a label"),
        (
            f"{HEADER}p/study1,1,0,0\np/study1,1,0,1\n",
            ", line 3, column Fracture: not what an earlier row says",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "reader.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_reader(path, NAMES)
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_reader_of_other_studies_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"^bc4: no study of these 200: its first is p/study1, theirs patient00000/study1$"
    ):
        assess_readers(NAMES, draw_studies(), {"bc4": {"p/study1": {"Edema": 1}}})


def test_a_reader_is_not_credited_with_another_sets_studies_of_equal_names() -> None:
    studies = draw_studies()
    both = studies._replace(patient=np.where(np.arange(200) < 3, "nih/patient00000", studies.patient))
    reader = {"bc4": {"patient00000/study1": {"Edema": 1}, "patient00005/study1": {"Edema": 1}}}
    with pytest.raises(
        DataError,
        match=r"^bc4: its studies have names of chexpert and of nih: choose the set that was read, by `where` set=…$",
    ):
        assess_readers(NAMES, both, reader)
