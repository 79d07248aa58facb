"""What libraries' backward passes ask for that the rule of derivatives here does not keep."""

import jax
import jax.numpy as jnp


def outputs_like(do_BNTU: jax.Array, delta_BNT: jax.Array) -> jax.Array:
    """Arrays o in do's dtype whose rowsum(do * o) is delta.

    Libraries take outputs to make that sum of them, and nothing else; with such outputs the
    gradient of the log-sum-exp, which delta holds and they know nothing of, is theirs too. A row
    whose do is all 0 has none, and its outputs are 0: what its log-sum-exp alone owes is lost.
    """
    do = do_BNTU.astype(jnp.float32)
    top = jnp.max(jnp.abs(do), axis=-1, keepdims=True)
    unit = do / jnp.where(top > 0, top, 1.0)  # squares of small numbers would be 0
    scale = top * jnp.sum(unit * unit, axis=-1, keepdims=True)
    o = unit * (delta_BNT[..., None] / jnp.where(scale > 0, scale, 1.0))
    return o.astype(do_BNTU.dtype)
