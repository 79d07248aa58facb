"""What may see what: values of queries and keys, and a few statics; never a matrix of all pairs.

A key is visible to a query of its own segment when it is not later (or causality is off, or both
are of one span, as the tokens of an image are) and within the window. Segment 0 is padding or an
empty cache slot: it sees nothing and nothing sees it. Where positions are not given they are
columns, and what causality and a window leave out is known before any value is; where they are,
blocks of tokens are compared by the least and the greatest value of each, so a row's order in
memory need not be its order in time.

Letters of this file: I blocks of queries, J blocks of keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

NEG_INF = -2.3819763e38  # finite: differences of it are numbers

Bias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Rule(NamedTuple):
    """What is known of an attention before its arrays are.

    Attributes:
      causal: whether later keys are hidden. window: keys this far back, the query's own counted
        (either way where not causal); None: any. scale: of the scores. soft_cap: c of scores
        c tanh(s / c).
      bias: of (query head, query position, key position), added to the scaled scores before they
        are capped: elementwise over integer arrays that broadcast, so that kernels may call it.
      given: the fields of `Places` that have values; without positions masks are by column.
      value_width: values are the first so many numbers of the keys; None: arrays of their own.
      stored: "pages" and "scales" where keys and values need them to be read (`stored.Stored`).
    """

    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    bias: Bias | None = None
    given: tuple[str, ...] = ()
    value_width: int | None = None
    stored: tuple[str, ...] = ()


class Places(NamedTuple):
    """Where the tokens of one side stand: int32 [B, T] each, or None.

    Attributes:
      positions: None: columns. segments: 0 is padding; None: all of one. spans: 0 is none; None:
        there are none. Both sides give the same of the three.
    """

    positions: jax.Array | None = None
    segments: jax.Array | None = None
    spans: jax.Array | None = None

    def block(self, start: jax.Array | int, size: int) -> "Places":
        """The tokens in `size` columns from `start`."""
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1)  # noqa: E731
        return jax.tree.map(cut, self)


def visible(
    q: Places, k: Places, rule: Rule, q_columns_T: jax.Array, k_columns_S: jax.Array
) -> jax.Array | None:
    """True where a query may see a key, [B or 1, T, S]; None where all see all."""
    q_position_BT1, k_position_B1S = positions(q, k, q_columns_T, k_columns_S)
    q_BT1 = jax.tree.map(lambda x: x[:, :, None], q)._replace(positions=q_position_BT1)
    k_B1S = jax.tree.map(lambda x: x[:, None], k)._replace(positions=k_position_B1S)
    return sees(q_BT1, k_B1S, rule)


def sees(q: Places, k: Places, rule: Rule) -> jax.Array | None:
    """True where a query may see a key, of values that broadcast; both give positions."""
    seen = None

    def both(a: jax.Array | None, b: jax.Array) -> jax.Array:
        return b if a is None else a & b

    if rule.causal:
        seen = k.positions <= q.positions
        if q.spans is not None:
            seen |= (q.spans == k.spans) & (k.spans > 0)
    if rule.window is not None:
        seen = both(seen, q.positions - k.positions < rule.window)
        if not rule.causal:
            seen &= k.positions - q.positions < rule.window
    if q.segments is not None:
        seen = both(seen, (q.segments == k.segments) & (k.segments > 0))
    return seen


def positions(
    q: Places, k: Places, q_columns_T: jax.Array, k_columns_S: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Positions of queries [B or 1, T, 1] and of keys [B or 1, 1, S]."""
    if q.positions is None:
        return q_columns_T[None, :, None], k_columns_S[None, None]
    return q.positions[:, :, None], k.positions[:, None]


class Ranges(NamedTuple):
    """The least and the greatest value in each block of tokens, [B or 1, I] each.

    Padding is left out of positions and segments, and tokens of no span out of spans; a block with
    none left has a least above its greatest.
    """

    positions: tuple[jax.Array, jax.Array]
    segments: tuple[jax.Array, jax.Array] | None
    spans: tuple[jax.Array, jax.Array] | None


def ranges(places: Places, num_tokens: int, size: int) -> Ranges:
    """Of blocks of `size` tokens; the last may be shorter."""
    values_BT = places.positions
    if values_BT is None:
        values_BT = jnp.arange(num_tokens, dtype=jnp.int32)[None]
    real_BT = None if places.segments is None else places.segments > 0
    spans_BT = places.spans
    return Ranges(
        _ends(values_BT, real_BT, size),
        None if real_BT is None else _ends(places.segments, real_BT, size),
        None if spans_BT is None else _ends(spans_BT, spans_BT > 0, size),
    )


def _ends(x_BT: jax.Array, counts_BT: jax.Array | None, size: int) -> tuple[jax.Array, jax.Array]:
    def reduce(function: Callable[..., jax.Array], neutral: int) -> jax.Array:
        values_BT = x_BT if counts_BT is None else jnp.where(counts_BT, x_BT, neutral)
        padding = (0, 0), (0, -x_BT.shape[1] % size)
        values_BT = jnp.pad(values_BT, padding, constant_values=neutral)
        return function(values_BT.reshape(len(values_BT), -1, size), axis=2)

    limits = jnp.iinfo(jnp.int32)
    return reduce(jnp.min, limits.max), reduce(jnp.max, limits.min)


def may_see(q: Ranges, k: Ranges, rule: Rule) -> jax.Array:
    """False where no query of a block sees any key of another for sure, [B or 1, I, J]."""

    def pairs(i: tuple[jax.Array, jax.Array], j: tuple[jax.Array, jax.Array]):
        return i[0][:, :, None], i[1][:, :, None], j[0][:, None], j[1][:, None]

    q_low, q_high, k_low, k_high = pairs(q.positions, k.positions)
    seen = (q_low <= q_high) & (k_low <= k_high)
    if rule.causal:
        earlier = k_low <= q_high
        if q.spans is not None:
            i_low, i_high, j_low, j_high = pairs(q.spans, k.spans)
            earlier |= (i_low <= j_high) & (j_low <= i_high)
        seen &= earlier
    if rule.window is not None:
        seen &= q_low < k_high + rule.window
        if not rule.causal:
            seen &= k_low < q_high + rule.window
    if q.segments is not None:
        i_low, i_high, j_low, j_high = pairs(q.segments, k.segments)
        seen &= (i_low <= j_high) & (j_low <= i_high)
    return seen
