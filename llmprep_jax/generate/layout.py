"""A model laid out for decoding on one CPU, where a step does little else than read weights.

Each linear layer becomes the one form of a matrix-vector product that XLA's CPU compiler gives to
all cores at memory speed, its weight's outputs first (in bf16 inputs first run at a tenth). Such
products read a stack of layers where it lies, see `nn.stack.InPlace`, so that a program holds one
layer; stacks with other tables in them, as of experts, become lists of layers. Packed weights
(`quant`) are unpacked once where memory has room for that: a CPU takes longer to unpack a weight
than to read it dense.
"""

import functools
import math
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from flax import nnx

from llmprep_jax.nn.linear import Einsum, multiply
from llmprep_jax.nn.param import AdapterParam, Param, Shared
from llmprep_jax.nn.stack import InPlace, unstack
from llmprep_jax.types import Array, Float

MOST_DIMS = 3  # of what is sliced out of a stack: one more are experts
MAX_INPUTS = 2048  # of one product; from 4096 on XLA copies the weight at every step: 2 GB/s


@functools.cache
def cpu_options() -> dict[str, int]:
    """Compiler options of programs that decode on this machine's CPU.

    LLVM takes vectors of 256 bits where a CPU has 512. On Intel's, one row of SmolLM2 takes 0.80 of
    the CPU-seconds a token with 512 in float32, and 0.86 in bf16; on AMD's Zen 4, which works on
    halves, 1.09 times as long in float32, and as long in bf16.
    """
    cpus = pathlib.Path("/proc/cpuinfo")
    is_intel = cpus.exists() and "GenuineIntel" in cpus.read_text()
    return {"xla_cpu_prefer_vector_width": 512} if is_intel else {}


def row_wise(model: nnx.Module) -> nnx.Module:
    """The same model with dense weights in the operands' dtype, which are read row by row."""
    stacks = {name: _laid(layers) for name, layers in _stacks(model).items()}
    extras = {name: getattr(model, name) for name in model.extras}  # lists already
    stacks |= {name: nnx.List(map(_lay, extra)) for name, extra in extras.items() if extra}
    if model.unembedding() is None:
        return _with(model, **stacks)  # adapted, and no one matrix
    if model.head is not None:
        return _with(model, **stacks, head=RowsHead(model.head.w[...].T, model.head.dtype))
    table, dtype = model.embed.w[...], model.embed.compute.operand_dtype
    if table.dtype == dtype and table.shape[1] <= MAX_INPUTS:
        return _with(model, **stacks)  # the table is row-wise as it is
    return _with(model, **stacks, head=RowsHead(table, dtype))


def packed_layers(model: nnx.Module) -> list[Einsum]:
    """The layers, or stacks of them, on packed weights."""
    packed: list[Einsum] = []

    def visit(_: tuple, node: Any) -> Any:
        if _is_packed(node):
            packed.append(node)
        return node

    nnx.recursive_map(visit, model)
    return packed


def can_unpack(model: nnx.Module) -> bool:
    """Whether dense copies of packed layers fit in half of the memory that is free; says so."""
    layers, free = packed_layers(model), free_memory()
    size = sum(math.prod(layer.shape) * layer.dtype.itemsize for layer in layers)
    fits, copies = size < free / 2, f"dense copies of them, {size / 1e9:.1f} GB"
    reason = f", do not fit in half of the {free / 1e9:.1f} GB that are free; free some memory"
    warnings.warn(
        "a CPU is slow on packed weights: "
        + (f"generation keeps {copies}" if fits else copies + reason),
        stacklevel=2,
    )
    return fits


def free_memory() -> int:
    """Bytes that the process may still take, of the machine or of its control group."""
    free = psutil.virtual_memory().available
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit, used = [int((group / f"memory.{name}").read_text()) for name in ("max", "current")]
    except (OSError, ValueError):  # there is none, or no limit
        return free
    return min(free, limit - used)


def _is_packed(node: Any) -> bool:
    return isinstance(node, Einsum) and node.is_packed


def _dense(node: Einsum) -> Einsum:
    """A layer whose weight is dense and in the operands' dtype."""
    w = _weight(node)
    graph, state = nnx.split(node.with_weight(w))
    state["w"] = state["w"].replace(w)  # not rounded to the dtype that it was stored in
    return nnx.merge(graph, state)


@jax.jit
def _weight(node: Einsum) -> Array:
    return node.weight().astype(node.dtype)


def _stacks(model: nnx.Module) -> dict[str, nnx.Module]:
    return {name: getattr(model, name) for name in model.stacks}


def _laid(layers: nnx.Module) -> InPlace | nnx.List:
    """A stack whose weights are read row by row: in place, if it has no others, else as a list."""
    return unstack(layers, _lay) if _has_others(layers) else InPlace(_lay_all(layers))


def _has_others(layers: nnx.Module) -> bool:
    """Whether a stack has large tables beside those of linear layers, or what its layers share."""
    others: list[nnx.Variable] = []

    def visit(_: tuple, node: Any) -> Any:
        if isinstance(node, nnx.Module) and not (type(node) is Einsum or _is_packed(node)):
            own = [x for x in vars(node).values() if isinstance(x, nnx.Variable)]
            others.extend(x for x in own if isinstance(x, Shared) or _is_table(x))
        return node

    nnx.recursive_map(visit, layers)
    return bool(others)


def _is_table(x: nnx.Variable) -> bool:
    return x.ndim > MOST_DIMS and not isinstance(x, AdapterParam)


def _lay_node(_: tuple, node: Any) -> Any:
    node = _dense(node) if _is_packed(node) else node
    return Rows(node) if type(node) is Einsum else node


@jax.jit  # one program for all layers
def _lay(layer: nnx.Module) -> nnx.Module:
    return nnx.recursive_map(_lay_node, layer)


@jax.jit
def _lay_all(layers: nnx.Module) -> nnx.Module:
    return jax.vmap(_lay)(layers)  # fused: SmolLM2's from nf4 have temporaries of 8 MB


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
        x_part = x[:, start:end].astype(dtype)
        if len(x) > 1:
            y += multiply(x_part, part[...], w_axis=1)
        else:
            # a transpose of its own, else XLA's CPU compiler makes a float32 copy of bf16 weights;
            # and a difference, since it fuses a sum with its product into a form that copies them
            dims, sums = (((1,), (0,)), ((), ())), dict(preferred_element_type=jnp.float32)
            y -= jax.lax.dot_general(-x_part, part[...].T, dims, **sums)
        start = end
    return y
