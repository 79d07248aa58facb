"""Products of rows with the matrix of their group, as a layer of experts needs them.

Rows are sorted by group and groups differ in size, so one product of M rows does the work of M
rows, whatever the number of groups. `reference` says what is meant. A backend is a file of three
functions, `multiply`, `accumulate` and `refusal`, which says what it cannot do. Operands are in one
dtype and sums in float32, forward and backward: dx is the same product with w transposed, dw a sum
of outer products over each group's rows. On a mesh this is called inside `jax.shard_map`, on the
rows and groups of one device.
"""

import functools
import importlib
from types import ModuleType

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.platforms import platform, tell_once

# each platform's backends, best first; what one refuses falls to the next
BACKENDS = {
    "cpu": ("blocks",),
    "tpu": ("pallas_tpu", "ragged"),
    "gpu": ("pallas_gpu", "tokamax", "blocks"),
    None: ("ragged",),  # a mesh without devices, of a pod that nobody has at hand
}
IMPLS = ("blocks", "ragged", "pallas_tpu", "pallas_gpu", "tokamax")


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
      impl: a backend by name; None: the best for the platform of the mesh in force. One that
        cannot do what is asked falls to the next, and says so once.

    Raises:
      ValueError: an unknown `impl`.
    """
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(IMPLS)}")
    operands = _varying_alike(x_MD, w_EDF, sizes_E)
    return _product(*operands, jnp.dtype(dtype), impl)


def backend(impl: str | None, x_MD: jax.Array, w_EDF: jax.Array) -> ModuleType:
    """The first backend that can do it, of the one asked for and the platform's."""
    for name in (*(() if impl is None else (impl,)), *BACKENDS[platform()]):
        try:
            module = importlib.import_module(f"{__package__}.{name}")
        except ImportError as error:  # of a part of Pallas that this JAX is built without
            reason = str(error)
        else:
            reason = module.refusal(x_MD, w_EDF)
        if reason is None:
            return module
        if name == impl:
            tell_once(f"grouped_matmul: {impl} cannot do this ({reason}); another takes its place")
    raise AssertionError(impl)  # the last of each platform does all


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x_MD, w_EDF, sizes_E, dtype, impl):
    x_in_dtype_MD = x_MD.astype(dtype)
    module = backend(impl, x_in_dtype_MD, w_EDF)
    with jax.named_scope("grouped_matmul"):
        return module.multiply(x_in_dtype_MD, w_EDF, sizes_E, 1, x_MD.dtype)


def _forward(x_MD, w_EDF, sizes_E, dtype, impl):
    return _product(x_MD, w_EDF, sizes_E, dtype, impl), (x_MD, w_EDF, sizes_E)


def _backward(dtype, impl, residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    dy_MF = dy_MF.astype(dtype)
    module = backend(impl, dy_MF, w_EDF)
    with jax.named_scope("grouped_matmul_backward"):
        dx_MD = module.multiply(dy_MF, w_EDF, sizes_E, 2, x_MD.dtype)
        dw_EDF = module.accumulate(x_MD.astype(dtype), dy_MF, sizes_E, w_EDF.dtype)
    return dx_MD, dw_EDF, None


_product.defvjp(_forward, _backward)
