"""Tiny models of every family, with switches set in ways that releases combine."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.gemma3.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.types import Array
from tests.random_modules import random_module

_SIZES = dict(vocab_size=96, dim=48, mlp_dim=64, head_dim=8, max_seq_len=128)
_GEMMA = dict(**_SIZES, num_heads=4, window=4)

CONFIGS = {
    "llama-tied-9-3-heads": LlamaConfig(
        **_SIZES, num_layers=3, num_heads=9, num_kv_heads=3, tie_embeddings=True
    ),
    "qwen2-window": LlamaConfig(
        **_SIZES,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        window=5,
        first_window_layer=1,
        model_type="qwen2",
    ),
    "gemma3": Gemma3Config(**_GEMMA, num_layers=7, num_kv_heads=1),
}
# what no release is, but a small one may be: layers of one kind alone
ODD_CONFIGS = {
    "gemma3-all-local": Gemma3Config(**_GEMMA, num_layers=3, num_kv_heads=2),
    "gemma3-all-global": Gemma3Config(**_GEMMA, num_layers=2, num_kv_heads=4, global_every=1),
}


def random_model(cfg: Any) -> nnx.Module:
    """A model with random weights, in the layout of the mesh in force."""
    return random_module(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))


def make_model(name: str, **compute) -> nnx.Module:
    """The random model of a config above."""
    cfg = (CONFIGS | ODD_CONFIGS)[name]
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, **compute))
    return random_model(cfg)


def make_tokens(rows: int = 2, length: int = 14) -> Array:
    return np.random.default_rng(2).integers(1, 96, (rows, length), dtype=np.int32)


@jax.jit
def forward(model: nnx.Module, tokens: Array, **where: Array) -> Array:
    """Logits, compiled."""
    return model(tokens, **where).logits
