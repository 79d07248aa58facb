"""Grouped-query attention (Ainslie et al. 2023): MHA when K = N, MQA when K = 1.

Projections, norms of queries and keys, rotation, cache; the softmax itself is one function of
`kernels.flash_attention`. What may see what is described by values, not by a dense mask: each token
has a position and a segment (0 = padding or an empty cache slot), and a key is visible when it is
of the same segment, not later and within the window. Packing, padding, ring caches and sliding
windows are this one rule.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.kernels.flash_attention import attention
from llmprep_jax.nn.cache import KVCache, Seen, widen
from llmprep_jax.nn.linear import Einsum, Init, fan_in_normal
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.remat import QKV, keep
from llmprep_jax.nn.rope import apply_rope
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where a block of tokens stands.

    Attributes:
      positions_BT: index of each token in its segment, for RoPE and causality.
      segments_BT: which document a token is of; 0 is padding; None: all of one document.
      spans_BT: numbers of runs whose tokens see each other, 0 elsewhere; None: there is none.
      in_order: whether the tokens of each segment stand in the order of their positions, which
        are then known to grow along a row before they have values.
      is_counted: whether they also grow by no more than one a column.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None
    spans_BT: Int[Array, "B T"] | None = None
    in_order: bool = dataclasses.field(default=False, metadata=dict(static=True))
    is_counted: bool = dataclasses.field(default=False, metadata=dict(static=True))


def place_tokens(
    shape: tuple[int, int],
    positions_BT: Int[Array, "B T"] | None,
    segments_BT: Int[Array, "B T"] | None,
    mask_BT: Bool[Array, "B T"] | None,
    cache: KVCache | None = None,
    in_order: bool = False,
    spans_BT: Int[Array, "B T"] | None = None,
) -> tuple[Tokens, KVCache | None]:
    """Where a model's input tokens [B, T] stand, from what its caller gave; and the full cache,
    begun.

    Positions default to the count of real tokens in the row, on from those in the cache;
    `in_order` says that given ones grow along each document too.

    Raises:
      ValueError: both a mask and segment ids, or more tokens than the cache has slots left; where
        its length is traced, logits are NaN instead (`nn.cache`).
    """
    if mask_BT is not None and segments_BT is not None:
        raise ValueError("give mask or segment_ids, not both: segment 0 is the padding")
    if mask_BT is not None:
        segments_BT = mask_BT.astype(jnp.int32)
    is_counted = positions_BT is None
    if is_counted:
        if segments_BT is None:
            by_row = spec("batch", None, shape=shape)
            real_BT = jnp.ones(shape, jnp.int32, out_sharding=by_row)
        else:
            real_BT = segments_BT > 0
        positions_BT = jnp.cumsum(real_BT.astype(jnp.int32), axis=1) - 1
        if cache is not None:
            positions_BT += jnp.sum(cache.segments_BS > 0, axis=1, dtype=jnp.int32)[:, None]
        positions_BT = jnp.maximum(positions_BT, 0)
    # whole rows, whatever "seq" says: every query is held against every key
    places = (positions_BT, segments_BT, spans_BT)
    positions_BT, segments_BT, spans_BT = [_whole_rows(x) for x in places]
    order = (in_order or is_counted, is_counted)
    if cache is None:
        return Tokens(positions_BT, segments_BT, spans_BT, *order), None
    is_traced = isinstance(cache.length_B, jax.core.Tracer)
    num_used = 0 if is_traced else int(jnp.max(cache.length_B))
    if num_used + shape[1] > cache.num_slots:
        raise ValueError(
            f"{shape[1]} tokens do not fit a cache of {cache.num_slots} slots,"
            f" {num_used} of them taken; give init_cache a greater max_len"
        )
    segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
    place = Tokens(positions_BT, segments_BT, spans_BT, *(order if cache.is_fresh else ()))
    return place, cache.begin(positions_BT, segments_BT, spans_BT)


def _whole_rows(x_BT: Array | None) -> Int[Array, "B T"] | None:
    if x_BT is None or not has_mesh():
        return x_BT
    return jax.reshard(x_BT, spec("batch", None, shape=x_BT.shape))


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKU: Float[Array, "B S K U"] | None,
    queries: Tokens,
    keys: Tokens | None = None,
    *,
    window: int | None = None,
    **options: Any,
) -> Any:
    """Attention of tokens to others, or to themselves where `keys` is None, [B, T, N, U].

    `options` are those of `kernels.flash_attention.attention`.
    """
    at_Q, at_K = queries.positions_BT, (queries if keys is None else keys).positions_BT
    if keys is None and queries.in_order:
        if window is not None and queries.is_counted and window >= q_BTNH.shape[1]:
            window = None
        # a window is of positions, which padding inside a row parts from columns
        if window is None or (queries.is_counted and queries.segments_BT is None):
            at_Q = at_K = None
    return attention(
        q_BTNH,
        k_BSKH,
        v_BSKU,
        window=window,
        q_positions=at_Q,
        k_positions=at_K,
        q_segments=queries.segments_BT,
        k_segments=(queries if keys is None else keys).segments_BT,
        q_spans=queries.spans_BT,
        k_spans=(queries if keys is None else keys).spans_BT,
        **options,
    )


def attend_cached(
    q_BTNH: Float[Array, "B T N H"], seen: Seen, queries: Tokens, **options: Any
) -> Float[Array, "B T N U"]:
    """`attend` to what a cache holds; NaN in rows that it has no room for. `scale` is an option."""
    k, v, *_ = *seen.streams, None
    positions_BS, segments_BS, spans_BS = *seen.places, *[None] * (3 - len(seen.places))
    o_BTNU = attention(
        widen(q_BTNH, k.shape[-1]),
        k,
        v,
        q_positions=queries.positions_BT,
        k_positions=positions_BS,
        q_segments=queries.segments_BT,
        k_segments=segments_BS,
        q_spans=None if spans_BS is None else queries.spans_BT,
        k_spans=spans_BS,
        pages=seen.pages_BJ,
        layer=seen.layer,
        **dict(zip(("k_scales", "v_scales"), seen.scales, strict=False)),
        **options,
    )
    return seen.or_nan(o_BTNU if v is None else o_BTNU[..., : seen.widths[-1]])


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, optional biases and query/key norms.

    Args:
      dim: D. num_heads: N. num_kv_heads: K. head_dim: H.
      qkv_bias, out_bias: biases of the projections (Qwen2 has the former).
      qk_norm_eps: epsilon of the norms of each head's queries and keys, before they are rotated;
        None: no norms.
      zero_centered: whether these scale by 1 + w (Gemma 3) or by w (Qwen3).
      scale: of the scores; None is H^-0.5.
      causal: whether later tokens are hidden; encoders see all.
      inits: of the weights of queries, keys and values, and of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        zero_centered: bool = False,
        scale: float | None = None,
        causal: bool = True,
        inits: tuple[Init, Init] = (fan_in_normal, fan_in_normal),
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.scale = head_dim**-0.5 if scale is None else scale
        self.causal = causal
        self.within = attend  # how tokens attend to themselves; LongLoRA trains with another

        def project(heads: int, axis: str) -> Einsum:
            return Einsum(
                "BTD,DNH->BTNH",
                (dim, heads, head_dim),
                ("embed", axis, "head"),
                ("batch", None, axis, None),  # every query may see every key
                bias=qkv_bias,
                init=inits[0],
                compute=compute,
                rngs=rngs,
            )

        self.q = project(num_heads, "heads")
        self.k = project(num_kv_heads, "kv_heads")
        self.v = project(num_kv_heads, "kv_heads")
        self.o = Einsum(
            "BTNH,NHD->BTD",
            (num_heads, head_dim, dim),
            ("heads", "head", "embed"),
            ("batch", "seq", "act_embed"),
            bias=out_bias,
            init=inits[1],
            compute=compute,
            rngs=rngs,
        )

        def norm() -> RMSNorm | None:
            if qk_norm_eps is None:
                return None
            kind = dict(eps=qk_norm_eps, zero_centered=zero_centered)
            return RMSNorm(head_dim, **kind, param_dtype=compute.param_dtype, rngs=rngs)

        self.q_norm, self.k_norm = norm(), norm()

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: tuple[Array, Array] | None = None,
        window: int | None = None,
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
        keys: Tokens | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within `x_BTD`, or over `cache` with x's keys and values written into it first.

        Args:
          tokens: positions and segments of x.
          rope: cos and sin of x's positions; None: no rotation, as in encoders.
          window: sliding window, None for all.
          cache: keys and values so far; it has `begin` called on it for these tokens.
          layer: which layer's slots of the cache are meant.
          keys: what x is as keys, where that is other segments: padding that none sees and that
            sees; without a cache.
        """
        q_BTNH, k_BTKH, v_BTKH = keep((self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)), QKV)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        options = dict(window=window, scale=self.scale, causal=self.causal)
        if cache is None:
            if keys is not None:
                options["keys"] = keys
            return self.o(self.within(q_BTNH, k_BTKH, v_BTKH, tokens, **options)), None
        cache, seen = cache.update(layer, k_BTKH, v_BTKH)
        if cache.is_fresh:
            return self.o(attend(q_BTNH, k_BTKH, v_BTKH, tokens, **options)), cache
        return self.o(attend_cached(q_BTNH, seen, tokens, **options)), cache
