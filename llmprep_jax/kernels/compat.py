"""What differs between the versions of JAX that kernels run with; no other file looks at them."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def load_as(ref: Any, layout: Any) -> jax.Array:
    """A reference of a Mosaic GPU kernel as an array of a layout."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if "idx" in inspect.signature(plgpu.load).parameters:  # up to 0.10
        return plgpu.load(ref, (), layout=layout)
    return plgpu.load(ref, layout=layout)


def accumulate(multiply: Callable[[Any], None], sums: jax.Array, interprets: bool) -> jax.Array:
    """`sums` and what `multiply` adds to an accumulator of a warpgroup's products.

    JAX 0.12 interprets no accumulator that begins with values.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not interprets:
        return pl.run_state(multiply)(plgpu.ACC.init(sums))

    def products(accumulator: Any) -> jax.Array:
        multiply(accumulator)
        return accumulator[...]

    return sums + pl.run_scoped(products, plgpu.ACC(sums.shape, sums.dtype))


def accumulate_product(p: jax.Array, ref: Any, sums: jax.Array, interprets: bool) -> jax.Array:
    """`sums` and the product of an array in registers with one in shared memory.

    JAX 0.12 interprets products of arrays in shared memory alone.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interprets:
        values = ref[...]
        plgpu.commit_smem()  # a read that copies must wait for, as they do for a product's
        return sums + jax.lax.dot(p, values, preferred_element_type=sums.dtype)
    return accumulate(lambda accumulator: plgpu.wgmma(accumulator, p, ref), sums, interprets)


def mosaic_interpreter() -> Any:
    """What has JAX interpret Mosaic GPU kernels; None before 0.11.2."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = getattr(plgpu, "InterpretGPUParams", None)
    return None if params is None else params()
