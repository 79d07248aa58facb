"""What the loss of a linear output head means, with all logits at once.

Of a token with logits l over V words and target y:

    loss = lse - (1 - e) l_y - e mean_v(l_v) + z lse^2,    lse = log sum_v exp(l_v)

where e is the label smoothing (Szegedy et al. 2016, section 7) and z the weight of the squared
normaliser (PaLM, section 5). With a soft cap c, l = c tanh(x w / c) (Gemma 2, section 2).
"""

import jax
import jax.numpy as jnp


def linear_cross_entropy(
    x_ND: jax.Array,
    w_DV: jax.Array,
    targets_N: jax.Array,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """[N] in float32; 0 where the target is -1."""
    logits_NV = jnp.dot(x_ND, w_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_NV = soft_cap * jnp.tanh(logits_NV / soft_cap)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    hit_NV = targets_N[:, None] == jnp.arange(logits_NV.shape[1])
    wanted_N = jnp.sum(jnp.where(hit_NV, logits_NV, 0.0), axis=-1)
    mean_N = jnp.mean(logits_NV, axis=-1)
    losses_N = lse_N - (1 - label_smoothing) * wanted_N - label_smoothing * mean_N
    return jnp.where(targets_N >= 0, losses_N + z_loss * jnp.square(lse_N), 0.0)
