"""Llama (Touvron et al. 2023; Llama 3 herd, 2024): pre-norm decoder with RoPE, GQA and SwiGLU.

x <- x + Attention(RMSNorm(x)); x <- x + SwiGLU(RMSNorm(x)), a final RMSNorm, and a head that may be
the embedding itself. Qwen2 (2024) is the same with biases on q, k and v, Qwen3 (2025) with norms of
each head's queries and keys, Mistral 7B (Jiang et al. 2023) with a window on all layers. Positions
and segments travel beside the tokens, so packing, left padding and cached decoding are all the same
forward pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.weights import WEIGHTS
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


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        compute = cfg.compute
        norm = functools.partial(
            RMSNorm, cfg.dim, eps=cfg.norm_eps, param_dtype=compute.param_dtype, rngs=rngs
        )
        self.attn_norm = norm()
        self.attn = Attention(
            cfg.dim,
            cfg.num_heads,
            cfg.num_kv_heads,
            cfg.head_dim,
            qkv_bias=cfg.qkv_bias,
            out_bias=cfg.out_bias,
            qk_norm_eps=cfg.norm_eps if cfg.qk_norm else None,
            compute=compute,
            rngs=rngs,
        )
        self.mlp_norm = norm()
        self.mlp = GatedMlp(cfg.dim, cfg.mlp_dim, bias=cfg.mlp_bias, compute=compute, rngs=rngs)

    @jax.named_scope("block")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: tuple[Array, Array],
        window: int | None = None,
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        x_BTD = keep(x_BTD, BLOCK_IN)
        h_BTD, cache = self.attn(self.attn_norm(x_BTD), tokens, rope, window, cache, layer)
        x_BTD = keep(x_BTD + h_BTD, MLP_IN)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Model(LanguageModel):
    """Tokens to logits."""

    weights, stacks = WEIGHTS, ("layers",)

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.embed = Embed(cfg.vocab_size, cfg.dim, compute=cfg.compute, rngs=rngs)
        self.layers = stack(functools.partial(Block, cfg), cfg.num_layers, rngs=rngs)
        self.norm = RMSNorm(
            cfg.dim, eps=cfg.norm_eps, param_dtype=cfg.compute.param_dtype, rngs=rngs
        )
        tied = cfg.tie_embeddings
        make_head = functools.partial(Head, cfg.dim, cfg.vocab_size, compute=cfg.compute)
        self.head = None if tied else make_head(rngs=rngs)

    @on_own_mesh
    def features(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        spans: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """The final hidden states, after the last norm, of what `embed_inputs` gives.

        `spans`: numbers of runs whose tokens see each other, 0 elsewhere; the rest as `__call__`.
        """
        cfg = self.cfg
        shape = x_BTD.shape[:2]
        place, cache = place_tokens(shape, positions, segment_ids, mask, cache, in_order, spans)
        inv_freq, factor = rope_frequencies(cfg.head_dim, cfg.rope_base, cfg.rope_scaling)
        rope = rope_angles(place.positions_BT, inv_freq, factor)

        def step(block, carry, layer, window):
            x_BTD, cache = carry
            return block(x_BTD, place, rope, window, cache, layer)

        x_BTD, cache = scan(
            step,
            self.layers,
            (x_BTD, cache),
            np.arange(cfg.num_layers),
            kinds=cfg.windows(),
            compute=cfg.compute,
        )
        return self.norm(x_BTD), None if cache is None else cache.end()

    @on_own_mesh
    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states to logits, float32."""
        return self.embed.unembed(x_BTD) if self.head is None else self.head(x_BTD)

    @on_own_mesh
    def init_cache(
        self,
        batch_size: int,
        max_len: int,
        dtype: str | jnp.dtype | None = None,
        **pages: int | None,
    ) -> KVCache:
        """An empty cache for `max_len` tokens a row; `dtype` and `pages` as `KVCache.create`."""
        cfg = self.cfg
        return KVCache.create(
            cfg.num_layers,
            batch_size,
            max_len,
            cfg.num_kv_heads,
            (cfg.head_dim, cfg.head_dim),
            dtype=dtype or cfg.compute.dtype,
            **pages,
        )
