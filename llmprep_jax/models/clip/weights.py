"""Names of CLIP's tensors in Hugging Face checkpoints; `pre_layrnorm` is released so."""

import dataclasses

from llmprep_jax.models.towers import IMAGE, TEXT
from llmprep_jax.weights.rows import Table

# of a tower alone, for models that hold one
VISION_WEIGHTS = IMAGE | Table(
    {
        "positions.class_token": ("embeddings.class_embedding", "d -> d"),
        "pre_norm.scale": ("pre_layrnorm.weight", "d -> d"),
        "pre_norm.bias": ("pre_layrnorm.bias", "d -> d"),
    }
)

_BOTH = TEXT.below("text", "text_model.") | VISION_WEIGHTS.below("vision", "vision_model.")
WEIGHTS = dataclasses.replace(
    _BOTH
    | Table(
        {
            "text_projection.w": ("text_projection.weight", "e d -> d e"),
            "vision_projection.w": ("visual_projection.weight", "e d -> d e"),
            "logit_scale": ("logit_scale", "->"),
        }
    ),
    ignored=(r"\.position_ids$",),  # 0, 1, 2, ...
)
