"""Parameter-efficient fine-tuning: a method is put around chosen linear layers and trained alone.

A method is three functions of one layer (`init`, `forward`, `merge`) with its settings in a frozen
dataclass; `inject` wraps every targeted layer of a stack at once. Training is then
`nnx.split(model, AdapterParam, ...)`. The one thing a reader would get wrong: the wrapped model
shares the base model's arrays, nothing is copied, and the base's own step of training is what
`split` leaves out.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam

Targets = str | tuple[str, ...] | list[str]


@runtime_checkable
class Method(Protocol):
    """An adapter method: its settings, and three functions of one layer."""

    targets: Targets

    def resolve(self, names: Sequence[str]) -> "Method":
        """The settings for one layer, which goes by `names`."""
        ...

    def init(self, base: Einsum, rngs: nnx.Rngs) -> Mapping[str, Array]:
        """Parameters by name, such that `forward` equals the base."""
        ...

    def forward(self, params: Mapping[str, Array], base: Einsum, x: Array) -> Array: ...

    def merge(self, params: Mapping[str, Array], base: Einsum) -> Array:
        """The base's weight with the adapter in it, in float32."""
        ...


class Adapted(nnx.Module):
    """A linear layer and the adapter around it, whose parameters are attributes."""

    def __init__(self, base: Einsum, method: Method, params: Mapping[str, Array]):
        self.base, self.method, self.names = base, method, tuple(params)
        for name, value in params.items():
            setattr(self, name, AdapterParam(value))

    def params(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in self.names}

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.method.forward(self.params(), self.base, x)


def inject(model: nnx.Module, method: Method, seed: int = 0) -> nnx.Module:
    """A model with `method` around its targeted layers; the given model is unchanged.

    Targets are "all-linear" (every linear layer but the output head), names, or one regex for whole
    paths. A name is ours ("attn.q") or Hugging Face's ("q_proj"), matched as PEFT does: the path
    equals it or ends with "." and it.

    Raises:
      ValueError: a target matches no layer, or a rank exceeds a layer's dimensions.
    """
    layers = linear_layers(model)
    _check_targets(method.targets, layers)
    chosen = {path for path in layers if matches(method.targets, layers[path])}
    rngs = nnx.Rngs(seed)
    methods = {path: method.resolve(layers[path]) for path in sorted(chosen)}
    keys = {path: rngs.params() for path in sorted(layers)}  # so another target changes no other

    def wrap(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        if not isinstance(node, Einsum) or name not in methods:
            return node
        return Adapted(node, methods[name], _init(methods[name], node, keys[name]))

    return nnx.recursive_map(wrap, model)


def _init(method: Method, base: Einsum, key: jax.Array) -> Mapping[str, Array]:
    """The parameters of one layer, or with a leading axis those of a stack of layers."""

    def one(base: Einsum, key: jax.Array) -> dict[str, Array]:
        return dict(method.init(base, nnx.Rngs(key)))

    num_layers = stacked(base)
    if num_layers is None:
        return one(base, key)
    return jax.vmap(one)(base, jax.random.split(key, num_layers))


def stacked(base: Einsum) -> int | None:
    """How many layers' weights a linear layer holds, None for one layer."""
    return base.w.shape[0] if len(base.w.shape) > len(base.axes) else None


def bases(model: nnx.Module) -> dict[str, Einsum]:
    """A model's linear layers by path; an adapted one by the path that its adapter took."""
    found: dict[str, Einsum] = {}

    def visit(path: tuple, node: Any) -> Any:
        if isinstance(node, Einsum):
            found[".".join(map(str, path)).removesuffix(".base")] = node
        return node

    nnx.recursive_map(visit, model)
    return found


def methods(model: nnx.Module) -> dict[str, Method]:
    """The adapters' methods by the path of the layer that they are around."""
    found: dict[str, Method] = {}

    def visit(path: tuple, node: Any) -> Any:
        if isinstance(node, Adapted):
            found[".".join(map(str, path))] = node.method
        return node

    nnx.recursive_map(visit, model)
    return found


def linear_layers(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Paths of a model's linear layers, with their names: ours, and Hugging Face's if known."""
    table = getattr(model, "weights", {})
    theirs = {path: table.get(weight_name(path), ("",))[0] for path in bases(model)}
    theirs = {path: name.removesuffix(".weight") for path, name in theirs.items()}
    return {path: (path, name) if name else (path,) for path, name in theirs.items()}


def weight_name(path: str) -> str:
    """The weight table's name of a layer's weight; the numbers of layers in a list are left out."""
    return ".".join([part for part in path.split(".") if not part.isdigit()] + ["w"])


def matches(targets: Targets, names: Sequence[str]) -> bool:
    """Whether a layer that goes by `names` is targeted, by PEFT's rules."""
    if targets == "all-linear":
        return True
    # `{l}` stands for every layer's number
    names = [name.replace("{l}", "0") for name in names]
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == t or name.endswith(f".{t}") for name in names for t in targets)


def _check_targets(targets: Targets, layers: Mapping[str, Sequence[str]]) -> None:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"target {targets!r} is no regex: {error}") from error
    each = [targets] if isinstance(targets, str) else [(target,) for target in targets]
    for target in each:
        if any(matches(target, names) for names in layers.values()):
            continue
        known = sorted({name.rsplit(".", 1)[-1] for names in layers.values() for name in names})
        text = target if isinstance(target, str) else target[0]
        near = difflib.get_close_matches(text, known, n=3, cutoff=0.3) or known
        raise ValueError(f"target {text!r} matches no linear layer; near names: {', '.join(near)}")
    if not each:
        raise ValueError('no targets given; "all-linear" takes every linear layer')


