"""A family that is none: a tower with a fused qkv and a head that is not used, and a small Llama.

Its files are spelled as Gemma 3's are: stored under `language_model.model.`, in transformers'
memory under `model.language_model.`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.models.llama.model import Model as Llama
from llmprep_jax.models.llama.weights import WEIGHTS as LLAMA
from llmprep_jax.models.model_config import UNSAVED, ComposedConfig
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Compute, idle
from llmprep_jax.nn.stack import scan, stack
from llmprep_jax.types import Array, Float
from llmprep_jax.weights.rows import Table, Whole
from tests.random_modules import random_module

N, H, P = 4, 2, 4  # heads of the tower, their width, patches of an image
DEPTH, WIDTH, PIXELS, IMAGE_ID = 2, 8, 12, 95


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """Of the toy."""

    language: LlamaConfig = LlamaConfig(
        vocab_size=96,
        dim=32,
        mlp_dim=48,
        num_layers=1,
        head_dim=8,
        max_seq_len=64,
        num_heads=4,
        num_kv_heads=2,
    )
    model_type: str = "toy"
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    return Config().with_decoder(tie_embeddings=hf["tie_word_embeddings"])


def to_hf(cfg: Config) -> dict[str, Any]:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return {**ids, "model_type": "toy", "tie_word_embeddings": cfg.language.tie_embeddings}


MODEL_TYPES, PRESETS = ("toy",), {}


def linear(eqn: str, *shape: int, rngs: nnx.Rngs, compute: Compute, bias: bool = False) -> Einsum:
    axes = (None,) * len(shape), (None,) * len(eqn.split("->")[1])
    return Einsum(eqn, shape, *axes, bias=bias, compute=compute, rngs=rngs)


class Block(nnx.Module):
    """x + o(q tanh(k) + v), whose q, k and v are stored as one."""

    def __init__(self, compute: Compute, *, rngs: nnx.Rngs):
        own = dict(rngs=rngs, compute=compute)
        for name in ("q", "k", "v"):
            setattr(self, name, linear("BPD,DNH->BPNH", WIDTH, N, H, bias=True, **own))
        self.o = linear("BPNH,NHD->BPD", N, H, WIDTH, **own)

    def __call__(self, x_BPD: Array) -> Array:
        return x_BPD + self.o(self.q(x_BPD) * jnp.tanh(self.k(x_BPD)) + self.v(x_BPD))


class Tower(nnx.Module):
    """Patches to features, [B, P, D]; `pool` is in files and computes nothing."""

    def __init__(self, compute: Compute, *, rngs: nnx.Rngs):
        self.compute = compute
        self.patch = linear("BPI,ID->BPD", PIXELS, WIDTH, rngs=rngs, compute=compute)
        self.blocks = stack(lambda rngs: Block(compute, rngs=rngs), DEPTH, rngs=rngs)
        self.pool = idle(Block(compute, rngs=rngs))

    def __call__(self, x_BPI: Array) -> Array:
        step = lambda block, x_BPD: block(x_BPD)  # noqa: E731
        return scan(step, self.blocks, self.patch(x_BPI), compute=self.compute)


class Model(ComposedModel):
    """The toy."""

    stacks = ("vision.blocks", "language.layers")
    image_id, tokens_per_image, image_sizes = IMAGE_ID, P, MappingProxyType({"images": 4})

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.vision = Tower(cfg.compute, rngs=rngs)
        self.projector = linear(
            "BPD,DE->BPE", WIDTH, cfg.language.dim, rngs=rngs, compute=cfg.compute
        )
        self.language = Llama(cfg.language, rngs=rngs)

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return WEIGHTS

    def image_features(self, images: Float[Array, "B M H W C"]) -> Float[Array, "B J D"]:
        """Four patches an image."""
        return self.projector(self.vision(images.reshape(len(images), -1, PIXELS)))

    def probe(self) -> dict[str, Array]:
        """Logits of an image and words."""
        tokens = jnp.asarray([[5, *[IMAGE_ID] * P, 7, 8]])
        return {"logits": self(tokens, images=IMAGES[:1]).logits}


def _blocks(ours: str, theirs: str) -> dict[str, tuple]:
    qkv = f"{theirs}.attn.qkv"
    return {
        **{
            f"{ours}.{x}.w": (f"{qkv}.weight", "(n h) d -> d n h", (i, 3))
            for i, x in enumerate("qkv")
        },
        **{f"{ours}.{x}.b": (f"{qkv}.bias", "(n h) -> n h", (i, 3)) for i, x in enumerate("qkv")},
        f"{ours}.o.w": (f"{theirs}.attn.proj.weight", "d (n h) -> n h d"),
    }


VISION = Table(
    {
        "patch.w": ("patch_embed.weight", "d i -> i d"),
        **_blocks("blocks", "blocks.{l}"),
        **_blocks("pool", "attn_pool"),
    }
)
PROJECTOR = Table({"projector.w": ("multi_modal_projector.linear.weight", "e d -> d e")})
WEIGHTS = dataclasses.replace(
    VISION.below("vision", "vision_tower.")
    | PROJECTOR
    | LLAMA.below("language", "language_model."),
    renames=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    modules=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
)


class Language(Llama):
    """The language model alone, which knows what adapters of the whole are called."""

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return dataclasses.replace(
            LLAMA,
            within=(Whole("toy", "model.language_model.", ("vision_tower",)),),
        )


IMAGES = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


def make(tied: bool = False, seed: int = 1) -> Model:
    """The toy with random weights."""
    cfg = Config().with_decoder(tie_embeddings=tied)
    return random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)), seed)


def alone(model: Model) -> Language:
    """Its language model as a model of its own."""
    abstract = jax.eval_shape(lambda: Language(model.cfg.language, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(abstract)[0], nnx.state(model.language))
