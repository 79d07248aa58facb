"""What the forms of the loss share: a head's statics, its logits, and their gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Move = Callable[[jax.Array], jax.Array]  # of a chunk of weights, between devices


class Head(NamedTuple):
    """Statics of a head and of the loss over it.

    Attributes:
      w_axis: of the weight, the axis that is contracted: 0 of [D, V], 1 of a table [V, D].
      vocab_size: of the whole head, of which a device may hold a part.
      chunk: words whose logits exist at a time; None: all, which are kept for the backward pass.
      dtype: of the products' operands; sums are in float32.
      soft_cap, z_loss, label_smoothing: see `reference`.
      by_kernels: whether a TPU's kernels compute it, which keep no logits at all.
    """

    w_axis: int
    vocab_size: int
    chunk: int | None
    dtype: jnp.dtype
    soft_cap: float | None
    z_loss: float
    label_smoothing: float
    by_kernels: bool = False


class Sums(NamedTuple):
    """Over some words, by token: log sum exp, the target's logit (0: it is none of them), and the
    sum of logits; [N] each, float32."""

    lse_N: jax.Array
    wanted_N: jax.Array
    total_N: jax.Array


class Tokens(NamedTuple):
    """What the backward pass knows of each token, [N].

    Attributes:
      targets_N: ids counted from the first word that is here.
      lse_N: log sum exp over all words.
      dlosses_N: the cotangent of the loss, 0 where it is ignored.
    """

    targets_N: jax.Array
    lse_N: jax.Array
    dlosses_N: jax.Array


def same(x: jax.Array) -> jax.Array:
    """The move of one device."""
    return x


def logits(x_ND: jax.Array, w: jax.Array, head: Head) -> jax.Array:
    """[N, words of w], float32."""
    logits_NV = multiply(x_ND.astype(head.dtype), w.astype(head.dtype), head.w_axis)
    return (
        logits_NV if head.soft_cap is None else head.soft_cap * jnp.tanh(logits_NV / head.soft_cap)
    )


def logit_gradients(
    logits_NV: jax.Array, ids_V: jax.Array, tokens: Tokens, head: Head
) -> jax.Array:
    """Of x w, [N, V] in the operands' dtype; `ids_V` are the words' as targets count them."""
    targets_N, lse_N, dlosses_N = tokens
    smooth = head.label_smoothing
    of_lse_N = dlosses_N * (1 + 2 * head.z_loss * lse_N)
    d_NV = of_lse_N[:, None] * jnp.exp(logits_NV - lse_N[:, None])
    d_NV -= jnp.where(targets_N[:, None] == ids_V, (dlosses_N * (1 - smooth))[:, None], 0.0)
    if smooth:
        d_NV -= (dlosses_N * smooth / head.vocab_size)[:, None]
    if head.soft_cap is not None:  # of c tanh(s / c) by s: 1 - tanh^2
        d_NV *= 1 - jnp.square(logits_NV / head.soft_cap)
    # not by a product alone: the logits of a token that is ignored may be infinite
    return jnp.where(dlosses_N[:, None] != 0, d_NV, 0.0).astype(head.dtype)


def outer(x_ND: jax.Array, d_NV: jax.Array, head: Head) -> jax.Array:
    """The gradient of the words' weights, summed over tokens in float32."""
    eqn = "nd,nv->dv" if head.w_axis == 0 else "nd,nv->vd"
    return jnp.einsum(eqn, x_ND.astype(head.dtype), d_NV, preferred_element_type=jnp.float32)


def multiply(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    """Product of two matrices over x's columns and the `w_axis` of w, in float32.

    The second form is x w^T, as XLA's CPU compiler multiplies it in bf16 (370 GFLOP/s; 90 else).
    """

    def product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        dims = (((1,), (axis,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)

    return product(x, w, 0) if w_axis == 0 else product(w, x, 1).T
