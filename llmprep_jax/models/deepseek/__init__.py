"""DeepSeek-V2, V2-Lite and V2.5; DeepSeek-V3, V3.1 and R1."""

from llmprep_jax.models.deepseek.config import Config, from_hf, to_hf
from llmprep_jax.models.deepseek.model import Model
from llmprep_jax.models.deepseek.presets import PRESETS

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")
__all__ = ["MODEL_TYPES", "PRESETS", "Config", "Model", "from_hf", "to_hf"]
