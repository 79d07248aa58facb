"""Parameter-efficient fine-tuning: a method is put around chosen linear layers and trained alone.

A method is three functions of one layer (`init`, `forward`, `merge`) with its settings in a frozen
dataclass; `inject` wraps every targeted layer of a stack at once. Training is then
`nnx.split(model, AdapterParam, ...)`. The one thing a reader would get wrong: the wrapped model
shares the base model's arrays, nothing is copied, and the base's own step of training is what
`split` leaves out.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Shared
from llmprep_jax.peft.experts import each_expert, experts, letters, num_experts
from llmprep_jax.peft.targets import (
    Names,
    Number,
    Targets,
    bases,
    check_keys,
    linear_layers,
    select,
    stacked,
)
from llmprep_jax.quant.linear import QuantEinsum
from llmprep_jax.sharding import has_mesh, spec

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer's inputs and outputs are laid out, as einops writes it: "(n h)" and "n h".

    Attributes:
      their_ins, their_outs: the columns and rows of Hugging Face's matrix.
      ins, outs: our dimensions.
    """

    their_ins: str
    their_outs: str
    ins: str
    outs: str

    @classmethod
    def of(cls, pattern: str) -> "Layout | None":
        """That of a weight table's pattern, "(n h) d -> d n h"; None for what is no matrix."""
        theirs, ours = (side.strip() for side in pattern.split("->"))
        groups = re.findall(r"\([^)]*\)|\S+", theirs)
        if len(groups) != 2:
            return None
        outs, ins = (group.strip("()").split() for group in groups)
        ordered = [" ".join(dim for dim in ours.split() if dim in side) for side in (ins, outs)]
        return cls(groups[1], groups[0], *ordered)


@runtime_checkable
class Method(Protocol):
    """An adapter method: its settings, and three functions of one layer.

    One whose layers share arrays has `shared`, `shared_shapes` and `draw_shared` too, as VeRA does.
    """

    targets: Targets

    def tensors(self, layout: Layout) -> Mapping[str, tuple[str, str]]:
        """PEFT's name of each parameter and einops pattern theirs -> ours, for one layer."""
        ...

    def resolve(self, names: Sequence[str]) -> "Method":
        """The settings for one layer, which goes by `names`; without targets and patterns."""
        ...

    def init(self, base: Einsum, rngs: nnx.Rngs) -> Params:
        """Parameters by name, such that `forward` equals the base."""
        ...

    def forward(self, params: Params, base: Einsum, x: Array) -> Array: ...

    def merge(self, params: Params, base: Einsum) -> Array:
        """The base's weight with the adapter in it, in float32."""
        ...


class Adapted(nnx.Module):
    """A linear layer and the adapter around it, whose parameters are attributes.

    `shared` are arrays that all layers of the model see, and that are not trained.
    """

    def __init__(self, base: Einsum, method: Method, params: Params, shared: Params | None = None):
        shared = shared or {}
        self.base, self.method, self.names = base, method, (*params, *shared)
        for name, value in params.items():
            setattr(self, name, AdapterParam(value))
        for name, value in shared.items():
            setattr(self, name, Shared(value))

    def params(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in self.names}

    def own(self) -> dict[str, Array]:
        """Of `params`, those of this layer alone."""
        of = {name: getattr(self, name) for name in self.names}
        return {name: x[...] for name, x in of.items() if not isinstance(x, Shared)}

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        everything = self.params()
        forward = lambda base, own, x: self.method.forward(everything | own, base, x)  # noqa: E731
        x_dims, _, y_dims = letters(self.base)
        return each_expert(forward, self.base, self.own(), x, dims=("", x_dims), result=y_dims)

    def merged(self, weights: Mapping[str, Number] | None = None) -> tuple[Array, Array | None]:
        """(weight in float32, bias) with the adapter in them; `weights` are for several adapters.

        Raises:
          ValueError: there are weights.
        """
        if weights is not None:
            raise ValueError(
                "the model holds one adapter, without a name, and takes no weights; put several on"
                " it by lp.peft.combine"
            )
        _, w_dims, y_dims = letters(self.base)
        b_dims = "".join(dim for dim in w_dims if dim in y_dims)
        bias = None if self.base.b is None else self.base.b[...]
        if bias is not None and hasattr(self.method, "merge_bias"):
            bias = self.map(self.method.merge_bias, b_dims)
        return self.map(self.method.merge, w_dims), bias

    def map(self, of: Callable[[Params, Einsum], Array], result: str = "") -> Array:
        """`of` the layer, or of each layer of a stack and each expert; `result`: its dimensions."""
        everything = self.params()

        def one(base: Einsum, own: Params) -> Array:
            return of(everything | own, base)

        def layer(own: Params, base: Einsum) -> Array:
            return each_expert(one, base, own, dims=("",), result=result)

        each = layer if stacked(self.base) is None else jax.vmap(layer)
        return each(self.own(), self.base)


