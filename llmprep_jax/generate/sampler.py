"""From logits to the next token: penalties, temperature, and the truncations of the tail.

The order is Hugging Face's, since the settings do not commute: repetition penalty (Keskar et al.
2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). The one thing a
reader would get wrong: each row draws from a key of its own (seed, row, step), so a row's text does
not depend on what it is batched with.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Key

from llmprep_jax.nn.attention import NEG_INF
from llmprep_jax.types import Array, Bool, Float, Int

_COLDEST = 1e-30  # logits divided by less overflow float32, and every token is alike again


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely. top_p: the fewest whose probabilities reach p. min_p: those at
        least min_p times as likely as the most likely one. None: not applied.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens that the
        prompt or the text so far holds; 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        rules = (
            (0 <= self.temperature < math.inf, "temperature", "finite and at least 0"),
            (self.top_k is None or self.top_k >= 1, "top_k", "at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, "top_p", "in (0, 1]"),
            (self.min_p is None or 0 <= self.min_p <= 1, "min_p", "in [0, 1]"),
            (0 < self.repetition_penalty < math.inf, "repetition_penalty", "finite and above 0"),
        )
        for holds, name, must in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {must}")


def shape_logits(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, sampling: Sampling
) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from; what is ruled out is NEG_INF.

    Args:
      seen_BV: tokens that the prompt or the text so far holds; needed for a repetition penalty
        only.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / max(sampling.temperature, _COLDEST)
    if sampling.top_k is not None:
        k = min(sampling.top_k, logits_BV.shape[-1])
        kth_B1 = jax.lax.top_k(logits_BV, k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, NEG_INF, logits_BV)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = _keep_top_p(logits_BV, sampling.top_p)
    if sampling.min_p is not None:
        p_BV = jax.nn.softmax(logits_BV)
        least_B1 = sampling.min_p * jnp.max(p_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(p_BV < least_B1, NEG_INF, logits_BV)
    return logits_BV


def _keep_top_p(logits_BV: Array, top_p: float) -> Array:
    """Keeps the most likely tokens whose probabilities, summed, first reach top_p."""
    order_BV = jnp.argsort(logits_BV, axis=-1)  # ascending, as the reference sums from the tail
    tail_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1)), axis=-1)
    dropped_BV = (tail_BV <= 1 - top_p).at[:, -1].set(False)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    dropped_BV = jnp.zeros_like(dropped_BV).at[rows_B1, order_BV].set(dropped_BV)
    return jnp.where(dropped_BV, NEG_INF, logits_BV)


def draw(
    logits_BV: Float[Array, "B V"], sampling: Sampling, keys_B: Key[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of each row, from logits that `shape_logits` made."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
