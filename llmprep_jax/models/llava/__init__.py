"""LLaVA 1.5 and what is built as it is."""

from llmprep_jax.models.llava.config import PRESETS, Config, from_hf, to_hf
from llmprep_jax.models.llava.model import Model

MODEL_TYPES = ("llava",)
__all__ = ["MODEL_TYPES", "PRESETS", "Config", "Model", "from_hf", "to_hf"]
