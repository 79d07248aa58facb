"""Tokens into the slots of a cache, in place: contiguous rows, and pages of a pool.

A slot is written where it lies: on TPUs slice by slice, since a scatter, or a loop, lays the whole
cache out anew (a copy of all layers at each step).

Letters of this file: P pages of a pool, J pages of a row.
"""

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, platform, sharding_of
from llmprep_jax.types import Array, Int


def put(old_LBKSH: Array, new_BKTH: Array, layer: Int[Array, ""], start_B: Array) -> Array:
    """Each row's tokens from its own slot on; every device writes the rows and heads it has."""
    if not has_mesh() or jax.sharding.get_abstract_mesh().manual_axes:
        return _put_here(old_LBKSH, new_BKTH, layer, start_B)
    lies = (*sharding_of(old_LBKSH).spec, *[None] * 5)[:5]
    ins = (jax.P(*lies), jax.P(*lies[1:3], None, None), jax.P(), jax.P(lies[1]))
    new_BKTH, start_B = jax.reshard(new_BKTH, ins[1]), jax.reshard(start_B, ins[3])
    write = jax.shard_map(_put_here, in_specs=ins, out_specs=ins[0])
    return write(old_LBKSH, new_BKTH, layer, start_B)


def pages_of(pages_BJ: Array, start_B: Array, num_new: int, size: int) -> Int[Array, "B T"]:
    """The page that each of so many slots from `start` on lies in, -1 for none."""
    at_BT = (start_B[:, None] + jnp.arange(num_new)) // size
    return jnp.take_along_axis(pages_BJ, at_BT, axis=1, mode="fill", fill_value=-1)


def put_in_pages(
    pool_LPKSH: Array, new_BKTH: Array, layer: Int[Array, ""], pages_BJ: Array, start_B: Array
) -> Array:
    """Each row's tokens into its pages; every device has all rows' tokens of its heads.

    A token without a page is dropped.
    """
    write = put_in_pages_by_slice if platform() == "tpu" else put_in_pages_by_scatter
    if not has_mesh() or jax.sharding.get_abstract_mesh().manual_axes:
        return write(pool_LPKSH, new_BKTH, layer, pages_BJ, start_B)
    lies = (*sharding_of(pool_LPKSH).spec, *[None] * 5)[:5]
    everywhere = jax.P(None, None), jax.P(None)
    ins = (jax.P(*lies), jax.P(None, lies[2], None, None), jax.P(), *everywhere)
    arrays = (pool_LPKSH, new_BKTH, layer, pages_BJ, start_B)
    arrays = [jax.reshard(x, where) for x, where in zip(arrays, ins, strict=True)]
    return jax.shard_map(write, in_specs=ins, out_specs=ins[0])(*arrays)


def put_in_pages_by_scatter(
    pool_LPKSH: Array, new_BKTH: Array, layer: Array, pages_BJ: Array, start_B: Array
) -> Array:
    size, num_new = pool_LPKSH.shape[3], new_BKTH.shape[2]
    pages_BT = pages_of(pages_BJ, start_B, num_new, size)
    pages_BT = jnp.where(pages_BT < 0, pool_LPKSH.shape[1], pages_BT)  # beyond the pool
    at_BT = (start_B[:, None] + jnp.arange(num_new)) % size
    at_BT3 = jnp.stack([jnp.broadcast_to(layer, at_BT.shape), pages_BT, at_BT], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 1, 3),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(pool_LPKSH, at_BT3, new_BKTH.swapaxes(1, 2), numbers, mode="drop")


def put_in_pages_by_slice(
    pool_LPKSH: Array, new_BKTH: Array, layer: Array, pages_BJ: Array, start_B: Array
) -> Array:
    """Of each row the page, or the pages, that its tokens reach into; of one token its slot.

    Of 8 bits and of scales, 1 wide, whole pages too: for less XLA lays the pool out anew.
    """
    (_, _, num_heads, size, width), num_new = pool_LPKSH.shape, new_BKTH.shape[2]
    by_page = num_new > 1 or width == 1 or pool_LPKSH.dtype.itemsize == 1
    most = size if by_page else 1  # slots that are written at once
    new_BKTH = jnp.pad(new_BKTH, ((0, 0), (0, 0), (most, most), (0, 0)))
    for row in range(len(start_B)):
        first = start_B[row] // size
        for number in range((num_new - 2) // size + 2):
            offset = 0 if by_page else start_B[row] % size
            column = (first + number) * size + offset - start_B[row]  # of the first such slot
            page = jnp.take(pages_BJ[row], first + number, mode="fill", fill_value=-1)
            start = (layer, jnp.maximum(page, 0), 0, offset, 0)
            old = jax.lax.dynamic_slice(pool_LPKSH, start, (1, 1, num_heads, most, width))
            new = jax.lax.dynamic_slice_in_dim(new_BKTH[row], column + most, most, axis=1)
            columns = column + jnp.arange(most)
            is_new = (columns >= 0) & (columns < num_new) & (page >= 0)
            new = jnp.where(is_new[:, None], new, old[0, 0])
            pool_LPKSH = jax.lax.dynamic_update_slice(pool_LPKSH, new[None, None], start)
    return pool_LPKSH


def _put_here(old_LBKSH: Array, new_BKTH: Array, layer: Array, start_B: Array) -> Array:
    num_rows = len(start_B)
    # on TPUs slice by slice: a scatter, or a loop of them, lays the whole cache out anew
    if num_rows == 1 or platform() == "tpu":
        for row in range(num_rows):
            start = (layer, row, 0, start_B[row], 0)
            old_LBKSH = jax.lax.dynamic_update_slice(old_LBKSH, new_BKTH[None, row, None], start)
        return old_LBKSH
    rows_B = jnp.arange(num_rows, dtype=jnp.int32)
    at_B3 = jnp.stack([jnp.broadcast_to(layer, num_rows), rows_B, start_B], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(old_LBKSH, at_B3, new_BKTH, numbers, unique_indices=True, mode="clip")
