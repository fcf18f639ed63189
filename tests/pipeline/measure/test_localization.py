"""Maps against what readers marked, by hand-made boxes, masks and run lengths."""

import numpy as np
import pytest

from pipeline.measure.localization import Cell, Mark, decode_rle, exceedance, mark_image, measure_localization


def test_run_lengths_are_read_as_numbers_and_as_coco_s_text() -> None:
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = mask[0, 2] = True
    # Column by column: 4 zeros, 3 ones, 5 zeros.
    np.testing.assert_array_equal(decode_rle([3, 4], [4, 3, 5]), mask)
    np.testing.assert_array_equal(decode_rle([3, 4], "435"), mask)
    # From the fourth on, differences: 3, 1, 3, 2, 3 are 3, 1, 3, +1, +0; 40 needs two groups of bits.
    np.testing.assert_array_equal(decode_rle([3, 4], "31310"), decode_rle([3, 4], [3, 1, 3, 2, 3]))
    assert decode_rle([10, 5], "X1:").sum() == 10
    np.testing.assert_array_equal(decode_rle([2, 5], "141N1"), decode_rle([2, 5], [1, 4, 1, 2, 2]))
    with pytest.raises(ValueError, match="do not fill 3×4"):
        decode_rle([3, 4], [4, 3])
    with pytest.raises(ValueError, match="not COCO"):
        decode_rle([3, 4], "4 5")


def test_boxes_and_masks_are_placed_on_the_input() -> None:
    row, mask = {"width": 40, "height": 20}, np.zeros((20, 40), bool)
    mask[:10, 20:] = True
    marks: list[Mark] = [[(20, 0, 20, 10)], mask]
    for square, shape, cells in (
        ("stretch", (4, 4), [[0, 2], [0, 3], [1, 2], [1, 3]]),
        ("pad", (4, 2), [[1, 1]]),  # 10 rows above and below
        ("crop", (4, 4), [[0, 2], [0, 3], [1, 2], [1, 3]]),
    ):
        for mark in marks:
            assert np.argwhere(mark_image(mark, row, square, shape)).tolist() == cells
    cropped = mark_image([(12, 0, 5, 20)], row, "crop", (1, 4))  # to columns 10 to 30
    assert np.argwhere(cropped).tolist() == [[0, 0]]


def test_hits_iou_and_chance() -> None:
    marked = np.zeros((2, 2), bool)
    marked[0, 0] = True
    top, low, none = (np.array(heat, np.float32) for heat in ([[1, 0.5], [0, 0]], [[0, 0], [0, 1]], [[0, 0], [0, 0]]))
    cells = [Cell("Edema", f"p{number}", heat, marked) for number, heat in enumerate((top, top, low, none))]
    figures = measure_localization(cells)["labels"]["Edema"]
    assert (figures["hits"], figures["cells"], figures["chance"], figures["iou"]) == (2, 4, 0.25, 0.25)
    assert figures["p"] == pytest.approx(1 - 0.75**4 - 4 * 0.25 * 0.75**3)
    assert figures["fixed"] == 1.0
    assert (figures["few"], figures["iou_limits"]) == (True, {"low": None, "high": None})
    many = [cell._replace(patient=f"p{copy}{cell.patient}") for cell in cells for copy in range(3)]
    limits = measure_localization(many)["labels"]["Edema"]["iou_limits"]
    assert limits["low"] < 0.25 < limits["high"]
    assert exceedance(np.array([0.5, 0.25]), np.array(["a", "b"]), 2) == 0.125
    assert exceedance(np.array([0.5, 0.25]), np.array(["a", "a"]), 2) == 0.25  # a patient's cells may hit together
    assert exceedance(np.array([0.5, 0.25]), np.array(["a", "a"]), 1) == 0.5