def with_weights(base: Einsum, weight: Array, bias: Array | None) -> Einsum:
    """The layer with another weight and bias, in the dtypes of this one's."""
    plain = base.with_weight(weight)
    if bias is None:
        return plain
    graph, state = nnx.split(plain)
    state["b"] = state["b"].replace(bias.astype(base.b.dtype))
    return nnx.merge(graph, state)


def inject(model: nnx.Module, method: Method, seed: int = 0) -> nnx.Module:
    """A model with `method` around its targeted layers; the given model is unchanged.

    Targets are "all-linear" (every linear layer but the output head), names, or one regex for whole
    paths. A name is ours ("attn.q") or Hugging Face's ("q_proj"), matched as PEFT does: the path
    equals it or ends with "." and it.

    Raises:
      ValueError: a target matches no layer, a rank exceeds a layer's dimensions, or the model has
        adapters.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already; inject into lp.peft.strip(model)")
    layers = linear_layers(model)
    chosen = {path: layers[path] for path in select(method.targets, layers)}
    for label in ("rank_pattern", "alpha_pattern"):
        check_keys(label, getattr(method, label, ()), chosen)
    methods = {path: _resolve(method, path, names) for path, names in chosen.items()}
    rngs = nnx.Rngs(seed)
    keys = {path: rngs.params() for path in sorted(layers)}  # so another target changes no other
    found = {path: base for path, base in bases(model).items() if path in methods}
    # one program: op by op this takes seconds
    params = _init(tuple(methods.items()), found, {path: keys[path] for path in methods})
    shared = {}
    if hasattr(method, "draw_shared"):
        shared = place_shared(method.draw_shared(found.values()))
    return wrap(model, methods, params, shared)


def place_shared(arrays: Mapping[str, np.ndarray]) -> Params:
    """What all layers share, one array for all of them, whole on every device."""
    place = spec(None, None) if has_mesh() else None
    return {
        name: jnp.asarray(x) if place is None else jax.device_put(x, place)
        for name, x in arrays.items()
    }


def _resolve(method: Method, path: str, layers: Sequence[Names]) -> Method:
    """The one method that all layers of a path have."""
    one, *others = dict.fromkeys(method.resolve(names) for names in layers)
    if others:
        raise ValueError(
            f"rank_pattern or alpha_pattern sets layers of the stack {path} apart; give all of them"
            " one value, or unstack(model.layers) first"
        )
    return one


@functools.partial(jax.jit, static_argnums=0)
def _init(
    methods: tuple[tuple[str, Method], ...],
    bases: Mapping[str, Einsum],
    keys: Mapping[str, jax.Array],
) -> dict[str, Params]:
    return {path: _init_layers(path, method, bases[path], keys[path]) for path, method in methods}


def init_layer(method: Method, base: Einsum, key: jax.Array) -> dict[str, Array]:
    """The parameters of one layer, or of each of its experts."""
    init = lambda base, key: dict(method.init(base, nnx.Rngs(key)))  # noqa: E731
    key = jax.random.split(key, num_experts(base)) if experts(base) else key
    return each_expert(init, base, key, dims=("",))


def _init_layers(path: str, method: Method, base: Einsum, key: jax.Array) -> Params:
    """The parameters of one layer, or with a leading axis those of a stack of layers."""

    def one(base: Einsum, key: jax.Array) -> dict[str, Array]:
        return init_layer(method, base, key)

    try:
        if stacked(base) is None:
            return one(base, key)
        return jax.vmap(one)(base, jax.random.split(key, stacked(base)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def wrap(
    model: nnx.Module,
    methods: Mapping[str, Method],
    params: Mapping[str, Params],
    shared: Params | None = None,
) -> nnx.Module:
    """A model with adapters of these methods and parameters, by path; `shared` is for all."""

    def visit(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        if not isinstance(node, Einsum) or name not in methods:
            return node
        return Adapted(node, methods[name], params[name], shared)

    return nnx.recursive_map(visit, model)


def methods(model: nnx.Module) -> dict[str, Method]:
    """The adapters' methods by the path of the layer that they are around."""
    return {path: adapted.method for path, adapted in adapters(model).items()}


