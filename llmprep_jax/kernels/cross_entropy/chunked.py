"""The loss by chunks of the vocabulary: logits of one chunk exist at a time, forward and backward.

Forward keeps, of each token, the maximum of its logits so far and the sum of their exponentials
(the online softmax of Milakov and Gimelshein 2018), its target's logit and the sum of logits.
Backward computes each chunk's logits again, for which it needs the logarithm of that sum alone:
four products in place of three, and no [N, V] array. A target's share in the gradient is a
comparison with the chunk's ids and no scatter.

Where chunks do not divide a vocabulary the last one begins earlier, over words that were there
before: sums leave these out, and the gradient of their weights is written twice, the same.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.cross_entropy.head import (
    Head,
    Move,
    Sums,
    Tokens,
    logit_gradients,
    logits,
    multiply,
    outer,
    same,
)

_LOW = -1e30  # the maximum of no logits: finite, so that differences of it are numbers


def sums(
    x_ND: jax.Array, w: jax.Array, targets_N: jax.Array, head: Head, gather: Move = same
) -> Sums:
    """Over the words of `w`, from which targets count.

    Args:
      gather: makes a chunk of weights whole that is laid over devices along the model dimension.
    """

    def body(so_far: Any, start: jax.Array) -> tuple[Any, None]:
        max_N, sum_N, wanted_N, total_N = so_far
        logits_NC = logits(x_ND, gather(_chunk(w, start, head)), head)
        ids_C, is_new_C = _words(start, head)
        seen_NC = jnp.where(is_new_C, logits_NC, _LOW)
        top_N = jnp.maximum(max_N, jnp.max(seen_NC, axis=1))
        sum_N = sum_N * jnp.exp(max_N - top_N)
        sum_N += jnp.sum(jnp.exp(seen_NC - top_N[:, None]), axis=1)
        is_wanted_NC = (targets_N[:, None] == ids_C) & is_new_C
        wanted_N += jnp.sum(jnp.where(is_wanted_NC, logits_NC, 0.0), axis=1)
        if head.label_smoothing:
            total_N += jnp.sum(jnp.where(is_new_C, logits_NC, 0.0), axis=1)
        return (top_N, sum_N, wanted_N, total_N), None

    zeros_N = jnp.zeros(len(x_ND), jnp.float32)
    first = (jnp.full_like(zeros_N, _LOW), zeros_N, zeros_N, zeros_N)
    (max_N, sum_N, wanted_N, total_N), _ = jax.lax.scan(body, first, _starts(w, head))
    return Sums(max_N + jnp.log(sum_N), wanted_N, total_N)


def gradients(
    x_ND: jax.Array,
    w: jax.Array,
    tokens: Tokens,
    head: Head,
    gather: Move = same,
    reduce: Move = same,
) -> tuple[jax.Array, jax.Array]:
    """Through the words of `w`: dx [N, D] in float32, and dw in w's shape and dtype.

    Args:
      gather: see `sums`. reduce: adds a chunk's dw up over devices that hold other tokens.
    """
    v_axis = 1 - head.w_axis

    def body(so_far: Any, start: jax.Array) -> tuple[Any, None]:
        dx_ND, dw = so_far
        w_C = gather(_chunk(w, start, head))
        ids_C, is_new_C = _words(start, head)
        d_NC = logit_gradients(logits(x_ND, w_C, head), ids_C, tokens, head)
        dw_C = reduce(outer(x_ND, d_NC, head)).astype(dw.dtype)
        dw = jax.lax.dynamic_update_slice_in_dim(dw, dw_C, start, v_axis)
        dx_ND += multiply(jnp.where(is_new_C, d_NC, 0), w_C, v_axis)
        return (dx_ND, dw), None

    first = (jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(w.shape, w.dtype))
    return jax.lax.scan(body, first, _starts(w, head))[0]


def _starts(w: jax.Array, head: Head) -> jax.Array:
    """The first word of each chunk."""
    vocab_size = w.shape[1 - head.w_axis]
    return jnp.minimum(jnp.arange(0, vocab_size, head.chunk), vocab_size - head.chunk)


def _chunk(w: jax.Array, start: jax.Array, head: Head) -> jax.Array:
    w_C = jax.lax.dynamic_slice_in_dim(w, start, head.chunk, 1 - head.w_axis)
    return w_C.astype(head.dtype)


def _words(start: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """A chunk's ids [C], and which of them no chunk had before."""
    ids_C = start + jnp.arange(head.chunk)
    return ids_C, ids_C >= -(-start // head.chunk) * head.chunk
