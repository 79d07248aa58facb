"""Depth as data: layers are built once with a leading layer axis and run by `jax.lax.scan`.

Tracing and compiling then cost the same at 2 and at 61 layers. On a CPU a scan copies each layer's
slice of the weights before it multiplies (a decode step at half speed). Two other forms of a stack
do not, for inference: layers `InPlace`, of which products with one row read their weights out of
the stack, and a list of layers (`unstack`), which `scan` runs as a Python loop and which takes as
many times longer to compile as there are layers. Variables of class `Shared` are the same in every
layer and are sliced by none of these.

Layers that differ in a static (Gemma 3's five local and one global) stay one flat stack. The loop's
body is then a super-block, one period of the kinds, and each of its layers picks its weights out of
the whole stack by number: reshaping to [periods, period, ...] keeps each super-block's weights, or
all of them, a second time for the backward pass.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.param import Compute, Shared
from llmprep_jax.nn.remat import remat
from llmprep_jax.types import Array, Int

LEAST_SAVED = 8  # layers that a further loop must save compiling: it sums all gradients once more


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


class InPlace(nnx.Module):
    """Layers `start` to `stop` of a stack that `scan` reads where it lies.

    XLA's CPU compiler puts the choice of a layer into the product that reads its weight, where that
    is one of a vector of up to 4,096 float32 numbers with a matrix of outputs by inputs: nothing is
    copied, and one layer is compiled.
    """

    def __init__(self, layers: nnx.Module, start: int = 0, stop: int | None = None):
        self.layers, self.start = layers, start
        self.stop = depth(layers) if stop is None else stop


def take(layers: nnx.Module | nnx.List, start: int, stop: int) -> nnx.Module | nnx.List:
    """Some of the layers, `start` to `stop`; all of them as they are."""
    if isinstance(layers, nnx.List):
        return nnx.List(list(layers)[start:stop])
    if isinstance(layers, InPlace):
        return InPlace(layers.layers, layers.start + start, layers.start + stop)
    if (start, stop) == (0, depth(layers)):
        return layers
    stacked, build = part(layers)
    return build(jax.tree.map(lambda x: x[start:stop], stacked))


def depth(layers: nnx.Module | nnx.List) -> int:
    """The number of layers, however they lie."""
    if isinstance(layers, nnx.List):
        return len(layers)
    if isinstance(layers, InPlace):
        return layers.stop - layers.start
    return jax.tree.leaves(part(layers)[0])[0].shape[0]


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Shared)


def scan(
    step: Callable[..., Any],
    layers: nnx.Module | nnx.List,
    carry: Any,
    *values: Any,
    compute: Compute,
    kinds: Sequence[Hashable] | None = None,
) -> Any:
    """carry = step(layer, carry, *values[l], kinds[l]) for each layer l.

    Args:
      step: the body; it is rematerialised as `compute.remat` says.
      layers: what `stack` made, that `InPlace`, or a list of modules.
      carry: what goes through the layers.
      values: arrays with a leading layer axis.
      kinds: what is static of each layer and may differ, such as its window; None: steps get none.
    """
    values = tuple(jnp.asarray(value) for value in values)
    if isinstance(layers, InPlace):
        return _scan_in_place(step, layers, carry, values, kinds)
    if isinstance(layers, nnx.List):
        kinds = len(layers) * ((),) if kinds is None else [(kind,) for kind in kinds]
        # layers alike are traced once; and their kernels are compiled once, as long as the compiler
        # does not see that their numbers are constants (SmolLM2's first answer: 9.7 s for 13.2)
        runs = {kind: jax.jit(_list_step(step, kind, compute)) for kind in kinds}
        for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
            numbers = jax.lax.optimization_barrier([value[index] for value in values])
            carry = runs[kind](layer, carry, numbers)
        return carry

    if kinds is not None and len(set(kinds)) > 1:
        return _scan_kinds(step, layers, carry, values, tuple(kinds), compute)
    statics = [] if kinds is None else [kinds[0]]
    stacked, build = part(layers)
    unroll = compute.unroll or depth(layers)

    def run(values_of_layer, carry):
        layer, *numbers = values_of_layer
        return step(build(layer), carry, *numbers, *statics)

    run = remat(run, compute, in_loop=unroll < depth(layers))
    return jax.lax.scan(
        lambda carry, xs: (run(xs, carry), None), carry, (stacked, *values), unroll=unroll
    )[0]


def _list_step(step: Callable[..., Any], kind: tuple, compute: Compute) -> Callable[..., Any]:
    return remat(
        lambda layer, carry, numbers: step(layer, carry, *numbers, *kind), compute, in_loop=False
    )


class Run(NamedTuple):
    """Layers that are run together, from `start` on: `repeats` times a super-block of `period`."""

    start: int
    period: int
    repeats: int


@functools.cache
def plan_runs(kinds: tuple[Hashable, ...], least: int = 1, start: int = 0) -> tuple[Run, ...]:
    """How layers of these kinds are run, so that few are compiled: by loops and one by one.

    Args:
      least: layers that a loop must save compiling. start: the number of the first.
    """
    best = Run(0, len(kinds), 1)
    for period in range(1, len(kinds) // 2 + 1):
        alike = [a == b for a, b in zip(kinds, kinds[period:], strict=False)]
        for first in range(len(kinds) - period):
            length = next((i for i, same in enumerate(alike[first:]) if not same), None)
            length = period + (len(alike) - first if length is None else length)
            run = Run(first, period, length // period)
            if run.period * (run.repeats - 1) > best.period * (best.repeats - 1):
                best = run
    if best.period * (best.repeats - 1) < least:
        return (Run(start, len(kinds), 1),) if kinds else ()
    end = best.start + best.period * best.repeats
    return (
        *plan_runs(kinds[: best.start], LEAST_SAVED, start),
        best._replace(start=start + best.start),
        *plan_runs(kinds[end:], LEAST_SAVED, start + end),
    )


def _scan_kinds(
    step: Callable[..., Any],
    layers: nnx.Module,
    carry: Any,
    values: tuple[Array, ...],
    kinds: tuple[Hashable, ...],
    compute: Compute,
) -> Any:
    """`scan` of layers of several kinds."""
    stacked, build = part(layers)

    def run_layer(carry: Any, number: int | Int[Array, ""], kind: Hashable, in_loop: bool) -> Any:
        # picked inside what is rematerialised, else the backward pass keeps a copy
        def run(whole, carry):
            layer, *numbers = jax.tree.map(lambda x: _pick(x, number), whole)
            return step(build(layer), carry, *numbers, kind)

        return remat(run, compute, in_loop, _all_but_weights)((stacked, *values), carry)

    return _by_number(run_layer, carry, kinds, compute.unroll)


def _scan_in_place(
    step: Callable[..., Any],
    layers: InPlace,
    carry: Any,
    values: tuple[Array, ...],
    kinds: Sequence[Hashable] | None,
) -> Any:
    """`scan` of layers that are read where they lie, as they are: nothing is kept for gradients."""
    stacked, build = part(layers.layers)
    kinds = depth(layers) * ((),) if kinds is None else tuple((kind,) for kind in kinds)

    def run_layer(carry: Any, number: int | Int[Array, ""], kind: tuple, in_loop: bool) -> Any:
        if in_loop:  # tied to the loop, or bf16 weights are made float32 ahead of it, all of them
            whole, number = jax.lax.optimization_barrier((stacked, number))
        else:
            whole = stacked
        layer = build(jax.tree.map(lambda x: _pick(x, layers.start + number), whole))
        return step(layer, carry, *[_pick(value, number) for value in values], *kind)

    return _by_number(run_layer, carry, kinds, unroll=1)


def _by_number(
    run_layer: Callable[..., Any], carry: Any, kinds: tuple[Hashable, ...], unroll: int
) -> Any:
    """carry = run_layer(carry, l, kinds[l], in_loop) for each layer l, in loops over super-blocks.

    Args:
      unroll: layers of a step of a loop, in whole super-blocks; 0: all.
    """
    for start, period, repeats in plan_runs(kinds):
        offsets = range(start, start + period)
        if repeats == 1:
            for number in offsets:
                carry = run_layer(carry, number, kinds[number], in_loop=False)
            continue
        unrolled = min(-(-unroll // period) or repeats, repeats)

        def super_block(carry, first, offsets=offsets, in_loop=unrolled < repeats):
            for number in offsets:
                carry = run_layer(carry, first + number, kinds[number], in_loop)
            return carry, None

        firsts = jnp.arange(0, period * repeats, period)
        carry, _ = jax.lax.scan(super_block, carry, firsts, unroll=unrolled)
    return carry


def _pick(x: Array, number: int | Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)


def _all_but_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy that keeps what autodiff would, but for what `_pick` gives."""
    return primitive.name not in ("dynamic_slice", "squeeze")
