"""Images of prompts: given by name beside the tokens, and embedded once for the decoder to read."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate.prompt import (
    Inputs,
    bucket,
    by_row,
    columns_of_blocks,
    pad,
    prompt_width,
)
from llmprep_jax.nn.media import place_features

Media = Mapping[str, np.ndarray]


def read_media(model: nnx.Module, tokens: np.ndarray, media: Mapping[str, Any]) -> Media:
    """Media as a processor gave them, of whole rows: [B, M, ...] each, M a power of two.

    Raises:
      ValueError: a model of text, or other media than the tokens are of.
    """
    rows = model.by_row(tokens, media)
    return {name: _bucketed(np.asarray(x)) for name, x in rows.items()}


def _bucketed(x: np.ndarray) -> np.ndarray:
    missing = bucket(x.shape[1], 1) - x.shape[1]
    return np.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))


def cache_keys(model: nnx.Module, tokens_T: np.ndarray, media: Media) -> np.ndarray:
    """Numbers of one row that are equal where its tokens and, in the places of theirs, its images
    are: two pictures have the same tokens."""
    keys_T = tokens_T.astype(np.int64)
    is_image_T, each = tokens_T == model.image_id, model.tokens_per_image
    if not media or not is_image_T.any():
        return keys_T
    numbers_T = np.cumsum(is_image_T) - 1
    numbers_T = np.zeros_like(numbers_T) if each is None else numbers_T // each
    count = int(numbers_T.max()) + 1
    digests = []
    for number in range(count):
        parts = [x[0] if each is None else x[0, number] for _, x in sorted(media.items())]
        digest = hashlib.blake2b(b"".join(x.tobytes() for x in parts), digest_size=7).digest()
        digests.append(-1 - int.from_bytes(digest, "big"))
    return np.where(is_image_T, np.array(digests)[numbers_T], keys_T)


def spans_of(model: nnx.Module, tokens_BT: np.ndarray) -> np.ndarray | None:
    """Numbers of runs whose tokens see each other; None: there is none."""
    spans_BT = model.spans(jnp.asarray(tokens_BT))
    return None if spans_BT is None else np.asarray(spans_BT)


def lay_out(
    model: nnx.Module,
    tokens_BT: np.ndarray,
    mask_BT: np.ndarray,
    media: Media,
    width: int,
    num_known: int = 0,
) -> tuple[np.ndarray, np.ndarray, Inputs, int]:
    """(tokens, mask, what the decoder reads, tokens of a block) of prompts after their first
    `num_known` tokens, padded to `width` or more."""
    spans_BT = spans_of(model, tokens_BT)
    new_spans_BT = None if spans_BT is None else spans_BT[:, num_known:]
    length = tokens_BT.shape[1] - num_known
    columns_BT, block = columns_of_blocks(mask_BT[:, num_known:], new_spans_BT, length, width)

    def take(x_BT: np.ndarray) -> np.ndarray:
        x_BT = np.take_along_axis(x_BT[:, num_known:], np.maximum(columns_BT, 0), axis=1)
        return np.where(columns_BT >= 0, x_BT, 0)

    whole_BT = pad(tokens_BT, max(prompt_width(tokens_BT.shape[1]), width))
    at_BT = np.where(columns_BT >= 0, columns_BT + num_known, -1).astype(np.int32)
    x_BTD = _embed(model, whole_BT, at_BT, dict(media))
    spans_BT = None if spans_BT is None else take(spans_BT)
    return take(tokens_BT), take(mask_BT).astype(bool), Inputs(x_BTD, spans_BT), block


@jax.jit
def _embed(model, tokens_BT, columns_BT, media):
    """What the decoder reads in each column, zeros where that is -1."""
    tokens_BT, columns_BT = by_row(tokens_BT), by_row(columns_BT)
    x_BTD = model.embed_inputs(tokens_BT, **jax.tree.map(by_row, media))
    nothing_BTD = jnp.zeros((*columns_BT.shape, x_BTD.shape[-1]), x_BTD.dtype)
    return place_features(nothing_BTD, columns_BT, x_BTD)