def _map_adapted(model: nnx.Module, change: Callable[[Adapted], Any]) -> nnx.Module:
    return nnx.recursive_map(
        lambda _, node: change(node) if isinstance(node, Adapted) else node, model
    )


def is_adapted(model: nnx.Module) -> bool:
    """Whether a model has adapters."""
    return bool(jax.tree.leaves(nnx.state(model, AdapterParam)))


def split(model: nnx.Module) -> tuple[nnx.State, nnx.State]:
    """(trainable, frozen): the adapters' parameters, and all others."""
    return nnx.state(model, AdapterParam, ...)


def strip(model: nnx.Module) -> nnx.Module:
    """The base model, without its adapters."""
    return _map_adapted(model, lambda adapted: adapted.base)


def merge(model: nnx.Module) -> nnx.Module:
    """A plain model whose weights hold what the adapters added; computed in float32."""

    def merged(adapted: Adapted) -> Einsum:
        base, params = adapted.base, adapted.params()
        one = functools.partial(_merge_one, adapted.method)
        w = one(base, params) if stacked(base) is None else jax.vmap(one)(base, params)
        graph, state = nnx.split(base)
        state["w"] = state["w"].replace(w.astype(base.w.dtype))
        return nnx.merge(graph, state)

    return _map_adapted(model, merged)


def _merge_one(method: Method, base: Einsum, params: Mapping[str, Array]) -> Array:
    return method.merge(params, base)


@dataclasses.dataclass(frozen=True)
class Count:
    """Sizes of a model with adapters: parameters and bytes."""

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / max(self.trainable + self.frozen, 1)


def count(model: nnx.Module) -> Count:
    """Counts parameters; an abstract model will do."""
    sizes = []
    for state in split(model):
        leaves = jax.tree.leaves(state)
        numbers = [int(np.prod(leaf.shape)) for leaf in leaves]
        sizes.append((sum(numbers), sum(n * x.dtype.itemsize for n, x in zip(numbers, leaves))))  # noqa: B905
    return Count(sizes[0][0], sizes[1][0], sizes[0][1], sizes[1][1])
