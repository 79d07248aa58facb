"""RMSNorm (Zhang and Sennrich 2019) in its two released forms, LayerNorm (Ba et al. 2016), and
GroupNorm (Wu and He 2018).

All statistics are float32. The one thing a reader would get wrong: Gemma stores w and scales by 1 +
w in float32 before it casts (`zero_centered=True`), Llama casts first and multiplies by w
afterwards; in float32 they agree, in bf16 they round differently.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.media import of_rows
from llmprep_jax.nn.param import param, scale_by
from llmprep_jax.types import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * w over the last dimension, or * (1 + w) when `zero_centered`."""

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-6,
        zero_centered: bool = False,
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.eps, self.zero_centered = eps, zero_centered
        init = jax.nn.initializers.zeros if zero_centered else jax.nn.initializers.ones
        self.scale = param(rngs, (dim,), (None,), init, param_dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.zero_centered:
            return (x32 * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return scale_by(x32.astype(x.dtype), self.scale[...], x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last dimension."""

    def __init__(
        self, dim: int, *, eps: float = 1e-5, param_dtype: str = "float32", rngs: nnx.Rngs
    ):
        self.eps = eps
        self.scale = param(rngs, (dim,), (None,), jax.nn.initializers.ones, param_dtype)
        self.bias = param(rngs, (dim,), (None,), jax.nn.initializers.zeros, param_dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """(x - mean) / std * scale + bias of pictures [B, Y, X, D], over all places and the channels of
    a group; a group's channels are neighbours."""

    def __init__(
        self,
        dim: int,
        num_groups: int,
        *,
        eps: float = 1e-5,
        param_dtype: str = "float32",
        rngs: nnx.Rngs,
    ):
        self.eps, self.num_groups = eps, num_groups
        self.scale = param(rngs, (dim,), (None,), jax.nn.initializers.ones, param_dtype)
        self.bias = param(rngs, (dim,), (None,), jax.nn.initializers.zeros, param_dtype)

    def __call__(self, x: Float[Array, "B Y X D"]) -> Float[Array, "B Y X D"]:
        (Y, X, D), G = x.shape[1:], self.num_groups
        x32 = of_rows(x.astype(jnp.float32), (Y * X, G, D // G))
        x32 = x32 - jnp.mean(x32, axis=(1, 3), keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=(1, 3), keepdims=True) + self.eps)
        x32 = of_rows(x32, (Y, X, D))
        y = x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
