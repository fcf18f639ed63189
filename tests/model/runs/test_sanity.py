"""A network's AUROC on altered images: lungs covered, all but the lungs covered, patches shuffled."""

import re
from pathlib import Path

import numpy as np

from pipeline.images import Gray
from pipeline.labels import LABELS
from pipeline.look.pixels import ALTERATIONS
from pipeline.measure.evaluate import ALTERED
from pipeline.measure.evaluation import MEANS, read_evaluation
from tests.conftest import Shards
from tests.training import Capture, call_train


def draw_images() -> Gray:
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

    for pair in zip(images, shuffled, strict=True):
        before, after = (
            [image[0, y : y + 10, x : x + 10].tobytes() for y in range(0, 80, 10) for x in range(0, 80, 10)]
            for image in pair
        )
        assert sorted(before) == sorted(after)
        assert sum(map(bytes.__eq__, before, after)) < 5
    assert not shuffled[..., 80:, :].any()
    assert not shuffled[..., 80:].any()


def test_evaluate_scores_altered_images(run: Path, sample_shards: Shards, capsys: Capture) -> None:
    assert call_train("evaluate", "--shards", sample_shards[0], "--run", run, "--split", "dev", "--sanity") == 0
    evaluation = read_evaluation(run / "evaluation-dev.json")
    assert evaluation.head["altered"] == list(ALTERATIONS)
    for name in ALTERATIONS:
        altered = list(evaluation.select(metric="auroc", scorer=f"{ALTERED}{name}"))
        assert [row.label for row in altered] == [*LABELS, *MEANS]
    table = capsys.readouterr().out.partition("Sanity: the same images, altered")[2]
    assert [name for name in ALTERATIONS if re.search(rf"┃ +{name} ", table)] == list(ALTERATIONS)
