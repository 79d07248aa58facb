"""Gemma 3's language models: 270M and 1B, and those inside the multimodal 4B, 12B and 27B."""

from llmprep_jax.models.gemma3_text.config import PRESETS, Config, from_hf, to_hf
from llmprep_jax.models.gemma3_text.model import Model
from llmprep_jax.models.gemma3_text.weights import WEIGHTS

MODEL_TYPES = ("gemma3_text",)
__all__ = ["MODEL_TYPES", "PRESETS", "WEIGHTS", "Config", "Model", "from_hf", "to_hf"]
