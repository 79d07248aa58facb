"""Rotary position embedding (Su et al. 2021, RoFormer section 3.2) and its context-extension rules.

Pair i of a head's dimensions is rotated by the angle p * f_i, with f_i = base^(-2i/H). Two layouts
of the pairs are in use: half-split (i, i + H/2), which Llama and Gemma release, and interleaved
(2i, 2i + 1), the paper's and DeepSeek's. A context extension changes the frequencies (YaRN scales
cos and sin too), never the positions, so an angle is computed for any position and nothing is
clamped to a table's end.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from llmprep_jax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are changed to reach beyond the trained context.

    Attributes:
      kind: "linear" (Chen et al. 2023, position interpolation), "ntk" (base * factor^(H/(H-2))),
        "llama3" (Llama 3.1), or "yarn" (Peng et al. 2023).
      factor: by how much the context grows.
      original_max_seq_len: the trained context; used by llama3 and yarn.
      low_freq_factor, high_freq_factor: llama3's borders, in turns over the trained context.
      beta_fast, beta_slow: yarn's borders, in turns over the trained context.
      attention_factor: yarn's multiplier of cos and sin; None derives it (from mscale or factor).
      mscale, mscale_all_dim: DeepSeek's two yarn temperatures; 0 means not given.
    """

    kind: Literal["linear", "ntk", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def rope_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None = None
) -> tuple[np.ndarray, float]:
    """The angular frequencies [H/2] in float32, and the factor that multiplies cos and sin."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if scaling is not None and scaling.kind == "ntk":
        base = base * scaling.factor ** (head_dim / (head_dim - 2))
    inv_freq = (1.0 / np.float32(base) ** exponents).astype(np.float32)
    if scaling is None or scaling.kind == "ntk":
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return (inv_freq / np.float32(scaling.factor)).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3_frequencies(inv_freq, scaling), 1.0
    return _yarn_frequencies(inv_freq, head_dim, base, scaling), _yarn_attention_factor(scaling)


def _llama3_frequencies(inv_freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    turns = s.original_max_seq_len * inv_freq / (2 * math.pi)
    smooth = np.clip(
        (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0
    )
    return ((1 - smooth) * inv_freq / s.factor + smooth * inv_freq).astype(np.float32)


def _yarn_frequencies(
    inv_freq: np.ndarray, head_dim: int, base: float, s: RopeScaling
) -> np.ndarray:
    def pair_that_turns(turns: float) -> float:
        wavelength = s.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(base))

    low, high = pair_that_turns(s.beta_fast), pair_that_turns(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    # 0.001 keeps the ramp finite where both borders fall on one pair
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0.0, 1.0)
    return (inv_freq / s.factor * ramp + inv_freq * (1 - ramp)).astype(np.float32)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature 0.1 * mscale * ln(factor) + 1 (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(s: RopeScaling) -> float:
    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return yarn_mscale(s.factor, s.mscale) / yarn_mscale(s.factor, s.mscale_all_dim)
    return yarn_mscale(s.factor)


def rope_angles(
    positions_BT: Int[Array, "B T"], inv_freq: np.ndarray, factor: float = 1.0
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """cos and sin of every position's angles, [B, T, H/2] in float32, times `factor`."""
    angles = positions_BT[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x_BTNH: Float[Array, "B T N H"],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B T N H"]:
    """Rotates each pair of the last dimension: (a, b) -> (a cos - b sin, b cos + a sin)."""
    cos, sin = cos[:, :, None].astype(x_BTNH.dtype), sin[:, :, None].astype(x_BTNH.dtype)
    if interleaved:
        a, b = x_BTNH[..., 0::2], x_BTNH[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return pairs.reshape(x_BTNH.shape)
    a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
