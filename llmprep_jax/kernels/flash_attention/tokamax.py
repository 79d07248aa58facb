"""Attention by the kernels for Hopper and Blackwell GPUs of the library tokamax, where it is there.

Its public function gives no log-sum-exp; the operation behind it gives each row's greatest score
and its sum of exponentials, and its backward takes them back: lse and 1 are such a pair too.
Segments and spans would be masks of T x S there, and are refused.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.cudnn import by_column_alone
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from llmprep_jax.kernels.flash_attention.residuals import outputs_like
from llmprep_jax.kernels.platforms import platform

WIDEST = 256

Array = jax.Array
Pair = tuple[Places, Places]


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why it cannot do it; None: it can."""
    (T, H), (S, U), dtype = q_BNTH.shape[2:], v_BKSU.shape[2:], q_BNTH.dtype
    if platform() != "gpu":
        return f"it runs on GPUs here, not on {platform()}"
    reason = by_column_alone(rule, T, S)
    if reason is not None:
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, not {dtype.name}"
    if max(H, U) > WIDEST:
        return f"its tiles of widths {H} and {U} pass shared memory"
    if not q_BNTH.size or not k_BKSH.size:
        return "an array is empty"
    try:
        _operation()
    except (ImportError, KeyError) as error:
        return f"tokamax is not installed, or has no such kernel: {error}"
    return None


def forward(
    q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, places: Pair, rule: Rule
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    q, k, v = [x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSU)]
    o_BTNU, (top_BNT, sum_BNT) = _operation()(
        q, k, v, return_residuals=True, **_options(rule, k.shape[1])
    )
    return o_BTNU.swapaxes(1, 2), top_BNT + jnp.log(sum_BNT)


def backward(
    q_BNTH: Array,
    k_BKSH: Array,
    v_BKSU: Array,
    lse_BNT: Array,
    do_BNTU: Array,
    delta_BNT: Array,
    places: Pair,
    rule: Rule,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), as `reference.backward`."""
    do_BNTU = do_BNTU.astype(q_BNTH.dtype)
    arrays = (outputs_like(do_BNTU, delta_BNT), do_BNTU, q_BNTH, k_BKSH, v_BKSU)
    o, do, q, k, v = [x.swapaxes(1, 2) for x in arrays]
    residuals = (lse_BNT, jnp.ones_like(lse_BNT))
    operation = _operation()
    whole = operation.bind(q, k, v, **_options(rule, k.shape[1]))  # with all that has defaults
    gradients = operation.vjp(residuals, o, do, *whole.args, **whole.kwargs)
    dq, dk, dv = [x.swapaxes(1, 2) for x in map(gradients.get, "qkv")]
    return dq, dk.astype(jnp.float32), dv.astype(jnp.float32)


def _options(rule: Rule, num_keys: int) -> dict[str, Any]:
    mask = importlib.import_module("tokamax._src.ops.attention.base").Mask
    seen = mask(is_causal=rule.causal)
    if rule.window is not None:
        columns = jnp.arange(num_keys)
        seen &= mask(k_start=columns - rule.window + 1)
    return dict(mask=seen, logits_scale=rule.scale, logits_soft_cap=rule.soft_cap)


@functools.cache
def _operation() -> Any:
    found = importlib.import_module("tokamax._src.ops.attention.api").IMPLEMENTATIONS["mosaic_gpu"]
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():  # else it reads sys.argv, and stops at what other programs know
        flags.mark_as_parsed()
    return found
