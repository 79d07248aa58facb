"""What attention means, in a few lines and with a matrix of all scores.

Head-major arrays, as every backend takes and returns them: q [B, N, T, H], k [B, K, S, H],
v [B, K, S, U]. Backward is the derivative written out: with P = exp(S - lse) and
D = rowsum(dO * O), dV = P^T dO and dS = P * (dO V^T - D) (Dao et al. 2022, section 3.1 and B.4).
"""

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.masks import NEG_INF, Places, Rule, positions, visible
from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored, clear, written_out


def refusal(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSU: jax.Array, rule: Rule, backward: bool
) -> str | None:
    """Why this backend cannot do it, forward or backward; None: it can."""
    return None


def forward(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSU: jax.Array,
    places: tuple[Places, Places],
    rule: Rule,
    stored: Stored = NOT_STORED,
) -> tuple[jax.Array, jax.Array]:
    """(o [B, N, T, U] in q's dtype, lse [B, N, T] in float32); a row that sees nothing is 0, and
    its lse NEG_INF.

    Args:
      stored: what k and v need to be read, where `rule.stored` says so.
    """
    if rule.stored:
        k_BKSH, v_BKSU = written_out(k_BKSH, v_BKSU, stored, rule, q_BNTH.dtype)
    k_BKSH, v_BKSU = [clear(x, places[1]) for x in (k_BKSH, v_BKSU)]
    s_BNTS, seen_BNTS, _ = _scores(q_BNTH, k_BKSH, places, rule)
    lse_BNT = jnp.where(jnp.any(seen_BNTS, -1), jax.nn.logsumexp(s_BNTS, -1), NEG_INF)
    p_BNTS = jnp.where(seen_BNTS, jnp.exp(s_BNTS - lse_BNT[..., None]), 0.0)
    v_BNSU = _by_query_head(v_BKSU, q_BNTH)
    return _multiply("bnts,bnsu->bntu", p_BNTS, v_BNSU, q_BNTH).astype(q_BNTH.dtype), lse_BNT


def backward(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSU: jax.Array,
    lse_BNT: jax.Array,
    do_BNTU: jax.Array,
    delta_BNT: jax.Array,
    places: tuple[Places, Places],
    rule: Rule,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv), the last two in float32 for sums over devices.

    Args:
      delta_BNT: rowsum(do * o) less the gradient of lse, float32.
    """
    k_BKSH, v_BKSU = [clear(x, places[1]) for x in (k_BKSH, v_BKSU)]
    s_BNTS, seen_BNTS, slope_BNTS = _scores(q_BNTH, k_BKSH, places, rule)
    p_BNTS = jnp.where(seen_BNTS, jnp.exp(s_BNTS - lse_BNT[..., None]), 0.0)
    v_BNSU, k_BNSH = _by_query_head(v_BKSU, q_BNTH), _by_query_head(k_BKSH, q_BNTH)
    dp_BNTS = _multiply("bntu,bnsu->bnts", do_BNTU, v_BNSU, q_BNTH)
    ds_BNTS = p_BNTS * (dp_BNTS - delta_BNT[..., None]) * slope_BNTS * rule.scale
    dq_BNTH = _multiply("bnts,bnsh->bnth", ds_BNTS, k_BNSH, q_BNTH)
    dk_BNSH = _multiply("bnts,bnth->bnsh", ds_BNTS, q_BNTH, q_BNTH)
    dv_BNSU = _multiply("bnts,bntu->bnsu", p_BNTS, do_BNTU, q_BNTH)
    dk_BKSH, dv_BKSU = [_sum_groups(x, k_BKSH.shape[1]) for x in (dk_BNSH, dv_BNSU)]
    return dq_BNTH.astype(q_BNTH.dtype), dk_BKSH, dv_BKSU


def _scores(q_BNTH, k_BKSH, places, rule):
    """(scores, which are seen, the slope of the cap at each)."""
    s_BNTS = _multiply("bnth,bnsh->bnts", q_BNTH, _by_query_head(k_BKSH, q_BNTH), q_BNTH)
    s_BNTS, slope = s_BNTS * rule.scale, 1.0
    columns = jnp.arange(s_BNTS.shape[2]), jnp.arange(s_BNTS.shape[3])
    if rule.bias is not None:
        heads_N11 = jnp.arange(q_BNTH.shape[1])[:, None, None]
        q_BT1, k_B1S = positions(*places, *columns)
        s_BNTS += rule.bias(heads_N11, q_BT1[:, None], k_B1S[:, None])
    if rule.soft_cap is not None:
        s_BNTS = jnp.tanh(s_BNTS / rule.soft_cap) * rule.soft_cap
        slope = 1 - jnp.square(s_BNTS / rule.soft_cap)
    seen_BTS = visible(*places, rule, *columns)
    seen_BTS = jnp.ones((1, 1, 1), bool) if seen_BTS is None else seen_BTS
    seen_BNTS = jnp.broadcast_to(seen_BTS[:, None], s_BNTS.shape)
    return jnp.where(seen_BNTS, s_BNTS, NEG_INF), seen_BNTS, slope


def _multiply(equation, a, b, q):
    dtype = q.dtype  # of the operands; sums are in float32
    return jnp.einsum(
        equation, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
    )


def _by_query_head(x_BKSH, q_BNTH):
    return jnp.repeat(x_BKSH, q_BNTH.shape[1] // x_BKSH.shape[1], axis=1)


def _sum_groups(x_BNSH, num_kv_heads):
    B, N, S, H = x_BNSH.shape
    return x_BNSH.reshape(B, num_kv_heads, N // num_kv_heads, S, H).sum(2)
