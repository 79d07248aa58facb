"""Boxes: how far two overlap, and how many of a model's are right.

A box is (left, top, right, bottom) in any unit that both sides share, with no pixel added to its
width. The accuracy of referring expressions (RefCOCO and kin; Mao et al., arXiv 1511.02283) counts
a box whose overlap with the right one is above 0.5; the scripts that published numbers come from
count 0.5 as well, and so does this.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Num

from llmprep_jax.types import Array, Float

Box = Sequence[int | float]


def iou(left: Num[Array, "*n 4"], right: Num[Array, "*n 4"]) -> Float[np.ndarray, "*n"]:
    """Intersection over union of boxes, pair by pair; 0 where both are empty.

    A box whose right lies left of its left, or bottom above its top, is empty.
    """
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    low = np.maximum(left[..., :2], right[..., :2])
    high = np.minimum(left[..., 2:], right[..., 2:])
    common = _area(np.concatenate([low, high], axis=-1))
    union = _area(left) + _area(right) - common
    return np.divide(common, union, out=np.zeros_like(union), where=union > 0)


def box_accuracy(
    predictions: Sequence[Box | None], targets: Sequence[Box], threshold: float = 0.5
) -> float:
    """The fraction of boxes that overlap their target by at least `threshold`.

    None stands for an answer without a box, which is wrong.

    Raises:
      ValueError: no targets, or not as many predictions.
    """
    if len(predictions) != len(targets) or not targets:
        raise ValueError(f"{len(predictions)} boxes for {len(targets)} targets")
    given = [(0.0,) * 4 if box is None else tuple(box) for box in predictions]
    overlaps = iou(np.array(given, np.float64), np.array(targets, np.float64))
    is_given = np.array([box is not None for box in predictions])
    return float(np.mean(is_given & (overlaps >= threshold)))


def _area(boxes: np.ndarray) -> np.ndarray | np.float64:
    sides = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return sides[..., 0] * sides[..., 1]
