"""Balance of the load among experts: losses (DeepSeek-V2, section 2.1.4; DeepSeek-V3, eq. 17 to
20), the bias rule without a loss (2408.15664; DeepSeek-V3, section 2.1.2), and measures of it.

Losses multiply how often each expert is chosen, which has no gradient, with the scores it is given,
which have one. All losses are of one sequence at a time, averaged with the sequences' tokens as
weights; counts over a whole batch can be even where no sequence is.

Letters of this file: E experts, A experts of a token, G groups of experts, each on one device.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.types import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Balance:
    """Weights of the balance losses.

    Attributes:
      expert: alpha_1, of the load of each expert (V3: alpha, 1e-4).
      device: alpha_2, of the load of each group's device.
      communication: alpha_3, of the tokens that are sent to each group's device.
    """

    expert: float = 0.0
    device: float = 0.0
    communication: float = 0.0

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss at all."""
        return bool(self.expert or self.device or self.communication)


NO_BALANCE = Balance()


class Load(NamedTuple):
    """What one router did with a batch, or several stacked.

    Attributes:
      counts_E: tokens that each expert was chosen for, float32; padding is not counted.
      dropped: choices that no expert computed.
      loss: the weighted balance losses, the mean over tokens of their sequences'.
    """

    counts_E: Float[Array, "... E"]
    dropped: Float[Array, "..."]
    loss: Float[Array, "..."]


def measure(
    experts_BTA: Int[Array, "B T A"],
    scores_BTE: Float[Array, "B T E"],
    mask_BT: Bool[Array, "B T"] | None,
    balance: Balance,
    num_groups: int = 1,
    num_active_groups: int = 1,
) -> Load:
    """The load of a batch; `mask_BT` is True for real tokens, None where all are."""
    E, A, G = scores_BTE.shape[-1], experts_BTA.shape[-1], num_groups
    hits_BTE = jnp.sum(jax.nn.one_hot(experts_BTA, E, dtype=jnp.float32), axis=-2)
    if mask_BT is not None:
        hits_BTE *= mask_BT[..., None]
    counts_E, none = jnp.sum(hits_BTE, axis=(0, 1)), jnp.zeros(())
    if not balance.has_loss:
        return Load(counts_E, none, none)
    real_BT = jnp.ones_like(scores_BTE[..., 0]) if mask_BT is None else mask_BT.astype(jnp.float32)
    tokens_B = jnp.sum(real_BT, axis=1)
    each_B1 = jnp.maximum(tokens_B, 1.0)[:, None]
    # sigmoid scores are made shares first (V3, eq. 19); softmax's are shares as they are
    shares_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    p_BE = jnp.sum(shares_BTE * real_BT[..., None], axis=1) / each_B1
    f_BE = jnp.sum(hits_BTE, axis=1) / each_B1 * (E / A)
    loss_B = balance.expert * jnp.sum(f_BE * p_BE, axis=-1)
    p_BG = jnp.sum(p_BE.reshape(-1, G, E // G), axis=-1)
    if balance.device:
        f_BG = jnp.mean(f_BE.reshape(-1, G, E // G), axis=-1)
        loss_B += balance.device * jnp.sum(f_BG * p_BG, axis=-1)
    if balance.communication:
        sent_BTG = jnp.max(hits_BTE.reshape(*hits_BTE.shape[:2], G, E // G), axis=-1)
        f_BG = jnp.sum(sent_BTG, axis=1) / each_B1 * (G / num_active_groups)
        loss_B += balance.communication * jnp.sum(f_BG * p_BG, axis=-1)
    loss = jnp.sum(loss_B * tokens_B) / jnp.maximum(jnp.sum(tokens_B), 1.0)
    return Load(counts_E, none, loss)


def rebalanced(bias_E: Array, counts_E: Array, rate: float | Array) -> Float[Array, "... E"]:
    """bias + rate * sign(mean load - load), of each router (2408.15664, algorithm 1)."""
    return bias_E + rate * jnp.sign(jnp.mean(counts_E, axis=-1, keepdims=True) - counts_E)


def load_metrics(counts_LE: Float[Array, "L E"]) -> dict[str, Array]:
    """How even the load is, each the mean over layers.

    Returns:
      max_vio: by how much the busiest expert is above the mean, as a share of it (2408.15664, eq.
      4); load_entropy: of the shares, as a share of that of an even load.
    """
    E = counts_LE.shape[-1]
    mean_L1 = jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1e-9)
    max_vio_L = jnp.max(counts_LE / mean_L1, axis=-1) - 1.0
    p_LE = counts_LE / (mean_L1 * E)
    entropy_L = -jnp.sum(jnp.where(p_LE > 0, p_LE * jnp.log(p_LE), 0.0), axis=-1)
    return {"max_vio": jnp.mean(max_vio_L), "load_entropy": jnp.mean(entropy_L) / jnp.log(E)}
