"""SigLIP, and SigLIP 2 with a fixed resolution: images and texts in one space."""

from llmprep_jax.models.siglip.config import (
    Config,
    TextConfig,
    VisionConfig,
    from_hf,
    read_vision,
    to_hf,
    write_vision,
)
from llmprep_jax.models.siglip.model import Model, TextTower, VisionTower
from llmprep_jax.models.siglip.presets import PRESETS
from llmprep_jax.models.siglip.timm_weights import TIMM_VISION_WEIGHTS
from llmprep_jax.models.siglip.weights import VISION_WEIGHTS, WEIGHTS

MODEL_TYPES = ("siglip",)
__all__ = [
    "MODEL_TYPES",
    "PRESETS",
    "TIMM_VISION_WEIGHTS",
    "VISION_WEIGHTS",
    "WEIGHTS",
    "Config",
    "Model",
    "TextConfig",
    "TextTower",
    "VisionConfig",
    "VisionTower",
    "from_hf",
    "read_vision",
    "to_hf",
    "write_vision",
]
