"""Tiny models of every family, with switches set in ways that releases combine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.models.gemma3.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig

_LLAMA = dict(vocab_size=96, dim=48, mlp_dim=64, num_layers=3, head_dim=8, max_seq_len=128)

CONFIGS = {
    "llama-tied-9-3-heads": LlamaConfig(**_LLAMA, num_heads=9, num_kv_heads=3, tie_embeddings=True),
    "qwen2-window": LlamaConfig(
        **_LLAMA,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
        window=5,
        first_window_layer=1,
        model_type="qwen2",
    ),
    "gemma3": Gemma3Config(96, 48, 64, 7, 4, 1, head_dim=8, window=4, max_seq_len=128),
}


def make_model(name: str, **compute) -> nnx.Module:
    """A tiny model whose weights are all random: norms and biases too."""
    cfg = CONFIGS[name]
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, **compute))
    model = registry.build(cfg, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(1)

    def shake(x: jax.Array) -> jax.Array:
        return x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)

    return nnx.merge(graph, jax.tree.map(shake, state))


# compiled as a whole: op by op, each of the tests would take ten times as long
forward = jax.jit(lambda model, tokens, **where: model(tokens, **where).logits)


def make_tokens(rows: int = 2, length: int = 14) -> np.ndarray:
    return np.random.default_rng(2).integers(1, 96, (rows, length), dtype=np.int32)
