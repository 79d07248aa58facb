"""DeepSeek-V2 (2405.04434) and V3 (2412.19437): latent attention, then a mixture of experts.

x <- x + MLA(RMSNorm(x)); x <- x + FFN(RMSNorm(x)), where the FFN is a SwiGLU in the first layers
and shared and routed experts in the others (V3, sections 2.1.1 and 2.1.2). After the last norm, D
modules predict further tokens one after the other (section 2.2). Layers of the two kinds are two
stacks, and a layer's number in a checkpoint, and its slot in the cache, count both.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models.deepseek import loss, weights
from llmprep_jax.models.deepseek.config import Config
from llmprep_jax.models.deepseek.drafts import Drafts
from llmprep_jax.nn.attention import Attention, Tokens, place_tokens
from llmprep_jax.nn.balance import Load
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.language_model import LanguageModel, SumLosses, Terms
from llmprep_jax.nn.linear import Einsum, Embed, Head
from llmprep_jax.nn.mla import MLA
from llmprep_jax.nn.mlp import GatedMlp
from llmprep_jax.nn.moe import MoE, with_bounded_buffers
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.remat import BLOCK_IN, MLP_IN, keep
from llmprep_jax.nn.rope import rope_angles, rope_frequencies
from llmprep_jax.nn.stack import scan, stack, take
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array, Bool, Float, Int
from llmprep_jax.weights.rows import Table

Rope = tuple[Array, Array]


class Block(nnx.Module):
    """One decoder layer, with experts or without."""

    def __init__(self, cfg: Config, is_moe: bool, *, rngs: nnx.Rngs):
        kind = dict(compute=cfg.compute, rngs=rngs)
        self.attn_norm, self.mlp_norm = _norm(cfg, rngs), _norm(cfg, rngs)
        self.attn = _attention(cfg, **kind)
        if is_moe:
            sizes = (cfg.dim, cfg.expert_dim, cfg.num_shared, cfg.routing)
            sent = dict(transport=cfg.transport, buffer_factor=cfg.buffer_factor)
            self.mlp = MoE(*sizes, balance=cfg.balance, **sent, **kind)
        else:
            self.mlp = GatedMlp(cfg.dim, cfg.mlp_dim, **kind)

    @jax.named_scope("block")
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: Rope,
        cache: KVCache | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Load | None]:
        """What follows the layer, the cache, and the load of its experts if it has any."""
        x_BTD = keep(x_BTD, BLOCK_IN)
        h_BTD, cache = self.attn(self.attn_norm(x_BTD), tokens, rope, cache=cache, layer=layer)
        x_BTD = keep(x_BTD + h_BTD, MLP_IN)
        h_BTD = self.mlp_norm(x_BTD)
        if isinstance(self.mlp, MoE):
            segments_BT = tokens.segments_BT
            h_BTD, load = self.mlp(h_BTD, None if segments_BT is None else segments_BT > 0)
            return x_BTD + h_BTD, cache, load
        return x_BTD + self.mlp(h_BTD), cache, None


class PairProjection(Einsum):
    """The layer that takes two states to one; as released, it is dense where others are packed."""


class MTP(nnx.Module):
    """One multi-token prediction module (V3, section 2.2, eq. 21 to 23).

    The embedding and the output head are the main model's. The released weights take the embedding
    first and the hidden state second, other than the paper's figure.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.embed_norm, self.hidden_norm, self.norm = [_norm(cfg, rngs) for _ in range(3)]
        self.proj = PairProjection(
            "BTI,ID->BTD",
            (2 * cfg.dim, cfg.dim),
            (None, "embed"),
            ("batch", "seq", "act_embed"),
            compute=cfg.compute,
            rngs=rngs,
        )
        self.block = Block(cfg, is_moe=True, rngs=rngs)

    @jax.named_scope("mtp")
    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        next_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        rope: Rope,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Load]:
        """Hidden states, to be unembedded, of one token further than `next`.

        Args:
          hidden_BTD: of the model or of the module before, after its last norm.
          next_BTD: embeddings of the tokens that came after those.
          tokens: where those of `hidden` stand; only differences of positions matter.
          layer: the module's own in a cache that `Drafts` made.
        """
        pair = [self.embed_norm(next_BTD), self.hidden_norm(hidden_BTD)]
        x_BTD = self.proj(jnp.concatenate(pair, axis=-1))
        x_BTD, cache, load = self.block(x_BTD, tokens, rope, cache, layer)
        return self.norm(x_BTD), cache, load


def _attention(cfg: Config, **kind: Any) -> nnx.Module:
    if cfg.attention == "heads":
        return Attention(cfg.dim, cfg.num_heads, cfg.num_heads, cfg.rotated_dim, **kind)
    return MLA(
        cfg.dim,
        cfg.num_heads,
        nope_dim=cfg.nope_dim,
        rope_dim=cfg.rope_dim,
        value_dim=cfg.value_dim,
        kv_rank=cfg.kv_rank,
        q_rank=cfg.q_rank,
        rope_scaling=cfg.rope_scaling,
        interleaved=cfg.rope_interleaved,
        **kind,
    )


