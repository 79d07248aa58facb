"""The forward kernel on a TPU: for each block of queries, the blocks of keys that it may see.

Output, maximum and sum of a block of queries are in VMEM until its last block of keys has been
added (the online softmax of Milakov and Gimelshein 2018). A query that sees nothing adds up what
its first tile happens to hold, which a later key that it sees would shrink to 0; if there is none
its maximum still is NEG_INF at the end. Small pages make up a tile, each an operand that is fetched
by the row's table; 8-bit keys and values are widened in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.flash_attention import tpu_tiles as tiles
from llmprep_jax.kernels.flash_attention.masks import NEG_INF
from llmprep_jax.kernels.flash_attention.stored import Stored
from llmprep_jax.kernels.flash_attention.tpu_tiles import Spec, Table, Tile
from llmprep_jax.kernels.platforms import in_32_bits

Array = jax.Array


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array | None,
    values: tuple[Array, ...],
    table: Table,
    spec: Spec,
    interpret: bool,
    stored: Stored,
) -> tuple[Array, Array]:
    """(o [B, N, T, U], lse [B, N, T]); v is None where `spec.latent` says what values are."""
    (B, N, T, H), U = q_BNTH.shape, spec.latent or v_BKSU.shape[-1]
    specs = block_specs(spec, H, U, [x.shape[1] for x in values])
    by_key = dict(k=k_BKSH, v=v_BKSU)
    # a row a head, which HBM does not pad
    by_key |= {
        name: None if x is None else x[:, :, None]
        for name, x in dict(k_scale=stored.k_scales, v_scale=stored.v_scales).items()
    }
    by_key = {name: x for name, x in by_key.items() if x is not None}
    scalars = [table.q_low, table.q_high, table.kinds]
    if spec.page:
        rest = tiles.padded_pages(spec) - stored.pages.shape[1]
        scalars.append(jnp.pad(stored.pages, ((0, 0), (0, rest))).reshape(-1))
    statistic = pltpu.VMEM((spec.q_block, tpu.LANES), jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(B, N, spec.num_q_blocks, tiles.num_steps(table.q_low, table.q_high)),
        in_specs=[*specs["values"], specs["q"], *[spec for x in by_key for spec in specs[x]]],
        out_specs=[specs["o"], specs["row"]],
        scratch_shapes=[
            *tiles.columns(values[:1], spec.q_block),
            statistic,
            statistic,
            pltpu.VMEM((spec.q_block, U), jnp.float32),
        ],
    )
    # of a pool it reads what rows have
    read = [
        jax.ShapeDtypeStruct(
            (B, x.shape[1], spec.S, x.shape[3] if name in "kv" else 1),
            x.dtype,
        )
        for name, x in by_key.items()
    ]
    outs = [
        jax.ShapeDtypeStruct((B, N, T, U), q_BNTH.dtype),
        jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
    ]
    kernel = pl.pallas_call(
        functools.partial(_kernel, spec=spec, names=tuple(by_key)),
        grid_spec=grid_spec,
        out_shape=outs,
        cost_estimate=tiles.cost(spec, H + U, (q_BNTH, *read), outs),
        compiler_params=tpu.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="attention_forward",
    )
    pages = [x for x in by_key.values() for _ in range(spec.num_pages)]
    o, lse_BN1T = in_32_bits(kernel)(*scalars, *values, q_BNTH, *pages)
    return o, lse_BN1T[:, :, 0]


def block_specs(spec: Spec, H: int, U: int, num_values: list[int]) -> dict:
    """Of a grid (row, query head, block of queries, step over keys); of what there is by key one
    for each page of a tile."""

    def of_query(b, n, i, step, *_):
        return b, n, i, 0

    def key_block(b, i, step, low, high):
        return tiles.at_step(low, high, b, i, step, spec.num_q_blocks, spec)

    def of_key(c, is_row=False):
        def index(b, n, i, step, low, high, kinds, *pages):
            j = key_block(b, i, step, low, high)
            at, part = tiles.page_at(*pages, b, j, c, spec) if spec.page else (b, j)
            return at, n // spec.group, *((0, part) if is_row else (part, 0))

        return index

    def of_row(b, n, i, step, *_):
        return b, n, 0, i

    keys, pages = min(spec.k_block, spec.page or spec.k_block), range(spec.num_pages)
    scale = [pl.BlockSpec((None, None, 1, keys), of_key(c, True)) for c in pages]
    specs = dict(
        q=pl.BlockSpec((None, None, spec.q_block, H), of_query),
        o=pl.BlockSpec((None, None, spec.q_block, U), of_query),
        row=pl.BlockSpec((None, None, 1, spec.q_block), of_row),
        k=[pl.BlockSpec((None, None, keys, H), of_key(c)) for c in pages],
        v=[pl.BlockSpec((None, None, keys, U), of_key(c)) for c in pages],
        k_scale=scale,
        v_scale=scale,
        values=[],
    )
    if num_values:
        specs["values"] = [
            pl.BlockSpec((None, num_values[0], spec.q_block), lambda b, n, i, *_: (b, 0, i)),
            pl.BlockSpec(
                (None, num_values[1], spec.k_block),
                lambda b, n, i, step, low, high, *_: (b, 0, key_block(b, i, step, low, high)),
            ),
        ]
    return specs


def _kernel(low_ref, high_ref, kinds_ref, *refs, spec: Spec, names: tuple[str, ...]):
    """`names` are of what there is by key: k, v, k_scale, v_scale."""
    q_values_ref = k_values_ref = columns_ref = None
    if spec.page:
        _, *refs = refs
    if spec.names:
        q_values_ref, k_values_ref, *refs = refs
    q_ref, *refs = refs
    by_key = {}
    for name in names:
        by_key[name], refs = refs[: spec.num_pages], refs[spec.num_pages :]
    o_ref, lse_ref, *refs = refs
    if spec.names:
        columns_ref, *refs = refs
    max_ref, sum_ref, sums_ref = refs
    b, n, i, step = [pl.program_id(axis) for axis in range(4)]
    j = tiles.index(low_ref, b, i, spec.num_q_blocks, spec) + step
    end = tiles.index(high_ref, b, i, spec.num_q_blocks, spec)

    @pl.when(step == 0)
    def begin():
        max_ref[...] = jnp.full_like(max_ref, NEG_INF)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)
        tiles.fill(columns_ref, q_values_ref)

    def read(name: str) -> Array | None:
        if name not in by_key:
            return None
        parts = [ref[...] for ref in by_key[name]]
        axis = 0 if name in "kv" else 1
        x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
        return x.astype(q_ref.dtype) if axis == 0 else x

    def add(is_masked: bool, has_padding: bool = False):
        def clear(x: Array, axis: int) -> Array:
            """Without what was read past the end, nor at padding, which may be NaN."""
            x = tpu.within(x, j * spec.k_block, spec.S, axis, spec.k_block)
            return tiles.clear_padding(x, k_values_ref, axis, spec) if has_padding else x

        tile = q_tile(spec, n, i, j, columns_ref, k_values_ref)
        k, k_scale = read("k"), read("k_scale")
        s = tiles.scores(q_ref[...], k, tile, spec, k_scale)
        if is_masked:
            s = jnp.where(tiles.seen(tile, spec), s, NEG_INF)
        old_max = max_ref[...]
        new_max = jnp.maximum(old_max, jnp.max(s, axis=1, keepdims=True))
        e = jnp.exp(s - tpu.lanes(new_max, spec.k_block))
        shrink = jnp.exp(old_max - new_max)
        max_ref[...] = new_max
        sum_ref[...] = sum_ref[...] * shrink + jnp.sum(e, axis=1, keepdims=True)
        v, v_scale = (k[:, : spec.latent], k_scale) if spec.latent else (read("v"), read("v_scale"))
        if v_scale is None:
            v = clear(v, 0)
        else:
            e = e * clear(v_scale, 1)
        sums_ref[...] *= tpu.lanes(shrink, v.shape[1])
        sums_ref[...] += tpu.multiply(e.astype(v.dtype), v, (1, 0))

    on_kind(spec, kinds_ref, b, i, j, j < end, add, functools.partial(add, has_padding=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        top, total = max_ref[...], sum_ref[...]
        sees = top > NEG_INF
        total = jnp.where(sees, total, 1.0)
        lse_ref[...] = tpu.to_row(jnp.where(sees, top + jnp.log(total), NEG_INF))
        share = tpu.lanes(jnp.where(sees, 1 / total, 0.0), o_ref.shape[1])
        o_ref[...] = (sums_ref[...] * share).astype(o_ref.dtype)


def q_tile(spec: Spec, n, i, j, columns_ref, k_values_ref) -> Tile:
    """Queries along rows, keys along columns."""
    q_values = k_values = ()
    if spec.names:
        size = spec.k_block
        q_values = tuple(tpu.lanes(columns_ref[c], size) for c in range(columns_ref.shape[0]))
        k_values = tuple(k_values_ref[c : c + 1] for c in range(k_values_ref.shape[0]))
    starts = i * spec.q_block, j * spec.k_block
    return Tile(*starts, n * spec.folded, 0, (spec.q_block, spec.k_block), q_values, k_values)


def on_kind(spec: Spec, kinds_ref, b, i, j, is_in_range, add, add_padded=None) -> None:
    """`add` of a tile, with the mask where not all of it is seen; not at all where none is.

    Args:
      add_padded: in its place where some of the keys are padding.
    """
    i, j = jnp.minimum(i, spec.num_q_blocks - 1), jnp.minimum(j, spec.num_k_blocks - 1)
    kind = jnp.where(is_in_range, tiles.kind(kinds_ref, b, i, j, spec), tiles.HIDDEN)
    is_partly = kind == tiles.PARTLY
    if add_padded is not None and "segments" in spec.names:
        pl.when(kind == tiles.PADDED)(lambda: add_padded(True))
    else:
        is_partly |= kind == tiles.PADDED
    pl.when(is_partly)(lambda: add(True))
    pl.when(kind == tiles.WHOLLY)(lambda: add(False))
