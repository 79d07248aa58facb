"""A model laid out for decoding on one CPU, where a step does little else than read weights.

A scan slices each layer's weights out of the stack before it multiplies them, so layers become a
list; and for a single row each linear layer becomes the one form of a matrix-vector product that
XLA's CPU compiler gives to all cores at memory speed. Layers on packed weights (`quant`) are left
as they are: rows would be dense, at two to four times their memory, which is what the packing is
for. The one thing a reader would get wrong: that form has the weight's outputs first, in bf16 too;
with its inputs first, bf16 runs at a tenth.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Param
from llmprep_jax.nn.stack import unstack
from llmprep_jax.types import Array, Float

MAX_INPUTS = 2048  # of one product; from 4096 on XLA copies the weight at every step: 2 GB/s


def listed(model: nnx.Module) -> nnx.Module:
    """The same model with its layers in a list, their weights in the operands' dtype."""

    def cast(_: tuple, node: Any) -> Any:
        if type(node) is not Einsum:
            return node
        graph, state = nnx.split(node)
        state["w"] = state["w"].replace(node.w[...].astype(node.dtype))
        return nnx.merge(graph, state)

    return _with(model, **_unstacked(model, cast))


def row_wise(model: nnx.Module) -> nnx.Module:
    """The same model for one token of one row: a list of layers that read weights row by row."""

    def lay(_: tuple, node: Any) -> Any:
        return Rows(node) if type(node) is Einsum else node

    stacks = _unstacked(model, lay)
    if not hasattr(model.embed if model.head is None else model.head, "w"):
        return _with(model, **stacks)  # adapted, and no one matrix
    if model.head is not None:
        return _with(model, **stacks, head=RowsHead(model.head.w[...].T, model.head.dtype))
    table, dtype = model.embed.w[...], model.embed.compute.operand_dtype
    if table.dtype == dtype and table.shape[1] <= MAX_INPUTS:
        return _with(model, **stacks)  # the table is row-wise as it is
    return _with(model, **stacks, head=RowsHead(table, dtype))


def is_listed(model: nnx.Module) -> bool:
    """Whether the model's layers are lists."""
    return all(isinstance(layers, nnx.List) for layers in _stacks(model).values())


def _stacks(model: nnx.Module) -> dict[str, nnx.Module]:
    found = {name: getattr(model, name) for name in model.stacks}
    return {name: layers for name, layers in found.items() if layers is not None}


def _unstacked(model: nnx.Module, of: Callable[[tuple, Any], Any]) -> dict[str, nnx.List]:
    """Each stack, and the modules that draft, as a list whose nodes are what `of` makes of them."""
    lists = {name: unstack(layers) for name, layers in _stacks(model).items()}
    if len(getattr(model, "mtp", ())):
        lists["mtp"] = nnx.merge(*nnx.split(model.mtp))  # another list; theirs is left as it is
    return {name: nnx.recursive_map(of, layers) for name, layers in lists.items()}


def _with(model: nnx.Module, **parts: nnx.Module) -> nnx.Module:
    """The model with other parts; what is not replaced is shared, not copied."""
    graph, state = nnx.split(model)
    changed = nnx.merge(graph, state)
    for name, part in parts.items():
        setattr(changed, name, nnx.data(part))
    return changed


class Rows(Einsum):
    """An einsum that reads its weight row by row, a row of inputs for each output.

    `parts` holds the weight as matrices [outputs, inputs], of up to MAX_INPUTS inputs each.
    """

    def __init__(self, base: Einsum):
        self.eqn, self.axes, self.out_axes = base.eqn, base.axes, base.out_axes
        self.dtype, self.b, self.layer_shape = base.dtype, base.b, base.layer_shape
        x_dims, w_dims = base.eqn.split("->")[0].split(",")
        ins = [i for i, dim in enumerate(w_dims) if dim in x_dims]
        outs = [i for i, dim in enumerate(w_dims) if dim not in x_dims]
        self.num_in, self.order = len(ins), (*outs, *ins)
        self.out_shape = tuple(base.layer_shape[i] for i in outs)
        w = jnp.transpose(base.w[...], self.order).reshape(math.prod(self.out_shape), -1)
        self.parts = _parts(w, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layer_shape

    def weight(self) -> Float[Array, "..."]:
        """The weight in the layout of the einsum, for adapters that change it whole."""
        matrix = jnp.concatenate([part[...] for part in self.parts], axis=1)
        w = matrix.reshape([self.layer_shape[i] for i in self.order])
        return jnp.transpose(w, [self.order.index(i) for i in range(len(self.order))])

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        rows = x.shape[: x.ndim - self.num_in]
        y = _multiply(x.reshape(math.prod(rows), -1), self.parts, self.dtype).astype(x.dtype)
        y = y.reshape(*rows, *self.out_shape)
        return y if self.b is None else y + self.b[...].astype(y.dtype)


class RowsHead(nnx.Module):
    """An output head that reads its weight, [V, D], row by row."""

    def __init__(self, w: Float[Array, "V D"], dtype: jnp.dtype):
        self.dtype, self.parts = dtype, _parts(w, dtype)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        y = _multiply(x_BTD.reshape(-1, x_BTD.shape[-1]), self.parts, self.dtype)
        return y.reshape(*x_BTD.shape[:-1], -1)


def _parts(w: Float[Array, "O I"], dtype: jnp.dtype) -> nnx.List:
    ends = list(range(MAX_INPUTS, w.shape[1], MAX_INPUTS))
    return nnx.List([Param(part) for part in jnp.split(w.astype(dtype), ends, axis=1)])


def _multiply(x: Float[Array, "B I"], parts: nnx.List, dtype: jnp.dtype) -> Float[Array, "B O"]:
    """x w^T in float32."""
    y, start = 0.0, 0
    for part in parts:
        end = start + part.shape[1]
        # a transpose of its own, else XLA's CPU compiler makes a float32 copy of bf16 weights; and
        # a difference, since it fuses a sum with its product into a form that copies the weight
        operands = -x[:, start:end].astype(dtype), part[...].T
        dims = (((1,), (0,)), ((), ()))
        y -= jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)
        start = end
    return y
