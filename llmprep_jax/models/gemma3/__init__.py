"""Gemma 3 with images: 4B, 12B and 27B."""

from llmprep_jax.models.gemma3.config import PRESETS, Config, from_hf, to_hf
from llmprep_jax.models.gemma3.model import Model

MODEL_TYPES = ("gemma3",)
__all__ = ["MODEL_TYPES", "PRESETS", "Config", "Model", "from_hf", "to_hf"]
