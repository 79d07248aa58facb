"""Gemma 3's language model (Gemma 3 technical report 2025, section 2.1): five local layers to a
global one.

x <- x + norm(Attention(norm(x))); x <- x + norm(GeGLU(norm(x))), every norm scaling by 1 + w;
queries and keys normed per head; local layers rotate by base 10k and see a window, global ones by
base 1M and see all. The one thing a reader would get wrong: embeddings are multiplied by sqrt(D)
rounded to the dtype of the weights (25.25 for 270M in bf16, not 25.298), the tied head is not.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models.gemma3_text.config import Config
from llmprep_jax.models.gemma3_text.weights import WEIGHTS
from llmprep_jax.nn.attention import Attention, Tokens, place_tokens
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.language_model import LanguageModel
from llmprep_jax.nn.linear import Embed, Head
from llmprep_jax.nn.mlp import GatedMlp
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.remat import BLOCK_IN, MLP_IN, keep
from llmprep_jax.nn.rope import rope_angles, rope_frequencies
from llmprep_jax.nn.stack import scan, stack
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array, Bool, Float, Int


class Caches(NamedTuple):
    """Keys and values of the local layers, a ring of the window's size, and of the global ones."""

    local: KVCache
    full: KVCache


class Block(nnx.Module):
    """One decoder layer with norms before and after each of its halves."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        compute = cfg.compute
        norm = functools.partial(
            RMSNorm,
            cfg.dim,
            eps=cfg.norm_eps,
            zero_centered=True,
            param_dtype=compute.param_dtype,
            rngs=rngs,
        )
        self.attn_norm, self.post_attn_norm = norm(), norm()
        self.attn = Attention(
            cfg.dim,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            qk_norm_eps=cfg.norm_eps,
            zero_centered=True,
            scale=cfg.query_scale**-0.5,
            compute=compute,
            rngs=rngs,
        )
        self.mlp_norm, self.post_mlp_norm = norm(), norm()
        self.mlp = GatedMlp(cfg.dim, cfg.mlp_dim, act="gelu_tanh", compute=compute, rngs=rngs)

    @jax.named_scope("block")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: tuple[Array, Array],
        window: int | None,
        cache: KVCache | None = None,
        slot: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """`slot` is the layer's place among those of its kind, which is where its cache is."""
        x_BTD = keep(x_BTD, BLOCK_IN)
        h_BTD, cache = self.attn(self.attn_norm(x_BTD), tokens, rope, window, cache, slot)
        x_BTD = keep(x_BTD + self.post_attn_norm(h_BTD), MLP_IN)
        return x_BTD + self.post_mlp_norm(self.mlp(self.mlp_norm(x_BTD))), cache


class Model(LanguageModel):
    """Tokens to logits."""

    weights, stacks = WEIGHTS, ("layers",)

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.embed = Embed(cfg.vocab_size, cfg.dim, compute=cfg.compute, rngs=rngs)
        self.layers = stack(functools.partial(Block, cfg), cfg.num_layers, rngs=rngs)
        self.norm = RMSNorm(
            cfg.dim,
            eps=cfg.norm_eps,
            zero_centered=True,
            param_dtype=cfg.compute.param_dtype,
            rngs=rngs,
        )
        make_head = functools.partial(Head, cfg.dim, cfg.vocab_size, compute=cfg.compute)
        self.head = None if cfg.tie_embeddings else make_head(rngs=rngs)

    @on_own_mesh
    def features(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        spans: Int[Array, "B T"] | None = None,
        cache: Caches | None = None,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B T D"], Caches | None]:
        """The final hidden states, after the last norm, of what `embed_inputs` gives.

        `spans`: numbers of runs whose tokens see each other, 0 elsewhere; the rest as `__call__`.
        """
        cfg = self.cfg
        place, full_cache = place_tokens(
            x_BTD.shape[:2],
            positions,
            segment_ids,
            mask,
            cache and cache.full,
            in_order,
            spans,
        )
        if cache is not None:
            local_cache = cache.local.begin(place.positions_BT, place.segments_BT, place.spans_BT)
            cache = Caches(local_cache, full_cache)
        ropes = {True: self._rope(place, is_local=True), False: self._rope(place, is_local=False)}

        def step(block, carry, slot, is_local):
            x_BTD, caches = carry
            field, window = ("local", cfg.window) if is_local else ("full", None)
            cache = caches and getattr(caches, field)
            with jax.named_scope("local" if is_local else "global"):
                x_BTD, cache = block(x_BTD, place, ropes[is_local], window, cache, slot)
            return x_BTD, caches and caches._replace(**{field: cache})

        is_local_L = np.array(cfg.local_layers())
        slot_L = np.where(is_local_L, np.cumsum(is_local_L), np.cumsum(~is_local_L)) - 1
        x_BTD, cache = scan(
            step,
            self.layers,
            (x_BTD, cache),
            slot_L,
            kinds=cfg.local_layers(),
            compute=cfg.compute,
        )
        return self.norm(x_BTD), cache and Caches(cache.local.end(), cache.full.end())

    @on_own_mesh
    def embed_inputs(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What `features` takes: embeddings times sqrt(D), rounded as the weights are."""
        x_BTD = self.embed(tokens)
        scale = jnp.asarray(self.cfg.dim**0.5, self.embed.table_dtype)
        return x_BTD * scale.astype(x_BTD.dtype)

    def _rope(self, place: Tokens, is_local: bool) -> tuple[Array, Array]:
        cfg = self.cfg
        base = (cfg.rope_local_base,) if is_local else (cfg.rope_base, cfg.rope_scaling)
        return rope_angles(place.positions_BT, *rope_frequencies(cfg.head_dim, *base))

    @property
    def logits_soft_cap(self) -> float | None:
        return self.cfg.logits_soft_cap

    @on_own_mesh
    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states to logits, float32."""
        logits_BTV = self.embed.unembed(x_BTD) if self.head is None else self.head(x_BTD)
        cap = self.logits_soft_cap
        return logits_BTV if cap is None else jnp.tanh(logits_BTV / cap) * cap

    @on_own_mesh
    def init_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: str | jnp.dtype | None = None,
        **pages: int | None,
    ) -> Caches:
        """Empty caches for `max_len` tokens a row; local layers keep the last `window` of them.

        `dtype` as `KVCache.create`, and `pages`, which are the global layers'.
        """
        cfg = self.cfg
        num_local = sum(cfg.local_layers())
        create = functools.partial(
            KVCache.create,
            batch_size=batch_size,
            num_kv_heads=cfg.num_kv_heads,
            widths=(cfg.head_dim, cfg.head_dim),
            dtype=dtype or cfg.compute.dtype,
        )
        return Caches(
            create(num_local, num_slots=min(cfg.window, max_len), is_ring=True),
            create(cfg.num_layers - num_local, num_slots=max_len, **pages),
        )
