"""DeepSeek-VL: 1.3B with one tower, 7B with two."""

from llmprep_jax.models.deepseek_vl.config import PRESETS, Config, from_hf, to_hf
from llmprep_jax.models.deepseek_vl.model import Model

MODEL_TYPES = ("deepseek_vl", "deepseek_vl_hybrid", "multi_modality")
__all__ = ["MODEL_TYPES", "PRESETS", "Config", "Model", "from_hf", "to_hf"]
