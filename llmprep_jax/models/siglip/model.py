"""SigLIP (Zhai et al. 2023): a ViT with attention pooling, and a text tower read at its last place.

Logits are dot products of unit vectors times exp(scale), plus a bias. The one thing a reader would
get wrong: texts are padded to the full length, and the last token, padding or not, stands for the
text; all tokens see each other, padding too, unless a mask hides it.

Random weights are those of the paper's code (big_vision), but for the MLPs' biases: zeros here,
1e-6 at random there.
"""

import functools
import math

import jax
from flax import nnx

from llmprep_jax.models.siglip.config import Config, TextConfig, VisionConfig
from llmprep_jax.models.siglip.weights import WEIGHTS
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.linear import Einsum, Embed
from llmprep_jax.nn.norm import LayerNorm
from llmprep_jax.nn.param import param
from llmprep_jax.nn.stack import stack
from llmprep_jax.nn.two_towers import TwoTowers
from llmprep_jax.nn.vit import AttentionPool, Block, Inits, PatchEmbed, Positions, run_blocks
from llmprep_jax.types import Array, Bool, Float, Int

_INITS = Inits(*[jax.nn.initializers.glorot_uniform] * 4)
SCALE, BIAS = math.log(10), -10.0  # section 3.2


def _blocks(cfg: TextConfig | VisionConfig, rngs: nnx.Rngs) -> nnx.Module:
    kind = dict(act=cfg.act, norm_eps=cfg.norm_eps, inits=_INITS, compute=cfg.compute)
    make = functools.partial(Block, cfg.dim, cfg.mlp_dim, cfg.num_heads, **kind)
    return stack(make, cfg.num_layers, rngs=rngs)


def _norm(cfg: TextConfig | VisionConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(cfg.dim, eps=cfg.norm_eps, param_dtype=cfg.compute.param_dtype, rngs=rngs)


class TextTower(nnx.Module):
    """Tokens to a vector, [B, E]."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg, std, kind = cfg, cfg.dim**-0.5, dict(compute=cfg.compute, rngs=rngs)
        self.embed = Embed(cfg.vocab_size, cfg.dim, std=std, **kind)
        self.positions = Positions(cfg.max_seq_len, cfg.dim, std=std, **kind)
        self.layers = _blocks(cfg, rngs)
        self.norm = _norm(cfg, rngs)
        shape, axes = (cfg.dim, cfg.projection_dim or cfg.dim), ("embed", None)
        self.head = Einsum("BD,DE->BE", shape, axes, ("batch", None), bias=True, **kind)

    def features(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The hidden states before the last norm."""
        x_BTD = self.positions(self.embed(tokens_BT))
        return run_blocks(self.layers, x_BTD, self.cfg.compute, mask_BT)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """What the last token's hidden state is projected to."""
        x_BD = self.norm(self.features(tokens_BT, mask_BT)[:, -1])
        return self.head(x_BD.astype("float32"))


class VisionTower(nnx.Module):
    """Normalised images to a vector, [B, D]."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.cfg, std, kind = cfg, cfg.dim**-0.5, dict(compute=cfg.compute, rngs=rngs)
        self.patches = PatchEmbed(cfg.image_size, cfg.patch_size, cfg.dim, bias=True, **kind)
        self.positions = Positions(cfg.num_tokens, cfg.dim, std=std, **kind)
        self.layers = _blocks(cfg, rngs)
        self.norm = _norm(cfg, rngs)
        sizes = (cfg.dim, cfg.mlp_dim, cfg.num_heads)
        more = dict(act=cfg.act, norm_eps=cfg.norm_eps, inits=_INITS)
        self.pool = AttentionPool(*sizes, **more, **kind) if cfg.has_pool else None

    def features(
        self, images_BHWC: Float[Array, "B H W C"], stop: int | None = None
    ) -> Float[Array, "B I D"]:
        """The patches' hidden states: after the last norm, or within the blocks, before it.

        Args:
          stop: blocks that are run, from the end if negative; None: all, and the norm.
        """
        x_BID = self.positions(self.patches(images_BHWC))
        x_BID = run_blocks(self.layers, x_BID, self.cfg.compute, stop=stop)
        return self.norm(x_BID) if stop is None else x_BID

    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B D"]:
        """What the pooling gathers."""
        return self.pool(self.features(images_BHWC))


class Model(TwoTowers):
    """Texts and images to unit vectors."""

    weights = WEIGHTS

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.text, self.vision = TextTower(cfg.text, rngs=rngs), VisionTower(cfg.vision, rngs=rngs)

        def scalar(value: float) -> nnx.Variable:
            init = jax.nn.initializers.constant(value)
            return param(rngs, (), (), init, cfg.compute.param_dtype)

        self.logit_scale, self.logit_bias = scalar(SCALE), scalar(BIAS)

    def text_features(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
    ) -> Float[Array, "B E"]:
        return self.text(tokens_BT, mask_BT)

    def image_features(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        return self.vision(images_BHWC)
