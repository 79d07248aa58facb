"""Linear layers on packed weights, and a model's dense layers turned into them and back.

A `QuantEinsum` is an `Einsum` whose weight is a packed matrix [O, I], outputs by inputs as Hugging
Face stores it, so that its bytes are those of the formats' own libraries; a `QuantExperts` has one
of each expert. Embeddings, norms and the head of a model stay as they are. The arrays are Buffers:
nothing of them is trained, and adapters go around as around any layer. On a mesh a device holds
some rows of each array (experts lie over the expert axis); a layer's are brought together, packed
as they are, where it multiplies. A stack of layers is one QuantEinsum whose arrays have a leading
axis, as an Einsum's weight has.
"""

import functools
import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import Einsum, contract
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.nn.param import Buffer, Compute, Idle, add_bias
from llmprep_jax.quant.kinds import check_kind, quantize
from llmprep_jax.quant.packed import Packed, dequantize, whole
from llmprep_jax.quant.product import multiply
from llmprep_jax.sharding import has_mesh, on_own_mesh, spec
from llmprep_jax.types import Array, Float


class QuantEinsum(Einsum):
    """y = einsum(eqn, x, w) + b on a packed w.

    Args:
      base: the layer, or stack of layers, whose weight `packed` stands for.
      packed: the weight; for a stack its arrays have a leading axis.
      dense_dtype: of the weight where it is made dense again.
    """

    is_packed = True
    plain: type[Einsum] = Einsum  # what it is without the packing

    def __init__(self, base: Einsum, packed: Packed, dense_dtype: str | jnp.dtype):
        self.eqn, self.axes, self.out_axes = base.eqn, base.axes, base.out_axes
        self.dtype, self.b, self.layer_shape = base.dtype, base.b, base.layer_shape
        self.dense_dtype = jnp.dtype(dense_dtype)
        self.format, self.settings = type(packed), packed.settings()
        self.names = tuple(packed.arrays())
        for name, value in packed.arrays().items():
            setattr(self, name, Buffer(value))

    @property
    def kind(self) -> str:
        """The format's name."""
        return dict(self.settings).get("kind") or self.format.kind

    @property
    def packed(self) -> Packed:
        """The weight as its format's dataclass."""
        arrays = {name: getattr(self, name)[...] for name in self.names}
        return self.format.of(self.settings, arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        codes = self.codes.shape  # not `packed`: an abstract weight has a shape too
        return (*codes[: len(codes) - self.format.CODES_NDIM], *self.layer_shape)

    @jax.jit
    def weight(self) -> Float[Array, "..."]:
        """The weight, dequantised, in float32; on a mesh laid out as a dense one is."""
        packed, to_weight = self.packed, functools.partial(from_matrix, self.eqn, self.layer_shape)
        if not has_mesh():
            return to_weight(dequantize(packed))

        def one(packed: Packed) -> Array:  # a layer, since every device has it whole for a moment
            w = to_weight(dequantize(whole(packed)))
            return jax.reshard(w, spec(*self.axes, shape=self.layer_shape))

        for _ in packed.stacked:
            one = functools.partial(jax.lax.map, one)
        return one(packed)

    def with_weight(self, w: Float[Array, "..."]) -> Einsum:
        """A dense layer with this one's bias and another weight."""
        dtype = str(self.dense_dtype)
        make = functools.partial(
            self.plain,
            *(self.eqn, self.layer_shape, self.axes, self.out_axes),
            bias=self.b is not None,
            compute=Compute(dtype=str(self.dtype), param_dtype=dtype),
        )
        graph, state = nnx.split(jax.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        state["w"] = state["w"].replace(w.astype(dtype))
        if self.b is not None:
            state["b"] = state["b"].replace(self.b[...])
        return nnx.merge(graph, state)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        ins, outs = _dims(self.eqn)
        batch = x.shape[: x.ndim - len(ins)]
        if has_mesh():  # every device multiplies with the whole weight, so it takes whole inputs
            axes = (*self.out_axes[: len(batch)], *(None,) * len(ins))
            x = jax.reshard(x, spec(*axes, shape=x.shape))
        y = multiply(x.reshape(*batch, -1), self.packed, self.dtype)
        y = y.reshape(*batch, *(self.layer_shape[i] for i in outs))
        if has_mesh():
            y = jax.reshard(y, spec(*self.out_axes, shape=y.shape))
        return y if self.b is None else add_bias(y, self.b[...])


class QuantExperts(QuantEinsum, ExpertWeights):
    """Packed weights of many experts: of each a matrix, so that no scale is of two of them.

    All arrays have the experts before the dimensions of a matrix; on a mesh experts lie over the
    expert axis, and nothing else of them is split. What multiplies is the dense weight of a layer.
    """

    plain = ExpertWeights

    @property
    def shape(self) -> tuple[int, ...]:
        depth = self.codes.ndim - self.format.CODES_NDIM - 1
        return (*self.codes.shape[:depth], *self.layer_shape)

    @jax.jit
    def weight(self) -> Float[Array, "..."]:
        """The experts' weights, dequantised, in the dtype of operands."""
        eqn, dims = matrix_eqn(self), self.layer_shape[1:]
        unpack = lambda packed: from_matrix(eqn, dims, dequantize(packed, self.dtype))  # noqa: E731
        if has_mesh():
            place = expert_spec(self.shape[: 1 - len(self.layer_shape)])
            unpack = jax.shard_map(unpack, in_specs=place, out_specs=place)
        return unpack(self.packed)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return contract(self.eqn, x, self.weight(), self.dtype, self.out_axes)


def is_dense(node: Any) -> bool:
    """Whether a part of a model is a linear layer that may be packed, and is not."""
    return type(node) in (Einsum, ExpertWeights) and not isinstance(node.w, Idle)


def matrix_eqn(base: Einsum) -> str:
    """The einsum of one matrix: a layer's own, or that of one of its experts."""
    if not isinstance(base, ExpertWeights):
        return base.eqn
    return base.eqn.replace(base.eqn[0], "")


def expert_spec(shape: tuple[int, ...]) -> jax.P | None:
    """Where arrays of stacked experts lie, whose leading dimensions are these, experts last."""
    return spec(*[None] * (len(shape) - 1), "expert", shape=shape)


def row_spec(shape: tuple[int, ...]) -> jax.P | None:
    """Where an array of a packed matrix lies; its rows come first in every format."""
    return spec(*("packed", *[None] * len(shape))[: len(shape)], shape=shape)


def _packed_layer(base: Einsum, packed: Packed, dense_dtype: str | jnp.dtype) -> QuantEinsum:
    kind = QuantExperts if isinstance(base, ExpertWeights) else QuantEinsum
    return kind(base, packed, dense_dtype)


def _dims(eqn: str) -> tuple[list[int], list[int]]:
    """The weight's dimensions that are inputs, and those that are outputs."""
    inputs, y_dims = eqn.split("->")
    w_dims = inputs.split(",")[1]
    ins = [i for i, dim in enumerate(w_dims) if dim not in y_dims]
    return ins, [i for i in range(len(w_dims)) if i not in ins]


def to_matrix(eqn: str, w: Float[Array, "..."]) -> Float[Array, "..."]:
    """An einsum's weight, or a stack of them, as matrices of outputs by inputs."""
    ins, outs = _dims(eqn)
    depth = w.ndim - len(ins) - len(outs)
    w = w.transpose(*range(depth), *(depth + i for i in outs), *(depth + i for i in ins))
    num_outs = math.prod(w.shape[depth : depth + len(outs)])
    return w.reshape(*w.shape[:depth], num_outs, -1)


def from_matrix(
    eqn: str, shape: tuple[int, ...], matrix: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The inverse of `to_matrix`, for weights of `shape`."""
    ins, outs = _dims(eqn)
    stack = matrix.shape[:-2]
    w = matrix.reshape(*stack, *(shape[i] for i in (*outs, *ins)))
    order = sorted(range(len(shape)), key=(*outs, *ins).__getitem__)
    return w.transpose(*range(len(stack)), *(len(stack) + i for i in order))


@on_own_mesh
def quantize_model(model: nnx.Module, kind: str, targets: str = "all-linear") -> nnx.Module:
    """A model whose targeted linear layers are packed; the given model is unchanged.

    Embeddings, norms and the head are no targets. To load a model that does not fit in memory
    dense, use `load_model(path, dtype=kind)`.

    Args:
      kind: one of `kinds.KINDS`.
      targets: "all-linear", or a regex for whole paths, e.g. `layers.mlp.*`.

    Raises:
      ValueError: an unknown kind, a target that is no regex or matches no dense layer.
    """
    check_kind(kind)
    layers = find_layers(model, is_dense)
    chosen = {path: base for path, base in layers.items() if _matches(targets, path)}
    if not chosen:
        raise ValueError(
            f"target {targets!r} matches no dense linear layer; there are"
            f" {', '.join(sorted(layers)) or 'none'}"
        )
    changed = {
        path: _packed_layer(base, _pack_layer(base, kind), base.w.dtype)
        for path, base in chosen.items()
    }
    return _replace(model, changed)


@on_own_mesh
def dequantize_model(model: nnx.Module, paths: Collection[str] | None = None) -> nnx.Module:
    """A model whose packed layers are dense again, in the dtype they had.

    Args:
      paths: of these alone; None: all.
    """
    layers = {path: x for path, x in packed_layers(model).items() if paths is None or path in paths}
    return _replace(model, {path: base.with_weight(base.weight()) for path, base in layers.items()})


def packed_layers(model: nnx.Module) -> dict[str, QuantEinsum]:
    """The layers on packed weights, by path."""
    return find_layers(model, lambda node: isinstance(node, QuantEinsum))


def adopt(model: nnx.Module, dense_dtype: str) -> nnx.Module:
    """Makes layers on packed weights of those whose weight a loader has filled with a `Packed`."""

    def is_packed(node: Any) -> bool:
        return is_dense(node) and isinstance(node.w.get_value(), Packed)

    layers = find_layers(model, is_packed)
    return _replace(
        model,
        {path: _packed_layer(x, x.w.get_value(), dense_dtype) for path, x in layers.items()},
    )


def _pack_layer(base: Einsum, kind: str) -> Packed:
    is_experts = isinstance(base, ExpertWeights)
    w = whole(base.w[...]) if is_experts else base.w[...]
    packed = _pack(w, matrix_eqn(base), kind, not is_experts)
    if not has_mesh() or not is_experts:
        return packed
    place = expert_spec(base.shape[: len(base.shape) - len(base.layer_shape) + 1])
    return jax.tree.map(
        lambda x: jax.reshard(x, jax.P(*place, *[None] * (x.ndim - len(place)))), packed
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pack(w: Float[Array, "..."], eqn: str, kind: str, by_rows: bool) -> Packed:
    """A weight, or a stack of them one after the other, packed.

    Args:
      by_rows: whether a mesh's devices get some rows each, or all of them.
    """

    def one(w: Array) -> Packed:
        packed = quantize(to_matrix(eqn, whole(w)), kind)
        if not has_mesh() or not by_rows:
            return packed
        return jax.tree.map(lambda x: jax.reshard(x, row_spec(x.shape)), packed)

    for _ in range(w.ndim - len(eqn.split("->")[0].split(",")[1])):
        one = functools.partial(jax.lax.map, one)
    return one(w)


def _matches(targets: str, path: str) -> bool:
    if targets == "all-linear":
        return True
    try:
        return re.fullmatch(targets, path) is not None
    except (re.error, TypeError) as error:
        raise ValueError(f"target {targets!r} is no regex: {error}") from error


def find_layers(model: nnx.Module, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Parts of a model by path; a layer under an adapter by the path that the adapter took."""
    return {_name(path): node for path, node in _parts((), model) if wanted(node)}


def _parts(path: tuple, node: Any) -> Iterator[tuple[tuple, Any]]:
    """The parts of a model, it last (`nnx.recursive_map`'s order, which takes 25 times as long)."""
    for name, child in nnx.iter_children(node):
        if not isinstance(child, nnx.Variable):
            yield from _parts((*path, name), child)
    yield path, node


def _replace(model: nnx.Module, parts: dict[str, Any]) -> nnx.Module:
    def visit(path: tuple, node: Any) -> Any:
        return parts[_name(path)] if isinstance(node, Einsum) and _name(path) in parts else node

    return nnx.recursive_map(visit, model)


def _name(path: tuple) -> str:
    return ".".join(map(str, path)).removesuffix(".base")
