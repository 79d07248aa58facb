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

from llmprep_jax.nn.linear import Einsum, Embed
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.nn.param import AdapterParam, Buffer, Shared
from llmprep_jax.peft import biases
from llmprep_jax.peft.experts import each_expert, experts, letters, num_experts
from llmprep_jax.peft.targets import (
    Names,
    Number,
    Targets,
    bases,
    check_keys,
    is_table,
    linear_layers,
    modules,
    select,
    stacked,
    words,
)
from llmprep_jax.peft.tied import refuse_head
from llmprep_jax.peft.tuned import Tuned, choose, tune
from llmprep_jax.quant.linear import QuantEinsum, find_layers
from llmprep_jax.sharding import has_mesh, on_own_mesh, sharding_of, spec
from llmprep_jax.types import Array, Float

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer's inputs and outputs are laid out, as einops writes it: "(n h)" and "n h".

    Attributes:
      their_ins, their_outs: the columns and rows of Hugging Face's matrix.
      ins, outs: our dimensions.
      is_embedding: whether PEFT's names are those of an embedding.
    """

    their_ins: str
    their_outs: str
    ins: str
    outs: str

    is_embedding: bool = False

    @classmethod
    def of_layer(cls, base: Einsum, pattern: str) -> "Layout | None":
        """That of a layer; an embedding, [V, D] with us and with them, takes V and gives D."""
        layout = cls.of(pattern)
        if not isinstance(base, Embed):
            return layout
        theirs, ours = (layout.their_outs, layout.their_ins), (layout.outs, layout.ins)
        return cls(*theirs, *ours, is_embedding=True)

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

    def forward(self, params: Params, base: Einsum, x: Array) -> Array:
        """The layer's result; a method with `dropout` takes the inputs after it as well."""
        ...

    def merge(self, params: Params, base: Einsum) -> Array:
        """The base's weight with the adapter in it, in float32."""
        ...


class Adapted(nnx.Module):
    """A linear layer and the adapter around it, whose parameters are attributes.

    `shared` are arrays that all layers of the model see, and that are not trained.
    """

    is_by_row = False

    def __init__(self, base: Einsum, method: Method, params: Params, shared: Params | None = None):
        shared = shared or {}
        self.base, self.method, self.names = base, method, (*params, *shared)
        self.key: Buffer | None = None  # `train_mode` gives one to a layer that drops inputs
        for name, value in params.items():
            is_frozen = name in getattr(method, "frozen", ())
            setattr(self, name, Buffer(value) if is_frozen else AdapterParam(value))
        for name, value in shared.items():
            setattr(self, name, Shared(value))

    def params(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in self.names}

    def own(self) -> dict[str, Array]:
        """Of `params`, those of this layer alone."""
        of = {name: getattr(self, name) for name in self.names}
        return {name: x[...] for name, x in of.items() if not isinstance(x, Shared)}

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, of a tied embedding."""
        return self.method.unembed(self.params(), self.base, x_BTD)

    @property
    def table_dtype(self) -> jnp.dtype:
        """dtype of an embedding's table."""
        return self.base.table_dtype

    def __call__(self, x: Array) -> Float[Array, "..."]:
        everything, x = self.params(), jnp.asarray(x)
        dropped = [] if self.key is None else [drop(x, self.method.dropout, self.key[...])]

        def forward(base: Einsum, own: Params, *inputs: Array) -> Array:
            return self.method.forward(everything | own, base, *inputs)

        x_dims, _, y_dims = letters(self.base)
        dims = ("", x_dims, *[x_dims] * len(dropped))
        return each_expert(forward, self.base, self.own(), x, *dropped, dims=dims, result=y_dims)

    def weight(self) -> Float[Array, "..."]:
        """The weight with the adapter in it, in operands' dtype; for layers used by their weight.

        Raises:
          ValueError: the adapter drops inputs, which no weight does.
        """
        if self.key is not None:
            raise ValueError(
                f"an adapter of {self.base.eqn} has dropout={self.method.dropout}, but the layer is"
                " used by its weight and sees no inputs; leave dropout at 0 there"
            )
        return self.merged()[0].astype(self.base.dtype)

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

    def map(self, of: Callable[[Params, Einsum], Any], result: str = "") -> Any:
        """`of` the layer, or of each layer of a stack and each expert; `result`: its dimensions."""
        everything = self.params()

        def one(base: Einsum, own: Params) -> Any:
            return of(everything | own, base)

        def layer(own: Params, base: Einsum) -> Any:
            return each_expert(one, base, own, dims=("",), result=result)

        each = layer if stacked(self.base) is None else jax.vmap(layer)
        return each(self.own(), self.base)

    def widened(self) -> "Adapted":
        """The adapter on the whole weight; itself, if it takes no part out of it."""
        method = self.method
        if not getattr(method, "frozen", ()):
            return self
        return Adapted(self.base, method.wide, self.map(lambda own, _: method.widen(own)))


def drop(x: Float[Array, "..."], rate: float, key: jax.Array) -> Float[Array, "..."]:
    """Dropout: a share `rate` of the values is 0, the others are divided by 1 - rate."""
    kept = jax.random.uniform(key, x.shape, out_sharding=sharding_of(x)) >= rate
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


def with_weights(base: Einsum, weight: Array, bias: Array | None) -> Einsum:
    """The layer with another weight and bias, in the dtypes of this one's."""
    plain = base.with_weight(weight)
    if bias is None:
        return plain
    graph, state = nnx.split(plain)
    state["b"] = state["b"].replace(bias.astype(base.b.dtype))
    return nnx.merge(graph, state)


