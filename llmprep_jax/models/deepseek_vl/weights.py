"""Names of DeepSeek-VL's tensors in Hugging Face checkpoints, in files as in memory."""

import dataclasses

from llmprep_jax.models import llama, sam, siglip
from llmprep_jax.models.deepseek_vl.config import Config
from llmprep_jax.weights.rows import Table

_ALIGNER = Table(
    {
        "aligner.up.w": ("model.aligner.linear1.weight", "e d -> d e"),
        "aligner.up.b": ("model.aligner.linear1.bias", "e -> e"),
        "aligner.down.w": ("model.aligner.linear2.weight", "e d -> d e"),
        "aligner.down.b": ("model.aligner.linear2.bias", "e -> e"),
    }
)
_HYBRID = Table(
    {
        "aligner.low.w": ("model.aligner.vision_proj.weight", "e d -> d e"),
        "aligner.low.b": ("model.aligner.vision_proj.bias", "e -> e"),
        "aligner.high.w": ("model.aligner.high_res_vision_proj.weight", "e d -> d e"),
        "aligner.high.b": ("model.aligner.high_res_vision_proj.bias", "e -> e"),
        "aligner.down.w": ("model.aligner.proj.weight", "e d -> d e"),
        "aligner.down.b": ("model.aligner.proj.bias", "e -> e"),
        "high.alpha": ("model.high_res_vision_alpha", "1 ->"),
        "high.halve.w": ("model.high_res_vision_proj.conv1.weight", "o i p q -> p q i o"),
        "high.quarter.w": ("model.high_res_vision_proj.conv2.weight", "o i p q -> p q i o"),
    }
)


def table(cfg: Config) -> Table:
    """The table of a model with one tower or with two."""
    words = {"model.": "model.language_model.", "lm_head.": "lm_head."}
    rows = llama.WEIGHTS.below("language", also=words)
    rows |= siglip.VISION_WEIGHTS.below("vision", "model.vision_model.")
    if cfg.high is None:
        rows |= _ALIGNER
    else:
        tower = "model.high_res_vision_model.vision_encoder."
        rows |= sam.tower_weights(cfg.high).below("high.tower", tower) | _HYBRID
        rows |= sam.neck_weights().below("high.neck", "model.high_res_vision_neck.")
    return dataclasses.replace(rows, ignored=(r"\.position_ids$",))
