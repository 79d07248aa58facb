"""What the GPU kernels share: what they know of a task, and tiles of arrays and of scores.

Scores are in base 2, and where nothing is added to them their scale is part of that. Widths that
are no power of two are cut into two that are: 192 is 128 + 64, 80 is 64 + 16.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmprep_jax.kernels.flash_attention.gpu_blocks import (
    Sizes,
    cut_width,
    seen_by_column,
    sizes_of,
)
from llmprep_jax.kernels.flash_attention.masks import Places, Rule, sees
from llmprep_jax.kernels.flash_attention.stored import Stored, num_slots

LOG2_E = math.log2(math.e)

Array = jax.Array
Ref = Any
Pair = tuple[Places, Places]


class Task(NamedTuple):
    """What a kernel knows before it is compiled.

    Attributes:
      T, S: queries, keys. H, U: widths of keys and values. group: query heads of a key head.
      by_value: whether what may be seen is said by values, not by columns alone.
      fold: tokens, where rows are the tokens of each head of a group, one head after the other; 0:
        rows are tokens of one head.
      splits: parts of the keys, each for a program of its own.
      page: slots of one, a whole number of tiles; 0: keys are in rows.
    """

    rule: Rule
    sizes: Sizes
    T: int
    S: int
    H: int
    U: int
    group: int
    by_value: bool
    fold: int = 0
    splits: int = 1
    page: int = 0

    @property
    def num_q_blocks(self) -> int:
        return pl.cdiv(self.T, self.sizes.q)

    @property
    def num_k_blocks(self) -> int:
        return pl.cdiv(self.S, self.sizes.k)

    @property
    def scales_first(self) -> bool:
        """Whether scores are scaled before they are compared; else their scale is in `unit`."""
        return self.rule.bias is not None or self.rule.soft_cap is not None or self.rule.scale <= 0

    @property
    def unit(self) -> float:
        """The factor from scores to exponents of 2; positive."""
        return LOG2_E if self.scales_first else LOG2_E * self.rule.scale


def task_of(
    which: str,
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: Pair,
    rule: Rule,
    pages_BJ: Array | None = None,
) -> Task:
    (_, N, T, H), K, U = q_BNTH.shape, k_BKSH.shape[1], v_BKSU.shape[-1]
    sizes = sizes_of(which, H, U, q_BNTH.dtype, T, k_BKSH.shape[2])
    task = Task(rule, sizes, T, k_BKSH.shape[2], H, U, N // K, bool(jax.tree.leaves(places)))
    if pages_BJ is None:
        return task
    return task._replace(S=num_slots(k_BKSH, pages_BJ), page=k_BKSH.shape[2])


def round_up(n: int, size: int) -> int:
    return -(-n // size) * size


def padded(width: int) -> int:
    return sum(size for _, size in cut_width(width))


def tile_spec(rows: int, width: int, index: Callable[..., tuple]) -> pl.BlockSpec:
    """Rows of one head of [B, T, N, H]."""
    return pl.BlockSpec((None, rows, None, padded(width)), index)


def stored_spec(x_BKSH: Array, task: Task) -> pl.BlockSpec:
    """All that a program may read of one key head of a cache, which lies by head: [B, K, S, H], a
    pool [P, K, page, H], or scales of either."""
    head = lambda n: jax.lax.div(n, task.group)  # noqa: E731
    if task.page:
        shape, index = (len(x_BKSH), None, task.page), lambda i, n, b: (0, head(n), 0)
    else:
        length = round_up(task.S, task.sizes.k)
        shape, index = (None, None, length), lambda i, n, b: (b, head(n), 0)
    if x_BKSH.ndim == 3:
        return pl.BlockSpec(shape, index)
    return pl.BlockSpec((*shape, padded(x_BKSH.shape[3])), lambda *at: (*index(*at), 0))


def stored_specs(stored: Stored, task: Task) -> Stored:
    """Of a row's pages, and of scales."""
    scales = [
        None if x is None else stored_spec(x, task) for x in (stored.k_scales, stored.v_scales)
    ]
    return Stored(row_specs(stored.pages, task.S // max(1, task.page)), *scales)


def row_specs(values: Any, length: int) -> Any:
    """Whole rows of arrays [B or 1, T]."""

    def spec(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, length), lambda i, n, b: (b if len(x) > 1 else 0, 0))

    return jax.tree.map(spec, values)


def load_tile(
    ref: Ref,
    start: Array | int,
    size: int,
    rows_left: Any,
    width: int,
    head: tuple[Array, ...] = (),
    page: tuple[Array, ...] = (),
    counts: Array | None = None,
) -> list[Array]:
    """`size` rows by the parts of their width, with zeros where `rows_left` are fewer.

    Args:
      ref: [T, H], or [T, N, H] of which `head` is read, or [P, T, H] of which `page` is.
      rows_left: from `start` on; None: as many as are asked for. counts: [size, 1], False where a
        row is 0 whatever is there.
    """
    tiles = []
    for first, wide in cut_width(width):
        mask = None
        if rows_left is not None:
            mask = jnp.broadcast_to(jnp.arange(size)[:, None] < rows_left, (size, wide))
        if first + wide > width:
            real = jnp.broadcast_to(first + jnp.arange(wide)[None] < width, (size, wide))
            mask = real if mask is None else mask & real
        if counts is not None:
            real = jnp.broadcast_to(counts, (size, wide))
            mask = real if mask is None else mask & real
        at = ref.at[*page, pl.ds(start, size), *head, pl.ds(first, wide)]
        tiles.append(plgpu.load(at, mask=mask, other=None if mask is None else 0.0))
    return tiles


def store_tile(ref: Ref, tiles: list[Array], rows_left: Any, width: int) -> None:
    """Writes what `_load_tile` would read from row 0 on."""
    for (first, wide), tile in zip(cut_width(width), tiles, strict=True):
        shape = tile.shape
        mask = None
        if rows_left is not None:
            mask = jnp.broadcast_to(jnp.arange(shape[0])[:, None] < rows_left, shape)
        if first + wide > width:
            real = jnp.broadcast_to(first + jnp.arange(wide)[None] < width, shape)
            mask = real if mask is None else mask & real
        at = ref.at[:, pl.ds(first, wide)]
        plgpu.store(at, tile.astype(ref.dtype), mask=mask)


def load_rows(
    ref: Ref,
    start: Array | int,
    size: int,
    rows_left: Any,
    other: Any,
    head: tuple[Array, ...] = (),
) -> Array:
    """`size` values of [T], or of one head of [N, T]."""
    mask = None if rows_left is None else jnp.arange(size) < rows_left
    at = ref.at[*head, pl.ds(start, size)]
    return plgpu.load(at, mask=mask, other=None if mask is None else other)


def load_places(refs: Places, start: Array, size: int, rows_left: Any, axis: int) -> Places:
    """Places of some tokens along `axis` of tiles of scores; beyond the end they are padding."""
    values = jax.tree.map(lambda ref: load_rows(ref, start, size, rows_left, 0), refs)
    if values.positions is None:
        values = values._replace(positions=start + jnp.arange(size))
    return jax.tree.map(lambda x: x[None] if axis else x[:, None], values)


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product in float32 sums; of float32 operands without TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, numbers, precision=precision, preferred_element_type=jnp.float32
    )


