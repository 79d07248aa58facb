"""LongLoRA (Chen et al. 2024): LoRA for longer contexts, with shifted sparse attention in training.

S2-Attn (section 3.2) cuts a row of T tokens into groups of G = T / 4 that attend within themselves,
at half the heads shifted by G / 2, so that information flows from group to group; embeddings and
norms are trained beside LoRA (section 3.3). The one thing a reader would get wrong: the shift does
not wrap around. The shifted heads' segments are [0, G/2), [G/2, 3G/2), ..., [T - G/2, T), as in the
authors' flash-attention code; rolled rows would let early tokens see the last ones.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.nn.attention import Tokens, attend
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.targets import Number, Targets
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LongLoRA(LoRA):
    """Settings of LongLoRA; a LoRA whose model attends in groups in `peft.train_mode`.

    Everything else sees full attention: evaluation, generation, PEFT. A folder of PEFT's format is
    that of LoRA and has no `groups`, so what is loaded from it trains with full attention.

    Attributes:
      groups: T / G.
    """

    rank: int = 8
    alpha: Number = 16.0
    _: dataclasses.KW_ONLY
    targets: Targets = ("attn.q", "attn.k", "attn.v", "attn.o")
    modules_to_save: Targets = r".*(embed|norm).*"
    groups: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.groups, int) or self.groups < 2:
            raise ValueError(f"LongLoRA's groups is {self.groups!r}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class ShiftedAttention:
    """S2-Attn in place of `attend`, for queries and keys that are rotated already.

    A group is a row of its own. Rows of tokens are padded at the end to whole groups, and for the
    shifted heads by half a group at both ends.

    Attributes:
      groups: T / G; G is rounded up to an even size.
    """

    groups: int

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        tokens: Tokens,
        **options: Any,
    ) -> Float[Array, "B T N H"]:
        T = q_BTNH.shape[1]
        half = -(-T // (2 * self.groups))
        end = 2 * half * self.groups - T
        straight, shifted = _halves(q_BTNH, k_BTKH, v_BTKH)
        outs = []
        for qkv, start, stop in ((straight, 0, end), (shifted, half, end + half)):
            rows = [_fold(x, start, stop, 2 * half) for x in (*qkv, *_places(tokens))]
            out = attend(*rows[:3], Tokens(*rows[3:], in_order=tokens.in_order), **options)
            B, _, N, _ = qkv[0].shape
            outs.append(_reshape(out, (B, -1, N, out.shape[-1]))[:, start : start + T])
        return _lay(jnp.concatenate(outs, axis=2), "heads")


def _places(tokens: Tokens) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Positions, and segments of which the padding has none."""
    segments_BT = tokens.segments_BT
    return tokens.positions_BT, (
        jnp.ones_like(tokens.positions_BT) if segments_BT is None else segments_BT
    )


def _fold(x: Array, start: int, end: int, size: int) -> Array:
    """Each row of tokens as rows of `size`, zeros before and behind it."""
    x = jnp.pad(x, [(0, 0), (start, end), *[(0, 0)] * (x.ndim - 2)])
    return _reshape(x, (-1, size, *x.shape[2:]))


def _reshape(x: Array, shape: tuple[int, ...]) -> Array:
    """A reshape that leaves rows where they lie on a mesh."""
    known = math.prod(size for size in shape if size != -1)
    shape = tuple(x.size // known if size == -1 else size for size in shape)
    rows = jax.P(jax.typeof(x).sharding.spec[0]) if has_mesh() else None
    return jax.lax.reshape(x, shape, out_sharding=rows)


def _halves(*qkv: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Queries, keys and values of the two halves of the heads.

    Key heads are repeated where a half of the queries would share one with the other.
    """
    q_BTNH, k_BTKH, v_BTKH = map(_lay, qkv)  # on a mesh halves need not part over it
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    if K % 2:
        k_BTKH, v_BTKH = (jnp.repeat(x, N // K, axis=2) for x in (k_BTKH, v_BTKH))
    arrays = [(x, x.shape[2] // 2) for x in (q_BTNH, k_BTKH, v_BTKH)]
    first = tuple(x[:, :, :half] for x, half in arrays)
    return first, tuple(x[:, :, half:] for x, half in arrays)


def _lay(x: Array, heads: str | None = None) -> Array:
    """The array with its heads, of [B, T, N, H], over the mesh as told."""
    return jax.reshard(x, spec("batch", None, heads, None, shape=x.shape)) if has_mesh() else x
