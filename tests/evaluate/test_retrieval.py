"""Recall at K by hand, under ties, and by blocks."""

import math

import numpy as np
import pytest

from llmprep_jax.evaluate import retrieval
from llmprep_jax.evaluate.retrieval import recall

# the cosines of images (rows) and texts are the coordinates of texts, of length 1
SCORES = np.array([[0.5, 0.8, 0.1], [0.5, 0.0, 0.7], [0.1, 0.5, 0.2]])


def embeddings(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts with these cosines, up to a length a text."""
    rest = np.sqrt(1 - (scores**2).sum(0))
    return np.eye(*(len(scores), len(scores) + 1)), np.vstack([scores, rest]).T


def sorted_recall(scores, owner, k):
    """By sorting all pairs; for scores without ties."""
    texts = [any(owner[j] == i for j in np.argsort(-row)[:k]) for i, row in enumerate(scores)]
    images = [owner[j] in np.argsort(-scores[:, j])[:k] for j in range(scores.shape[1])]
    return np.mean(texts), np.mean(images)


def test_recall_by_hand():
    images, texts = embeddings(SCORES)
    found = recall(images, texts, ks=(1, 2, 3))
    # ranks of the right text: 2, 3, 2; of the right image: 1 (tied with another), 3, 2
    assert found.image_to_text == pytest.approx({1: 0, 2: 2 / 3, 3: 1})
    assert found.text_to_image == pytest.approx({1: 0.5 / 3, 2: 2 / 3, 3: 1})


def test_lengths_of_embeddings_do_not_matter():
    images, texts = embeddings(SCORES)
    scaled = recall(images * [[1], [5], [0.1]], texts * [[3], [1], [9]], ks=(1, 2))
    assert scaled == recall(images, texts, ks=(1, 2))


def test_any_caption_of_an_image_will_do():
    images = np.eye(2)
    texts = np.array([[0.9, 0.1], [0.5, 0.9], [0.8, 0.3], [0.2, 0.9]])
    found = recall(images, texts, [0, 0, 1, 1], ks=(1, 2))
    assert found.image_to_text == {1: 1.0, 2: 1.0}
    assert found.text_to_image == {1: 0.5, 2: 1.0}


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "ones"])
def test_a_model_that_says_one_thing_scores_chance(value):
    images, texts = np.full((20, 33), value, np.float32), np.full((60, 33), value, np.float32)
    found = recall(images, texts, np.arange(60) // 3, ks=(1, 5, 10))
    assert found.text_to_image == pytest.approx({k: k / 20 for k in (1, 5, 10)})
    chance = {k: 1 - math.comb(57, k) / math.comb(60, k) for k in (1, 5, 10)}
    assert found.image_to_text == pytest.approx(chance)


def test_part_of_a_tie_is_part_of_a_hit():
    images = np.eye(3)
    texts = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])  # two texts are the same
    found = recall(images, texts, ks=(1, 2))
    assert found.text_to_image == pytest.approx({1: (1 + 0 + 1) / 3, 2: (1 + 0.5 + 1) / 3})
    # the second image sees all texts at 0
    assert found.image_to_text == pytest.approx({1: (0.5 + 1 / 3 + 1) / 3, 2: (1 + 2 / 3 + 1) / 3})


def test_more_than_there_are_is_all():
    images, texts = embeddings(SCORES)
    assert recall(images, texts).image_to_text[10] == 1.0


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_blocks_change_nothing(block, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(23, 8)).astype(np.float32)
    owner = np.concatenate([np.arange(23), rng.integers(0, 23, 30)])
    texts = (images[owner] + 2 * rng.normal(size=(53, 8))).astype(np.float32)
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    found = recall(images, texts, owner, ks=(1, 5))
    scores = retrieval.unit(images) @ retrieval.unit(texts).T
    for k in (1, 5):
        expected = sorted_recall(scores, owner, k)
        assert (found.image_to_text[k], found.text_to_image[k]) == pytest.approx(expected)
        assert min(expected) > 0.1
        assert max(expected) < 0.95


def test_all_pairs_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", 300)
    sizes = []
    places = retrieval._places
    monkeypatch.setattr(
        retrieval,
        "_places",
        lambda scores, *args, **kw: sizes.append(scores.size) or places(scores, *args, **kw),
    )
    rng = np.random.default_rng(0)
    recall(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)))
    assert max(sizes) == 300
    assert sum(sizes) == 2 * 50 * 50


def test_what_cannot_be_ranked_is_refused():
    x = np.eye(3)
    with pytest.raises(ValueError, match="not finite, at rows \\[1\\]"):
        recall(x, np.where(np.arange(3)[:, None] == 1, np.nan, x))
    with pytest.raises(ValueError, match="3 images and 2 texts"):
        recall(x, x[:2])
    with pytest.raises(ValueError, match="rows \\[1, 2\\]"):
        recall(x, x[:1], [0])
    with pytest.raises(ValueError, match="rows \\[3\\]"):
        recall(x, np.eye(4, 3), [0, 1, 2, 3])
