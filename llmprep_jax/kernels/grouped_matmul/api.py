"""Products of rows with the matrix of their group, as a layer of experts needs them.

Rows are sorted by group and groups differ in size, so one product of M rows does the work of M
rows, whatever the number of groups. `reference` says what is meant; `ragged` and `blocks` compute
it. Operands are in one dtype and sums in float32, forward and backward: dx is the same product with
w transposed, dw a sum of outer products over each group's rows. On a mesh this is called inside
`jax.shard_map`, on the rows and groups of one device.
"""

import functools

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.grouped_matmul import blocks, ragged

IMPLS = {"ragged": ragged, "blocks": blocks}


def grouped_matmul(
    x_MD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jax.typing.DTypeLike,
    impl: str | None = None,
) -> jax.Array:
    """y_m = x_m w_e for the group e that row m is of, [M, F] in x's dtype.

    Args:
      x_MD: rows sorted by group; those beyond the sum of sizes give zeros, and get zeros back.
      sizes_E: rows of each group, int32.
      dtype: dtype of the operands of products.
      impl: "ragged" or "blocks"; the default is "blocks" on CPUs and "ragged" elsewhere.
    """
    operands = _varying_alike(x_MD, w_EDF, sizes_E)
    return _product(*operands, jnp.dtype(dtype), impl or _default_impl())


def _varying_alike(*arrays):
    """In `jax.shard_map`: all marked as varying over devices where one of them is.

    Loops and custom rules want equal types; the mark's transpose sums gradients over devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [
        jax.lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(arrays, missing, strict=True)
    ]


def _default_impl() -> str:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return "blocks" if jax.default_backend() == "cpu" else "ragged"
    # a mesh without devices is that of a pod which nobody has at hand
    device = mesh.abstract_device
    return "blocks" if device is not None and device.platform == "cpu" else "ragged"


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MD, w_EDF, sizes_E, dtype, impl):
    return IMPLS[impl].multiply(x_MD.astype(dtype), w_EDF, sizes_E, 1, x_MD.dtype)


def _forward(x_MD, w_EDF, sizes_E, dtype, impl):
    return _product(x_MD, w_EDF, sizes_E, dtype, impl), (x_MD, w_EDF, sizes_E)


def _backward(dtype, impl, residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    dy_MF = dy_MF.astype(dtype)
    dx_MD = IMPLS[impl].multiply(dy_MF, w_EDF, sizes_E, 2, x_MD.dtype)
    dw_EDF = IMPLS[impl].accumulate(x_MD.astype(dtype), dy_MF, sizes_E, w_EDF.dtype)
    return dx_MD, dw_EDF, None


_product.defvjp(_forward, _backward)
