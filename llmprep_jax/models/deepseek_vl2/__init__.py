"""DeepSeek-VL2: Tiny, Small and Base."""

from llmprep_jax.models.deepseek_vl2.config import Config, from_hf, to_hf
from llmprep_jax.models.deepseek_vl2.model import Model
from llmprep_jax.models.deepseek_vl2.presets import PRESETS

MODEL_TYPES = ("deepseek_vl_v2",)
__all__ = ["MODEL_TYPES", "PRESETS", "Config", "Model", "from_hf", "to_hf"]
