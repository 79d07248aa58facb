"""Multi-head latent attention (DeepSeek-V2, section 2.1; its equations 9 to 19 and 37 to 47).

Keys and values of all heads come out of one latent of C numbers a token, beside a rotary key of R
that the heads share; only these C + R are cached. Three equal forms: naive (keys and values of
every head, as in multi-head attention), absorbed (the up-projection of keys moved into the queries
and that of values behind the softmax, so that all heads attend to the latents themselves), and
either of them over the cache. Where both of YaRN's mscales are equal, its temperature enters the
softmax scale, squared, and not the angles.

Letters of this file: C key/value latent, Q query latent, R rotary width, U value head width, Z what
is cached of a token (C + R); H is the width of a head's part without rotation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.attention import Tokens, attend, attend_cached
from llmprep_jax.nn.cache import KVCache, Seen
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.remat import QKV, keep
from llmprep_jax.nn.rope import RopeScaling, apply_rope, yarn_mscale
from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.types import Array, Float, Int

LATENT_NORM_EPS = 1e-6  # of the two norms of latents, whatever the config says of the others


class MLA(nnx.Module):
    """Multi-head latent attention.

    Args:
      dim: D. num_heads: N. nope_dim: H. rope_dim: R. value_dim: U. kv_rank: C.
      q_rank: Q; None projects queries in one step (V2-Lite).
      rope_scaling: of the rotary part; its temperature enters the softmax scale.
      interleaved: whether rotary pairs are neighbours, as released.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        kv_rank: int,
        q_rank: int | None,
        rope_scaling: RopeScaling | None = None,
        interleaved: bool = True,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.kv_rank, self.interleaved, self.dtype = kv_rank, interleaved, jnp.dtype(compute.dtype)
        self.scale = (nope_dim + rope_dim) ** -0.5 * _temperature(rope_scaling) ** 2
        kind: dict[str, Any] = dict(compute=compute, rngs=rngs)

        def norm(size: int) -> RMSNorm:
            param_dtype = compute.param_dtype
            return RMSNorm(size, eps=LATENT_NORM_EPS, param_dtype=param_dtype, rngs=rngs)

        def up(rank: int, axis: str, head_dim: int) -> Einsum:
            shape, out = (rank, num_heads, head_dim), ("batch", None, "heads", None)
            return Einsum("BTC,CNH->BTNH", shape, (axis, "heads", "head"), out, **kind)

        def down(size: int) -> Einsum:
            axes, out = ("embed", "latent"), ("batch", None, None)
            return Einsum("BTD,DC->BTC", (dim, size), axes, out, **kind)

        self.q_a = None if q_rank is None else down(q_rank)
        self.q_norm = None if q_rank is None else norm(q_rank)
        q_in = (dim, "embed") if q_rank is None else (q_rank, "latent")
        self.q_b = up(*q_in, nope_dim + rope_dim)
        self.kv_a, self.kv_norm = down(kv_rank + rope_dim), norm(kv_rank)
        self.kv_b = up(kv_rank, "latent", nope_dim + value_dim)
        self.o = Einsum(
            "BTNH,NHD->BTD",
            (num_heads, value_dim, dim),
            ("heads", "head", "embed"),
            ("batch", "seq", "act_embed"),
            **kind,
        )

    @jax.named_scope("latent_attention")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: tuple[Array, Array],
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Attends within `x_BTD`, or over `cache` with x's latents written into it first.

        Args:
          tokens: positions and segments of x.
          rope: cos and sin of x's positions.
          cache: latents so far, one stream of one head; `begin` was called on it.
          layer: which layer's slots of the cache are meant.
        """
        (q_BTNH, q_BTNR), z_BTZ = keep((self.queries(x_BTD, rope), self.latents(x_BTD, rope)), QKV)
        if cache is None:
            return self.attend(q_BTNH, q_BTNR, z_BTZ, tokens, absorbed=False), None
        cache, seen = cache.update(layer, z_BTZ[:, :, None])
        if cache.is_fresh:
            return self.attend(q_BTNH, q_BTNR, z_BTZ, tokens, absorbed=False), cache
        num_used = jnp.max(cache.length_B)
        return self.attend_cached(q_BTNH, q_BTNR, seen, tokens, num_used), cache

    def queries(self, x_BTD: Float[Array, "B T D"], rope: tuple[Array, Array]) -> tuple:
        """(q_BTNH, q_BTNR): the parts of every head's query without and with rotation."""
        x_BTQ = x_BTD if self.q_a is None else self.q_norm(self.q_a(x_BTD))
        q_BTNH, q_BTNR = jnp.split(self.q_b(x_BTQ), [self.nope_dim], axis=-1)
        return q_BTNH, apply_rope(q_BTNR, *rope, interleaved=self.interleaved)

    def latents(self, x_BTD: Float[Array, "B T D"], rope: tuple[Array, Array]) -> Array:
        """What is cached of each token, [B, T, C + R]: its normed latent and its rotated key."""
        c_BTC, k_BTR = jnp.split(self.kv_a(x_BTD), [self.kv_rank], axis=-1)
        k_BT1R = apply_rope(k_BTR[:, :, None], *rope, interleaved=self.interleaved)
        return jnp.concatenate([self.kv_norm(c_BTC), k_BT1R[:, :, 0]], axis=-1)

    def attend(
        self,
        q_BTNH: Float[Array, "B T N H"],
        q_BTNR: Float[Array, "B T N R"],
        z_BSZ: Float[Array, "B S Z"],
        queries: Tokens,
        keys: Tokens | None = None,
        *,
        absorbed: bool,
    ) -> Float[Array, "B T D"]:
        """Attention over latents in one of the two forms, and the output projection."""
        if absorbed:
            look = functools.partial(attend, k_BSKH=z_BSZ[:, :, None], v_BSKU=None)
            return self._attend_absorbed(q_BTNH, q_BTNR, look, queries=queries, keys=keys)
        o_BTNU, _ = self._attend_naive(_join(q_BTNH, q_BTNR), z_BSZ, queries, keys)
        return self.o(o_BTNU)

    def attend_cached(
        self,
        q_BTNH: Float[Array, "B T N H"],
        q_BTNR: Float[Array, "B T N R"],
        seen: Seen,
        queries: Tokens,
        num_used: Int[Array, ""],
    ) -> Float[Array, "B T D"]:
        """The same over a cache, whose first `num_used` slots hold tokens, in the cheaper form."""
        cheaper = self.absorbed_is_cheaper(q_BTNH.shape[1], seen.places[0].shape[1])
        if cheaper and not self.kv_b.is_by_row:  # adapters by row leave no one matrix to absorb
            look = functools.partial(attend_cached, seen=seen)
            return self._attend_absorbed(q_BTNH, q_BTNR, look, queries=queries)
        q_BTNH = _join(q_BTNH, q_BTNR)
        z_BSZ, keys = seen.rows(q_BTNH.dtype)[0][:, :, 0], Tokens(*seen.places)
        o_BTNU = self._attend_by_parts(q_BTNH, z_BSZ, queries, keys, num_used)
        return self.o(seen.or_nan(o_BTNU))

    @jax.named_scope("naive")
    def _attend_naive(self, q_BTNH, z_BSZ, queries, keys):
        """(o_BTNU, lse_BTN)."""
        options = dict(scale=self.scale, return_lse=True)
        return attend(q_BTNH, *self.expand(z_BSZ), queries, keys, **options)

    def _attend_by_parts(self, q_BTNH, z_BSZ, queries, keys, num_used):
        """The naive form over T slots at a time, as far as there are tokens: no more latents than
        that are expanded at once, and of a prompt in blocks none behind the block.
        """
        num_slots = z_BSZ.shape[1]
        size = min(q_BTNH.shape[1], num_slots)

        def part(start):
            # the last part is moved to where it fits; what it shares with the one before is hidden
            first = jnp.minimum(start, num_slots - size)
            cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)  # noqa: E731
            is_new_S = first + jnp.arange(size) >= start
            segments_BS = jnp.where(is_new_S, cut(keys.segments_BT), 0)
            spans_BS = None if keys.spans_BT is None else cut(keys.spans_BT)
            at = Tokens(cut(keys.positions_BT), segments_BS, spans_BS)
            o_BTNU, lse_BTN = self._attend_naive(q_BTNH, cut(z_BSZ), queries, at)
            return o_BTNU.astype(jnp.float32), lse_BTN

        def add(sums, start):
            more = lambda sums: _merge(sums, part(start))  # noqa: E731
            return jax.lax.cond(start < num_used, more, lambda sums: sums, sums), None

        starts, sums = jnp.arange(size, num_slots, size), part(0)
        if len(starts):
            sums, _ = jax.lax.scan(add, sums, starts)
        return sums[0].astype(q_BTNH.dtype)

    @jax.named_scope("absorbed")
    def _attend_absorbed(self, q_BTNH, q_BTNR, look, **tokens):
        """`look` is attention to latents."""
        w = self.kv_b.weight().astype(self.dtype)
        if has_mesh():
            w = jax.reshard(w, spec(None, "heads", None, shape=w.shape))
        w_CNH, w_CNU = jnp.split(w, [self.nope_dim], axis=-1)
        sums = dict(preferred_element_type=jnp.float32)
        q_BTNC = jnp.einsum("BTNH,CNH->BTNC", q_BTNH.astype(self.dtype), w_CNH, **sums)
        q_BTNZ = _join(q_BTNC.astype(q_BTNR.dtype), q_BTNR)
        o_BTNC = look(q_BTNZ, scale=self.scale, value_width=self.kv_rank, **tokens)
        o_BTNU = jnp.einsum("BTNC,CNU->BTNU", o_BTNC.astype(self.dtype), w_CNU, **sums)
        return self.o(o_BTNU.astype(q_BTNR.dtype))

    def expand(self, z_BSZ: Float[Array, "B S Z"]) -> tuple[Array, Array]:
        """(k_BSNH, v_BSNU): every head's keys, H + R wide, and values, out of latents."""
        c_BSC, k_BSR = jnp.split(z_BSZ, [self.kv_rank], axis=-1)
        k_BSNH, v_BSNU = jnp.split(self.kv_b(c_BSC), [self.nope_dim], axis=-1)
        shape = (*k_BSNH.shape[:3], self.rope_dim)
        # float32 until it is broadcast, or its gradient is summed over heads in bf16
        k_BSNR = jax.lax.broadcast_in_dim(
            k_BSR.astype(jnp.float32), shape, (0, 1, 3), out_sharding=sharding_of(k_BSNH)
        )
        k_BSNH = jnp.concatenate([k_BSNH, k_BSNR.astype(k_BSNH.dtype)], axis=-1)
        return k_BSNH, v_BSNU

    def absorbed_is_cheaper(self, num_queries: int, num_keys: int) -> bool:
        """Whether T queries over S keys take fewer products absorbed than naive.

        For each head, naive: S C (H + U) to expand the keys and T S (H + R + U) to attend;
        absorbed: T C (H + U) and T S (2 C + R). At release sizes that is up to 170 queries.
        """
        T, S, C, H, R, U = num_queries, num_keys, self.kv_rank, *self._widths()
        naive, absorbed = S * C * (H + U), T * C * (H + U)
        return absorbed + T * S * (2 * C + R) < naive + T * S * (H + R + U)

    def _widths(self) -> tuple[int, int, int]:
        return self.nope_dim, self.rope_dim, self.value_dim


def _join(q_BTNH: Array, q_BTNR: Array) -> Float[Array, "B T N _"]:
    return jnp.concatenate([q_BTNH, q_BTNR], axis=-1)


def _merge(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs and log-sum-exps over all keys, of those over two parts of them."""
    lse_BTN = jnp.logaddexp(one[1], other[1])
    sums = [o_BTNU * jnp.exp(lse - lse_BTN)[..., None] for o_BTNU, lse in (one, other)]
    return sums[0] + sums[1], lse_BTN


def _temperature(scaling: RopeScaling | None) -> float:
    """m of the softmax scale m^2 / sqrt(H + R), from YaRN's mscale_all_dim."""
    if scaling is None or not scaling.mscale_all_dim:
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale_all_dim)
