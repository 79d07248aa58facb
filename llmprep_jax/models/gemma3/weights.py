"""Names of the tensors of Gemma 3 with images, as released; norms are stored as w and applied as
1 + w."""

import dataclasses

from llmprep_jax.models import gemma3_text, siglip
from llmprep_jax.models.hf_names import IN_MEMORY, LANGUAGE, PROJECTOR, RENAMES, TOWER
from llmprep_jax.weights.rows import Table

_PROJECTOR = Table(
    {
        "projector.norm.scale": (f"{PROJECTOR}mm_soft_emb_norm.weight", "d -> d"),
        "projector.proj.w": (f"{PROJECTOR}mm_input_projection_weight", "d e -> d e"),
    }
)

WEIGHTS = dataclasses.replace(
    gemma3_text.WEIGHTS.below("language", LANGUAGE)
    | siglip.VISION_WEIGHTS.below("vision", TOWER)
    | _PROJECTOR,
    renames=RENAMES,
    ignored=(r"\.position_ids$",),
    modules=IN_MEMORY,
)
