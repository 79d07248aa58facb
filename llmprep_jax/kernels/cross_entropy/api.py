"""Cross-entropy of a linear output head that need not hold the logits of all tokens and words.

At 262,144 words the logits of 4,096 tokens take 4 GiB in float32, and their gradient as much: more
than all else that a small model's step needs. `chunked` computes them a part of the vocabulary at a
time; `whole` keeps them, where they are few; `reference` says what is meant. On a mesh the weights
stay where they lie: devices that share the vocabulary exchange two or three numbers a token, and a
chunk of weights that is laid out along the model dimension is brought together when its turn comes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.cross_entropy import chunked, pallas_tpu, reference, whole
from llmprep_jax.kernels.cross_entropy.head import Head, Tokens
from llmprep_jax.kernels.cross_entropy.layout import Layout, layout_of, sizes_here
from llmprep_jax.kernels.platforms import platform, tell_once

IMPLS = ("chunked", "whole", "reference", "pallas_tpu")
AT_A_TIME = 2**24  # logits of a chunk: 64 MiB in float32
KEPT = 2**25  # logits that are kept, at most: 128 MiB


def linear_cross_entropy(
    x: jax.typing.ArrayLike,
    w: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    impl: str | None = None,
    is_table: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """-log softmax(x w)[target] of each token, [N] in float32.

    Args:
      x: hidden states [N, D]. w: the head [D, V]. targets: ids [N]; -1 is ignored: its loss is 0,
        and so are its gradients.
      soft_cap: c of logits c tanh(x w / c); None: plain ones.
      z_loss: weight of the squared log-sum-exp that is added (PaLM, section 5).
      label_smoothing: the share of the target's probability that all words divide.
      chunk: words whose logits exist at a time; None: so many that these take 64 MiB.
      impl: "chunked", "whole", "reference" or "pallas_tpu", kernels that take the place of chunks
        where each device has all tokens and whole weights of its words; None: "whole" where the
        logits of a device take 128 MiB at most and no chunk is given, else the kernels on a TPU
        and "chunked" elsewhere.
      is_table: whether `w` is [V, D], an embedding table that is the head too.
      dtype: of the products' operands; None: x's. Sums are in float32, and gradients have the
        dtypes of x and w.

    Raises:
      ValueError: shapes that do not fit each other, or an unknown `impl`.
    """
    x, w, targets = jnp.asarray(x), jnp.asarray(w), jnp.asarray(targets)
    w_axis = 1 if is_table else 0
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[w_axis] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"x {x.shape}, w {w.shape}, targets {targets.shape}; they must be [N, D],"
            f" {'[V, D]' if is_table else '[D, V]'} and [N]"
        )
    if impl not in (None, *IMPLS):
        raise ValueError(f"unknown impl {impl!r}; there are {', '.join(IMPLS)}")
    terms = dict(soft_cap=soft_cap, z_loss=z_loss, label_smoothing=label_smoothing)
    dtype = jnp.dtype(dtype or x.dtype)
    if impl == "reference":
        w_DV = (w.T if is_table else w).astype(dtype)
        return reference.linear_cross_entropy(x.astype(dtype), w_DV, targets, **terms)
    layout = layout_of(x, w, w_axis)
    chunk, by_kernels = _choose(impl, chunk, x, w, dtype, layout)
    head = Head(w_axis, w.shape[1 - w_axis], chunk, dtype, **terms, by_kernels=by_kernels)
    if _is_mesh(layout):
        x, targets = jax.reshard(x, layout.of_x()), jax.reshard(targets, layout.by_token())
    return _losses(x, w, targets, head, layout)


def _choose(
    impl: str | None,
    chunk: int | None,
    x: jax.Array,
    w: jax.Array,
    dtype: jnp.dtype,
    layout: Layout,
) -> tuple[int | None, bool]:
    """The words of a chunk, None: all, which are kept; and whether kernels take their place."""
    num_tokens, num_words = sizes_here(x, w, layout)
    if impl == "whole" or (impl is None and chunk is None and num_tokens * num_words <= KEPT):
        return None, False
    by_kernels = impl == "pallas_tpu" or (impl is None and chunk is None and platform() == "tpu")
    if by_kernels:
        reason = pallas_tpu.refusal(x, w, dtype)
        if layout.model or layout.tokens:
            reason = "chunks of the weights or of their gradient cross the network"
        by_kernels = reason is None
        if reason is not None and impl is not None:
            tell_once(f"linear_cross_entropy: impl={impl!r} cannot do this ({reason}); chunks do")
    return min(num_words, chunk or default_chunk(num_tokens)), by_kernels


def default_chunk(num_tokens: int) -> int:
    """Words whose logits of so many tokens take 64 MiB: a multiple of 128, and 1,024 at least."""
    return max(1024, AT_A_TIME // max(num_tokens, 1) // 128 * 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _losses(
    x_ND: jax.Array, w: jax.Array, targets_N: jax.Array, head: Head, layout: Layout
) -> jax.Array:
    return _forward(x_ND, w, targets_N, head, layout)[0]


def _forward(x_ND, w, targets_N, head, layout):
    def run(x_ND, w, targets_N):
        own_N, logits_NV = targets_N - layout.first_word(w), None
        if head.chunk is None:
            sums, logits_NV = whole.sums(x_ND, w, own_N, head, layout.gather)
        elif head.by_kernels:
            sums = pallas_tpu.sums(x_ND, w, own_N, head)
        else:
            sums = chunked.sums(x_ND, w, own_N, head, layout.gather)
        lse_N, wanted_N, total_N = layout.add_up(sums)
        smooth = head.label_smoothing
        losses_N = lse_N - (1 - smooth) * wanted_N - smooth / head.vocab_size * total_N
        losses_N += head.z_loss * jnp.square(lse_N)
        return jnp.where(targets_N >= 0, losses_N, 0.0), lse_N, logits_NV

    logits_spec = None if head.chunk else layout.of_logits()
    outs = (layout.by_token(), layout.by_token(), logits_spec)
    losses_N, lse_N, logits_NV = _on_devices(run, layout, outs)(x_ND, w, targets_N)
    return losses_N, (x_ND, w, targets_N, lse_N, logits_NV)


def _backward(head, layout, residuals, dlosses_N):
    def run(x_ND, w, targets_N, lse_N, dlosses_N, logits_NV):
        dlosses_N = jnp.where(targets_N >= 0, dlosses_N, 0.0)
        tokens = Tokens(targets_N - layout.first_word(w), lse_N, dlosses_N)
        moves = (layout.gather, layout.reduce)
        if head.chunk is None:
            dx_ND, dw = whole.gradients(x_ND, w, logits_NV, tokens, head, *moves)
        elif head.by_kernels:
            dx_ND, dw = pallas_tpu.gradients(x_ND, w, tokens, head)
        else:
            dx_ND, dw = chunked.gradients(x_ND, w, tokens, head, *moves)
        dx_ND = dx_ND.astype(x_ND.dtype)  # in which it crosses the network
        return (jax.lax.psum(dx_ND, layout.words) if layout.words else dx_ND), dw

    x_ND, w, targets_N, lse_N, logits_NV = residuals
    run = _on_devices(run, layout, (layout.of_x(), layout.of_w()))
    dx_ND, dw = run(x_ND, w, targets_N, lse_N, dlosses_N, logits_NV)
    return dx_ND, dw, None


_losses.defvjp(_forward, _backward)


def _is_mesh(layout: Layout) -> bool:
    return bool(layout.tokens or layout.words or layout.model)


def _on_devices(function: Any, layout: Layout, outs: Any) -> Any:
    """`function` of x, w, numbers by token and logits, on each device's part."""
    if not _is_mesh(layout):
        return function

    def call(x_ND, w, *others):
        specs = [
            layout.by_token() if x is None or x.ndim == 1 else layout.of_logits() for x in others
        ]
        ins = (layout.of_x(), layout.of_w(), *specs)
        # unchecked: sums over tokens and words are written out above
        return jax.shard_map(function, in_specs=ins, out_specs=outs, check_vma=False)(
            x_ND, w, *others
        )

    return call
