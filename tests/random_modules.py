"""Modules with random weights at once: the initialisers' programs take seconds to compile."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

_NEAR_ONE = ("scale", "base_squares")  # norms' weights, and what DoRA keeps of its base: a length


def random_module(make: Callable[[], nnx.Module], seed: int = 1) -> nnx.Module:
    """What `make` makes, with every weight random, norms and biases too, as the mesh lays it out.

    The numbers are the same on every mesh.
    """
    return fill(jax.eval_shape(make), seed)


def fill(abstract: nnx.Module, seed: int = 1) -> nnx.Module:
    """As `random_module`, of the module's shapes."""
    graph, state = nnx.split(abstract)
    rng, filled = np.random.default_rng(seed), []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value()
        value = rng.normal(1.0 if path[-1] in _NEAR_ONE else 0.0, 0.15, shape.shape)
        place = None if shape.sharding is None else shape.sharding.spec
        filled.append((path, variable.replace(jax.device_put(value.astype(shape.dtype), place))))
    return nnx.merge(graph, nnx.from_flat_state(filled))
