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
