"""Held-out loss and recall of two towers: of all pairs, once each, on one device and on a mesh."""

import numpy as np
import pytest

from llmprep_jax.evaluate.contrast import contrast
from llmprep_jax.evaluate.retrieval import recall
from llmprep_jax.sharding import batch_shards, make_mesh, use_mesh
from llmprep_jax.train.batches import own_rows
from llmprep_jax.train.contrastive import ContrastiveLoss
from tests.grids import cases
from tests.models.towers import END, make_towers
from tests.train.test_contrastive import unit

ROWS, PAIRS, FURTHER = 8, 19, 7  # two whole batches, and one that is filled up


class Held:
    """Of a text each, and seven more of the first seven images."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (PAIRS, 1, 9, 9, 3), dtype=np.uint8)
        self.texts = rng.integers(1, END, (PAIRS + FURTHER, 10), dtype=np.int32)
        self.texts[:, -1] = END
        self.size, self.num_images = ROWS, PAIRS
        self.owners = np.array([*range(PAIRS), *range(FURTHER)])

    def parts(self, array):
        for start in range(0, len(array), ROWS):
            numbers = [i if i < len(array) else 0 for i in range(start, start + ROWS)]
            yield array[np.array(numbers)[own_rows(ROWS)]]

    def __iter__(self):
        firsts = self.texts[:PAIRS]
        for tokens, images in zip(self.parts(firsts), self.parts(self.images), strict=True):
            yield {"tokens": tokens, "images": images}

    def further(self):
        yield from ({"tokens": tokens} for tokens in self.parts(self.texts[PAIRS:]))


def expected(model, pairs):
    images = np.asarray(model.encode_image((pairs.images[:, 0] / 127.5 - 1).astype(np.float32)))
    texts = np.asarray(model.encode_text(pairs.texts))
    factor, bias = map(float, model.similarity())
    losses = []
    for start in (0, ROWS):
        rows = slice(start, start + ROWS)
        z = factor * images[rows] @ texts[:PAIRS][rows].T + bias
        losses.append(np.logaddexp(0, -(2 * np.eye(ROWS) - 1) * z).sum() / ROWS)
    found = recall(unit(images), unit(texts), pairs.owners, ks=(1,))
    return np.mean(losses), found.image_to_text[1], found.text_to_image[1]


@pytest.mark.parametrize(
    "axes", cases([None, {"data": 2, "fsdp": 4}], fast=[{"data": 2, "fsdp": 4}]), ids=str
)
def test_loss_is_of_whole_batches_and_recall_of_all_pairs_with_all_their_texts(axes):
    pairs, loss = Held(), ContrastiveLoss()
    wanted = expected(make_towers("siglip"), pairs)
    with use_mesh(make_mesh(axes) if axes else None):
        assert batch_shards().count == (8 if axes else 1)
        model = make_towers("siglip")
    np.testing.assert_allclose(contrast(model, pairs, loss), wanted, rtol=1e-5)
    assert wanted[1] != wanted[2]
