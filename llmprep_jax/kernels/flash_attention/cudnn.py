"""NVIDIA's own attention, cuDNN's, for what it computes as `reference` means it.

The call below `jax.nn.dot_product_attention` is used, since that one rounds the log-sum-exp to the
dtype of the outputs, and backward takes it back. Masks are by columns alone: causal ones, also with
a window behind. A window is asked for with a causal mask always: without one, JAX lets queries see
ahead of it (jax #39576). Documents and padding are refused: as a mask they would be a T x S array.
"""

import functools
import importlib
import inspect
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from llmprep_jax.kernels.flash_attention.residuals import outputs_like
from llmprep_jax.kernels.flash_attention.stored import refusal_of_stored
from llmprep_jax.kernels.platforms import platform

LAYOUT, LAYOUT_NUMBER = "BTNH", 0  # the same, for different functions

Array = jax.Array
Pair = tuple[Places, Places]


def refusal(q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, rule: Rule, backward: bool) -> str | None:
    """Why it cannot do it; None: it can."""
    (T, H), (S, U), dtype = q_BNTH.shape[2:], v_BKSU.shape[2:], q_BNTH.dtype
    if platform() != "gpu":
        return f"it runs on GPUs, not on {platform()}"
    reason = by_column_alone(rule, T, S)
    if reason is not None:
        return reason
    if rule.soft_cap is not None:
        return "it caps no scores"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, not {dtype.name}"
    if H % 8 or U % 8:
        return f"widths {H} and {U} must be multiples of 8"
    if not q_BNTH.size or not k_BKSH.size:
        return "an array is empty"
    try:
        library = _library()
        arrays = [jax.typeof(x.swapaxes(1, 2)) for x in (q_BNTH, k_BKSH, v_BKSU)]
        library.check_is_flash_attention(
            *arrays,
            LAYOUT_NUMBER,
            library.check_cudnn_version(),
            False,
            True,
        )
    except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
        return f"this cuDNN or JAX cannot: {str(error).strip() or type(error).__name__}"
    return None


def by_column_alone(rule: Rule, T: int, S: int) -> str | None:
    """Why masks by column, from 0 on for queries and keys, and plain rows are not enough."""
    if rule.stored:
        return refusal_of_stored(rule)
    if rule.given:
        return f"it masks by columns, not by {' and '.join(rule.given)}"
    if rule.bias is not None:
        return "a bias would be a T x S array"
    if rule.window is not None and not rule.causal:
        return "it knows no window ahead"
    if rule.causal and T != S:
        return f"{T} queries and {S} keys: libraries differ on which are the last"
    return None


def forward(
    q_BNTH: Array, k_BKSH: Array, v_BKSU: Array, places: Pair, rule: Rule
) -> tuple[Array, Array]:
    """(o, lse), as `reference.forward`."""
    library = _library()
    q, k, v = [x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSU)]
    o_BTNU, lse_BNT = library.dot_product_attention(
        q, k, v, qkv_layout=LAYOUT, return_residual=True, **_options(library, rule)
    )
    return o_BTNU.swapaxes(1, 2), lse_BNT


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
    library = _library()
    do_BNTU = do_BNTU.astype(q_BNTH.dtype)
    o_BNTU = outputs_like(do_BNTU, delta_BNT)
    arrays = (q_BNTH, k_BKSH, v_BKSU, do_BNTU, o_BNTU)
    q, k, v, do, o = [x.swapaxes(1, 2) for x in arrays]
    none = jnp.zeros(0, q.dtype)  # of bias, lengths, offsets and pages
    rule_of_derivatives = library._dot_product_attention_bwd_rule
    has_score_mod = "score_mod" in inspect.signature(rule_of_derivatives).parameters
    more = ((),) if has_score_mod else ()
    residuals = (q, k, v, *[none] * 7, *more, lse_BNT, o)
    statics = _options(library, rule) | dict(
        layout=LAYOUT_NUMBER,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(False, False),
        return_residual=False,
        score_mod=None,
        cudnn_version=None,
        is_training=True,
    )
    names = list(inspect.signature(rule_of_derivatives).parameters)[:-2]
    values = [statics[name] for name in names]
    dq, dk, dv = rule_of_derivatives(*values, residuals, do)[:3]
    wide = [x.swapaxes(1, 2).astype(jnp.float32) for x in (dk, dv)]
    return dq.swapaxes(1, 2), *wide


def _options(library: ModuleType, rule: Rule) -> dict[str, Any]:
    kinds = library.MaskType
    return dict(
        scale=rule.scale,
        mask_type=kinds.CAUSAL if rule.causal else kinds.NO_MASK,
        sliding_window_length=rule.window,
    )


@functools.cache
def _library() -> ModuleType:
    return importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
