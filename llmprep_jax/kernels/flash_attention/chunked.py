"""Attention by blocks of queries in plain XLA, for any device; memory is linear in length.

Few short blocks are written out one after the other, each with the keys up to its end alone: their
scores are single products, which a CPU is quickest with, and what a mask in order of columns hides
is not computed. Longer rows run as a loop over blocks of queries, and inside it over those blocks
of keys that the queries may see by their values, with the online softmax (Milakov and Gimelshein
2018). Both read the same tile of scores from `_scores`. Keys in pages or of 8 bits are always run
through by the loop, which gathers and widens a block of them at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import (
    NEG_INF,
    Places,
    Rule,
    may_see,
    positions,
    ranges,
    visible,
)
from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored, clear, gather, num_slots

MIN_BLOCK, MAX_BLOCKS = 128, 8  # queries of a block written out; more blocks compile longer
WHOLE = 2**24  # scores of all blocks written out, at most: 64 MiB, as XLA may keep them at once
Q_BLOCK, K_BLOCK = 256, 128  # of the loop
FEW, FEW_K_BLOCK = 16, 512  # with so few queries a step of it costs more than its products

Array = jax.Array


def refusal(q: Array, k: Array, v: Array, rule: Rule, backward: bool) -> str | None:
    """Why this backend cannot do it; there is nothing that it cannot."""
    return None


class Tile(NamedTuple):
    """Some queries and some keys, by their first columns."""

    q_start: int | Array
    k_start: int | Array


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: tuple[Places, Places],
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    blocks = None if rule.stored else _written_out(q_BNTH, k_BKSH, places, rule)
    if blocks is None:
        return _forward_loop(q_BNTH, k_BKSH, v_BKSU, places, rule, stored)
    v_BKSU = clear(v_BKSU, places[1])  # a slice of a cache is copied on its way to a product anyway
    outs = []
    for rows, columns in blocks:
        q, k, v = q_BNTH[:, :, rows], k_BKSH[:, :, columns], v_BKSU[:, :, columns]
        tile = Tile(rows.start, columns.start)
        outs.append(_forward_whole(q, k, v, _cut(places, rows, columns), rule, tile))
    if len(outs) == 1:
        return outs[0]
    return tuple(jnp.concatenate(x, axis=2) for x in zip(*outs, strict=True))


def backward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    lse_BNT: Array,
    do_BNTU: Array,
    delta_BNT: Array,
    places: tuple[Places, Places],
    rule: Rule,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), as `reference.backward`."""
    arrays = (q_BNTH, lse_BNT, do_BNTU, delta_BNT)
    blocks = _written_out(q_BNTH, k_BKSH, places, rule)
    if blocks is None:
        return _backward_loop(arrays, k_BKSH, v_BKSU, places, rule)
    k_BKSH, v_BKSU = clear(k_BKSH, places[1]), clear(v_BKSU, places[1])
    dqs, dk, dv = [], 0.0, 0.0
    for rows, columns in blocks:
        of_block = [x[:, :, rows] for x in arrays]
        k, v = k_BKSH[:, :, columns], v_BKSU[:, :, columns]
        tile, near = Tile(rows.start, columns.start), _cut(places, rows, columns)
        dq_B, dk_B, dv_B = _tile_gradients(*of_block, k, v, near, rule, tile)
        rest = (0, 0), (0, 0), (columns.start, k_BKSH.shape[2] - columns.stop), (0, 0)
        dqs.append(dq_B.astype(q_BNTH.dtype))
        dk, dv = dk + jnp.pad(dk_B, rest), dv + jnp.pad(dv_B, rest)
    return dqs[0] if len(dqs) == 1 else jnp.concatenate(dqs, axis=2), dk, dv


