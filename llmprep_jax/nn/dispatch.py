"""Experts on several devices: tokens go to where their experts are, and the results come back.

A token of a mixture of experts is computed by A of E experts. Their weights lie over the expert
axis of the mesh, the tokens over every batch axis, that one included, so copies of tokens change
devices twice a layer. `run_experts` does that in one `jax.shard_map`; what crosses the network is
up to a transport (`TRANSPORTS`):

    ragged    each copy to its expert's device by `ragged_all_to_all`, dropless (TPU)
    emulated  the same, with that collective written out for backends that lack it (CPU)
    ring      all tokens to all devices, which sum what their own experts make of them (GPU)
    capacity  `all_to_all` of a fixed number of rows for each expert; what is over is dropped

The one thing a reader would get wrong: the A experts of a token are distinct, as those of a top-k
are, and the buffers are sized for that: a device of E/n experts gets at most min(A, E/n) copies of
a token.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.types import Array, Float, Int

# (rows sorted by expert, rows of each expert, weights of the experts) -> rows
Apply = Callable[[Array, Array, Any], Array]
_TOKENS = ("batch", "seq", None)
_DEFAULTS = {"cpu": "emulated", "gpu": "ring", "cuda": "ring", "rocm": "ring", "tpu": "ragged"}


class Experts(NamedTuple):
    """The experts of one device, and how to run them.

    Attributes:
      apply: what runs them.
      params: their weights, each with a leading expert dimension.
      num_local: how many there are.
      axis: mesh axes that the experts lie over; None if each device has all of them.
      num_slots: rows that a device sends to each expert, for "capacity".
    """

    apply: Apply
    params: Any
    num_local: int
    axis: str | tuple[str, ...] | None
    num_slots: int


class Transport(Protocol):
    """Computes this device's tokens with the experts of all devices along `experts.axis`."""

    def __call__(
        self, x_MD: Array, experts_MA: Array, weights_MA: Array, experts: Experts
    ) -> tuple[Array, Array | int]:
        """(weighted sums in float32, number of copies of these tokens that were dropped)."""


def run_experts(
    x_BTD: Float[Array, "B T D"],
    experts_BTA: Int[Array, "B T A"],
    weights_BTA: Float[Array, "B T A"],
    params: Any,
    axes: Any,
    apply: Apply,
    *,
    num_experts: int,
    transport: str | None = None,
    capacity_factor: float | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, ""]]:
    """y = sum over a of weights_a * expert_a(x), summed in float32.

    Args:
      experts_BTA: the A experts of each token, all different.
      params: weights of the experts, a pytree of arrays whose first dimension is E.
      axes: tree of the same structure, of tuples of logical axes, the first of which is "expert".
        A dimension called "mlp" stays sharded, and results are summed over its shards.
      apply: (rows_MD, sizes_E, params) -> rows_MD, for rows that are sorted by expert; it gets the
        experts and "mlp" columns of one device. Rows beyond the sum of sizes do not count.
      transport: a name in `TRANSPORTS`; the default goes by the platform of the mesh's devices.
      capacity_factor: for "capacity": rows for each expert as a multiple of an even load; None
        makes room for every copy.

    Returns:
      y in x's dtype and sharding, and how many copies of tokens were dropped.

    Raises:
      ValueError: an unknown transport, or experts that the expert axis does not divide.
    """
    B, T, D = x_BTD.shape
    x = x_BTD.reshape(-1, D)
    ids = experts_BTA.reshape(-1)
    w = weights_BTA.reshape(-1)
    A = experts_BTA.shape[-1]
    order = jnp.argsort(ids, stable=True)
    sizes = jnp.bincount(ids, length=num_experts).astype(jnp.int32)
    y = apply(x[order // A], sizes, params)
    y = y.astype(jnp.float32) * w[order][:, None]
    out = jnp.zeros((B * T, D)).at[order // A].add(y)
    return out.reshape(B, T, D).astype(x_BTD.dtype), jnp.int32(0)
