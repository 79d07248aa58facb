"""Grouped products as Pallas kernels for TPUs.

XLA's own kernel for `jax.lax.ragged_dot` has float32 results and wants w transposed in memory for
dx; for dw there is none, and all rows are multiplied for every group. The kernels here go through
tiles of rows in order (`visits`), and an array of scalars tells which group's matrix comes in: it
is fetched once while its rows last, since a tile holds all of the contracted dimension. In a tile
on a border, rows of other groups are left as they are (forward) or taken for zeros (dw).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels import tpu
from llmprep_jax.kernels.grouped_matmul.visits import visit_groups, visit_tiles
from llmprep_jax.kernels.platforms import platform

VMEM_LIMIT = 60 * 2**20  # v7x has 64 MiB, others 128
ROOM = 46 * 2**20  # for tiles that are fetched, each of them twice
# rows and columns, first what reads least: rows are read once a tile of columns
TILES = ((512, 1024), (256, 1024), (512, 512), (256, 512), (256, 256), (128, 256), (128, 128))
WIDEST = 1024  # columns of tiles of dw
PART = 1024  # of the contracted dimension in one product; all 7,168 compile for 13 s, these for 3


def refusal(x_MD: jax.Array, w_EDF: jax.Array) -> str | None:
    """What keeps these kernels from products of x and w, forward or backward."""
    if platform() == "gpu":
        return "it is for TPUs"
    if platform() == "cpu" and jax.typeof(x_MD).manual_axis_type.varying:
        return "Pallas interprets nothing where jax.shard_map checks what varies"
    if not len(x_MD):
        return "there are no rows"
    widest = max(w_EDF.shape[1:])
    if _tiles(len(x_MD), 1, widest, x_MD.dtype, w_EDF.dtype) is None:
        return f"{widest} columns are too many for a tile"
    return None


def multiply(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, w_axis: int, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of each group times its matrix, whose `w_axis` is contracted."""
    num_rows, width = x_MD.shape
    num_groups, num_out = len(w_EDF), w_EDF.shape[3 - w_axis]
    tile_M, tile_F = _tiles(num_rows, num_groups, width, x_MD.dtype, w_EDF.dtype)
    tile_F, part_D = _even(num_out, tile_F), _part(width)
    visits = visit_tiles(sizes_E, num_rows, tile_M)

    def kernel(groups, tiles, starts, ends, count, x_ref, w_ref, y_ref):
        v = pl.program_id(1)

        @pl.when((v == 0) | (tiles[v] != tiles[jnp.maximum(v, 1) - 1]))
        def _():
            y_ref[...] = jnp.zeros_like(y_ref)

        def add(i, y):
            part = pl.ds(i * part_D, part_D)
            w = w_ref[part] if w_axis == 1 else w_ref[:, part]
            x, w = x_ref[:, part], w.astype(x_ref.dtype)
            return y + tpu.multiply(x, w, (1, w_axis - 1))

        @pl.when(groups[v] < num_groups)
        def _():
            y = jnp.zeros(y_ref.shape, jnp.float32)
            y = jax.lax.fori_loop(0, width // part_D, add, y)
            is_row = _is_row(tiles[v], starts[v], ends[v], tile_M)
            y_ref[...] = jnp.where(is_row, y.astype(y_ref.dtype), y_ref[...])

    def of_w(f, v, groups, *_):
        group = jnp.minimum(groups[v], num_groups - 1)
        return (group, 0, f) if w_axis == 1 else (group, f, 0)

    w_tile = (width, tile_F) if w_axis == 1 else (tile_F, width)
    of_x = pl.BlockSpec((tile_M, width), lambda f, v, _, tiles, *__: (tiles[v], 0))
    of_y = pl.BlockSpec((tile_M, tile_F), lambda f, v, _, tiles, *__: (tiles[v], f))
    return pl.pallas_call(
        kernel,
        _like(x_MD, (num_rows, num_out), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(num_out, tile_F), visits.count[0]),
            in_specs=[of_x, pl.BlockSpec((None, *w_tile), of_w)],
            out_specs=of_y,
        ),
        compiler_params=_params("parallel", "arbitrary"),
        cost_estimate=_cost(x_MD, w_EDF, num_out, out_dtype),
        interpret=tpu.interprets(),
        name="grouped_matmul",
    )(*visits, x_MD, w_EDF)


