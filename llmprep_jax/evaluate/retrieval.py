"""Recall of retrieval: whether what belongs together is among the K most alike.

R@K of Karpathy and Fei-Fei (arXiv 1412.2306, section 4.1), as CLIP and SigLIP report it: of an
image, 1 where any of its captions is among the K texts nearest to it; of a text, 1 where its image
is among the K images; each averaged over all. Equal scores are in no order, and a sort would order
them as the data lie, which puts what belongs together first: a model that maps everything to one
vector would be perfect. Here such a query counts by the chance of a random order.

Letters: I images, C captions (of a classifier: classes), D width, M one block of images.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llmprep_jax.types import Array, Float, Int

_BLOCK = 2**22  # scores at once: 32 MiB
# of vectors of equal direction, products in float64 agree to 1e-15; the last bit of one of 512
# numbers in float32 moves them by 1e-10
_TIE = 1e-12


class Recall(NamedTuple):
    """R@K by K, in [0, 1]: texts found for images, and images found for texts."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def recall(
    images: Float[Array, "I D"],
    texts: Float[Array, "C D"],
    image_of_text: Int[Array, " C"] | Sequence[int] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> Recall:
    """R@K both ways, by cosine similarity; embeddings need not be unit vectors.

    Works by blocks of images: the scores of all pairs are never held at once.

    Args:
      image_of_text: the row of the image that each text describes; None: text i is of image i.

    Raises:
      ValueError: shapes do not fit, an embedding is not finite, an image has no text.
    """
    image_of_text = _owners(images, texts, image_of_text)
    images_ID, texts_CD = unit(images), unit(texts)
    own_C = np.einsum("CD,CD->C", images_ID[image_of_text], texts_CD)
    best_I = np.full(len(images_ID), -np.inf)
    np.maximum.at(best_I, image_of_text, own_C)
    right_I = np.bincount(image_of_text[own_C >= best_I[image_of_text] - _TIE])
    above_I, tied_I, above_C, tied_C = (
        np.zeros(len(own), int) for own in (best_I, best_I, own_C, own_C)
    )
    for rows, scores_MC in _blocks(images_ID, texts_CD):
        above_I[rows], tied_I[rows] = _places(scores_MC, best_I[rows, None], axis=1)
        above, tied = _places(scores_MC, own_C[None], axis=0)
        above_C, tied_C = above_C + above, tied_C + tied
    return Recall(
        {k: float(np.mean(chance(above_I, tied_I, right_I, k))) for k in ks},
        {k: float(np.mean(chance(above_C, tied_C, np.ones_like(tied_C), k))) for k in ks},
    )


def unit(x: Float[Array, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Vectors of length 1 in float64; zeros stay.

    Raises:
      ValueError: a value is not finite: comparisons with NaN would all fail, which looks perfect.
    """
    x = np.asarray(x).astype(np.float64)
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(-1))
        raise ValueError(f"embeddings that are not finite, at rows {rows[:5].tolist()}")
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def ranks(
    images_ID: Float[np.ndarray, "I D"],
    texts_CD: Float[np.ndarray, "C D"],
    right_I: Int[np.ndarray, " I"],
) -> tuple[Int[np.ndarray, " I"], Int[np.ndarray, " I"]]:
    """For each image, how many texts score above the right one, and how many as it (itself too)."""
    above_I, tied_I = np.zeros(len(right_I), int), np.zeros(len(right_I), int)
    for rows, scores_MC in _blocks(images_ID, texts_CD):
        own_M = np.take_along_axis(scores_MC, right_I[rows, None], axis=1)
        above_I[rows], tied_I[rows] = _places(scores_MC, own_M, axis=1)
    return above_I, tied_I


def chance(
    above: Int[np.ndarray, " n"], tied: Int[np.ndarray, " n"], right: Int[np.ndarray, " n"], k: int
) -> Float[np.ndarray, " n"]:
    """How likely a right one is among the first k, when equal scores are in random order.

    `above` candidates come first; then `tied` in random order, `right` of which are right. Of the m
    places that are left of k, all go to wrong ones with probability C(tied - right, m) / C(tied, m)
    = prod over j < right of (tied - m - j) / (tied - j).
    """
    places = np.clip(k - above, 0, tied)
    none_right = np.ones(len(tied))
    for j in range(int(right.max(initial=0))):
        share = np.maximum(tied - places - j, 0) / np.maximum(tied - j, 1)
        none_right *= np.where(j < right, share, 1)
    return 1 - none_right


def _places(scores: np.ndarray, own: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """How many scores are above one's own, and how many equal it."""
    above = (scores > own + _TIE).sum(axis)
    return above, (scores >= own - _TIE).sum(axis) - above


def _blocks(images_ID: np.ndarray, texts_CD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    rows = max(1, _BLOCK // len(texts_CD))
    for start in range(0, len(images_ID), rows):
        block = slice(start, start + rows)
        yield block, images_ID[block] @ texts_CD.T


def _owners(images: Array, texts: Array, image_of_text: Array | Sequence[int] | None) -> np.ndarray:
    """The image of each text, checked."""
    if image_of_text is None:
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images and {len(texts)} texts: give image_of_text")
        image_of_text = np.arange(len(texts))
    owners = np.asarray(image_of_text)
    if len(owners) != len(texts):
        raise ValueError(f"image_of_text has {len(owners)} rows for {len(texts)} texts")
    if not len(images) or set(owners.tolist()) != set(range(len(images))):
        wrong = sorted(set(owners.tolist()) ^ set(range(len(images))))
        raise ValueError(
            f"every image needs a text, and every text one of the {len(images)} images; not so for "
            f"rows {wrong[:5]}"
        )
    return owners
