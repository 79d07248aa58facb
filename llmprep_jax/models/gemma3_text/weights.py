"""Names of Gemma 3's text tensors in Hugging Face checkpoints.

The multimodal checkpoints (4B and up) hold the same tensors under `language_model.`, next to a
vision tower that a text model leaves alone; `RENAMES` and `IGNORED` say so. The norms are stored as
w and applied as 1 + w; nothing is folded here, so what is saved is what was loaded.
"""

from llmprep_jax.weights.rows import Table, Whole

_LAYER = "model.layers.{l}"
# spellings of the language model's prefix in multimodal checkpoints, newest and oldest
RENAMES = (
    (r"^(model\.)?language_model\.(model\.)+", "model."),
    (r"^model\.language_model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
IGNORED = (r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\.")

WEIGHTS = Table(
    {
        "embed.w": ("model.embed_tokens.weight", "v d -> v d"),
        "layers.attn_norm.scale": (f"{_LAYER}.input_layernorm.weight", "d -> d"),
        "layers.attn.q.w": (f"{_LAYER}.self_attn.q_proj.weight", "(n h) d -> d n h"),
        "layers.attn.k.w": (f"{_LAYER}.self_attn.k_proj.weight", "(k h) d -> d k h"),
        "layers.attn.v.w": (f"{_LAYER}.self_attn.v_proj.weight", "(k h) d -> d k h"),
        "layers.attn.o.w": (f"{_LAYER}.self_attn.o_proj.weight", "d (n h) -> n h d"),
        "layers.attn.q_norm.scale": (f"{_LAYER}.self_attn.q_norm.weight", "h -> h"),
        "layers.attn.k_norm.scale": (f"{_LAYER}.self_attn.k_norm.weight", "h -> h"),
        "layers.post_attn_norm.scale": (f"{_LAYER}.post_attention_layernorm.weight", "d -> d"),
        "layers.mlp_norm.scale": (f"{_LAYER}.pre_feedforward_layernorm.weight", "d -> d"),
        "layers.post_mlp_norm.scale": (f"{_LAYER}.post_feedforward_layernorm.weight", "d -> d"),
        "layers.mlp.gate.w": (f"{_LAYER}.mlp.gate_proj.weight", "f d -> d f"),
        "layers.mlp.up.w": (f"{_LAYER}.mlp.up_proj.weight", "f d -> d f"),
        "layers.mlp.down.w": (f"{_LAYER}.mlp.down_proj.weight", "d f -> f d"),
        "norm.scale": ("model.norm.weight", "d -> d"),
        "head.w": ("lm_head.weight", "v d -> d v"),
    },
    renames=RENAMES,
    ignored=IGNORED,
    within=(Whole("gemma3", "model.language_model.", ("vision_tower", "multi_modal_projector")),),
    finds_prefix=True,
)