def adapters(model: nnx.Module) -> dict[str, Adapted]:
    """The adapted layers by path."""
    found: dict[str, Adapted] = {}

    def visit(path: tuple, node: Any) -> Any:
        if isinstance(node, Adapted):
            found[".".join(map(str, path))] = node
        return node

    nnx.recursive_map(visit, model)
    return found


def is_adapted(model: nnx.Module) -> bool:
    """Whether a model has adapters."""
    return bool(jax.tree.leaves(nnx.state(model, AdapterParam)))


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): the adapters' parameters, and all others."""
    return nnx.state(model, AdapterParam, ...)


def strip(model: nnx.Module) -> nnx.Module:
    """The base model, without its adapters."""
    return map_adapted(model, lambda adapted: adapted.base)


def merge(model: nnx.Module, weights: Mapping[str, Number] | None = None) -> nnx.Module:
    """A plain model whose weights hold what the adapters added; computed in float32.

    Adapted layers on packed weights (`quant`) become dense, in the dtype they had before, with a
    warning; packing them again would round what the adapter added.

    Args:
      weights: of several adapters (see `combine`), by name: base + sum of w (merged - base), those
        without a weight left out.

    Raises:
      ValueError: the model holds several adapters and there are no weights, or the other way.
    """
    found = adapters(model)
    if weights is not None and not found:
        raise ValueError("the model has no adapters that weights could be for")
    packed = [path for path, each in found.items() if isinstance(each.base, QuantEinsum)]
    if packed:
        warnings.warn(
            f"merging makes {len(packed)} packed layers dense, among them {packed[0]}; keep the"
            " adapters apart (lp.peft.save) to keep the weights packed",
            stacklevel=2,
        )
    return map_adapted(model, lambda each: with_weights(each.base, *each.merged(weights)))


def map_adapted(model: nnx.Module, change: Callable[[Adapted], Any]) -> nnx.Module:
    """The model with its adapted layers changed."""
    return nnx.recursive_map(
        lambda _, node: change(node) if isinstance(node, Adapted) else node, model
    )


def dims(base: Einsum) -> tuple[str, str, str, str]:
    """(activation, weight's inputs, weight's outputs, result) of a layer's einsum, as letters.

    Letters of experts are neither inputs nor outputs.
    """
    x_dims, w_dims, y_dims = letters(base)
    ins = "".join(dim for dim in w_dims if dim not in y_dims)
    outs = "".join(dim for dim in w_dims if dim not in x_dims)
    return x_dims, ins, outs, y_dims


def shape_of(base: Einsum) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One layer's (input, output) sizes, unmerged; of one expert where there are many."""
    return _sides(base, base.layer_shape)


def axes_of(base: Einsum) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The logical axes of a layer's (inputs, outputs)."""
    return _sides(base, base.axes)


def _sides(base: Einsum, values: tuple) -> tuple[tuple, tuple]:
    """What belongs to the (inputs, outputs), of values of the weight's dimensions."""
    _, ins, outs, _ = dims(base)
    of = dict(zip(letters(base)[1], values, strict=True))
    return tuple(of[dim] for dim in ins), tuple(of[dim] for dim in outs)
