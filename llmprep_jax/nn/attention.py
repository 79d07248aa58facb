"""Grouped-query attention (Ainslie et al. 2023): MHA when K = N, MQA when K = 1.

What may see what is described by values, not by a dense mask: each query and key has a position and
a segment (0 = padding or an empty cache slot), and a key is visible when it is of the same segment,
not later and within the window. Packing, padding, ring caches and sliding windows are this one
rule. Query heads of one group are neighbours (heads 0..G-1 share key head 0), as every checkpoint
has it. Softmax is float32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import apply_rope
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Bool, Float, Int

NEG_INF = -2.3819763e38  # finite, so that a row that sees nothing is uniform and not NaN
MIN_QUERY_BLOCK, MAX_QUERY_BLOCKS = 128, 8  # of `attend_in_order`; more blocks compile longer
NO_WINDOW = 2**31 - 1  # a window that hides nothing, where the window is a value


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Where a block of tokens stands.

    Attributes:
      positions_BT: index of each token in its segment, for RoPE and causality; the tokens of a
        segment stand in order, so no token of a row sees one further right.
      segments_BT: which document a token is of; 0 is padding; None: all of one document.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"] | None = None

    def block(self, start: int, end: int) -> "Tokens":
        """The tokens in columns `start` to `end`."""
        segments_BT = None if self.segments_BT is None else self.segments_BT[:, start:end]
        return type(self)(self.positions_BT[:, start:end], segments_BT)


def place_tokens(
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"] | None,
    segments_BT: Int[Array, "B T"] | None,
    mask_BT: Bool[Array, "B T"] | None,
    cache: KVCache | None = None,
) -> tuple[Tokens, KVCache | None]:
    """Where a model's input tokens stand, from what its caller gave; and the full cache, begun.

    Positions default to the count of real tokens in the row, on from those in the cache.

    Raises:
      ValueError: both a mask and segment ids, or more tokens than the cache has slots left; where
        its length is traced, logits are NaN instead (`nn.cache`).
    """
    if mask_BT is not None and segments_BT is not None:
        raise ValueError("give mask or segment_ids, not both: segment 0 is the padding")
    if mask_BT is not None:
        segments_BT = mask_BT.astype(jnp.int32)
    if positions_BT is None:
        real_BT = jnp.ones_like(tokens_BT) if segments_BT is None else segments_BT > 0
        positions_BT = jnp.cumsum(real_BT.astype(jnp.int32), axis=1) - 1
        if cache is not None:
            positions_BT += jnp.sum(cache.segments_BS > 0, axis=1, dtype=jnp.int32)[:, None]
        positions_BT = jnp.maximum(positions_BT, 0)
    # whole rows, whatever "seq" says: every query is held against every key
    positions_BT, segments_BT = [_whole_rows(x) for x in (positions_BT, segments_BT)]
    if cache is None:
        return Tokens(positions_BT, segments_BT), None
    num_used = 0 if isinstance(cache.length, jax.core.Tracer) else int(cache.length)
    if num_used + tokens_BT.shape[1] > cache.num_slots:
        raise ValueError(
            f"{tokens_BT.shape[1]} tokens do not fit a cache of {cache.num_slots} slots,"
            f" {num_used} of them taken; give init_cache a greater max_len"
        )
    segments_BT = jnp.ones_like(positions_BT) if segments_BT is None else segments_BT
    return Tokens(positions_BT, segments_BT), cache.begin(positions_BT, segments_BT)


def _whole_rows(x_BT: Array | None) -> Int[Array, "B T"] | None:
    if x_BT is None or not has_mesh():
        return x_BT
    return jax.reshard(x_BT, spec("batch", None, shape=x_BT.shape))


def visible(
    queries: Tokens, keys: Tokens, window: int | Int[Array, ""] | None = None, causal: bool = True
) -> Bool[Array, "B T S"]:
    """True where a query may see a key; `window` counts the query itself."""
    ahead_BTS = queries.positions_BT[:, :, None] - keys.positions_BT[:, None, :]
    seen_BTS = ahead_BTS >= 0 if causal else jnp.ones_like(ahead_BTS, bool)
    if window is not None:
        seen_BTS &= jnp.abs(ahead_BTS) < window
    if keys.segments_BT is not None:
        segments_BT = queries.segments_BT
        segments_BT = jnp.ones_like(queries.positions_BT) if segments_BT is None else segments_BT
        seen_BTS &= segments_BT[:, :, None] == keys.segments_BT[:, None, :]
        seen_BTS &= keys.segments_BT[:, None, :] > 0
    return seen_BTS


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSU: Float[Array, "B K S U"],
    seen_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    soft_cap: float | None = None,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "B T N U"]:
    """softmax(scale * q k^T) v over the visible keys, in float32 between the two products.

    Keys and values are laid out [B, K, S, H], as the cache holds them: one head's keys are one
    matrix. Values may be of another width U. `dtype` is that of the products' operands; None
    keeps q's.
    """
    dtype = dtype or q_BTNH.dtype
    B, T, N, H = q_BTNH.shape
    heads = spec("batch", "kv_heads", shape=k_BKSH.shape[:2])
    split = spec("heads", shape=(N,)) or (None,)
    if k_BKSH.shape[1] == 1:
        heads = heads and jax.P(heads[0], None)  # all query heads see the one, wherever they are
    elif has_mesh() and heads[1] is None and split[0] is not None:
        # the mesh splits query heads but not the fewer key heads: each query head gets a copy
        heads = spec("batch", "heads", shape=(B, N))
        # in float32, as the gradients of the copies are summed
        copies = [jnp.repeat(x.astype(jnp.float32), N // x.shape[1], 1) for x in (k_BKSH, v_BKSU)]
        k_BKSH, v_BKSU = [jax.reshard(x.astype(dtype), jax.P(*heads, None, None)) for x in copies]
    K, U = k_BKSH.shape[1], v_BKSU.shape[-1]
    head_axes = jax.P(*heads, split[0] if K == 1 else None, None) if has_mesh() else None
    q_BKGTH = q_BTNH.swapaxes(1, 2).astype(dtype)
    q_BKGTH = jax.lax.reshape(q_BKGTH, (B, K, N // K * T, H), out_sharding=head_axes)
    s_BKGTS = jnp.einsum(
        "bkgh,bksh->bkgs", q_BKGTH, k_BKSH.astype(dtype), preferred_element_type=jnp.float32
    ).reshape(B, K, N // K, T, -1)
    s_BKGTS = s_BKGTS * scale
    if soft_cap is not None:
        s_BKGTS = jnp.tanh(s_BKGTS / soft_cap) * soft_cap
    s_BKGTS = jnp.where(seen_BTS[:, None, None], s_BKGTS, NEG_INF)
    max_BKGT1 = jax.lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True))
    e_BKGTS = jnp.exp(s_BKGTS - max_BKGT1).reshape(B, K, N // K * T, -1)
    o_BKGTU = jnp.einsum(
        "bkgs,bksu->bkgu",
        e_BKGTS.astype(dtype),
        v_BKSU.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    # divided after the product: H quotients a query, not S
    sum_BKGT1 = jnp.sum(e_BKGTS, axis=-1, keepdims=True)
    if B * T == 1 and not has_mesh():
        return _divide_flat(o_BKGTU, sum_BKGT1).astype(q_BTNH.dtype).reshape(B, T, N, U)
    o_BKGTU = o_BKGTU / sum_BKGT1
    sharding = jax.P(heads[0], split[0] if K == 1 else heads[1], None, None) if has_mesh() else None
    o_BNTU = jax.lax.reshape(o_BKGTU, (B, N, T, U), out_sharding=sharding)
    return o_BNTU.swapaxes(1, 2).astype(q_BTNH.dtype)


def _divide_flat(o_BKGTU: Array, sum_BKGT1: Array) -> Float[Array, "1 D"]:
    """One token's quotients as one vector.

    Else XLA's CPU compiler takes heads apart in the inner loop of the product that follows: 187 us
    a layer against 40 in SmolLM2.
    """
    sums = jnp.broadcast_to(sum_BKGT1, o_BKGTU.shape).reshape(1, -1)
    return jnp.divide(*jax.lax.optimization_barrier((o_BKGTU.reshape(1, -1), sums)))


def attend_in_order(
    q_BTNH: Float[Array, "B T N H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTU: Float[Array, "B K T U"],
    tokens: Tokens,
    window: int | Int[Array, ""] | None = None,
    **options: Any,
) -> Float[Array, "B T N U"]:
    """Causal attention of a block of tokens to itself; `options` as `attend`.

    Queries go in blocks, each to the keys up to its end alone: what is masked is not computed,
    which halves a training step's attention on a CPU (7.0 ms against 14.1 forward and backward,
    SmolLM2-135M, 2 x 256). A window leaves no keys out: it is of positions, and with padding inside
    a row a key of the window may stand any number of columns before it.
    """
    T = q_BTNH.shape[1]
    size = max(MIN_QUERY_BLOCK, -(-T // MAX_QUERY_BLOCKS))
    outs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen_BTS = visible(tokens.block(start, end), tokens.block(0, end), window)
        k_BKSH, v_BKSU = k_BKTH[:, :, :end], v_BKTU[:, :, :end]
        outs.append(attend(q_BTNH[:, start:end], k_BKSH, v_BKSU, seen_BTS, **options))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, optional biases and query/key norms.

    Args:
      dim: D. num_heads: N. num_kv_heads: K. head_dim: H.
      qkv_bias, out_bias: biases of the projections (Qwen2 has the former).
      qk_norm_eps: epsilon of the (1 + w) norms of each head's queries and keys (Gemma 3); None: no
        norms.
      scale: of the scores; None is H^-0.5.
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
        scale: float | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.scale = head_dim**-0.5 if scale is None else scale
        # not matmul_dtype: XLA's CPU compiler has no batched bf16 product, and would keep the
        # probabilities for the backward pass in bf16 and in float32 (5 % of a step)
        self.dtype = jnp.dtype(compute.dtype)
        self.within = attend_in_order  # how a block attends to itself; LongLoRA trains with another

        def project(heads: int, axis: str) -> Einsum:
            return Einsum(
                "BTD,DNH->BTNH",
                (dim, heads, head_dim),
                ("embed", axis, "head"),
                ("batch", None, axis, None),  # every query may see every key
                bias=qkv_bias,
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
            compute=compute,
            rngs=rngs,
        )

        def norm() -> RMSNorm | None:
            if qk_norm_eps is None:
                return None
            kind = dict(eps=qk_norm_eps, zero_centered=True, param_dtype=compute.param_dtype)
            return RMSNorm(head_dim, **kind, rngs=rngs)

        self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: tuple[Array, Array],
        window: int | Int[Array, ""] | None = None,
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within `x_BTD`, or over `cache` with x's keys and values written into it first.

        Args:
          tokens: positions and segments of x.
          rope: cos and sin of x's positions.
          window: sliding window, None for all.
          cache: keys and values so far; it has `begin` called on it for these tokens.
          layer: which layer's slots of the cache are meant.
        """
        q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = apply_rope(q_BTNH, *rope), apply_rope(k_BTKH, *rope)
        k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        options = dict(scale=self.scale, dtype=self.dtype)
        if cache is None:
            return self.o(self.within(q_BTNH, k_BKTH, v_BKTH, tokens, window, **options)), None
        cache, k_BKSH, v_BKSH, slots = cache.update(layer, k_BKTH, v_BKTH)
        seen_BTS = visible(tokens, Tokens(*slots), window)
        return self.o(attend(q_BTNH, k_BKSH, v_BKSH, seen_BTS, **options)), cache
