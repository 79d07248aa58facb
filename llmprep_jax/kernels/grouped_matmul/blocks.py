"""Grouped products as loops over blocks of rows, for CPUs.

Groups that have rows are visited in turn: a group's matrix is taken out and cast once, and
multiplied with its rows block by block. A block that reaches over the end of its group writes rows
that the next group's first block writes again, so rows are neither padded nor gathered. In a loop
XLA's CPU compiler slices and updates a bf16 array on a float32 copy of all of it, made at every
step (47 against 8 ms for 4096 rows); hence `_bits`.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK_ROWS = 32  # 16 to 64 are as fast, within a tenth
GATHERED_ROWS = 16  # up to here each row takes a matrix: 0.2 against 1.4 ms for 6 rows in bf16

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def refusal(x_MD: jax.Array, w_EDF: jax.Array) -> str | None:
    """None: it does all."""


def multiply(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, w_axis: int, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of each group times its matrix, whose `w_axis` is contracted."""
    by_row = _multiply_gathered if len(x_MD) <= GATHERED_ROWS else _multiply_blocks
    y_MF = by_row(x_MD, w_EDF, sizes_E, w_axis, out_dtype)
    is_row_M = jnp.arange(len(x_MD)) < sizes_E.sum()
    return jnp.where(is_row_M[:, None], y_MF, 0)


def _multiply_gathered(x_MD, w_EDF, sizes_E, w_axis, out_dtype):
    groups_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_MD)), side="right")
    w_MDF = w_EDF.at[groups_M].get(mode="clip").astype(x_MD.dtype)
    return _dot(x_MD, w_MDF, (((1,), (w_axis,)), ((0,), (0,)))).astype(out_dtype)


def _multiply_blocks(x_MD, w_EDF, sizes_E, w_axis, out_dtype):
    x, w, starts_E = _bits(_padded(x_MD)), _bits(w_EDF), _starts(sizes_E)

    def visit(group, y):
        # held here, or the cast moves into the loop over blocks
        w_DF = jax.lax.optimization_barrier(_floats(w[group], w_EDF.dtype).astype(x_MD.dtype))

        def block(i, y):
            start = starts_E[group] + i * BLOCK_ROWS
            x_block = _floats(jax.lax.dynamic_slice_in_dim(x, start, BLOCK_ROWS), x_MD.dtype)
            y_block = _dot(x_block, w_DF, (((1,), (w_axis - 1,)), ((), ()))).astype(out_dtype)
            return jax.lax.dynamic_update_slice_in_dim(y, _bits(y_block), start, 0)

        return jax.lax.fori_loop(0, _num_blocks(sizes_E[group]), block, y)

    num_rows, num_out = len(x_MD) + BLOCK_ROWS, w_EDF.shape[3 - w_axis]
    y = _bits(jnp.zeros_like(x_MD, out_dtype, shape=(num_rows, num_out)))
    return _floats(_visit_groups(visit, y, sizes_E, len(x_MD)), out_dtype)[: len(x_MD)]


def accumulate(
    x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """Sum over each group's rows of the outer products of x_m and y_m, [E, D, F]."""
    x, y, starts_E = _bits(_padded(x_MD)), _bits(_padded(y_MF)), _starts(sizes_E)
    shape = (x_MD.shape[1], y_MF.shape[1])

    def visit(group, w):
        def block(i, w_DF):
            start, left = starts_E[group] + i * BLOCK_ROWS, sizes_E[group] - i * BLOCK_ROWS
            is_row = jnp.arange(BLOCK_ROWS)[:, None] < left
            x_block, y_block = [
                jnp.where(
                    is_row, _floats(jax.lax.dynamic_slice_in_dim(z, start, BLOCK_ROWS), dtype), 0
                )
                for z, dtype in ((x, x_MD.dtype), (y, y_MF.dtype))
            ]
            return w_DF + _dot(x_block, y_block, (((0,), (0,)), ((), ())))

        zeros = jnp.zeros_like(x_MD, jnp.float32, shape=shape)
        w_DF = jax.lax.fori_loop(0, _num_blocks(sizes_E[group]), block, zeros)
        return jax.lax.dynamic_update_index_in_dim(w, _bits(w_DF.astype(out_dtype)), group, 0)

    w = _bits(jnp.zeros_like(x_MD, out_dtype, shape=(len(sizes_E), *shape)))
    return _floats(_visit_groups(visit, w, sizes_E, len(x_MD)), out_dtype)


def _visit_groups(visit, carry, sizes_E, num_rows):
    """carry = visit(group, carry) for each group that has rows."""
    most = min(num_rows, len(sizes_E))
    (groups,) = jnp.nonzero(sizes_E, size=most, fill_value=0)
    step = lambda i, carry: visit(groups[i], carry)  # noqa: E731
    return jax.lax.fori_loop(0, jnp.count_nonzero(sizes_E), step, carry)


def _starts(sizes_E):
    return jnp.cumsum(sizes_E) - sizes_E


def _num_blocks(size):
    return (size + BLOCK_ROWS - 1) // BLOCK_ROWS


def _padded(x_MD):
    """With a block of rows more, so that the last block does not reach over the end."""
    return jnp.pad(x_MD, ((0, BLOCK_ROWS), (0, 0)))


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _floats(x, dtype):
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
