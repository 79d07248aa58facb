"""Grouped products as Pallas kernels for NVIDIA GPUs, lowered by Triton.

XLA has no instruction for them there: compiled for an H100, 8,192 rows and eight matrices of 7,168
x 2,048 are a product of all rows with all matrices, for which rows are copied eight times (896
MiB). Here a program takes a tile of rows of one group (`visits`) and a tile of its matrix's
columns; for dw, a tile of a group's matrix, and goes through the group's rows. Triton wants sizes
of powers of two, so a last tile begins earlier and writes some numbers again, the same ones.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llmprep_jax.kernels.grouped_matmul.visits import visit_tiles
from llmprep_jax.kernels.platforms import platform, precision_of

# rows, columns and contracted numbers of a tile; stages are tiles on their way from memory
TILES = {2: (128, 256, 64), 4: (64, 128, 32)}  # by bytes of an operand
LEAST = 16  # of each side of a product, for Triton
PARAMS = plgpu.CompilerParams(num_warps=8, num_stages=3)


def refusal(x_MD: jax.Array, w_EDF: jax.Array) -> str | None:
    """What keeps these kernels from products of x and w, forward or backward."""
    if platform() == "tpu":
        return "it is for GPUs"
    if platform() == "cpu" and jax.typeof(x_MD).manual_axis_type.varying:
        return "Pallas interprets nothing where jax.shard_map checks what varies"
    if min(len(x_MD), *w_EDF.shape[1:]) < LEAST:
        return f"it wants {LEAST} rows and columns or more"
    return None


def multiply(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, w_axis: int, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of each group times its matrix, whose `w_axis` is contracted."""
    (num_rows, width), num_out = x_MD.shape, w_EDF.shape[3 - w_axis]
    tile_M, tile_F, tile_D = _tiles(x_MD.dtype, num_rows, num_out, width)
    tile_M = _row_tile(tile_M, num_rows, len(w_EDF))
    visits = visit_tiles(sizes_E, num_rows, tile_M)

    def kernel(groups, tiles, starts, ends, count, x_ref, w_ref, y_ref):
        v = pl.program_id(1)
        group, start, end = groups[v], starts[v], ends[v]
        rows, is_row = _window(tiles[v], tile_M, num_rows, start, end)
        columns, _ = _window(pl.program_id(0), tile_F, num_out)

        def add(i, y):
            part, is_new = _window(i, tile_D, width, i * tile_D, width)
            x = plgpu.load(x_ref.at[rows, part], mask=is_row[:, None] & is_new, other=0)
            w = w_ref[group, part, columns] if w_axis == 1 else w_ref[group, columns, part]
            return y + _dot(x, w.astype(x.dtype), ((1,), (w_axis - 1,)))

        steps = (group < w_ref.shape[0]).astype(jnp.int32) * pl.cdiv(width, tile_D)
        y = jax.lax.fori_loop(0, steps, add, jnp.zeros((tile_M, tile_F), jnp.float32))
        plgpu.store(y_ref.at[rows, columns], y.astype(y_ref.dtype), mask=is_row[:, None])

    return pl.pallas_call(
        kernel,
        _like(x_MD, (num_rows, num_out), out_dtype),
        grid=(pl.cdiv(num_out, tile_F), len(visits.groups)),
        compiler_params=PARAMS,
        interpret=platform() == "cpu",
        name="grouped_matmul",
    )(*visits, x_MD, w_EDF)


def accumulate(
    x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """Sum over each group's rows of the outer products of x_m and y_m, [E, D, F]."""
    (num_rows, width), num_out = x_MD.shape, y_MF.shape[1]
    tile_D, tile_F, tile_M = _tiles(x_MD.dtype, width, num_out, num_rows)
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)

    def kernel(starts, ends, x_ref, y_ref, w_ref):
        group = pl.program_id(2)
        start, end = starts[group], ends[group]
        columns_D, _ = _window(pl.program_id(1), tile_D, width)
        columns_F, _ = _window(pl.program_id(0), tile_F, num_out)

        def add(i, w):
            first = start + i * tile_M
            rows, is_row = _window(i, tile_M, num_rows, first, end, offset=start)
            x, y = [
                plgpu.load(ref.at[rows, columns], mask=is_row[:, None], other=0)
                for ref, columns in ((x_ref, columns_D), (y_ref, columns_F))
            ]
            return w + _dot(x, y, ((0,), (0,)))

        zeros = jnp.zeros((tile_D, tile_F), jnp.float32)
        w = jax.lax.fori_loop(0, pl.cdiv(end - start, tile_M), add, zeros)
        w_ref[group, columns_D, columns_F] = w.astype(w_ref.dtype)

    return pl.pallas_call(
        kernel,
        _like(x_MD, (len(sizes_E), width, num_out), out_dtype),
        grid=(pl.cdiv(num_out, tile_F), pl.cdiv(width, tile_D), len(sizes_E)),
        compiler_params=PARAMS,
        interpret=platform() == "cpu",
        name="grouped_outer_products",
    )(ends_E - sizes_E, ends_E, x_MD, y_MF)


def _window(i, tile, size, start=0, end=None, offset=0):
    """(slice, mask): a dimension's tile i, moved to lie within; the mask is of start to end."""
    first = jnp.minimum(offset + i * tile, size - tile)
    index = first + jnp.arange(tile)
    return pl.ds(first, tile), (index >= start) & (index < (size if end is None else end))


def _tiles(dtype, *sizes):
    """Powers of two, none more than its dimension has."""
    tiles = TILES[max(2, jnp.dtype(dtype).itemsize)]
    return [min(tile, 1 << size.bit_length() - 1) for tile, size in zip(tiles, sizes, strict=True)]


def _row_tile(tile: int, num_rows: int, num_groups: int) -> int:
    """Fewer rows where a group has few: a tile on a border is computed once a group."""
    while tile > LEAST and tile * num_groups > num_rows:
        tile //= 2
    return tile


def _dot(x, y, contracted):
    sums = dict(preferred_element_type=jnp.float32, precision=precision_of(x.dtype))
    return jax.lax.dot_general(x, y, (contracted, ((), ())), **sums)


def _like(x, shape, dtype):
    """A result that varies over devices in `jax.shard_map` as x does."""
    kind = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