def accumulate(
    x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """Sum over each group's rows of the outer products of x_m and y_m, [E, D, F]."""
    (num_rows, width), num_out, num_groups = x_MD.shape, y_MF.shape[1], len(sizes_E)
    tile_M, tile_D, tile_F = (
        _row_tile(num_rows, num_groups),
        *(_even(n, WIDEST) for n in (width, num_out)),
    )
    visits = visit_groups(sizes_E, num_rows, tile_M)

    def kernel(groups, tiles, starts, ends, count, x_ref, y_ref, w_ref, sum_ref):
        v, last = pl.program_id(2), pl.num_programs(2) - 1

        @pl.when((v == 0) | (groups[v] != groups[jnp.maximum(v, 1) - 1]))
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(starts[v] < ends[v])
        def _():
            is_row = _is_row(tiles[v], starts[v], ends[v], tile_M)
            x, y = [jnp.where(is_row, ref[...], 0) for ref in (x_ref, y_ref)]
            sum_ref[...] += tpu.multiply(x, y, (0, 0))

        @pl.when((v == last) | (groups[v] != groups[jnp.minimum(v + 1, last)]))
        def _():
            w_ref[...] = sum_ref[...].astype(w_ref.dtype)

    of_x = pl.BlockSpec((tile_M, tile_D), lambda d, f, v, _, tiles, *__: (tiles[v], d))
    of_y = pl.BlockSpec((tile_M, tile_F), lambda d, f, v, _, tiles, *__: (tiles[v], f))
    of_w = pl.BlockSpec((None, tile_D, tile_F), lambda d, f, v, groups, *_: (groups[v], d, f))
    return pl.pallas_call(
        kernel,
        _like(x_MD, (num_groups, width, num_out), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(pl.cdiv(width, tile_D), pl.cdiv(num_out, tile_F), visits.count[0]),
            in_specs=[of_x, of_y],
            out_specs=of_w,
            scratch_shapes=[pltpu.VMEM((tile_D, tile_F), jnp.float32)],
        ),
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=_cost(x_MD, y_MF, num_out, out_dtype),
        interpret=tpu.interprets(),
        name="grouped_outer_products",
    )(*visits, x_MD, y_MF)


def _is_row(tile, start, end, tile_rows):
    """[tile, 1]: whether a row of a tile is from start to end."""
    row = tile * tile_rows + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, 1), 0)
    return (row >= start) & (row < end)


def _tiles(num_rows, num_groups, width, x_dtype, w_dtype):
    """(rows, columns) of tiles of x and w, with `width` columns and rows; None if none fits."""
    for rows, columns in TILES:
        rows = min(rows, _row_tile(num_rows, num_groups))
        size = rows * jnp.dtype(x_dtype).itemsize + columns * jnp.dtype(w_dtype).itemsize
        if 2 * size * width <= ROOM:
            return rows, columns
    return None


def _row_tile(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: at most half an even group's, as borders cost a tile a group."""
    tile = 128
    while tile < 512 and 4 * tile * num_groups <= num_rows:
        tile *= 2
    return min(tile, num_rows)


def _even(width: int, widest: int) -> int:
    """Columns of a tile, at most `widest`: all, or a multiple of 128 that leaves little over."""
    num_tiles = -(-width // widest)
    return width if num_tiles == 1 else -(-width // num_tiles // 128) * 128


def _part(width: int) -> int:
    """A part of the contracted dimension that divides it; all of it if none does."""
    parts = [size for size in range(128, PART + 1, 128) if width % size == 0]
    return max(parts, default=width)


def _like(x, shape, dtype):
    """A result that varies over devices in `jax.shard_map` as x does."""
    kind = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def _cost(x, y, num_out, out_dtype):
    """Every row multiplied once; everything read and written once."""
    size = x.size // x.shape[1] * num_out
    num_bytes = x.nbytes + y.nbytes + size * jnp.dtype(out_dtype).itemsize
    return pl.CostEstimate(flops=2 * x.size * num_out, bytes_accessed=num_bytes, transcendentals=0)


def _params(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)
