"""Tiny models of every family, with switches set in ways that releases combine."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.deepseek.config import Config as DeepSeekConfig
from llmprep_jax.models.gemma3_text.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.moe import Routing
from llmprep_jax.nn.rope import RopeScaling
from llmprep_jax.types import Array
from tests.random_modules import fill

_SIZES = dict(vocab_size=96, dim=48, mlp_dim=64, head_dim=8, max_seq_len=128)
_GEMMA = dict(**_SIZES, num_heads=4, window=4)
_DEEPSEEK = dict(
    vocab_size=96,
    dim=48,
    mlp_dim=64,
    expert_dim=24,
    num_layers=3,
    num_heads=4,
    kv_rank=16,
    nope_dim=12,
    rope_dim=8,
    value_dim=10,
    max_seq_len=128,
)

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
    "gemma3": Gemma3Config(**_GEMMA, num_layers=5, global_every=2, num_kv_heads=1),
    "deepseek-v3": DeepSeekConfig(
        **_DEEPSEEK,
        q_rank=20,
        num_mtp=1,
        routing=Routing(
            8,
            3,
            score="sigmoid",
            num_groups=4,
            num_active_groups=2,
            has_bias=True,
            normalize=True,
            scale=2.5,
        ),
        rope_scaling=RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=1.0),
    ),
}
# what no release is, but a small one may be: layers of one kind alone, or in turns
ODD_CONFIGS = {
    "gemma3-all-local": Gemma3Config(**_GEMMA, num_layers=3, num_kv_heads=2),
    "deepseek-v2-every-other": DeepSeekConfig(
        **{**_DEEPSEEK, "num_layers": 4},
        q_rank=None,
        num_shared=2,
        moe_every=2,
        routing=Routing(8, 2),
        model_type="deepseek_v2",
    ),
    "qwen3-window-in-turns": LlamaConfig(
        **_SIZES,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        out_bias=True,
        qk_norm=True,
        window=5,
        has_window=(True, False, True, False),
        model_type="qwen3",
    ),
    "mistral-all-windows": LlamaConfig(
        **_SIZES, num_layers=2, num_heads=4, num_kv_heads=1, window=4, model_type="mistral"
    ),
    "gemma3-all-global": Gemma3Config(**_GEMMA, num_layers=2, num_kv_heads=4, global_every=1),
}


def random_model(cfg: Any) -> nnx.Module:
    """A model with random weights, in the layout of the mesh in force."""
    return fill(registry.abstract(cfg))


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
