"""LLaVA 1.5 (Liu et al. 2023): CLIP's patches, through a projector of two layers, among a Llama's
words.

The one thing a reader would get wrong: features are the last block's inputs, not its outputs, and
neither the class token nor the tower's last norm has a part in them.
"""

import dataclasses
import functools

import jax
from flax import nnx

from llmprep_jax.models import clip, llama
from llmprep_jax.models.llava.config import Config
from llmprep_jax.models.llava.weights import table
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import merge_images, split_rows
from llmprep_jax.nn.mlp import ACTIVATIONS
from llmprep_jax.nn.param import idle
from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array, Float
from llmprep_jax.weights.rows import Table


class Projector(nnx.Module):
    """Features [N, I, D] to the language model's width: two layers, an activation between."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        width, self.act = cfg.language.dim, cfg.projector_act
        make = functools.partial(
            Einsum, bias=cfg.projector_bias, compute=cfg.language.compute, rngs=rngs
        )
        whole = ("batch", None, "act_embed")
        self.up = make("NID,DE->NIE", (cfg.vision.dim, width), (None, "embed"), whole)
        self.down = make("NID,DE->NIE", (width, width), ("embed", None), whole)

    @jax.named_scope("projector")
    def __call__(self, x_NID: Float[Array, "N I D"]) -> Float[Array, "N I E"]:
        return self.down(ACTIVATIONS[self.act](self.up(x_NID)))


class Model(ComposedModel):
    """Tokens and images [N, 336, 336, 3] to logits."""

    stacks = ("language.layers", "vision.layers")

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.language = llama.Model(cfg.language, rngs=rngs)

        def tower(num_layers: int) -> clip.VisionTower:
            return clip.VisionTower(
                dataclasses.replace(cfg.vision, num_layers=num_layers), rngs=rngs
            )

        self.vision = tower(cfg.num_blocks)
        idle(self.vision.norm)
        num_unused = cfg.vision.num_layers - cfg.num_blocks
        self.unused = idle(tower(num_unused).layers) if num_unused and cfg.has_unused else None
        self.projector = Projector(cfg, rngs=rngs)

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return table(self.cfg)

    @property
    def image_work(self) -> dict[str, Work]:
        """Of the blocks that features are taken behind."""
        work = super().image_work
        attention = work["vision"].attention * self.cfg.num_blocks / self.cfg.vision.num_layers
        return {**work, "vision": work["vision"]._replace(attention=attention)}

    def image_features(self, images: Float[Array, "B M H W 3"]) -> Float[Array, "B J D"]:
        """Of normalised images, in the order of their tokens."""
        x_NID = self.vision.features(merge_images(images))
        if not self.cfg.keeps_class_token:
            x_NID = x_NID[:, 1:]
        return split_rows(self.projector(x_NID), len(images))
