"""A composed model of the smallest kind: a linear tower of four features an image beside any of the
language models."""

import dataclasses
import functools
from types import MappingProxyType

import jax
import numpy as np
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.model_config import ComposedConfig, LanguageConfig
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import merge_images, number_runs, of_rows, split_rows
from tests.models.tiny import CONFIGS
from tests.random_modules import fill

IMAGE, EACH, SIDE = 95, 4, 4  # the token of a feature, features and side of an image


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    language: LanguageConfig
    sees_all: bool = False  # whether an image's tokens see each other


class Model(ComposedModel):
    stacks = ("language.layers",)
    image_id, tokens_per_image, image_sizes = IMAGE, EACH, MappingProxyType({"images": SIDE})

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        make = registry.family_of(cfg.language).Model
        self.language = make(cfg.language, rngs=rngs)
        dim, compute = cfg.language.dim, cfg.language.compute
        self.tower = Einsum(
            "BTP,PD->BTD",
            (SIDE * SIDE * 3 // EACH, dim),
            (None, "embed"),
            ("batch", None, "act_embed"),
            compute=compute,
            rngs=rngs,
        )

    def image_features(self, images):
        patches = of_rows(merge_images(images), (EACH, SIDE * SIDE * 3 // EACH))
        return split_rows(self.tower(patches), len(images))

    def spans(self, tokens):
        return number_runs(tokens == IMAGE) if self.cfg.sees_all else None


@functools.cache
def seeing(name: str) -> Model:
    """With the language model of a tiny config."""
    return fill(jax.eval_shape(lambda: make(name)))


def make(name: str) -> Model:
    sees_all = name.startswith("gemma")
    return Model(Config(CONFIGS[name], sees_all), rngs=nnx.Rngs(0))


def prompt(*parts: int) -> list[int]:
    """Tokens: so many words, and images where there is a 0."""
    rng, row = np.random.default_rng(len(parts)), []
    for part in parts:
        row += [IMAGE] * EACH if part == 0 else rng.integers(1, IMAGE, part).tolist()
    return row


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 3)).astype(np.float32)
