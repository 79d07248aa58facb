"""What the TPU kernels share: which tiles of queries and keys are computed, and their scores.

A grid steps over blocks of keys (or of queries) from the first to the last that a block may see by
its values; both ends, and for each tile whether all of it is seen, lie in scalar memory. Values by
token travel as rows [values, tokens].

Letters of this file: I blocks of queries, J blocks of keys, W words of 16 tiles.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.flash_attention.masks import Places, Rule, may_see, ranges
from llmprep_jax.kernels.tpu import LANES, lanes, multiply, to_column

HIDDEN, PARTLY, WHOLLY, PADDED = 0, 1, 2, 3  # how much of a tile is seen; partly, with padding

Array = jax.Array


class Spec(NamedTuple):
    """Statics of a call.

    Attributes:
      T, S: tokens of a row of queries and of keys. q_block, k_block: tokens of a tile.
      group: query heads that share a key head on the grid. folded: query heads that share one and
        lie one after the other in a row of queries, T / folded tokens each.
      names: values by token that both sides have, in order.
      by_row: whether rows differ in what they see.
      latent: values are the first so many numbers of keys, and no array of their own; None: they
        are one.
      page: slots of one, of which a tile has some or is a part; 0: keys are in rows.
    """

    rule: Rule
    T: int
    S: int
    q_block: int
    k_block: int
    group: int
    folded: int
    names: tuple[str, ...]
    by_row: bool
    latent: int | None = None
    page: int = 0

    @property
    def num_q_blocks(self) -> int:
        return pl.cdiv(self.T, self.q_block)

    @property
    def num_k_blocks(self) -> int:
        return pl.cdiv(self.S, self.k_block)

    @property
    def num_pages(self) -> int:
        """Of a tile of keys, or that each has a part of."""
        return max(1, self.k_block // self.page) if self.page else 1

    @property
    def has_heads(self) -> bool:
        """Whether queries carry their head as one more value."""
        return self.folded > 1 and self.rule.bias is not None


class Table(NamedTuple):
    """Scalars by block, flat: of rows and blocks of queries [B I], of keys [B J], of tiles [B I W].

    Attributes:
      q_low, q_high: the blocks of keys that a block of queries may see. k_low, k_high: the
        reverse. kinds: 2 bits a tile.
    """

    q_low: Array
    q_high: Array
    k_low: Array
    k_high: Array
    kinds: Array


def table_of(q: Places, k: Places, spec: Spec) -> Table:
    """Of B rows, or of one where they do not differ."""
    q_ends, k_ends = ranges(q, spec.T, spec.q_block), ranges(k, spec.S, spec.k_block)
    seen_BIJ = may_see(q_ends, k_ends, spec.rule)
    all_BIJ = seen_BIJ & _all_seen(q, k, q_ends.positions, k_ends.positions, spec)
    rows = [x for x in jax.tree.leaves(q)[:1] if spec.by_row]
    shape = (len(rows[0]) if rows else 1, spec.num_q_blocks, spec.num_k_blocks)
    seen_BIJ, all_BIJ = jnp.broadcast_to(seen_BIJ, shape), jnp.broadcast_to(all_BIJ, shape)
    kinds_BIJ = seen_BIJ.astype(jnp.int32) + all_BIJ
    if k.segments is not None:
        has_padding_B1J = ranges(Places(k.segments), spec.S, spec.k_block).positions[0] <= 0
        kinds_BIJ = jnp.where(seen_BIJ & has_padding_B1J[:, None], PADDED, kinds_BIJ)
    kinds_BIJ = jnp.pad(kinds_BIJ, ((0, 0), (0, 0), (0, -kinds_BIJ.shape[2] % 16)))
    kinds_BIWX = kinds_BIJ.reshape(*kinds_BIJ.shape[:2], -1, 16)
    words_BIW = jnp.sum(kinds_BIWX << (2 * jnp.arange(16)), axis=3, dtype=jnp.int32)
    ends = *_first_and_last(seen_BIJ, 2), *_first_and_last(seen_BIJ, 1)
    return Table(*[x.reshape(-1) for x in (*ends, words_BIW)])


def _all_seen(q: Places, k: Places, q_ends, k_ends, spec: Spec) -> Array:
    """Where each query of a block sees each key of another, [B or 1, I, J]."""
    q_low, q_high = [x[:, :, None] for x in q_ends]
    k_low, k_high = [x[:, None] for x in k_ends]
    rule = spec.rule
    # tokens past the end of a row are hidden by the mask
    whole = (jnp.arange(spec.num_q_blocks) < spec.T // spec.q_block)[:, None]
    seen = (whole & (jnp.arange(spec.num_k_blocks) < spec.S // spec.k_block))[None]
    if rule.causal:
        seen &= k_high <= q_low
    if rule.window is not None:
        seen &= q_high - k_low < rule.window
        if not rule.causal:
            seen &= k_high - q_low < rule.window
    if q.segments is not None:  # as positions: then padding counts
        i_low, i_high = ranges(Places(q.segments), spec.T, spec.q_block).positions
        j_low, j_high = ranges(Places(k.segments), spec.S, spec.k_block).positions
        same = (i_low == i_high)[:, :, None] & (j_low == j_high)[:, None]
        seen &= same & (i_low[:, :, None] == j_low[:, None]) & (j_low[:, None] > 0)
    return seen


def _first_and_last(seen_BIJ: Array, axis: int) -> tuple[Array, Array]:
    """The first block that is seen along an axis, and the one after the last; 0 and 0: none is."""
    some = jnp.any(seen_BIJ, axis)
    low = jnp.argmax(seen_BIJ, axis)
    high = seen_BIJ.shape[axis] - jnp.argmax(jnp.flip(seen_BIJ, axis), axis)
    return tuple(jnp.where(some, x, 0).astype(jnp.int32) for x in (low, high))


def num_steps(low: Array, high: Array) -> Array:
    """Steps of a grid that the longest range needs; one at least, which writes the output."""
    return jnp.maximum(jnp.max(high - low), 1)


def values_of(q: Places, k: Places, spec: Spec) -> tuple[Array, ...]:
    """int32 [B, values, T] and [B, values, S]; none where masks are by column."""
    q_values, k_values = ([getattr(x, name) for name in spec.names] for x in (q, k))
    if spec.has_heads:
        heads = jnp.arange(spec.T, dtype=jnp.int32) // (spec.T // spec.folded)
        q_values.append(jnp.broadcast_to(heads, q_values[0].shape))
    return tuple(jnp.stack(x, axis=1) for x in (q_values, k_values) if x)


# --- inside a kernel ---


def page_at(pages: jax.Ref, b: Array, j: Array, c: int, spec: Spec) -> tuple[Array, Array | int]:
    """(page, which tile of it) of the c-th page of a tile of keys."""
    if spec.page > spec.k_block:
        tiles_a_page = spec.page // spec.k_block
        at, part = j // tiles_a_page, j % tiles_a_page
    else:
        at, part = j * spec.num_pages + c, 0
    return pages[b * padded_pages(spec) + at], part


def padded_pages(spec: Spec) -> int:
    """Pages of a row, by whole tiles."""
    return pl.cdiv(spec.S // spec.page, spec.num_pages) * spec.num_pages


def index(ref: jax.Ref, b: Array, i: Array, count: int, spec: Spec) -> Array:
    """The scalar of a row and a block, of `count` blocks a row."""
    return ref[b * count + i if spec.by_row else i]


def at_step(
    low: jax.Ref, high: jax.Ref, b: Array, i: Array, step: Array, count: int, spec: Spec
) -> Array:
    """The block of a step; after the last it stays the same, which is not fetched again."""
    first, end = index(low, b, i, count, spec), index(high, b, i, count, spec)
    return jnp.minimum(first + step, jnp.maximum(end - 1, first))


def kind(kinds: jax.Ref, b: Array, i: Array, j: Array, spec: Spec) -> Array:
    words = pl.cdiv(spec.num_k_blocks, 16)
    row = b * spec.num_q_blocks + i if spec.by_row else i
    return (kinds[row * words + (j >> 4)] >> ((j & 15) * 2)) & 3


def columns(values: tuple[Array, ...], size: int) -> list:
    """Scratch for values by token as columns, of one side or of none."""
    return [pltpu.VMEM((x.shape[1], size, LANES), jnp.int32) for x in values]


def fill(columns_ref: jax.Ref | None, values_ref: jax.Ref | None) -> None:
    if columns_ref is not None:
        for c in range(columns_ref.shape[0]):
            columns_ref[c] = to_column(values_ref[c : c + 1])


class Tile(NamedTuple):
    """Where a tile of scores stands.

    Attributes:
      q_start, k_start: the first columns. head: query head. q_axis: which axis queries are along.
      q_values, k_values: by token, in shapes that broadcast to the tile's.
    """

    q_start: Array
    k_start: Array
    head: Array
    q_axis: int
    shape: tuple[int, int]
    q_values: tuple[Array, ...] = ()
    k_values: tuple[Array, ...] = ()


def clear_padding(x: Array, k_values_ref: jax.Ref, axis: int, spec: Spec) -> Array:
    """Values of a tile, or a row of scales, with 0 at keys of segment 0."""
    at = spec.names.index("segments")
    is_key = k_values_ref[at : at + 1] > 0
    if axis == 0:  # in 32 bits, as a mask of columns is
        is_key = lanes(to_column(k_values_ref[at : at + 1]), x.shape[1]) > 0
        return jnp.where(is_key, x.astype(jnp.float32), 0.0).astype(x.dtype)
    return jnp.where(is_key, x, 0.0)


def scores(a: Array, b: Array, tile: Tile, spec: Spec, k_scale: Array | None = None) -> Array:
    """Of the tile, before the mask: rows of `a` times rows of `b`, and of these times a scale."""
    rule = spec.rule
    s = multiply(a, b, (1, 1)) * rule.scale
    if k_scale is not None:
        s *= k_scale
    if rule.bias is not None:
        head = jnp.full((1, 1), tile.head, jnp.int32)
        if spec.has_heads:
            head = tile.head + tile.q_values[-1]
        s += rule.bias(head, *_positions(tile, spec))
    if rule.soft_cap is not None:
        s = jnp.tanh(s / rule.soft_cap) * rule.soft_cap
    return s


def seen(tile: Tile, spec: Spec) -> Array:
    """Which of a tile's scores count: `masks.visible`, and that both tokens are there."""
    rule, parts = spec.rule, []
    if rule.causal or rule.window is not None:
        i, j = _positions(tile, spec)
        if rule.causal:
            earlier = j <= i
            if "spans" in spec.names:
                q_span, k_span = _values(tile, spec, "spans")
                earlier |= (q_span == k_span) & (k_span > 0)
            parts.append(earlier)
        if rule.window is not None:
            parts.append(i - j < rule.window)
            if not rule.causal:
                parts.append(j - i < rule.window)
    if "segments" in spec.names:
        q_segment, k_segment = _values(tile, spec, "segments")
        parts += [q_segment == k_segment, k_segment > 0]
    if spec.S % spec.k_block:
        parts.append(_columns(tile, 1 - tile.q_axis) < spec.S)
    if spec.T % spec.q_block:
        parts.append(_columns(tile, tile.q_axis) < spec.T)
    parts = [jnp.broadcast_to(x, tile.shape) for x in parts]
    return functools.reduce(jnp.logical_and, parts) if parts else jnp.ones(tile.shape, bool)


