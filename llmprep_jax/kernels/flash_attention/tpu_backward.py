"""The backward kernels on a TPU: the gradient of queries, and that of keys and values.

Both compute the scores of each tile again (Dao et al. 2022, section 3.1 and B.4). The first goes
over keys for each block of queries as forward does. The second goes, for each block of keys, over
the queries of all heads that share it, and holds its tiles the other way round, keys along rows:
log-sum-exps and sums by query then are rows as they come from memory, and no tile is transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.flash_attention import tpu_tiles as tiles
from llmprep_jax.kernels.flash_attention.tpu_forward import block_specs, on_kind, q_tile
from llmprep_jax.kernels.flash_attention.tpu_tiles import Spec, Table, Tile
from llmprep_jax.kernels.platforms import in_32_bits

Array = jax.Array


def query_gradients(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    do_BNTU: Array,
    lse_BNT: Array,
    delta_BNT: Array,
    values: tuple[Array, ...],
    table: Table,
    spec: Spec,
    interpret: bool,
) -> Array:
    """dq, [B, N, T, H] in q's dtype."""
    (B, N, _, H), U = q_BNTH.shape, v_BKSU.shape[-1]
    specs = block_specs(spec, H, U, [x.shape[1] for x in values])
    by_key = *specs["k"], *specs["v"]
    column = pltpu.VMEM((spec.q_block, tpu.LANES), jnp.float32)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(B, N, spec.num_q_blocks, tiles.num_steps(table.q_low, table.q_high)),
        in_specs=[*specs["values"], specs["q"], *by_key, specs["o"], *[specs["row"]] * 2],
        out_specs=specs["q"],
        scratch_shapes=[
            *tiles.columns(values[:1], spec.q_block),
            column,
            column,
            pltpu.VMEM((spec.q_block, H), jnp.float32),
        ],
    )
    arrays = q_BNTH, k_BKSH, v_BKSU, do_BNTU, lse_BNT[:, :, None], delta_BNT[:, :, None]
    out = jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype)
    kernel = pl.pallas_call(
        functools.partial(_query_kernel, spec=spec),
        grid_spec=grid_spec,
        out_shape=out,
        cost_estimate=tiles.cost(spec, 2 * H + U, arrays, [out]),
        compiler_params=tpu.params("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name="attention_dq",
    )
    return in_32_bits(kernel)(table.q_low, table.q_high, table.kinds, *values, *arrays)


def _query_kernel(low_ref, high_ref, kinds_ref, *refs, spec: Spec):
    q_values_ref = k_values_ref = columns_ref = None
    if spec.names:
        q_values_ref, k_values_ref, *refs = refs
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *refs = refs
    if spec.names:
        columns_ref, *refs = refs
    lse_column_ref, delta_column_ref, sums_ref = refs
    b, n, i, step = [pl.program_id(axis) for axis in range(4)]
    j = tiles.index(low_ref, b, i, spec.num_q_blocks, spec) + step
    end = tiles.index(high_ref, b, i, spec.num_q_blocks, spec)

    @pl.when(step == 0)
    def begin():
        sums_ref[...] = jnp.zeros_like(sums_ref)
        lse_column_ref[...] = tpu.to_column(lse_ref[...])
        delta_column_ref[...] = tpu.to_column(delta_ref[...])
        tiles.fill(columns_ref, q_values_ref)

    def add(is_masked: bool, has_padding: bool = False):
        tile = q_tile(spec, n, i, j, columns_ref, k_values_ref)
        k, v = [
            tpu.within(ref[...], tile.k_start, spec.S, 0, spec.k_block) for ref in (k_ref, v_ref)
        ]
        if has_padding:
            k, v = [tiles.clear_padding(x, k_values_ref, 0, spec) for x in (k, v)]
        s = tiles.scores(q_ref[...], k, tile, spec)
        p = jnp.exp(s - tpu.lanes(lse_column_ref[...], spec.k_block))
        if is_masked:
            p = jnp.where(tiles.seen(tile, spec), p, 0.0)
        dp = tpu.multiply(do_ref[...], v, (1, 1))
        ds = p * (dp - tpu.lanes(delta_column_ref[...], spec.k_block)) * tiles.slope(s, spec)
        sums_ref[...] += tpu.multiply(ds.astype(k.dtype), k, (1, 0))

    on_kind(spec, kinds_ref, b, i, j, j < end, add, functools.partial(add, has_padding=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def finish():
        dq_ref[...] = sums_ref[...].astype(dq_ref.dtype)


def key_gradients(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    do_BNTU: Array,
    lse_BNT: Array,
    delta_BNT: Array,
    values: tuple[Array, ...],
    table: Table,
    spec: Spec,
    interpret: bool,
) -> tuple[Array, Array]:
    """(dk [B, K, S, H], dv [B, K, S, U]) in float32."""
    (B, K, _, H), U = k_BKSH.shape, v_BKSU.shape[-1]
    specs = _key_specs(spec, H, U, [x.shape[1] for x in values])
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(
            B,
            K,
            spec.num_k_blocks,
            spec.group,
            tiles.num_steps(table.k_low, table.k_high),
        ),
        in_specs=[*specs["values"], *[specs[x] for x in ("q", "k", "v", "o", "row", "row")]],
        out_specs=[specs["k"], specs["v"]],
        scratch_shapes=[
            *tiles.columns(values[1:], spec.k_block),
            pltpu.VMEM((spec.k_block, H), jnp.float32),
            pltpu.VMEM((spec.k_block, U), jnp.float32),
        ],
    )
    arrays = q_BNTH, k_BKSH, v_BKSU, do_BNTU, lse_BNT[:, :, None], delta_BNT[:, :, None]
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (k_BKSH, v_BKSU)]
    kernel = pl.pallas_call(
        functools.partial(_key_kernel, spec=spec),
        grid_spec=grid_spec,
        out_shape=shapes,
        cost_estimate=tiles.cost(spec, 2 * (H + U), arrays, shapes),
        compiler_params=tpu.params(*["parallel"] * 3, "arbitrary", "arbitrary"),
        interpret=interpret,
        name="attention_dkv",
    )
    return in_32_bits(kernel)(table.k_low, table.k_high, table.kinds, *values, *arrays)


def _key_specs(spec: Spec, H: int, U: int, num_values: list[int]) -> dict:
    """Of a grid (row, key head, block of keys, head of the group, step over queries)."""

    def query_block(b, j, step, low, high):
        return tiles.at_step(low, high, b, j, step, spec.num_k_blocks, spec)

    def of_query(b, kh, j, g, step, low, high, *_):
        return b, kh * spec.group + g, query_block(b, j, step, low, high), 0

    def of_row(b, kh, j, g, step, low, high, *_):
        return b, kh * spec.group + g, 0, query_block(b, j, step, low, high)

    def of_key(b, kh, j, *_):
        return b, kh, j, 0

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
            pl.BlockSpec(
                (None, num_values[0], spec.q_block),
                lambda b, kh, j, g, step, low, high, *_: (
                    b, 0, query_block(b, j, step, low, high)
                ),
            ),
            pl.BlockSpec((None, num_values[1], spec.k_block), lambda b, kh, j, *_: (b, 0, j)),
        ]  # fmt: skip
    return specs


