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

_DEEPSEEK = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    kv_lora_rank=20,
    q_lora_rank=28,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=2,
    first_k_dense_replace=1,
)
_V3 = {**_DEEPSEEK, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
_GROUPS = dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)


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
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 16, **_rope(1e6)}),
    "qwen3-layer-types": (
        "Qwen3",
        {
            **_SIZES,
            **_rope(1e6, **_YARN),
            "head_dim": 12,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": 5}),
    "mistral-no-window": (
        "Mistral",
        {**_SIZES, "sliding_window": None, "head_dim": 16, "rms_norm_eps": 1e-5, **_rope(1e6)},
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
    "deepseek-v2-lite": ("DeepseekV2", {**_DEEPSEEK, "q_lora_rank": None}),
    "deepseek-v2": (
        "DeepseekV2",
        {
            **_DEEPSEEK,
            **_GROUPS,
            **_rope(**_YARN, mscale=0.707, mscale_all_dim=0.707),
            "routed_scaling_factor": 16.0,
            "first_k_dense_replace": 2,
        },
    ),
    "deepseek-v2-all-experts": (
        "DeepseekV2",
        {**_DEEPSEEK, "first_k_dense_replace": 0, "n_shared_experts": 1},
    ),
    "deepseek-v3": ("DeepseekV3", {**_V3, **_rope(**_YARN, mscale=1.0, mscale_all_dim=1.0)}),
    "deepseek-v3-no-q-rank": (
        "DeepseekV3",
        {**_V3, "q_lora_rank": None, "n_shared_experts": 0, "first_k_dense_replace": 0},
    ),
    "deepseek-v3-one-group": (
        "DeepseekV3",
        {
            **_V3,
            **dict(n_group=1, topk_group=1, norm_topk_prob=False, rope_interleave=False),
            **_rope(**_YARN, mscale=0.707, mscale_all_dim=1.0),
            "first_k_dense_replace": 2,
        },
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
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # zero would hide that it is left out
                buffer.add_(torch.randn_like(buffer) * 0.15)
    return model


def save(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def by_file(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """A parameter by the names that files have: experts one by one, their gate and up apart."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: array}
    before, part = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    return {
        f"{before}.{e}.{each}.weight": matrix
        for e, expert in enumerate(array)
        for each, matrix in zip(parts, np.split(expert, len(parts)), strict=True)
    }


def router_biases(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The buffers that files hold."""
    buffers = model.named_buffers()
    return {n: b.numpy() for n, b in buffers if n.endswith("e_score_correction_bias")}


def gradients(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Every gradient by the names that files have; zeros for the biases of routers."""
    found = {name: np.zeros_like(bias) for name, bias in router_biases(model).items()}
    for name, parameter in model.named_parameters():
        if parameter.numel():  # shared experts may have no width
            found |= by_file(name, parameter.grad.numpy())
    return found


def tokens(rows: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 96, (rows, length), dtype=np.int32)
