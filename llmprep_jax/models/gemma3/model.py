"""Gemma 3 with images (Gemma 3 technical report 2025, section 2.1): a SigLIP tower, whose patches
are averaged to 256 tokens, normed and projected into the language model.

An image's tokens see each other, whatever their order; all else is causal. The one thing a reader
would get wrong: the language model's embeddings are scaled by sqrt(D), an image's features are not.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.models import gemma3_text, siglip
from llmprep_jax.models.gemma3.config import Config
from llmprep_jax.models.gemma3.weights import WEIGHTS
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import merge_images, number_runs, split_rows
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.param import idle
from llmprep_jax.types import Array, Float, Int


class Projector(nnx.Module):
    """Patches [N, I, D] to fewer tokens [N, J, E]: means over squares, a norm and a product."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        vision, compute = cfg.vision, cfg.language.compute
        self.num_tokens = cfg.tokens_per_image
        self.norm = RMSNorm(
            vision.dim,
            eps=vision.norm_eps,
            zero_centered=True,
            param_dtype=compute.param_dtype,
            rngs=rngs,
        )
        self.proj = Einsum(
            "NJD,DE->NJE",
            (vision.dim, cfg.language.dim),
            (None, "embed"),
            ("batch", None, "act_embed"),
            compute=compute,
            rngs=rngs,
        )

    @jax.named_scope("projector")
    def __call__(self, x_NID: Float[Array, "N I D"]) -> Float[Array, "N J E"]:
        N, I, D = x_NID.shape
        side = math.isqrt(self.num_tokens)
        width = math.isqrt(I) // side
        squares = x_NID.reshape(N, side, width, side, width, D)
        x_NJD = jnp.mean(squares, axis=(2, 4)).reshape(N, self.num_tokens, D)
        return self.proj(self.norm(x_NJD))


class Model(ComposedModel):
    """Tokens and images [N, 896, 896, 3] to logits."""

    weights, stacks = WEIGHTS, ("language.layers", "vision.layers")

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.language = gemma3_text.Model(cfg.language, rngs=rngs)
        self.vision = siglip.VisionTower(cfg.vision, rngs=rngs)
        if self.vision.pool is not None:
            idle(self.vision.pool)  # read and saved, as some files have it
        self.projector = Projector(cfg, rngs=rngs)

    def image_features(self, images: Float[Array, "B M H W 3"]) -> Float[Array, "B J D"]:
        """Of normalised images, in the order of their tokens."""
        x_NID = self.vision.features(merge_images(images))
        return split_rows(self.projector(x_NID), len(images))

    def spans(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The number of each image in its row, 0 elsewhere."""
        return number_runs(tokens == self.image_id)
