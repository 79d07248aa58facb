"""Variables by role, and how a parameter is born: in its dtype and already sharded.

The class of a variable tells who may change it: `Param` is trained, `AdapterParam` belongs to a
parameter-efficient method, `Buffer` is state without a gradient. `nnx.split(model, AdapterParam,
...)` is therefore all that fine-tuning needs. `AdapterParam` is no subclass of `Param`, so
splitting by `Param` gives the base weights alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.types import Array, Float


class Param(nnx.Param):
    """A weight of the model."""


class AdapterParam(nnx.Variable):
    """A weight that an adapter method added."""


class Buffer(nnx.Variable):
    """An array that belongs to the model and is never trained."""


class RouterBias(Buffer):
    """A router's bias on the choice of experts: no gradient, moved by the load of each step."""


class Idle(Buffer):
    """A weight that checkpoints hold and the model does without: it is loaded, saved and counted.

    It is not trained: without a gradient it would still decay.
    """


class Frozen(Idle):
    """A weight that is computed with and never trained: of a VQ, whose codes would change their
    meaning."""


def idle(module: nnx.Module, kind: type[Idle] = Idle) -> nnx.Module:
    """The same module, which is changed, with all its weights idle."""
    for name, child in list(nnx.iter_children(module)):
        if isinstance(child, Param):
            setattr(module, name, kind(child[...]))
        elif isinstance(child, nnx.Module):
            idle(child, kind)
    return module


TRAINED = (Param, RouterBias)  # what a step of training changes where there is no adapter


class Shared(Buffer):
    """A buffer that all layers of a stack see whole: it has no layer axis (see `nn.stack`)."""


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes, as opposed to what it computes.

    Attributes:
      dtype: dtype of activations.
      matmul_dtype: dtype of the operands of products with weights, whose results are accumulated in
        float32; None means `dtype`, which attention's own products have in any case. On CPUs with
        bf16 instructions, float32 activations with bf16 operands are the fastest way to train (2 x
        float32, 2.5 x bf16 activations).
      param_dtype: dtype in which parameters are created.
      remat: what the backward pass recomputes: "none"; "full" (all but each layer's input); "dots"
        (keeps matrix products); or all but activations that are named, with commas: block_in, qkv,
        attention, mlp_in, mlp_hidden (`nn.remat`).
      offload: names of activations that wait for the backward pass in host memory, with commas;
        on a CPU that is the same memory.
      unroll: layers a step of the scan; 0 unrolls all (faster steps on CPU, slower compilation).
    """

    dtype: str = "float32"
    matmul_dtype: str | None = None
    param_dtype: str = "float32"
    remat: str = "none"
    offload: str | None = None
    unroll: int = 1

    @property
    def operand_dtype(self) -> jnp.dtype:
        """dtype of matrix operands."""
        return jnp.dtype(self.matmul_dtype or self.dtype)


def param(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: jax.nn.initializers.Initializer,
    dtype: str | jnp.dtype = "float32",
) -> Param:
    """Creates a `Param` of `shape`, sharded by its logical `axes` (one name a dimension)."""
    value = init(rngs.params(), shape, jnp.dtype(dtype), out_sharding=spec(*axes, shape=shape))
    return Param(value)


@jax.custom_vjp
def add_bias(y: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """y + b in y's dtype, for a bias over the last dimensions; its gradient is a float32 sum.

    Autodiff would sum the cotangents of all tokens in y's dtype: in bf16 65,536 ones are 256.
    """
    return y + b.astype(y.dtype)


def _add_bias_forward(y, b):
    return add_bias(y, b), b


def _add_bias_backward(b, dy):
    return dy, _sum_tokens(dy, b)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def scale_by(
    x: Float[Array, "..."], w: Float[Array, "..."], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "..."]:
    """x * w in x's dtype, for a vector over the last dimensions; its gradient is a float32 sum.

    Args:
      dtype: that w is rounded to before the product; None: it is not.
    """
    return (x * w.astype(dtype or w.dtype)).astype(x.dtype)


def _scale_by_forward(x, w, dtype):
    return scale_by(x, w, dtype), (x, w)


def _scale_by_backward(dtype, residuals, dy):
    x, w = residuals
    dw = _sum_tokens(dy.astype(jnp.float32) * x.astype(jnp.float32), w)
    return scale_by(dy, w, dtype), dw


scale_by.defvjp(_scale_by_forward, _scale_by_backward)


def _sum_tokens(dy: Array, w: Array) -> Array:
    """The cotangent of what was broadcast over tokens, laid out as `w`; summed in float32."""
    dw = jnp.sum(dy.astype(jnp.float32), axis=tuple(range(dy.ndim - w.ndim)))
    return (jax.reshard(dw, sharding_of(w)) if has_mesh() else dw).astype(w.dtype)
