"""Parameter-efficient fine-tuning: a method is put around chosen linear layers and trained alone.

A method (`method.py`) is three functions of one layer with its settings in a frozen dataclass;
`inject` (`injection.py`) wraps every targeted layer of a stack at once. Training is then
`nnx.split(model, AdapterParam, ...)`. The wrapped model shares the arrays of its base; only what is
trained whole is copied.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.base_model import without_source
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Buffer, Shared
from llmprep_jax.nn.settle import Settling
from llmprep_jax.peft import biases
from llmprep_jax.peft.experts import each_expert, letters
from llmprep_jax.peft.method import Method, Params
from llmprep_jax.peft.targets import Number, Place, modules, stacked
from llmprep_jax.peft.tokens import TokenRows
from llmprep_jax.peft.tuned import Tuned
from llmprep_jax.quant.linear import QuantEinsum, find_layers
from llmprep_jax.sharding import on_own_mesh, sharding_of
from llmprep_jax.types import Array, Float


class Adapted(Settling):
    """A linear layer and the adapter around it, whose parameters are attributes.

    Args:
      shared: arrays that all layers of the model see, and that are not trained.
      kept: numbers of a stack's only layers that are adapted, None for all; the parameters of the
        others are zeros, which is the identity and gets no gradient.
    """

    is_by_row = False

    def __init__(
        self,
        base: Einsum,
        method: Method,
        params: Params,
        shared: Params | None = None,
        kept: tuple[int, ...] | None = None,
    ):
        shared = shared or {}
        self.base, self.method, self.names = base, method, (*sorted(params), *shared)
        self.kept = kept
        self.key: Buffer | None = None  # `train_mode` gives one to a layer that drops inputs
        for name, value in params.items():
            setattr(self, name, (Buffer if name in method.frozen else AdapterParam)(value))
        for name, value in shared.items():
            setattr(self, name, Shared(value))

    @property
    def left_out(self) -> tuple[int, ...]:
        """Numbers of the stack's layers that are not adapted."""
        layers = range(stacked(self.base) or 0)
        return tuple(n for n in layers if self.kept is not None and n not in self.kept)

    def params(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in self.names}

    def own(self) -> dict[str, Array]:
        """Of `params`, those of this layer alone."""
        variables = {name: getattr(self, name) for name in self.names}
        return {name: x[...] for name, x in variables.items() if not isinstance(x, Shared)}

    def owned(self) -> dict[str, "Adapted"]:
        """The adapters that the parameters belong to, by the path from here to them."""
        return {"": self}

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

    def check_weights(self, weights: Mapping[str, Number] | None) -> None:
        """Refuses weights, which are for several adapters.

        Raises:
          ValueError: there are weights.
        """
        if weights is not None:
            raise ValueError(
                "the model holds one adapter, without a name, and takes no weights; put several on"
                " it by lp.peft.combine"
            )

    def merged(self, weights: Mapping[str, Any] | None = None) -> tuple[Array, Array | None]:
        """(weight in float32, bias) with the adapter in them.

        Args:
          weights: of several adapters, numbers or arrays, which `check_weights` has let pass.
        """
        _, w_dims, y_dims = letters(self.base)
        b_dims = "".join(dim for dim in w_dims if dim in y_dims)
        bias = None if self.base.b is None else self.base.b[...]
        if bias is not None:
            bias = self.map(self.method.merge_bias, b_dims)
        return self.map(self.method.merge, w_dims), bias

    def map(self, function: Callable[[Params, Einsum], Any], result: str = "") -> Any:
        """A function of the layer, or of each layer of a stack and each expert.

        Args:
          result: the dimensions of what it gives.
        """
        everything = self.params()

        def one(base: Einsum, own: Params) -> Any:
            return function(everything | own, base)

        def layer(own: Params, base: Einsum) -> Any:
            return each_expert(one, base, own, dims=("",), result=result)

        run = layer if stacked(self.base) is None else jax.vmap(layer)
        return run(self.own(), self.base)

    def settled(self) -> "Adapted":
        """The layer with what follows from its parameters beside them, while these stand still."""
        more = _settle(self)
        if not more:
            return self
        changed = nnx.merge(*nnx.split(self))
        changed.names = (*self.names, *more)
        for name, value in more.items():
            setattr(changed, name, Buffer(value))
        return changed

    def widened(self) -> "Adapted":
        """The adapter on the whole weight; itself, if it takes no part out of it."""
        method = self.method
        if not method.takes_part:
            return self
        params = self.map(lambda own, _: method.widen(own))
        return Adapted(self.base, method.wide, params, kept=self.kept)