def dots(a: list[Array], b: list[Array]) -> Array:
    """a b^T over all parts of their width."""
    return sum(dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True))


def scores(
    task: Task,
    q: list[Array],
    k: list[Array],
    at: Pair,
    head: Array,
    masked: bool,
    k_scale: Array | None = None,
) -> tuple[Array, Array | float]:
    """(scores in 1 / `task.unit`, -inf where hidden; the slope of the cap) of a tile."""
    rule, slope = task.rule, 1.0
    s = dots(q, k)
    if k_scale is not None:
        s *= k_scale[None]
    if task.scales_first:
        s *= rule.scale
    if rule.bias is not None:
        s += rule.bias(head, at[0].positions, at[1].positions).astype(jnp.float32)
    if rule.soft_cap is not None:
        s = jnp.tanh(s / rule.soft_cap)
        slope = 1 - s * s
        s *= rule.soft_cap
    if masked:
        seen = sees(*at, rule)
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
    return s, slope


def walk(
    task: Task,
    bounds: Any,
    index: Array,
    body: Callable[..., Any],
    carry: Any,
    by_key: bool = False,
    part: Array | int = 0,
) -> Any:
    """`body(masked, j, carry)` over the blocks that block `index` may see, or may be seen by."""
    if bounds is not None:
        low, high = bounds[0][index], bounds[1][index]
        if task.splits > 1:
            size = jax.lax.div(high - low + task.splits - 1, task.splits)
            low = low + part * size
            high = jnp.minimum(high, low + size)
        return jax.lax.fori_loop(low, high, functools.partial(body, True), carry)
    back = None if task.rule.window is None else task.rule.window - 1
    ahead = 0 if task.rule.causal else back
    size, block, length = task.sizes.q, task.sizes.k, task.S
    if by_key:
        size, block, length, back, ahead = block, size, task.T, ahead, back
    low, inner_low, inner_high, high = seen_by_column(
        index * size, size, block, length, back, ahead
    )
    if back is not None:
        carry = jax.lax.fori_loop(low, inner_low, functools.partial(body, True), carry)
    carry = jax.lax.fori_loop(inner_low, inner_high, functools.partial(body, False), carry)
    if ahead is not None or length % block:
        carry = jax.lax.fori_loop(inner_high, high, functools.partial(body, True), carry)
    return carry


