"""Writes this folder's golden vectors: tiny random transformers models, and what they compute.

Run it with the parity extra installed: `python -m tests.golden.make_models [NAME ...]`. Each
`<name>.npz` holds the checkpoint's tensors under their Hugging Face names (`weight/...`), tokens, a
mask, logits, loss and some gradients (`grad/...`); `<name>.json` is the config.json. The loss is
that of the rows without the mask; the logits are with it, and those of masked tokens mean nothing.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.parity.torch_models import by_file, router_biases

FOLDER = Path(__file__).parent
_SIZES = dict(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
_DEEPSEEK = dict(
    **_SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4},
    moe_intermediate_size=12,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
)
_GEMMA_ROPE = {
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
MODELS = {
    "llama": transformers.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(
        **_SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(
        **_SIZES,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": transformers.MistralConfig(**_SIZES, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(
        **{**_SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1},
        head_dim=8,
        query_pre_attn_scalar=12,
        sliding_window=4,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters=_GEMMA_ROPE,
    ),
    "deepseek_v2": transformers.DeepseekV2Config(
        **_DEEPSEEK,
        q_lora_rank=None,
        n_shared_experts=2,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
        routed_scaling_factor=4.0,
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **_DEEPSEEK,
        q_lora_rank=10,
        n_group=2,
        topk_group=1,
        num_mtp_layers=0,
        rope_parameters=dict(_YARN, mscale=1.0, mscale_all_dim=1.0),
    ),
}


def build(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """A model whose weights are all random: norms and biases too."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for bias in router_biases(model).values():
            bias += np.random.default_rng(0).normal(0, 0.15, bias.shape)
    return model


def compute(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Inputs, logits with the first row padded on the left, loss without padding, gradients."""
    tokens = torch.tensor(np.random.default_rng(0).integers(1, 64, (2, 12)))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=places).logits
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    weights, grads = router_biases(model), {}
    for name, x in model.named_parameters():
        weights |= by_file(name, x.detach().numpy())
        grads |= by_file(name, x.grad.numpy())
    some = (
        "embed_tokens.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.0.mlp.up_proj.weight",
    )
    some += ("layers.1.input_layernorm.weight", "layers.0.self_attn.k_norm.weight")
    some += ("layers.0.self_attn.v_proj.bias", "lm_head.weight", "layers.1.mlp.gate.weight")
    some += ("layers.1.self_attn.kv_b_proj.weight", "layers.1.mlp.experts.2.down_proj.weight")
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "mask": mask.numpy().astype(bool),
        "logits": logits.numpy(),
        "loss": np.float32(loss.item()),
        **{f"weight/{name}": x for name, x in weights.items()},
        **{f"grad/{name}": grad for name, grad in grads.items() if name.endswith(some)},
    }


def main(names: list[str]) -> None:
    for name in names or MODELS:
        model = build(MODELS[name])
        arrays = compute(model)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        (FOLDER / f"{name}.json").write_text(model.config.to_json_string(), encoding="utf-8")
        size = (FOLDER / f"{name}.npz").stat().st_size
        print(f"{FOLDER / name}.npz: {len(arrays)} arrays, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