def _written_out(
    q_BNTH: Array, k_BKSH: Array, places: tuple[Places, Places], rule: Rule
) -> list[tuple[slice, slice]] | None:
    """The rows and columns of each block of queries; None where a loop is better."""
    (B, N, T, _), S = q_BNTH.shape, k_BKSH.shape[2]
    size = max(MIN_BLOCK, -(-T // MAX_BLOCKS))
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        low, high = 0, S
        if places[0].positions is None and places[0].spans is None:
            if rule.causal:
                high = min(stop, S)
            if rule.window is not None:
                low = max(0, start - rule.window + 1)
                high = min(high, stop + rule.window - 1)
        # queries that see no key have one, hidden from them
        low = min(low, S - 1)
        blocks.append((slice(start, stop), slice(low, max(high, low + 1))))
    num_pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks)
    return None if T > 1 and B * N * num_pairs > WHOLE else blocks


def _cut(places: tuple[Places, Places], rows: slice, columns: slice) -> tuple[Places, Places]:
    q, k = places
    cut = jax.tree.map(lambda x: x[:, rows], q), jax.tree.map(lambda x: x[:, columns], k)
    return cut


def _scores(
    q_BNTH: Array,
    k_BKSH: Array,
    places: tuple[Places, Places],
    rule: Rule,
    tile: Tile,
    k_scale_BKS: Array | None = None,
) -> tuple[Array, Array | None]:
    """Scores of a tile before the mask, [B, K, G, T, S], and what is visible of it."""
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    G = N // K
    q_BKGH = q_BNTH.reshape(B, K, G * T, H)
    s = jnp.einsum("bkgh,bksh->bkgs", q_BKGH, k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS = s.reshape(B, K, G, T, S) * rule.scale
    if k_scale_BKS is not None:
        s_BKGTS *= k_scale_BKS[:, :, None, None]
    columns = tile.q_start + jnp.arange(T), tile.k_start + jnp.arange(S)
    if rule.bias is not None:
        q_BT1, k_B1S = positions(*places, *columns)
        heads = jnp.arange(N).reshape(K, G, 1, 1)
        s_BKGTS += rule.bias(heads, q_BT1[:, None, None], k_B1S[:, None, None])
    if rule.soft_cap is not None:
        s_BKGTS = jnp.tanh(s_BKGTS / rule.soft_cap) * rule.soft_cap
    return s_BKGTS, visible(*places, rule, *columns)


def _hide(s_BKGTS: Array, seen_BTS: Array | None, hidden: float) -> Array:
    return s_BKGTS if seen_BTS is None else jnp.where(seen_BTS[:, None, None], s_BKGTS, hidden)


def _forward_whole(q_BNTH, k_BKSH, v_BKSU, places, rule, tile):
    """Some queries against all keys that they may see."""
    (B, N, T, _), U = q_BNTH.shape, v_BKSU.shape[-1]
    s_BKGTS, seen_BTS = _scores(q_BNTH, k_BKSH, places, rule, tile)
    s_BKGTS = _hide(s_BKGTS, seen_BTS, NEG_INF)
    max_BKGT1 = jnp.max(s_BKGTS, axis=-1, keepdims=True)
    e_BKGTS = jnp.exp(s_BKGTS - max_BKGT1)
    sum_BKGT1 = jnp.sum(e_BKGTS, axis=-1, keepdims=True)
    o_BKGTU = _weigh(e_BKGTS, v_BKSU)
    if seen_BTS is not None and _may_be_blind(places[0], rule):
        sees_BKGT1 = max_BKGT1 > NEG_INF
        o_BKGTU = jnp.where(sees_BKGT1, o_BKGTU, 0.0)
        lse_BKGT1 = jnp.where(sees_BKGT1, max_BKGT1 + jnp.log(sum_BKGT1), NEG_INF)
    else:
        lse_BKGT1 = max_BKGT1 + jnp.log(sum_BKGT1)
    # divided after the product: U quotients a query, not S
    divide = _divide_flat if B * T == 1 else jnp.divide
    o_BKGTU = divide(o_BKGTU, sum_BKGT1)
    return o_BKGTU.astype(q_BNTH.dtype).reshape(B, N, T, U), lse_BKGT1.reshape(B, N, T)


def _may_be_blind(q: Places, rule: Rule) -> bool:
    """Whether some query may see nothing; not so where each sees itself, by columns."""
    return not (q.positions is None and q.segments is None and rule.causal and rule.window is None)


def _weigh(e_BKGTS: Array, v_BKSU: Array, scale_BKS: Array | None = None) -> Array:
    """Sums of values [B, K, G, T, U] in float32."""
    B, K, G, T, S = e_BKGTS.shape
    if scale_BKS is not None:
        e_BKGTS = e_BKGTS * scale_BKS[:, :, None, None]
    e = e_BKGTS.reshape(B, K, G * T, S).astype(v_BKSU.dtype)
    o = jnp.einsum("bkgs,bksu->bkgu", e, v_BKSU, preferred_element_type=jnp.float32)
    return o.reshape(B, K, G, T, -1)


def _divide_flat(o_BKGTU: Array, sum_BKGT1: Array) -> Array:
    """One token's quotients as one vector.

    Else XLA's CPU compiler takes heads apart in the inner loop of the product that follows: 187 us
    a layer against 40 in SmolLM2.
    """
    sums = jnp.broadcast_to(sum_BKGT1, o_BKGTU.shape).reshape(1, -1)
    return jnp.divide(*jax.lax.optimization_barrier((o_BKGTU.reshape(1, -1), sums)))


def _tile_gradients(
    q_BNTH, lse_BNT, do_BNTU, delta_BNT, k_BKSH, v_BKSU, places, rule, tile
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of some queries and some keys, in float32."""
    (B, N, T, H), (K, S) = q_BNTH.shape, k_BKSH.shape[1:3]
    G, dtype, sums = N // K, q_BNTH.dtype, dict(preferred_element_type=jnp.float32)
    s_BKGTS, seen_BTS = _scores(q_BNTH, k_BKSH, places, rule, tile)
    p_BKGTS = jnp.exp(s_BKGTS - lse_BNT.reshape(B, K, G, T, 1))
    p_BKGTS = _hide(p_BKGTS, seen_BTS, 0.0)
    do_BKGU = do_BNTU.reshape(B, K, G * T, -1).astype(dtype)
    dp = jnp.einsum("bkgu,bksu->bkgs", do_BKGU, v_BKSU, **sums)
    ds_BKGTS = p_BKGTS * (dp.reshape(p_BKGTS.shape) - delta_BNT.reshape(B, K, G, T, 1))
    if rule.soft_cap is not None:
        ds_BKGTS *= 1 - jnp.square(s_BKGTS / rule.soft_cap)
    ds = (ds_BKGTS * rule.scale).reshape(B, K, G * T, S).astype(dtype)
    p = p_BKGTS.reshape(B, K, G * T, S).astype(dtype)
    dq = jnp.einsum("bkgs,bksh->bkgh", ds, k_BKSH, **sums).reshape(B, N, T, H)
    dk = jnp.einsum("bkgs,bkgh->bksh", ds, q_BNTH.reshape(B, K, G * T, H), **sums)
    dv = jnp.einsum("bkgs,bkgu->bksu", p, do_BKGU, **sums)
    return dq, dk, dv


class Keys(NamedTuple):
    """A block of them.

    Attributes:
      start: its first column. scales: of int8 keys, and of values, [B, K, S] each, or None.
    """

    start: Array
    k: Array
    v: Array
    places: Places
    scales: tuple[Array | None, Array | None] = (None, None)


class Loop(NamedTuple):
    """Blocks of queries, and keys.

    Attributes:
      keys: keys and values as `_to_bits` has them; one where values are the first of the keys.
      scales: of each, or none. pages: keys, values and scales are pools if there are any.
      blocks: by block of queries, [I, ...]: places, and the blocks of keys from `low` up to `high`
        that may be seen.
      S: keys. size, k_size: of a block. page: slots of one.
    """

    keys: tuple[tuple[Array, jnp.dtype], ...]
    scales: tuple[Array, ...]
    pages: Array | None
    k_places: Places
    blocks: tuple[Array, Places, Array, Array]
    S: int
    size: int
    k_size: int
    page: int

    def split(self, x_BNT: Array, fill: float = 0.0) -> Array:
        """An array by query in blocks, [I, B, N, size, ...]; the last is filled up."""
        return _blocks(x_BNT, self.size, axis=2, fill=fill)

    def cut(self, j: Array, rule: Rule, dtype: jnp.dtype) -> Keys:
        """Block j in a dtype; the last begins early, and hides what the one before it has."""
        start = jnp.minimum(j * self.k_size, self.S - self.k_size)
        places = self.k_places.block(start, self.k_size)
        if self.S % self.k_size:
            is_new_S = start + jnp.arange(self.k_size) >= j * self.k_size
            places = places._replace(segments=jnp.where(is_new_S, places.segments, 0))
        k, *v = [_from_bits(self._read(x, start), bits).astype(dtype) for x, bits in self.keys]
        v = v[0] if v else k[..., : rule.value_width]
        scales = [clear(self._read(x, start), places) for x in self.scales]
        scales = (scales[0], scales[-1]) if scales else (None, None)
        return Keys(start, clear(k, places), clear(v, places), places, scales)

    def _read(self, x_BKSH: Array, start: Array) -> Array:
        if self.pages is None:
            return jax.lax.dynamic_slice_in_dim(x_BKSH, start, self.k_size, 2)
        first, count = start // self.page, self.k_size // self.page
        return gather(x_BKSH, jax.lax.dynamic_slice_in_dim(self.pages, first, count, 1))


def _blocks(x: Array, size: int, axis: int, fill: float = 0.0) -> Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding, constant_values=fill)
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _join(x_IBNT: Array, num_tokens: int) -> Array:
    """Blocks of queries as one array again."""
    x_BNIT = jnp.moveaxis(x_IBNT, 0, 2)
    return x_BNIT.reshape(*x_BNIT.shape[:2], -1, *x_BNIT.shape[4:])[:, :, :num_tokens]


def _to_bits(x: Array) -> tuple[Array, jnp.dtype]:
    """Sixteen-bit floats as integers: XLA's CPU compiler makes a float32 copy, at each step of a
    loop, of all of an array that the loop slices (47 ms against 8 for 4,096 keys)."""
    bits = jnp.uint16 if x.dtype.itemsize == 2 else x.dtype
    return jax.lax.bitcast_convert_type(x, bits), x.dtype


def _from_bits(x: Array, dtype: jnp.dtype) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype)


def _loop(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    places: tuple[Places, Places],
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> Loop:
    (B, N, T, _), S = q_BNTH.shape, num_slots(k_BKSH, stored.pages)
    page = 1 if stored.pages is None else k_BKSH.shape[2]
    k_size = min(FEW_K_BLOCK if T <= FEW else K_BLOCK, S)
    k_size = page * max(1, k_size // page)
    size = min(Q_BLOCK, max(16, WHOLE // (B * N * k_size) // 16 * 16), T)
    q, k = places
    if S % k_size and k.segments is None:  # what two blocks of keys have is hidden in one
        q, k = [side._replace(segments=jnp.ones((1, n), jnp.int32)) for side, n in ((q, T), (k, S))]
    seen_IJ = jnp.any(may_see(ranges(q, T, size), ranges(k, S, k_size), rule), axis=0)
    any_I = jnp.any(seen_IJ, axis=1)
    low_I = jnp.where(any_I, jnp.argmax(seen_IJ, axis=1), 0)
    high_I = jnp.where(any_I, seen_IJ.shape[1] - jnp.argmax(seen_IJ[:, ::-1], axis=1), 0)
    keys = (k_BKSH,) if rule.stored and rule.value_width is not None else (k_BKSH, v_BKSU)
    scales = tuple(x for x in (stored.k_scales, stored.v_scales) if x is not None)
    starts_I = jnp.arange(len(low_I)) * size
    q_blocks = jax.tree.map(lambda x: _blocks(x, size, axis=1), q)
    blocks = (starts_I, q_blocks, low_I, high_I)
    keys = tuple(map(_to_bits, keys))
    return Loop(keys, scales, stored.pages, k, blocks, S, size, k_size, page)


def _forward_loop(q_BNTH, k_BKSH, v_BKSU, places, rule, stored):
    loop = _loop(q_BNTH, k_BKSH, v_BKSU, places, rule, stored)
    (B, N, T, _), K, U = q_BNTH.shape, k_BKSH.shape[1], v_BKSU.shape[-1]
    shape = (B, K, N // K, loop.size)

    def block(_, xs):
        q_B, (start, q_places, low, high) = xs

        def add(j, so_far):
            max_BKGT, sum_BKGT, o_BKGTU = so_far
            keys = loop.cut(j, rule, q_BNTH.dtype)
            tile = Tile(start, keys.start)
            near, (k_scale, v_scale) = (q_places, keys.places), keys.scales
            s_BKGTS, seen_BTS = _scores(q_B, keys.k, near, rule, tile, k_scale)
            s_BKGTS = _hide(s_BKGTS, seen_BTS, NEG_INF)
            top_BKGT = jnp.maximum(max_BKGT, jnp.max(s_BKGTS, axis=-1))
            e_BKGTS = _hide(jnp.exp(s_BKGTS - top_BKGT[..., None]), seen_BTS, 0.0)
            shrink_BKGT = jnp.exp(max_BKGT - top_BKGT)
            o_BKGTU = o_BKGTU * shrink_BKGT[..., None] + _weigh(e_BKGTS, keys.v, v_scale)
            return top_BKGT, sum_BKGT * shrink_BKGT + jnp.sum(e_BKGTS, axis=-1), o_BKGTU

        zeros = jnp.zeros(shape, jnp.float32)
        first = (jnp.full(shape, NEG_INF), zeros, jnp.zeros((*shape, U), jnp.float32))
        max_BKGT, sum_BKGT, o_BKGTU = jax.lax.fori_loop(low, high, add, first)
        sees_BKGT = sum_BKGT > 0
        sum_BKGT = jnp.where(sees_BKGT, sum_BKGT, 1.0)
        lse_BKGT = jnp.where(sees_BKGT, max_BKGT + jnp.log(sum_BKGT), NEG_INF)
        o_BKGTU = (o_BKGTU / sum_BKGT[..., None]).astype(q_BNTH.dtype)
        return None, (o_BKGTU.reshape(B, N, -1, U), lse_BKGT.reshape(B, N, -1))

    _, (o, lse) = jax.lax.scan(block, None, (loop.split(q_BNTH), loop.blocks))
    return _join(o, T), _join(lse, T)


def _backward_loop(arrays, k_BKSH, v_BKSU, places, rule):
    q_BNTH, lse_BNT, *rest = arrays
    loop = _loop(q_BNTH, k_BKSH, v_BKSU, places, rule)
    T = q_BNTH.shape[2]

    def block(sums, xs):
        of_block, (start, q_places, low, high) = xs

        def add(j, so_far):
            dq_B, dk, dv = so_far
            keys = loop.cut(j, rule, q_BNTH.dtype)
            near, tile = (q_places, keys.places), Tile(start, keys.start)
            dq_j, dk_j, dv_j = _tile_gradients(*of_block, keys.k, keys.v, near, rule, tile)
            return dq_B + dq_j, *[_add_at(x, tile.k_start, y) for x, y in ((dk, dk_j), (dv, dv_j))]

        dq_B = jnp.zeros(of_block[0].shape, jnp.float32)
        dq_B, dk, dv = jax.lax.fori_loop(low, high, add, (dq_B, *sums))
        return (dk, dv), dq_B.astype(q_BNTH.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x, _ in loop.keys)
    # queries that fill the last block have probabilities of 0, however large a bias
    blocks = loop.split(q_BNTH), loop.split(lse_BNT, jnp.inf), *map(loop.split, rest)
    (dk, dv), dq = jax.lax.scan(block, zeros, (blocks, loop.blocks))
    return _join(dq, T), dk, dv


def _add_at(sums_BKSH: Array, start: Array, new_BKSH: Array) -> Array:
    old_BKSH = jax.lax.dynamic_slice_in_dim(sums_BKSH, start, new_BKSH.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(sums_BKSH, old_BKSH + new_BKSH, start, 2)
