"""Overlap of boxes by hand."""

import numpy as np
import pytest

from llmprep_jax.evaluate.grounding import box_accuracy, iou

BOX = (0.0, 0.0, 10.0, 10.0)


@pytest.mark.parametrize(
    ("other", "overlap"),
    [
        (BOX, 1.0),
        ((5, 0, 15, 10), 50 / 150),
        ((2, 3, 7, 9), 30 / 100),
        ((10, 0, 20, 10), 0.0),  # they touch
        ((20, 20, 30, 30), 0.0),
        ((12, 12, 11, 11), 0.0),  # empty, and the corners of the common part are reversed twice
        ((8, 8, 2, 2), 0.0),
    ],
)
def test_intersection_over_union(other, overlap):
    other = np.array(other, np.float64)
    assert float(iou(np.array(BOX), other)) == pytest.approx(overlap)
    assert float(iou(other, np.array(BOX))) == pytest.approx(overlap)


def test_empty_boxes_do_not_overlap():
    assert iou(np.zeros((2, 4)), np.zeros((2, 4))).tolist() == [0, 0]


def test_boxes_that_overlap_by_half_are_right():
    wide, narrow = (0, 0, 10, 5), (0, 0, 10, 4.9)  # 0.5 and 0.49 of BOX
    assert box_accuracy([BOX, wide, narrow, None], [BOX] * 4) == 0.5
    assert box_accuracy([BOX, wide, narrow, None], [BOX] * 4, threshold=0.4) == 0.75
    assert box_accuracy([None], [BOX], threshold=0.0) == 0.0


def test_each_target_needs_a_prediction():
    with pytest.raises(ValueError, match="1 boxes for 2 targets"):
        box_accuracy([BOX], [BOX, BOX])
    with pytest.raises(ValueError, match="0 boxes"):
        box_accuracy([], [])