def tokens_left(total: int, size: int, start: Array) -> Array | None:
    """Tokens from `start` on, where blocks do not divide them."""
    return total - start if total % size else None


class Keys(NamedTuple):
    """A block of keys and values by the parts of their widths, and scales of 8-bit ones."""

    k: list[Array]
    v: list[Array]
    places: Places
    k_scale: Array | None = None
    v_scale: Array | None = None


def load_keys(
    task: Task, k_ref: Ref, v_ref: Ref, places: Places, j: Array, masked: bool, stored: Stored
) -> Keys:
    """Block j; only of a masked one may some be missing.

    What a cache holds in empty slots is not read: NaN would spread.
    """
    start, size = j * task.sizes.k, task.sizes.k
    left = tokens_left(task.S, size, start) if masked else None
    at = load_places(places, start, size, left, axis=1)
    counts = None
    if (task.fold or task.rule.stored) and places.segments is not None:
        counts = load_rows(places.segments, start, size, left, 0)[:, None] > 0
    page, first = (), start
    if task.page:
        page = (stored.pages[jax.lax.div(start, task.page)],)
        first = jax.lax.rem(start, task.page)
    k = load_tile(k_ref, first, size, left, task.H, (), page)
    v = load_tile(v_ref, first, size, left, task.U, (), page, counts)
    scales = []
    for ref in (stored.k_scales, stored.v_scales):
        if ref is not None:
            scales.append(load_rows(ref, first, size, left, 0.0, page))
            if counts is not None:
                scales[-1] = jnp.where(counts[:, 0], scales[-1], 0.0)
    return Keys(k, v, at, *scales)


def hide_tail(task: Task, s: Array, j: Array, masked: bool) -> Array:
    """Keys beyond the last are never seen."""
    if not masked or task.S % task.sizes.k == 0:
        return s
    columns = j * task.sizes.k + jnp.arange(task.sizes.k)
    return jnp.where(columns[None] < task.S, s, -jnp.inf)
