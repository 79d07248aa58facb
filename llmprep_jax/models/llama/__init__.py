"""Llama 2 and 3.x, SmolLM2, Qwen2, 2.5 and 3, Mistral, DeepSeek-LLM, and R1's distills of them."""

from llmprep_jax.models.llama.config import Config, from_hf, to_hf
from llmprep_jax.models.llama.model import Model
from llmprep_jax.models.llama.presets import PRESETS
from llmprep_jax.models.llama.weights import WEIGHTS

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")
__all__ = ["MODEL_TYPES", "PRESETS", "WEIGHTS", "Config", "Model", "from_hf", "to_hf"]
