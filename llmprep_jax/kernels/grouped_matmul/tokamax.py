"""Grouped products by the library tokamax, where it is installed and its kernels can do it.

Its Hopper kernels want 16-bit operands, drop what 128 does not divide of the contracted dimension,
and multiply masked rows by zero, so rows of no group are cleared here first. For dx it transposes
w in memory and for dw x: 224 and 112 MiB for 8,192 rows and eight matrices of 7,168 x 2,048, where
`pallas_gpu` holds nothing.
"""

import importlib.util

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.grouped_matmul.ragged import dimensions
from llmprep_jax.kernels.platforms import device_kind, platform

KERNELS = "mosaic"  # and not its others: "xla" multiplies all rows with all matrices


def refusal(x_MD: jax.Array, w_EDF: jax.Array) -> str | None:
    """What keeps these kernels from products of x and w, forward or backward."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed"
    if platform() not in ("gpu", "tpu"):
        return "it is for GPUs and TPUs"
    if any(width % 128 for width in w_EDF.shape[1:]) or len(x_MD) < 128:
        return "it wants multiples of 128 columns, and 128 rows"
    if platform() == "tpu" and jax.typeof(x_MD).manual_axis_type.varying:
        return "on TPUs it does not say what varies in jax.shard_map"
    if platform() == "gpu" and not any(name in device_kind() for name in ("H100", "H200")):
        return "its kernels for gradients are for Hopper"
    if platform() == "gpu" and x_MD.dtype.itemsize != 2:
        return f"it multiplies 16-bit numbers, not {x_MD.dtype}"
    return None


def multiply(
    x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, w_axis: int, out_dtype: jnp.dtype
) -> jax.Array:
    """Rows of each group times its matrix, whose `w_axis` is contracted."""
    dims = dimensions((1, w_axis), [0])
    return _own_rows(_product(x_MD, w_EDF.astype(x_MD.dtype), sizes_E, dims, out_dtype), sizes_E)


def accumulate(
    x_MD: jax.Array, y_MF: jax.Array, sizes_E: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """Sum over each group's rows of the outer products of x_m and y_m, [E, D, F]."""
    x_MD, y_MF = [_own_rows(z, sizes_E) for z in (x_MD, y_MF)]
    return _product(x_MD, y_MF, sizes_E, dimensions((0, 0), []), out_dtype)


def _product(lhs, rhs, sizes_E, dims, out_dtype):
    import tokamax  # two seconds, and not installed everywhere
    from absl import flags

    if not flags.FLAGS.is_parsed():  # or it reads the command's arguments as its own
        flags.FLAGS.mark_as_parsed()
    kind = dict(preferred_element_type=jnp.dtype(out_dtype), implementation=KERNELS)
    y = tokamax.ragged_dot_general(lhs, rhs, sizes_E, dims, **kind)
    # it does not say over which devices of jax.shard_map the result varies
    missing = [jax.typeof(z).manual_axis_type.varying for z in (lhs, y)]
    missing = tuple(missing[0] - missing[1])
    return jax.lax.pcast(y, missing, to="varying") if missing else y


def _own_rows(x_MD, sizes_E):
    """x, with zeros for rows that no group has."""
    is_row_M = jnp.arange(len(x_MD)) < sizes_E.sum()
    return jnp.where(is_row_M[:, None], x_MD, 0)
