"""Tiny random transformers models, saved as Hugging Face folders for us to load."""

from pathlib import Path

import numpy as np
import torch
import transformers

_SIZES = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
_LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
_YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
_GEMMA = {**_SIZES, "head_dim": 16, "num_hidden_layers": 7, "sliding_window": 5}
_GEMMA |= {"query_pre_attn_scalar": 24}


def _rope(theta: float = 10_000.0, **scaling) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **scaling}}


CASES = {
    "llama": ("Llama", {**_SIZES}),
    "llama-tied-mqa": (
        "Llama",
        {**_SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True, **_rope(5e5)},
    ),
    "llama-mha-biases": (
        "Llama",
        {**_SIZES, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads": ("Llama", {**_SIZES, "head_dim": 16, "rms_norm_eps": 1e-5}),
    "llama-llama3-rope": ("Llama", {**_SIZES, **_rope(5e5, **_LLAMA3)}),
    "llama-linear-rope": ("Llama", {**_SIZES, **_rope(rope_type="linear", factor=4.0)}),
    "llama-yarn-rope": ("Llama", {**_SIZES, **_rope(**_YARN)}),
    "llama-yarn-mscale": ("Llama", {**_SIZES, **_rope(**_YARN, mscale=0.707, mscale_all_dim=1.0)}),
    "qwen2": ("Qwen2", {**_SIZES, **_rope(1e6)}),
    "qwen2-tied": ("Qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-layer-types": (
        "Qwen2",
        {
            **_SIZES,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma3": ("Gemma3", _GEMMA),
    "gemma3-pattern": ("Gemma3", {**_GEMMA, "sliding_window_pattern": 2, "rms_norm_eps": 1e-5}),
    "gemma3-mqa-untied": (
        "Gemma3",
        {**_GEMMA, "num_key_value_heads": 1, "tie_word_embeddings": False},
    ),
    "gemma3-long-capped": (
        "Gemma3",
        {
            **_GEMMA,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
            },
        },
    ),
    "gemma3-layer-types": (
        "Gemma3",
        {**_GEMMA, "layer_types": (["full_attention", "sliding_attention"] * 4)[:7]},
    ),
}


def make(name: str) -> transformers.PreTrainedModel:
    """A model whose weights are all random, norms and biases too, with logits of order 1 to 10."""
    kind, fields = CASES[name]
    text = "TextConfig" if kind == "Gemma3" else "Config"
    config = getattr(transformers, f"{kind}{text}")(**fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def tokens(rows: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 96, (rows, length), dtype=np.int32)