def _positions(tile: Tile, spec: Spec) -> tuple[Array, Array]:
    if "positions" in spec.names:
        return _values(tile, spec, "positions")
    return _columns(tile, tile.q_axis), _columns(tile, 1 - tile.q_axis)


def _values(tile: Tile, spec: Spec, name: str) -> tuple[Array, Array]:
    at = spec.names.index(name)
    return tile.q_values[at], tile.k_values[at]


def _columns(tile: Tile, axis: int) -> Array:
    start = tile.q_start if axis == tile.q_axis else tile.k_start
    return start + jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)


def slope(s: Array, spec: Spec) -> Array | float:
    """Of the cap, by capped scores, times the scale."""
    cap = spec.rule.soft_cap
    return spec.rule.scale if cap is None else (1 - jnp.square(s / cap)) * spec.rule.scale


def cost(spec: Spec, widths: int, arrays: Sequence[Any], outs: Sequence[Any]) -> pl.CostEstimate:
    """For XLA's scheduler, of masks by column.

    Args:
      widths: over all products of a pair of tokens, the numbers that each multiplies.
    """
    pairs = spec.T * spec.S
    if spec.rule.causal and spec.folded == 1:
        pairs //= 2
    if spec.rule.window is not None:
        pairs = min(pairs, spec.T * spec.rule.window * (1 if spec.rule.causal else 2))
    pairs *= arrays[0].shape[0] * arrays[0].shape[1]
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *outs))
    return pl.CostEstimate(flops=2 * pairs * widths, transcendentals=pairs, bytes_accessed=size)
