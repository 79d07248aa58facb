"""The forward kernel on a TPU: for each block of queries, the blocks of keys that it may see.

Output, maximum and sum of a block of queries are in VMEM until its last block of keys has been
added (the online softmax of Milakov and Gimelshein 2018). A query that sees nothing adds up what
its first tile happens to hold, which a later key that it sees would shrink to 0; if there is none
its maximum still is NEG_INF at the end.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.flash_attention import tpu_tiles as tiles
from llmprep_jax.kernels.flash_attention.masks import NEG_INF
from llmprep_jax.kernels.flash_attention.tpu_tiles import Spec, Table, Tile

Array = jax.Array


def forward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array | None,
    values: tuple[Array, ...],
    table: Table,
    spec: Spec,
    interpret: bool,
) -> tuple[Array, Array]:
    """(o [B, N, T, U], lse [B, N, T]); v is None where `spec.latent` says what values are."""
    (B, N, T, H), U = q_BNTH.shape, spec.latent or v_BKSU.shape[-1]
    specs = block_specs(spec, H, U, [x.shape[1] for x in values])
    statistic = pltpu.VMEM((spec.q_block, tpu.LANES), jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(B, N, spec.num_q_blocks, tiles.num_steps(table.q_low, table.q_high)),
        in_specs=[*specs["values"], *[specs[x] for x in ("qk" if v_BKSU is None else "qkv")]],
        out_specs=[specs["o"], specs["row"]],
        scratch_shapes=[
            *tiles.columns(values[:1], spec.q_block),
            statistic,
            statistic,
            pltpu.VMEM((spec.q_block, U), jnp.float32),
        ],
    )
    arrays = [x for x in (q_BNTH, k_BKSH, v_BKSU) if x is not None]
    outs = [
        jax.ShapeDtypeStruct((B, N, T, U), q_BNTH.dtype),
        jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
    ]
    o, lse_BN1T = pl.pallas_call(
        functools.partial(_kernel, spec=spec),
        grid_spec=grid_spec,
        out_shape=outs,
        cost_estimate=tiles.cost(spec, H + U, arrays, outs),
        compiler_params=tpu.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="attention_forward",
    )(table.q_low, table.q_high, table.kinds, *values, *arrays)
    return o, lse_BN1T[:, :, 0]


def block_specs(spec: Spec, H: int, U: int, num_values: list[int]) -> dict:
    """Of a grid (row, query head, block of queries, step over keys)."""

    def of_query(b, n, i, step, *_):
        return b, n, i, 0

    def key_block(b, i, step, low, high):
        return tiles.at_step(low, high, b, i, step, spec.num_q_blocks, spec)

    def of_key(b, n, i, step, low, high, *_):
        return b, n // spec.group, key_block(b, i, step, low, high), 0

    def of_row(b, n, i, step, *_):
        return b, n, 0, i

    specs = dict(
        q=pl.BlockSpec((None, None, spec.q_block, H), of_query),
        o=pl.BlockSpec((None, None, spec.q_block, U), of_query),
        row=pl.BlockSpec((None, None, 1, spec.q_block), of_row),
        k=pl.BlockSpec((None, None, spec.k_block, H), of_key),
        v=pl.BlockSpec((None, None, spec.k_block, U), of_key),
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


def _kernel(low_ref, high_ref, kinds_ref, *refs, spec: Spec):
    q_values_ref = k_values_ref = columns_ref = None
    if spec.names:
        q_values_ref, k_values_ref, *refs = refs
    q_ref, k_ref, *refs = refs
    v_ref = None
    if spec.latent is None:
        v_ref, *refs = refs
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

    def add(is_masked: bool):
        tile = q_tile(spec, n, i, j, columns_ref, k_values_ref)
        s = tiles.scores(q_ref[...], k_ref[...], tile, spec)
        if is_masked:
            s = jnp.where(tiles.seen(tile, spec), s, NEG_INF)
        old_max = max_ref[...]
        new_max = jnp.maximum(old_max, jnp.max(s, axis=1, keepdims=True))
        e = jnp.exp(s - tpu.lanes(new_max, spec.k_block))
        shrink = jnp.exp(old_max - new_max)
        max_ref[...] = new_max
        sum_ref[...] = sum_ref[...] * shrink + jnp.sum(e, axis=1, keepdims=True)
        v = k_ref[:, : spec.latent] if v_ref is None else v_ref[...]
        v = tpu.within(v, j * spec.k_block, spec.S, 0, spec.k_block)
        sums_ref[...] *= tpu.lanes(shrink, v.shape[1])
        sums_ref[...] += tpu.multiply(e.astype(v.dtype), v, (1, 0))

    on_kind(spec, kinds_ref, b, i, j, j < end, add)

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


def on_kind(spec: Spec, kinds_ref, b, i, j, is_in_range, add) -> None:
    """`add` of a tile, with the mask where not all of it is seen; not at all where none is."""
    i, j = jnp.minimum(i, spec.num_q_blocks - 1), jnp.minimum(j, spec.num_k_blocks - 1)
    kind = jnp.where(is_in_range, tiles.kind(kinds_ref, b, i, j, spec), tiles.HIDDEN)
    pl.when(kind == tiles.PARTLY)(lambda: add(True))
    pl.when(kind == tiles.WHOLLY)(lambda: add(False))
