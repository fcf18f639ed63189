"""A network's AUROC on altered images: lungs covered, all but the lungs covered, patches shuffled."""

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from model.runs.sanity import ALTERATIONS
from pipeline.labels import LABELS
from pipeline.manifest import Manifest
from pipeline.measure.evaluate import Scored, assess_altered
from tests.training import call_train


def draw_images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 255, (3, 1, 84, 84), np.uint8)


def test_center_and_border_make_up_the_image() -> None:
    images = draw_images()
    inside = np.zeros((84, 84), bool)
    inside[8:76, 8:76] = True  # 80 % of each side
    center, border = (ALTERATIONS[name](7, images) for name in list(ALTERATIONS)[:2])
    np.testing.assert_array_equal(center, np.where(inside, 7, images))
    np.testing.assert_array_equal(border, np.where(inside, images, 7))


def test_patches_move_as_a_whole() -> None:
    images = draw_images()
    shuffled = ALTERATIONS["patches shuffled"](0, images)

    def patches(of: npt.NDArray[np.uint8]) -> list[bytes]:
        return [of[0, y : y + 10, x : x + 10].tobytes() for y in range(0, 80, 10) for x in range(0, 80, 10)]

    for before, after in zip(images, shuffled, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
        assert sum(one == other for one, other in zip(patches(before), patches(after), strict=True)) < 5
    assert not shuffled[..., 80:, :].any()
    assert not shuffled[..., 80:].any()


def test_labels_that_are_still_told_are_named() -> None:
    random = np.random.default_rng(1)
    target = (random.random((300, 2)) < 0.5).astype(float)
    scores = np.clip(target * 0.4 + random.random((300, 2)) * 0.6, 0, 1)
    facts = np.arange(300)
    images = Scored(scores, target, np.ones((300, 2), bool), facts, facts, facts, facts, facts)
    altered = np.column_stack([scores[:, 0], random.random(300)])
    found = assess_altered(["Edema", "Fracture"], images, {"covered": altered})["covered"]
    for column, label in enumerate(("Edema", "Fracture")):
        auroc = roc_auc_score(target[:, column], altered[:, column])
        assert found["labels"][label]["auroc"] == pytest.approx(auroc)
        less = auroc - roc_auc_score(target[:, column], scores[:, column])
        assert found["labels"][label]["less"]["difference"] == pytest.approx(less)
    assert found["kept"] == ["Edema"]
    assert found["macro_labels"] == ["Edema", "Fracture"]


def test_evaluate_scores_altered_images(
    run: Path,
    sample_shards: tuple[Path, Manifest],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        call_train("evaluate", "--shards", sample_shards[0], "--run", run, "--split", "dev", "--sanity") == 0
    )
    sanity = json.loads((run / "evaluation-dev.json").read_text())["sanity"]
    assert list(sanity) == list(ALTERATIONS)
    assert all(set(found["labels"]) == {*LABELS, "macro"} for found in sanity.values())
    table = capsys.readouterr().out.partition("Sanity: the same images, altered")[2]
    assert [name for name in ALTERATIONS if re.search(f"│ {name} ", table)] == list(ALTERATIONS)
