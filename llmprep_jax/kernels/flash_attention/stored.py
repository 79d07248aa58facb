"""Keys and values as a cache stores them: in pages that rows share, or 8 bits wide with scales.

A pool holds pages of so many slots; slots j page to (j + 1) page - 1 of row b lie in page
`pages[b, j]` (PagedAttention, Kwon et al. 2023). A page of -1 is none: its slots are of segment 0,
which hides page 0, read in its place. An int8 key is its numbers times one scale a token and head,
so scores are multiplied by it after their product; of an int8 value it is the probabilities that
are, before theirs. No kernel writes either out.

Letters of this file: P pages of a pool, J pages of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import Places, Rule

Array = jax.Array


class Stored(NamedTuple):
    """What keys and values need to be read; all None: they are rows of numbers.

    Attributes:
      pages: int32 [B, J], within the pool; keys and values are then pools [P, K, page, H].
      k_scales, v_scales: float32 [B, K, S], or [P, K, page]; keys and values are then int8. Values
        that are the first numbers of the keys have the scales of these.
    """

    pages: Array | None = None
    k_scales: Array | None = None
    v_scales: Array | None = None

    def names(self) -> tuple[str, ...]:
        """What of it there is, as `Rule.stored` says it."""
        names = "pages" * (self.pages is not None), "scales" * (self.k_scales is not None)
        return tuple(name for name in names if name)


NOT_STORED = Stored()


def refusal_of_stored(rule: Rule) -> str | None:
    """Of a backend that reads rows of numbers alone."""
    if "pages" in rule.stored:
        return "it reads no pages"
    return "it reads no 8-bit keys" if rule.stored else None


def num_slots(k_BKSH: Array, pages_BJ: Array | None) -> int:
    """S of a row."""
    return k_BKSH.shape[2] * (1 if pages_BJ is None else pages_BJ.shape[1])


def gather(pool_PKSH: Array, pages_BJ: Array) -> Array:
    """Pages one after the other, [B, K, J page, ...]."""
    heads_K1 = jnp.arange(pool_PKSH.shape[1])[:, None]  # indexed too: else a transpose follows
    x_BKJSH = pool_PKSH.at[pages_BJ[:, None], heads_K1].get(mode="promise_in_bounds")
    return x_BKJSH.reshape(*x_BKJSH.shape[:2], -1, *x_BKJSH.shape[4:])


def pools_of_head(
    k_PKSH: Array, v_PKSU: Array, stored: Stored, head: Array
) -> tuple[Array, Array, Stored]:
    """Pools of one key head, which the heads of a page are pages of; cut out it would be a copy."""
    num_heads = k_PKSH.shape[1]
    k, v, k_scales, v_scales = jax.tree.map(
        lambda x: x.reshape(-1, 1, *x.shape[2:]),
        (k_PKSH, v_PKSU, stored.k_scales, stored.v_scales),
    )
    return k, v, Stored(stored.pages * num_heads + head, k_scales, v_scales)


def written_out(
    k_BKSH: Array, v_BKSU: Array, stored: Stored, rule: Rule, dtype: jax.typing.DTypeLike
) -> tuple[Array, Array]:
    """Keys and values as rows of numbers, which is what they mean."""
    k_scales, v_scales = stored.k_scales, stored.v_scales
    if stored.pages is not None:
        k_BKSH, v_BKSU, k_scales, v_scales = [
            None if x is None else gather(x, stored.pages)
            for x in (k_BKSH, v_BKSU, k_scales, v_scales)
        ]
    if k_scales is not None:
        v_scales = k_scales if rule.value_width is not None else v_scales
        k_BKSH, v_BKSU = k_BKSH * k_scales[..., None], v_BKSU * v_scales[..., None]
    return k_BKSH.astype(dtype), v_BKSU.astype(dtype)


def clear(x_BKSH: Array, k: Places) -> Array:
    """x [B, K, S, ...] with 0 at keys of segment 0: NaN in an empty slot times 0 would be NaN."""
    if k.segments is None:
        return x_BKSH
    is_key_B1S = k.segments[:, None] > 0
    return jnp.where(is_key_B1S[..., None] if x_BKSH.ndim == 4 else is_key_B1S, x_BKSH, 0)