@on_own_mesh
def inject(model: nnx.Module, method: Method, seed: int = 0) -> nnx.Module:
    """A model with `method` around its targeted layers; the given model is unchanged.

    Targets are "all-linear" (every linear layer but the output head), names, or one regex for whole
    paths. A name is ours ("attn.q") or Hugging Face's ("q_proj"), matched as PEFT does: the path
    equals it or ends with "." and it. Routed experts and multi-token prediction modules, which PEFT
    does not see, are taken by targets alone that say "experts" or "mtp".

    Raises:
      ValueError: a target matches no layer, a rank exceeds a layer's dimensions, or the model has
        adapters.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters already; inject into lp.peft.strip(model)")
    if hasattr(method, "prepare"):
        model = method.prepare(model)
    layers, of_model = linear_layers(model), bases(model)
    tables = [path for path in layers if is_table(of_model[path])]
    refuse_head(model, method.targets)
    linear = {path: layers[path] for path in layers if path not in tables}
    offered = linear if method.targets == "all-linear" else layers
    taken = select(method.targets, offered, needed=words(model))
    chosen = {path: layers[path] for path in taken}
    for label in ("rank_pattern", "alpha_pattern"):
        check_keys(label, getattr(method, label, ()), chosen)
    whole = choose(model, getattr(method, "modules_to_save", ()))
    if chosen.keys() & set(whole):
        both = min(chosen.keys() & set(whole))
        raise ValueError(f"{both} is a target and in modules_to_save; leave it in one of them")
    refuse_embedding(method, {path: of_model[path] for path in chosen})
    _refuse_dropout(method, {path: of_model[path] for path in chosen})
    methods = {path: _resolve(method, path, names) for path, names in chosen.items()}
    rngs = nnx.Rngs(seed)
    # so another target changes no other
    keys = {path: rngs.params() for path in (*sorted(linear), *sorted(tables))}
    found = {path: base for path, base in of_model.items() if path in methods}
    # one program: op by op this takes seconds
    params = _init(tuple(methods.items()), found, {path: keys[path] for path in methods})
    shared = {}
    if hasattr(method, "draw_shared"):
        shared = place_shared(method.draw_shared(found.values()))
    which, dtype = getattr(method, "bias", "none"), getattr(method, "dtype", "float32")
    adapted = {path: theirs.keys() for path, theirs in modules(model).items() if path in methods}
    trained = biases.names_of(model, which, adapted, whole)
    if which != "none" and not trained:
        raise ValueError(f'bias is {which!r}, but no layer that it means has one; leave it "none"')
    model = tune(wrap(model, methods, params, shared), whole, dtype)
    return biases.free(model, trained, dtype)


def place_shared(arrays: Mapping[str, np.ndarray]) -> Params:
    """What all layers share, one array for all of them, whole on every device."""
    place = spec(None, None) if has_mesh() else None
    return {
        name: jnp.asarray(x) if place is None else jax.device_put(x, place)
        for name, x in arrays.items()
    }


def refuse_embedding(method: Method, layers: Mapping[str, Einsum]) -> None:
    """Refuses embeddings as targets of a method that is of linear layers."""
    for path, base in layers.items():
        if isinstance(base, Embed) and not getattr(method, "adapts_embeddings", False):
            raise ValueError(
                f"{type(method).__name__} does not adapt {path}, an embedding; use LoRA, or train"
                " it whole (modules_to_save)"
            )


def _refuse_dropout(method: Method, layers: Mapping[str, Einsum]) -> None:
    """Refuses dropout around experts, which are used by their weights (and in PEFT too)."""
    dropout = getattr(method, "dropout", 0)
    for path, base in layers.items():
        if dropout and isinstance(base, ExpertWeights):
            raise ValueError(
                f"dropout is {dropout}, but {path} holds routed experts, which are used by their"
                " weights; set it to 0, or leave them out"
            )


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
    return find_layers(model, lambda node: isinstance(node, Adapted))


def is_adapted(model: nnx.Module) -> bool:
    """Whether a model has adapters."""
    return bool(jax.tree.leaves(nnx.state(model, AdapterParam)))


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): the adapters' parameters, and all others."""
    return nnx.state(model, AdapterParam, ...)


@on_own_mesh
def strip(model: nnx.Module) -> nnx.Module:
    """The base model, without its adapters."""
    return map_adapted(model, lambda each: each.base, lambda each: each.base, trained=False)


@on_own_mesh
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

    def merged(adapted: Adapted) -> Einsum:
        return with_weights(adapted.base, *adapted.merged(weights))

    return map_adapted(model, merged, Tuned.merged, trained=True)


def widen(model: nnx.Module) -> nnx.Module:
    """The model with adapters on whole weights in place of those that take a part out of them."""

    return map_adapted(model, Adapted.widened)


def map_adapted(
    model: nnx.Module,
    change: Callable[[Adapted], Any],
    change_whole: Callable[[Tuned], Any] | None = None,
    *,
    trained: bool | None = None,
) -> nnx.Module:
    """The model with its adapters changed.

    Args:
      change_whole: what becomes of modules that are trained whole; None: they stay.
      trained: whether biases become what they were trained to be, or what they were; None: neither.
    """

    def visit(_: tuple, node: Any) -> Any:
        if isinstance(node, Einsum) and trained is not None:  # before the adapter around it
            return biases.settle(node, trained=trained)
        if isinstance(node, Tuned) and change_whole is not None:
            return change_whole(node)
        return change(node) if isinstance(node, Adapted) else node

    return nnx.recursive_map(visit, model)


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
