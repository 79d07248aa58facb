"""Names of SigLIP's tensors in Hugging Face checkpoints; the pooling's q, k and v are in one."""

import dataclasses

from llmprep_jax.models.towers import IMAGE, TEXT
from llmprep_jax.weights.rows import Table

_ATTN = "head.attention"

POOL = Table(
    {
        "pool.probe": ("head.probe", "1 o d -> o d"),
        "pool.q.w": (f"{_ATTN}.in_proj_weight", "(n h) d -> d n h", (0, 3)),
        "pool.k.w": (f"{_ATTN}.in_proj_weight", "(n h) d -> d n h", (1, 3)),
        "pool.v.w": (f"{_ATTN}.in_proj_weight", "(n h) d -> d n h", (2, 3)),
        "pool.q.b": (f"{_ATTN}.in_proj_bias", "(n h) -> n h", (0, 3)),
        "pool.k.b": (f"{_ATTN}.in_proj_bias", "(n h) -> n h", (1, 3)),
        "pool.v.b": (f"{_ATTN}.in_proj_bias", "(n h) -> n h", (2, 3)),
        "pool.o.w": (f"{_ATTN}.out_proj.weight", "d (n h) -> n h d"),
        "pool.o.b": (f"{_ATTN}.out_proj.bias", "d -> d"),
        "pool.norm.scale": ("head.layernorm.weight", "d -> d"),
        "pool.norm.bias": ("head.layernorm.bias", "d -> d"),
        "pool.mlp.up.w": ("head.mlp.fc1.weight", "f d -> d f"),
        "pool.mlp.up.b": ("head.mlp.fc1.bias", "f -> f"),
        "pool.mlp.down.w": ("head.mlp.fc2.weight", "d f -> f d"),
        "pool.mlp.down.b": ("head.mlp.fc2.bias", "d -> d"),
    }
)
# of a tower alone, for models that hold one
VISION_WEIGHTS = IMAGE | POOL | Table({"patches.b": ("embeddings.patch_embedding.bias", "d -> d")})

_HEAD = Table(
    {"head.w": ("head.weight", "e d -> d e"), "head.b": ("head.bias", "e -> e")}, head=None
)
_TEXT = dataclasses.replace(TEXT | _HEAD, head=None)
_BOTH = _TEXT.below("text", "text_model.") | VISION_WEIGHTS.below("vision", "vision_model.")
_SCALE = Table({"logit_scale": ("logit_scale", "1 ->"), "logit_bias": ("logit_bias", "1 ->")})
WEIGHTS = dataclasses.replace(_BOTH | _SCALE, ignored=(r"\.position_ids$",))  # 0, 1, 2, ...
