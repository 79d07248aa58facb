"""How well two towers tell pairs apart: their loss on held-out pairs, and retrieval among them.

The loss is the mean over whole batches, since it depends on how many pairs a batch has; recall is
over all pairs together.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llmprep_jax.evaluate.retrieval import recall
from llmprep_jax.sharding import has_mesh, on_own_mesh
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.contrastive import ContrastiveLoss


class Contrast(NamedTuple):
    """The loss, and R@1 both ways, in [0, 1]."""

    loss: float
    image_to_text: float
    text_to_image: float


@on_own_mesh
def contrast(model: Any, pairs: Any, loss: ContrastiveLoss) -> Contrast:
    """Evaluates a model of two towers; images are decoded and encoded once each.

    Args:
      pairs: of `data.HeldOutPairs`.
    """
    losses, images, texts, further = [], [], [], []
    for number, batch in enumerate(pairs, 1):
        total, x_BE, y_BE = jax.device_get(_encode_pairs(model, _placed(batch), loss))
        if number * pairs.size <= pairs.num_images:  # the last may be filled up
            losses.append(float(total) / pairs.size)
        images.append(x_BE)
        texts.append(y_BE)
    for batch in pairs.further():
        further.append(jax.device_get(_encode_texts(model, _placed(batch))))
    images_ID, texts_ID = (np.concatenate(x)[: pairs.num_images] for x in (images, texts))
    num_further = len(pairs.owners) - pairs.num_images
    texts_CD = np.concatenate([texts_ID, *further])[: pairs.num_images + num_further]
    found = recall(images_ID, texts_CD, pairs.owners, ks=(1,))
    return Contrast(float(np.mean(losses)), found.image_to_text[1], found.text_to_image[1])


def _placed(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: x[0] for name, x in place_batch(batch).items()}


def _whole(x_BE: jax.Array) -> jax.Array:
    """On each device and process."""
    return jax.reshard(x_BE, jax.P(None, None)) if has_mesh() else x_BE


@functools.partial(jax.jit, static_argnames="loss")
def _encode_pairs(
    model: Any, batch: Mapping[str, jax.Array], loss: ContrastiveLoss
) -> tuple[jax.Array, jax.Array, jax.Array]:
    pairs = loss.encode(model, batch)
    return loss.total(pairs), _whole(pairs.images), _whole(pairs.texts)


@jax.jit
def _encode_texts(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return _whole(model.encode_text(batch["tokens"]))
