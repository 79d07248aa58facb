"""What a kernel is compiled for, how exactly it multiplies, and what takes its place."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def platform() -> str | None:
    """Of the devices in force; None where a mesh has none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.default_backend()
    return None if mesh.abstract_device is None else mesh.abstract_device.platform


def device_kind() -> str:
    """What the devices in force are called, such as "NVIDIA H100 80GB HBM3"."""
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0] if mesh.empty else mesh.abstract_device
    return "" if device is None else device.device_kind


@functools.cache
def tell_once(line: str) -> None:
    warnings.warn(line, stacklevel=2)


def in_32_bits(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A Pallas call whose own numbers have 32 bits whatever `jax_enable_x64` says: else they are
    of both kinds, which no chip's compiler takes."""

    def call(*arrays: jax.Array) -> Any:
        with jax.enable_x64(False):
            return kernel(*arrays)

    return call


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Of products in a kernel: Pallas knows no "high", and no "highest" for operands in bf16."""
    wanted = jax.config.jax_default_matmul_precision
    is_exact = wanted not in (None, "default", "bfloat16") and jnp.dtype(dtype).itemsize >= 4
    return jax.lax.Precision.HIGHEST if is_exact else jax.lax.Precision.DEFAULT
