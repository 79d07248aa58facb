"""LongLoRA (Chen et al. 2024): LoRA for longer contexts, with shifted sparse attention in training.

S2-Attn (section 3.2) cuts a row of T tokens into groups of G = T / 4 that attend within themselves,
at half the heads shifted by G / 2, so that information flows from group to group; embeddings and
norms are trained beside LoRA (section 3.3). The one thing a reader would get wrong: the shift does
not wrap around. The shifted heads' segments are [0, G/2), [G/2, 3G/2), ..., [T - G/2, T), as in the
authors' flash-attention code; rolled rows would let early tokens see the last ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.nn.attention import Tokens, attend_in_order
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
    """S2-Attn in place of `attend_in_order`, for queries and keys that are rotated already.

    A row that does not part into groups of an even size is padded at its end, which causal
    attention does not see.

    Attributes:
      groups: T / G; G is rounded up to an even size.
    """

    groups: int

    def __call__(
        self,
        q_BTNH: Float[Array, "B T N H"],
        k_BKTH: Float[Array, "B K T H"],
        v_BKTH: Float[Array, "B K T H"],
        tokens: Tokens,
        window: int | Int[Array, ""] | None = None,
        **options: Any,
    ) -> Float[Array, "B T N H"]:
        T = q_BTNH.shape[1]
        half = -(-T // (2 * self.groups))
        pad = 2 * half * self.groups - T
        if pad:
            q_BTNH, k_BKTH, v_BKTH = (
                _pad(q_BTNH, 1, pad),
                _pad(k_BKTH, 2, pad),
                _pad(v_BKTH, 2, pad),
            )
            tokens = _pad_tokens(tokens, pad)
        places = tokens.positions_BT, tokens.segments_BT
        straight, shifted = [(*qkv, *places) for qkv in _halves(q_BTNH, k_BKTH, v_BKTH)]
        attend = functools.partial(_attend_in_groups, window=window, **options)
        ends = attend(_cut(_ends, shifted, half), half)
        inner = attend(_cut(_inner, shifted, half), 2 * half)
        shifted_BTNH = jnp.concatenate([ends[:, :half], inner, ends[:, half:]], axis=1)
        out_BTNH = jnp.concatenate([attend(straight, 2 * half), shifted_BTNH], axis=2)
        return _lay(out_BTNH[:, :T], "heads")


def _pad(x: Array, axis: int, size: int) -> Array:
    return jnp.pad(x, [(0, size if dim == axis else 0) for dim in range(x.ndim)])


def _pad_tokens(tokens: Tokens, size: int) -> Tokens:
    """Tokens of segment 0 at the end, which nothing sees."""
    segments_BT = tokens.segments_BT
    segments_BT = jnp.ones_like(tokens.positions_BT) if segments_BT is None else segments_BT
    return Tokens(_pad(tokens.positions_BT, 1, size), _pad(segments_BT, 1, size))


def _halves(*qkv: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Queries, keys and values of the two halves of the heads.

    Key heads are repeated where a half of the queries would share one with the other.
    """
    q_BTNH, k_BKTH, v_BKTH = qkv
    N, K = q_BTNH.shape[2], k_BKTH.shape[1]
    if K % 2:
        k_BKTH, v_BKTH = (jnp.repeat(_lay(x), N // K, axis=1) for x in (k_BKTH, v_BKTH))
        K = N
    # on a mesh all heads come together first, since halves need not part over it
    q_BTNH, k_BKTH, v_BKTH = _lay(q_BTNH), _lay(k_BKTH), _lay(v_BKTH)
    n, k = N // 2, K // 2
    first = q_BTNH[:, :, :n], k_BKTH[:, :k], v_BKTH[:, :k]
    return first, (q_BTNH[:, :, n:], k_BKTH[:, k:], v_BKTH[:, k:])


def _lay(x: Array, heads: str | None = None) -> Array:
    """The array with its heads, of [B, T, N, H], over the mesh as told."""
    return jax.reshard(x, spec("batch", None, heads, None, shape=x.shape)) if has_mesh() else x


_AXES = (1, 2, 2, 1, 1)  # the tokens' axes of queries, keys, values, positions and segments


def _cut(how: Callable[..., Array], arrays: tuple[Array | None, ...], *sizes: int) -> tuple:
    """`how(array, axis, *sizes)` of each array and its axis of tokens."""
    pairs = zip(arrays, _AXES, strict=True)
    return tuple(None if x is None else how(x, axis, *sizes) for x, axis in pairs)


def _ends(x: Array, axis: int, half: int) -> Array:
    """The first and the last half of a group."""
    cut = functools.partial(jax.lax.slice_in_dim, x, axis=axis)
    return jnp.concatenate([cut(0, half), cut(x.shape[axis] - half, x.shape[axis])], axis=axis)


def _inner(x: Array, axis: int, half: int) -> Array:
    """What lies between these."""
    return jax.lax.slice_in_dim(x, half, x.shape[axis] - half, axis=axis)


def _part(x: Array, axis: int, size: int) -> Array:
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _attend_in_groups(
    arrays: tuple[Array | None, ...], size: int, window: Any, **options
) -> Float[Array, "B T N H"]:
    """Attention within groups of `size` neighbours; `arrays` as `_AXES` lists them."""

    def attend(q_BTNH, k_BKTH, v_BKTH, positions_BT, segments_BT):
        tokens = Tokens(positions_BT, segments_BT)
        return attend_in_order(q_BTNH, k_BKTH, v_BKTH, tokens, window, **options)

    out = jax.vmap(attend, in_axes=_AXES, out_axes=1)(*_cut(_part, arrays, size))
    return _lay(out.reshape(arrays[0].shape))
