"""Reading a prompt into a cache, a block of tokens at a time.

Attention scores of T tokens against S slots are [T, S] for each head; blocks bound that, and for
DeepSeek the choice between the forms of latent attention is made for each. The one thing a reader
would get wrong: the odd block comes first, so that all others are one shape and one loop.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.types import Array, Bool, Float, Int

BLOCK = 1024  # tokens of a row that are read at once


def read_prompt(
    model: nnx.Module,
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    cache: Any,
    *,
    block: int = BLOCK,
    last_only: bool = False,
) -> tuple[Float[Array, "B _ D"], Any]:
    """(final hidden states, the cache with the prompt in it).

    Args:
      last_only: the hidden states of the last token alone, [B, 1, D].
    """
    num_blocks, first = divmod(tokens_BT.shape[1], block)

    def read(cache, tokens_BT, mask_BT):
        x_BTD, cache = model.features(tokens_BT, mask=mask_BT, cache=cache)
        return cache, x_BTD[:, -1:] if last_only else x_BTD

    found = []
    if first or not num_blocks:
        cache, x_BTD = read(cache, tokens_BT[:, :first], mask_BT[:, :first])
        found.append(x_BTD)
    if num_blocks:
        parts = [_blocks(x_BT[:, first:], num_blocks) for x_BT in (tokens_BT, mask_BT)]
        cache, x_LBTD = jax.lax.scan(lambda cache, part: read(cache, *part), cache, tuple(parts))
        found += [x_LBTD[-1]] if last_only else list(x_LBTD)
    return found[-1] if last_only else jnp.concatenate(found, axis=1), cache


def _blocks(x_BT: Array, num_blocks: int) -> Array:
    """[blocks, B, T / blocks]."""
    return x_BT.reshape(len(x_BT), num_blocks, -1).swapaxes(0, 1)