def _norm(cfg: Config, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(cfg.dim, eps=cfg.norm_eps, param_dtype=cfg.compute.param_dtype, rngs=rngs)


class Model(LanguageModel):
    """Tokens to logits."""

    extras = ("mtp",)

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.embed = Embed(cfg.vocab_size, cfg.dim, compute=cfg.compute, rngs=rngs)
        num_moe = sum(cfg.is_moe)
        num_dense = cfg.num_layers - num_moe

        def layers(is_moe: bool, number: int) -> nnx.Module | None:
            make = functools.partial(Block, cfg, is_moe)
            return stack(make, number, rngs=rngs) if number else None

        self.dense_layers, self.moe_layers = layers(False, num_dense), layers(True, num_moe)
        self.norm = _norm(cfg, rngs)
        make_head = functools.partial(Head, cfg.dim, cfg.vocab_size, compute=cfg.compute)
        self.head = None if cfg.tie_embeddings else make_head(rngs=rngs)
        self.mtp = nnx.List([MTP(cfg, rngs=rngs) for _ in range(cfg.num_mtp)])

    @property
    def stacks(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(x for x in ("dense_layers", "moe_layers") if getattr(self, x) is not None)

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return weights.table(self.cfg)

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
        shape = x_BTD.shape[:2]
        place, cache = place_tokens(shape, positions, segment_ids, mask, cache, in_order, spans)
        x_BTD, cache, _ = self.run(x_BTD, place, cache)
        return x_BTD, None if cache is None else cache.end()

    def run(
        self, x_BTD: Float[Array, "B T D"], place: Tokens, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache | None, Load]:
        """The final hidden states, the cache, and the load of each layer that has experts."""
        cfg, rope = self.cfg, self.rope(place)

        def step(block, carry, layer, slot):
            x_BTD, cache, loads = carry
            x_BTD, cache, load = block(x_BTD, place, rope, cache, layer)
            if load is not None:
                loads = jax.tree.map(lambda stack, one: stack.at[slot].set(one), loads, load)
            return x_BTD, cache, loads

        num_moe = sum(cfg.is_moe)
        counts = jnp.zeros((num_moe, cfg.routing.num_experts))
        carry = x_BTD, cache, Load(counts, jnp.zeros(num_moe), jnp.zeros(num_moe))
        done = {True: 0, False: 0}
        for is_moe, numbers in cfg.runs:
            slots = np.arange(done[is_moe], done[is_moe] + len(numbers))
            layers = self.moe_layers if is_moe else self.dense_layers
            layers = take(layers, done[is_moe], done[is_moe] + len(numbers))
            carry = scan(step, layers, carry, np.array(numbers), slots, compute=cfg.compute)
            done[is_moe] += len(numbers)
        x_BTD, cache, loads = carry
        return self.norm(x_BTD), cache, loads

    def training_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Mapping[str, Array], sum_losses: SumLosses
    ) -> Terms:
        """What the model is trained by, see `loss.training_terms`."""
        return loss.training_terms(with_bounded_buffers(self), x_BTD, batch, sum_losses)

    @property
    def drafts(self) -> Drafts | None:
        """The multi-token prediction modules, None where there are none."""
        return Drafts(self) if len(self.mtp) else None

    def rope(self, place: Tokens) -> Rope:
        """cos and sin of the tokens' positions."""
        cfg = self.cfg
        frequencies = rope_frequencies(cfg.rotated_dim, cfg.rope_base, cfg.rope_scaling)
        return rope_angles(place.positions_BT, *frequencies)

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
        """An empty cache for `max_len` tokens a row, of kv_rank + rope_dim numbers a layer; of all
        heads' keys and values where attention is not latent.

        `dtype` and `pages` as `KVCache.create`.
        """
        return self.make_cache(self.cfg.num_layers, batch_size, max_len, dtype, **pages)

    def make_cache(
        self,
        num_layers: int,
        batch_size: int,
        max_len: int,
        dtype: str | jnp.dtype | None = None,
        **pages: int | None,
    ) -> KVCache:
        """An empty cache of so many layers."""
        cfg, heads, widths = self.cfg, 1, (self.cfg.kv_rank + self.cfg.rope_dim,)
        if cfg.attention == "heads":
            heads, widths = cfg.num_heads, (cfg.rotated_dim, cfg.rotated_dim)
        return KVCache.create(
            num_layers,
            batch_size,
            max_len,
            num_kv_heads=heads,
            widths=widths,
            dtype=dtype or cfg.compute.dtype,
            **pages,
        )
