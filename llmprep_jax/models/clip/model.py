"""CLIP (Radford et al. 2021): a ViT with a class token, and a causal text tower read at its end.

Features are projected into one space; logits are dot products of unit vectors times exp(scale). The
one thing a reader would get wrong: images pass a norm before their blocks, and what `VisionTower`'s
`features` gives has not passed the one after them, which is of the class token alone.

Random weights are those of the paper's code, the text tower's rule for both towers.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.models.clip.config import GREATEST, Config, TextConfig, VisionConfig
from llmprep_jax.models.clip.weights import WEIGHTS
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.linear import Einsum, Embed
from llmprep_jax.nn.norm import LayerNorm
from llmprep_jax.nn.param import param
from llmprep_jax.nn.stack import stack
from llmprep_jax.nn.two_towers import TwoTowers
from llmprep_jax.nn.vit import (
    Block,
    Inits,
    PatchEmbed,
    Positions,
    normal,
    pick_tokens,
    run_blocks,
)
from llmprep_jax.types import Array, Bool, Float, Int


def _blocks(cfg: TextConfig | VisionConfig, causal: bool, rngs: nnx.Rngs) -> nnx.Module:
    std, by_depth = cfg.dim**-0.5, (2 * cfg.num_layers) ** -0.5
    inits = Inits(*map(normal, (std, std * by_depth, std * 2**-0.5, std * by_depth)))
    kind = dict(act=cfg.act, norm_eps=cfg.norm_eps, causal=causal, inits=inits)
    sizes = (cfg.dim, cfg.mlp_dim, cfg.num_heads)
    make = functools.partial(Block, *sizes, **kind, compute=cfg.compute)
    return stack(make, cfg.num_layers, rngs=rngs)


def _norm(cfg: TextConfig | VisionConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(cfg.dim, eps=cfg.norm_eps, param_dtype=cfg.compute.param_dtype, rngs=rngs)


class TextTower(nnx.Module):
    """Tokens to the state of the one that ends the text, [B, D]."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg, kind = cfg, dict(compute=cfg.compute, rngs=rngs)
        self.embed = Embed(cfg.vocab_size, cfg.dim, **kind)
        self.positions = Positions(cfg.max_seq_len, cfg.dim, std=0.01, **kind)
        self.layers = _blocks(cfg, True, rngs)
        self.norm = _norm(cfg, rngs)

    def features(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The hidden states before the last norm."""
        x_BTD = self.positions(self.embed(tokens_BT))
        return run_blocks(self.layers, x_BTD, self.cfg.compute, mask_BT)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B D"]:
        """The hidden state that stands for the text, after the last norm."""
        eos_id = self.cfg.eos_id
        ends_BT = tokens_BT if eos_id == GREATEST else tokens_BT == eos_id
        # the first of the greatest; of a text that has no end, its first token, as released
        columns_B = jnp.argmax(ends_BT, axis=1)
        return self.norm(pick_tokens(self.features(tokens_BT, mask_BT), columns_B))


class VisionTower(nnx.Module):
    """Normalised images to the state of their class token, [B, D]."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.cfg, std, kind = cfg, cfg.dim**-0.5, dict(compute=cfg.compute, rngs=rngs)
        sizes = (cfg.image_size, cfg.patch_size, cfg.dim)
        self.patches = PatchEmbed(*sizes, bias=False, init=normal(0.02), **kind)
        self.positions = Positions(cfg.num_tokens, cfg.dim, std=std, class_std=std, **kind)
        self.pre_norm = _norm(cfg, rngs)
        self.layers = _blocks(cfg, False, rngs)
        self.norm = _norm(cfg, rngs)

    def features(
        self, images_BHWC: Float[Array, "B H W C"], stop: int | None = None
    ) -> Float[Array, "B I D"]:
        """The class token's and the patches' hidden states, before the last norm.

        Args:
          stop: blocks that are run, from the end if negative; None: all.
        """
        x_BID = self.pre_norm(self.positions(self.patches(images_BHWC)))
        return run_blocks(self.layers, x_BID, self.cfg.compute, stop=stop)

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """The class token's hidden state, after the last norm."""
        return self.norm(self.features(images_BHWC)[:, 0])


class Model(TwoTowers):
    """Texts and images to unit vectors."""

    weights = WEIGHTS

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.text, self.vision = TextTower(cfg.text, rngs=rngs), VisionTower(cfg.vision, rngs=rngs)

        def project(dim: int) -> Einsum:
            shape, axes = (dim, cfg.projection_dim), ("embed", None)
            kind = dict(init=normal(dim**-0.5), compute=cfg.compute, rngs=rngs)
            return Einsum("BD,DE->BE", shape, axes, ("batch", None), **kind)

        self.text_projection = project(cfg.text.dim)
        self.vision_projection = project(cfg.vision.dim)
        scale_init = jax.nn.initializers.constant(cfg.logit_scale_init)
        self.logit_scale = param(rngs, (), (), scale_init, cfg.compute.param_dtype)

    def text_features(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
    ) -> Float[Array, "B E"]:
        # float32 from here on: unit vectors are no larger than 1, and their logits 100 times that
        return self.text_projection(self.text(tokens_BT, mask_BT).astype(jnp.float32))

    def image_features(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        return self.vision_projection(self.vision(images_BHWC).astype(jnp.float32))
