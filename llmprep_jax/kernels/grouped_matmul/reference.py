"""What a grouped product means: each row times the matrix of its group, all of them tried.

Groups lie one after the other, so a row's group is told by its index alone, and rows after the last
group belong to none and give zeros.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y_m = x_m w_e for the group e that row m is of, [M, F] in float32."""
    ends_E, rows_M = jnp.cumsum(sizes_E), jnp.arange(len(x_MD))
    is_of_ME = (rows_M[:, None] < ends_E) & (rows_M[:, None] >= ends_E - sizes_E)
    x_MD = jnp.where(is_of_ME.any(1, keepdims=True), x_MD, 0)
    y_MEF = jnp.einsum("MD,EDF->MEF", x_MD, w_EDF, preferred_element_type=jnp.float32)
    return jnp.where(is_of_ME[..., None], y_MEF, 0).sum(1)
