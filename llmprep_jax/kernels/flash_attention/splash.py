"""JAX's own attention kernel for TPUs, splash, for what it computes as `reference` means it.

It knows a query and a key by their columns and segments, and takes blocks of 128 tokens and more.
A row that sees nothing is the mean of the values there, and padding sees padding: the first is put
right by the log-sum-exp, the second by numbers that no other side has. Its backward computes the
forward pass again, and knows no gradient of the log-sum-exp: another backend's is taken.
"""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Places, Rule
from llmprep_jax.kernels.flash_attention.stored import refusal_of_stored
from llmprep_jax.kernels.platforms import platform

BLOCK, SMALLEST = 512, 128  # tokens
BLIND = -1e38  # a log-sum-exp below is of a row that sees nothing

Array = jax.Array
Sides = tuple[Places, Places]


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why it cannot do it; None: it can."""
    if backward:
        return "its backward takes no residuals"
    if rule.stored:
        return refusal_of_stored(rule)
    if rule.bias is not None:
        return "it adds no bias"
    by_value = [name for name in rule.given if name != "segments"]
    if by_value:
        return f"it masks by columns and segments, not by {' and '.join(by_value)}"
    lengths = q_BNTH.shape[2], k_BKSH.shape[2]
    if any(length == 0 or length % SMALLEST for length in lengths):
        return f"lengths {lengths} must be multiples of {SMALLEST}"
    if q_BNTH.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it multiplies float32 and bfloat16, not {q_BNTH.dtype}"
    try:
        _library()
    except ImportError as error:
        return f"this JAX has no splash attention: {error}"
    return None


def forward(
    q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, places: Sides, rule: Rule
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    splash, masks = _library()
    lengths = q_BNTH.shape[2], k_BKSH.shape[2]
    sizes = [max(n for n in range(SMALLEST, BLOCK + 1, SMALLEST) if x % n == 0) for x in lengths]
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([_mask(masks, lengths, rule)] * q_BNTH.shape[1]),
        block_sizes=splash.BlockSizes(*sizes),
        save_residuals=True,
        attn_logits_soft_cap=rule.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() not in ("tpu", None),
    )
    (q, k), segments = [side.segments for side in places], ()
    if q is not None:  # padding is of no segment
        segments = (splash.SegmentIds(jnp.where(q > 0, q, -1), jnp.where(k > 0, k, -2)),)
    scaled = (q_BNTH * rule.scale).astype(q_BNTH.dtype)
    o, (lse,) = jax.vmap(kernel)(scaled, k_BKSH, v_BKSU, *segments)
    return jnp.where(lse[..., None] > BLIND, o, 0), jnp.where(lse > BLIND, lse, NEG_INF)


def _mask(masks: ModuleType, lengths: tuple[int, int], rule: Rule) -> Any:
    """Of one head, by columns."""
    if rule.window is not None:
        ahead = 0 if rule.causal else rule.window - 1
        return masks.LocalMask(lengths, (rule.window - 1, ahead), offset=0)
    return masks.CausalMask(lengths) if rule.causal else masks.FullMask(lengths)


def _library() -> tuple[ModuleType, ModuleType]:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    return splash_attention_kernel, splash_attention_mask