def _key_kernel(low_ref, high_ref, kinds_ref, *refs, spec: Spec):
    q_values_ref = k_values_ref = columns_ref = None
    if spec.names:
        q_values_ref, k_values_ref, *refs = refs
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *refs = refs
    if spec.names:
        columns_ref, *refs = refs
    dk_sums_ref, dv_sums_ref = refs
    b, kh, j, g, step = [pl.program_id(axis) for axis in range(5)]
    i = tiles.index(low_ref, b, j, spec.num_k_blocks, spec) + step
    end = tiles.index(high_ref, b, j, spec.num_k_blocks, spec)

    @pl.when((g == 0) & (step == 0))
    def begin():
        dk_sums_ref[...] = jnp.zeros_like(dk_sums_ref)
        dv_sums_ref[...] = jnp.zeros_like(dv_sums_ref)
        tiles.fill(columns_ref, k_values_ref)

    def add(is_masked: bool):
        tile = _k_tile(spec, kh * spec.group + g, i, j, columns_ref, q_values_ref)
        q, do = [
            tpu.within(ref[...], tile.q_start, spec.T, 0, spec.q_block) for ref in (q_ref, do_ref)
        ]
        lse, delta = [
            tpu.within(ref[...], tile.q_start, spec.T, 1, spec.q_block)
            for ref in (lse_ref, delta_ref)
        ]
        s = tiles.scores(k_ref[...], q, tile, spec)
        p = jnp.exp(s - lse)
        dp = tpu.multiply(v_ref[...], do, (1, 1))
        ds = p * (dp - delta) * tiles.slope(s, spec)
        if is_masked:
            seen = tiles.seen(tile, spec)
            p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
        dv_sums_ref[...] += tpu.multiply(p.astype(do.dtype), do, (1, 0))
        dk_sums_ref[...] += tpu.multiply(ds.astype(q.dtype), q, (1, 0))

    on_kind(spec, kinds_ref, b, i, j, i < end, add)

    @pl.when((g == spec.group - 1) & (step == pl.num_programs(4) - 1))
    def finish():
        dk_ref[...] = dk_sums_ref[...]
        dv_ref[...] = dv_sums_ref[...]


def _k_tile(spec: Spec, head, i, j, columns_ref, q_values_ref) -> Tile:
    """Keys along rows, queries along columns."""
    q_values = k_values = ()
    if spec.names:
        size = spec.q_block
        q_values = tuple(q_values_ref[c : c + 1] for c in range(q_values_ref.shape[0]))
        k_values = tuple(tpu.lanes(columns_ref[c], size) for c in range(columns_ref.shape[0]))
    starts = i * spec.q_block, j * spec.k_block
    return Tile(*starts, head * spec.folded, 1, (spec.k_block, spec.q_block), q_values, k_values)
