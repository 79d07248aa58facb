"""What is in a program before it is compiled."""

import math
from collections.abc import Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, and of all programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def flops_of_products(jaxpr: Any) -> int:
    """2 for each multiplication of products and convolutions, loops as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        size = math.prod(getattr(eqn.outvars[0].aval, "shape", ())) if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (dims, _), _ = eqn.params["dimension_numbers"]
            total += 2 * size * math.prod(eqn.invars[0].aval.shape[dim] for dim in dims)
        elif eqn.primitive.name == "conv_general_dilated":
            total += 2 * size * math.prod(eqn.invars[1].aval.shape[:-1])
        else:
            inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            own = [flops_of_products(getattr(x, "jaxpr", x)) for x in inner if _is_jaxpr(x)]
            total += times * sum(own)
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
