"""Depth as data: layers are built once with a leading layer axis and run by `jax.lax.scan`.

Tracing and compiling then cost the same at 2 and at 61 layers. On a CPU a scan copies each layer's
slice of the weights before it multiplies (a decode step at half speed), so a model for generation
can be unrolled: `unstack` gives a list of layers, and `scan` runs it as a Python loop. Variables of
class `Shared` are the same in every layer and are sliced by neither.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import PRODUCT
from llmprep_jax.nn.param import Compute, Shared
from llmprep_jax.types import Array, Int

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}


def stack(make: Callable[..., nnx.Module], num_layers: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds `num_layers` modules as one whose parameters have a leading layer axis."""
    return jax.vmap(lambda rngs: make(rngs=rngs))(rngs.split(num_layers))


def unstack(
    layers: nnx.Module, change: Callable[[nnx.Module], nnx.Module] = lambda layer: layer
) -> nnx.List:
    """The same layers as a list of modules, each as `change` makes it; copies the weights once."""
    stacked, build = part(layers)
    return nnx.List([change(build(_slice(stacked, index))) for index in range(depth(layers))])


@jax.jit  # one small program for all layers
def _slice(stacked: list[Any], index: Int[Array, ""]) -> list[Any]:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)


def part(layers: nnx.Module) -> tuple[list[Any], Callable[[list[Any]], nnx.Module]]:
    """(what has a layer axis, a function that makes a module of such values of one layer)."""
    leaves, structure = jax.tree.flatten(layers, is_leaf=_is_shared)
    stacked = [None if _is_shared(leaf) else leaf for leaf in leaves]

    def build(values: list[Any]) -> nnx.Module:
        whole = [
            leaf if value is None else value for leaf, value in zip(leaves, values, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)

    return stacked, build


def take(layers: nnx.Module | nnx.List, start: int, stop: int) -> nnx.Module | nnx.List:
    """Some of the layers, `start` to `stop`; all of them as they are."""
    if isinstance(layers, nnx.List):
        return nnx.List(list(layers)[start:stop])
    if (start, stop) == (0, depth(layers)):
        return layers
    stacked, build = part(layers)
    return build(jax.tree.map(lambda x: x[start:stop], stacked))


def depth(layers: nnx.Module) -> int:
    """The number of layers in a stack."""
    return jax.tree.leaves(part(layers)[0])[0].shape[0]


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


def scan(
    step: Callable[..., Any],
    layers: nnx.Module | nnx.List,
    carry: Any,
    *values: Any,
    compute: Compute,
) -> Any:
    """carry = step(layer, carry, *values[l]) for each layer l.

    Args:
      step: the body; it is rematerialised as `compute.remat` says.
      layers: what `stack` made, or a list of modules.
      carry: what goes through the layers.
      values: arrays with a leading layer axis; with a list of layers each step gets them as plain
        numbers, so that `if` may branch on them.
    """
    remat = _remat(compute.remat)
    if isinstance(layers, nnx.List):
        for index, layer in enumerate(layers):
            # closed over, since jax.checkpoint would make traced values of its arguments
            numbers = [value[index].item() for value in values]
            run = remat(lambda layer, carry, numbers=numbers: step(layer, carry, *numbers))
            carry = run(layer, carry)
        return carry

    stacked, build = part(layers)

    def body(carry, layer_and_values):
        layer, *layer_values = layer_and_values
        return remat(step)(build(layer), carry, *layer_values), None

    arrays = tuple(jnp.asarray(value) for value in values)
    unroll = compute.unroll or depth(layers)
    return jax.lax.scan(body, carry, (stacked, *arrays), unroll=unroll)[0]


def _remat(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if name == "none":
        return lambda step: step
    if name not in REMAT_POLICIES:
        names = ", ".join(["none", *REMAT_POLICIES])
        raise ValueError(f"unknown remat policy {name!r}; the policies are {names}")
    return functools.partial(jax.checkpoint, policy=REMAT_POLICIES[name])
