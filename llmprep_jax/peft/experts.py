"""Layers that hold the weights of many experts, shown to an adapter method one expert at a time.

In "ECD,EDF->ECF" the letter E is in the activation, the weight and the result: nothing is summed
over it, and each expert has a layer of its own. A method's functions are mapped over such letters,
so that each expert has an adapter of its own and no method knows of experts. Adapters' parameters
get the experts as their first dimensions, wherever E stands in the weight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Param
from llmprep_jax.sharding import has_mesh, spec, without_axes
from llmprep_jax.types import Array


def letters(base: Einsum) -> tuple[str, str, str]:
    """(activation, weight, result) of a layer's einsum."""
    inputs, y_dims = base.eqn.split("->")
    return (*inputs.split(","), y_dims)


def are_apart(base: Einsum, pattern: str) -> bool:
    """Whether each expert has a tensor of its own, of a weight with this pattern in the table."""
    return bool(experts(base)) and len(pattern.split("->")[1].split()) < len(base.layer_shape)


def experts(base: Einsum) -> str:
    """The letters that experts are numbered by, in the order of the weight."""
    x_dims, w_dims, y_dims = letters(base)
    return "".join(dim for dim in w_dims if dim in x_dims and dim in y_dims)


def num_experts(base: Einsum) -> tuple[int, ...]:
    """How many experts a layer has, () for an ordinary one."""
    w_dims = letters(base)[1]
    return tuple(base.layer_shape[w_dims.index(dim)] for dim in experts(base))


class Expert(Einsum):
    """The layer of one expert.

    Args:
      base: the layer of all. letter: what they are numbered by.
      w, b: the one expert's weight and bias.
    """

    def __init__(self, base: Einsum, letter: str, w: Array, b: Array | None):
        _, w_dims, y_dims = letters(base)
        self.eqn, self.dtype = base.eqn.replace(letter, ""), base.dtype
        self.axes = _without(base.axes, w_dims.index(letter))
        self.layer_shape = _without(base.layer_shape, w_dims.index(letter))
        self.out_axes = _without(base.out_axes, y_dims.index(letter))
        self.w, self.b = Param(w), None if b is None else Param(b)


def each_expert(
    function: Callable[..., Any], base: Einsum, *args: Any, dims: Sequence[str], result: str = ""
) -> Any:
    """`function(base, *args)` of an ordinary layer; of each expert's layer where there are experts.

    Args:
      dims: the letters of each argument's dimensions; "" has the experts first, as parameters do.
      result: the same of what `function` gives.
    """
    if not experts(base):
        return function(base, *args)
    letter, (_, w_dims, y_dims) = experts(base)[0], letters(base)
    b_dims = [dim for dim in w_dims if dim in y_dims]
    rest = [letters_of_one.replace(letter, "") for letters_of_one in (*dims, result)]

    def one(w: Array, b: Array | None, *args: Any) -> Any:
        expert = Expert(base, letter, w, b)
        with without_axes(axis):
            return each_expert(function, expert, *args, dims=rest[:-1], result=rest[-1])

    at_w, at_b = w_dims.index(letter), b_dims.index(letter)
    places = [max(letters_of_one.find(letter), 0) for letters_of_one in dims]
    values = [base.weight(), None if base.b is None else base.b[...], *args]
    places = [at_w, None if base.b is None else at_b, *places]
    axis = None
    if has_mesh():  # what is mapped over must be laid out alike
        axis = spec(base.axes[at_w], shape=base.layer_shape[at_w : at_w + 1])[0]
        values = [
            jax.tree.map(lambda x, place=place: _laid(x, place, axis), value)
            for value, place in zip(values, places, strict=True)
        ]
    return jax.vmap(one, tuple(places), max(result.find(letter), 0))(*values)


def _laid(x: Array, place: int, axis: Any) -> Array:
    """An array whose experts' dimension is laid over a mesh axis, and no other is."""
    dims = list(jax.typeof(x).sharding.spec)
    dims = [None if dim == axis else dim for dim in dims] + [None] * (x.ndim - len(dims))
    dims[place] = axis
    return jax.reshard(x, jax.P(*dims))


def _without(values: tuple, index: int) -> tuple:
    return values[:index] + values[index + 1 :]
