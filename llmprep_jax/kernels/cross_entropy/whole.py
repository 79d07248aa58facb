"""The loss with all logits at once, kept for the backward pass: three products and no more.

For heads whose logits are small beside the rest of a step; in the operands' dtype, and with the
weights' gradient summed in float32, where differentiating `reference` would do neither.
"""

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


def sums(
    x_ND: jax.Array, w: jax.Array, targets_N: jax.Array, head: Head, gather: Move = same
) -> tuple[Sums, jax.Array]:
    """As of `chunked`, and the logits [N, V]."""
    logits_NV = logits(x_ND, gather(w.astype(head.dtype)), head)
    # looked up: a masked sum is written out whole by XLA's CPU compiler before it adds
    targets_N1 = targets_N[:, None]
    at_N1 = jnp.clip(targets_N1, 0, logits_NV.shape[1] - 1)
    found_N1 = jnp.take_along_axis(logits_NV, at_N1, axis=1)
    wanted_N = jnp.where(at_N1 == targets_N1, found_N1, 0.0)[:, 0]
    total_N = jnp.sum(logits_NV, axis=1) if head.label_smoothing else jnp.zeros_like(wanted_N)
    return Sums(jax.nn.logsumexp(logits_NV, axis=1), wanted_N, total_N), logits_NV


def gradients(
    x_ND: jax.Array,
    w: jax.Array,
    logits_NV: jax.Array,
    tokens: Tokens,
    head: Head,
    gather: Move = same,
    reduce: Move = same,
) -> tuple[jax.Array, jax.Array]:
    """As of `chunked`."""
    d_NV = logit_gradients(logits_NV, jnp.arange(logits_NV.shape[1]), tokens, head)
    dx_ND = multiply(d_NV, gather(w.astype(head.dtype)), 1 - head.w_axis)
    return dx_ND, reduce(outer(x_ND, d_NV, head)).astype(w.dtype)