@jax.jit
def _settle(adapted: Adapted) -> Params:
    return adapted.map(lambda params, base: dict(adapted.method.settled(params, base)))


def drop(x: Float[Array, "..."], rate: Any, key: jax.Array) -> Float[Array, "..."]:
    """Dropout: a share `rate` (which may differ from row to row) of the values is 0, the others are
    divided by 1 - rate.
    """
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


def wrap(
    model: nnx.Module,
    methods: Mapping[str, Method],
    params: Mapping[str, Params],
    shared: Params | None = None,
    kept: Mapping[str, tuple[int, ...]] | None = None,
) -> nnx.Module:
    """A model with adapters of these methods and parameters, by path; `shared` is for all.

    Args:
      kept: as of `Adapted`, by the paths of stacks of which it is not all layers.
    """
    kept = kept or {}

    def visit(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        if not isinstance(node, Einsum) or name not in methods:
            return node
        return Adapted(node, methods[name], params[name], shared, kept.get(name))

    return nnx.recursive_map(visit, model)


def methods(model: nnx.Module) -> dict[str, Method]:
    """The adapters' methods by the path of the layer that they are around."""
    return {path: adapted.method for path, adapted in adapters(model).items()}


def adapted_modules(model: nnx.Module) -> dict[str, dict[Place, str]]:
    """Hugging Face's module names of the adapted layers, those of stacks left out."""
    layers, of_model = adapters(model), modules(model)
    return {
        path: {at: name for at, name in of_model[path].items() if at[:1] not in gaps}
        for path, adapted in layers.items()
        if path in of_model
        for gaps in [{(number,) for number in adapted.left_out}]
    }


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
    return map_adapted(model, lambda part: part.base, lambda part: part.base, trained=False)


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
    layers = adapters(model)
    if weights is not None and not layers:
        raise ValueError("the model has no adapters that weights could be for")
    packed = [path for path, layer in layers.items() if isinstance(layer.base, QuantEinsum)]
    if packed:
        warnings.warn(
            f"merging makes {len(packed)} packed layers dense, among them {packed[0]}; keep the"
            " adapters apart (lp.peft.save) to keep the weights packed",
            stacklevel=2,
        )

    def merged(adapted: Adapted) -> Einsum:
        adapted.check_weights(weights)
        return _merged(adapted, weights)

    # whoever adapts it anew does not adapt what was loaded
    return without_source(map_adapted(model, merged, lambda layer: layer.merged(), trained=True))


@jax.jit  # a program a layer: op by op a first merge compiles a hundred
def _merged(adapted: Adapted, weights: Mapping[str, Any] | None) -> Einsum:
    return with_weights(adapted.base, *adapted.merged(weights))


def widen(model: nnx.Module) -> nnx.Module:
    """The model with adapters on whole weights in place of those that take a part out of them."""

    return map_adapted(model, Adapted.widened)


def map_adapted(
    model: nnx.Module,
    change: Callable[[Adapted], Any],
    change_whole: Callable[[Tuned | TokenRows], Any] | None = None,
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
        if isinstance(node, (Tuned, TokenRows)) and change_whole is not None:
            return change_whole(node)
        return change(node) if isinstance(node, Adapted) else node

    return nnx.recursive_map(visit, model)
