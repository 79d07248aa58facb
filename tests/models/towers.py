"""Tiny models of two towers, and inputs for them."""

import numpy as np
from flax import nnx

from llmprep_jax.models import clip, registry, siglip
from llmprep_jax.nn.param import Compute
from tests.random_modules import fill

_TEXT = dict(vocab_size=40, dim=16, mlp_dim=24, num_layers=2, num_heads=2, max_seq_len=10)
_VISION = dict(dim=16, mlp_dim=24, num_layers=2, num_heads=2, image_size=9, patch_size=4)
END = 39
CONFIGS = {
    "clip": clip.Config(
        clip.TextConfig(**_TEXT, bos_id=38, eos_id=clip.GREATEST, pad_id=END),
        clip.VisionConfig(**_VISION),
        projection_dim=8,
    ),
    "siglip": siglip.Config(siglip.TextConfig(**_TEXT), siglip.VisionConfig(**_VISION)),
}


def make_towers(name: str, **compute) -> nnx.Module:
    """The random model of a config above, in the layout of the mesh in force."""
    return fill(registry.abstract(CONFIGS[name].with_compute(Compute(**compute))))


def make_texts(rows: int = 4, length: int = 8) -> np.ndarray:
    """Texts of unlike lengths that end with the greatest id and are padded with it."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, length + 1, (rows, 1))
    tokens = rng.integers(1, END - 1, (rows, length))
    return np.where(np.arange(length) < lengths - 1, tokens, END).astype(np.int32)


def make_images(rows: int = 4) -> np.ndarray:
    """Normalised noise."""
    return np.random.default_rng(4).normal(size=(rows, 9, 9, 3)).astype(np.float32)
