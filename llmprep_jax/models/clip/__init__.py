"""CLIP: images and texts in one space, by OpenAI and OpenCLIP."""

from llmprep_jax.models.clip.config import (
    GREATEST,
    Config,
    TextConfig,
    VisionConfig,
    from_hf,
    read_vision,
    to_hf,
)
from llmprep_jax.models.clip.model import Model, TextTower, VisionTower
from llmprep_jax.models.clip.presets import PRESETS
from llmprep_jax.models.clip.weights import VISION_WEIGHTS, WEIGHTS

MODEL_TYPES = ("clip",)
__all__ = [
    "GREATEST",
    "MODEL_TYPES",
    "PRESETS",
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
]
