"""What Pallas kernels on a TPU share: numbers by row as columns, and products of what was read.

A number a row lies in memory as [1, rows], which HBM does not pad; where a kernel needs it beside
each row of a tile, it is turned once and kept over all lanes, [rows, 128].
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.platforms import platform, precision_of

LANES = 128
VMEM = 48 * 2**20  # of 128 MiB, and of 64 on a TPU7x

Array = jax.Array


def interprets() -> bool:
    """Whether there is no TPU in force, and kernels run by XLA's own operations."""
    return platform() not in ("tpu", None)


def params(*semantics: str) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM)


def block(length: int, limit: int) -> int:
    """Of an axis: the most that divides its length, if half the limit or more does."""
    if length <= limit:
        return length
    sizes = [n for n in range(limit, limit // 2 - 1, -128) if length % n == 0]
    return max(sizes, default=limit)


def to_column(row: Array) -> Array:
    """[1, rows] as a column over all lanes, [rows, 128]."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def to_row(column: Array) -> Array:
    """The reverse of `to_column`."""
    return jnp.transpose(column)[:1]


def lanes(x: Array, width: int) -> Array:
    """A column that lies over all lanes, [rows, 128], over `width` of them."""
    x = x if width <= LANES else jnp.concatenate([x] * -(-width // LANES), axis=1)
    return x if width == x.shape[1] else x[:, :width]


def within(x: Array, start: Array, end: int, axis: int, size: int) -> Array:
    """x with 0 where it was read past the end of an array, which blocks need not divide."""
    if end % size == 0:
        return x
    return jnp.where(start + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < end, x, 0)


def multiply(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """A product of matrices over an axis of each, summed in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = precision_of(a.dtype)
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
