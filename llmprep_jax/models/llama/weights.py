"""Names of the Llama family's tensors in Hugging Face checkpoints (Llama, SmolLM2, Qwen2, Qwen3,
Mistral, DeepSeek-LLM).

`{l}` runs over the stacked layers; the pattern turns their dimensions into ours. Rows that a model
has no parameter for (biases, norms of q and k, a head of its own) are not used. `(n h)` leaves the
rotary halves as released; only GGUF files permute them.
"""

from llmprep_jax.weights.rows import Table, Whole

_LAYER = "model.layers.{l}"
_BODY, _SEES = "model.language_model.", ("vision_model", "aligner")
# models that see by way of a Llama: adapters of the one are the other's
_WITHIN = (
    Whole("llava", _BODY, ("vision_tower", "multi_modal_projector")),
    Whole("deepseek_vl", _BODY, _SEES),
    Whole("deepseek_vl_hybrid", _BODY, (*_SEES, "high_res_vision_model", "high_res_vision_neck")),
    Whole("janus", _BODY, (*_SEES, "vqmodel", "generation_aligner", "generation_head")),
)

WEIGHTS = Table(
    {
        "embed.w": ("model.embed_tokens.weight", "v d -> v d"),
        "layers.attn_norm.scale": (f"{_LAYER}.input_layernorm.weight", "d -> d"),
        "layers.attn.q.w": (f"{_LAYER}.self_attn.q_proj.weight", "(n h) d -> d n h"),
        "layers.attn.k.w": (f"{_LAYER}.self_attn.k_proj.weight", "(k h) d -> d k h"),
        "layers.attn.v.w": (f"{_LAYER}.self_attn.v_proj.weight", "(k h) d -> d k h"),
        "layers.attn.o.w": (f"{_LAYER}.self_attn.o_proj.weight", "d (n h) -> n h d"),
        "layers.attn.q.b": (f"{_LAYER}.self_attn.q_proj.bias", "(n h) -> n h"),
        "layers.attn.k.b": (f"{_LAYER}.self_attn.k_proj.bias", "(k h) -> k h"),
        "layers.attn.v.b": (f"{_LAYER}.self_attn.v_proj.bias", "(k h) -> k h"),
        "layers.attn.o.b": (f"{_LAYER}.self_attn.o_proj.bias", "d -> d"),
        "layers.attn.q_norm.scale": (f"{_LAYER}.self_attn.q_norm.weight", "h -> h"),
        "layers.attn.k_norm.scale": (f"{_LAYER}.self_attn.k_norm.weight", "h -> h"),
        "layers.mlp_norm.scale": (f"{_LAYER}.post_attention_layernorm.weight", "d -> d"),
        "layers.mlp.gate.w": (f"{_LAYER}.mlp.gate_proj.weight", "f d -> d f"),
        "layers.mlp.up.w": (f"{_LAYER}.mlp.up_proj.weight", "f d -> d f"),
        "layers.mlp.down.w": (f"{_LAYER}.mlp.down_proj.weight", "d f -> f d"),
        "layers.mlp.gate.b": (f"{_LAYER}.mlp.gate_proj.bias", "f -> f"),
        "layers.mlp.up.b": (f"{_LAYER}.mlp.up_proj.bias", "f -> f"),
        "layers.mlp.down.b": (f"{_LAYER}.mlp.down_proj.bias", "d -> d"),
        "norm.scale": ("model.norm.weight", "d -> d"),
        "head.w": ("lm_head.weight", "v d -> d v"),
    },
    within=_WITHIN,
    finds_prefix=True,
)
