"""Janus and Janus-Pro: a language model that sees images and draws them."""

from llmprep_jax.models.janus.config import PRESETS, Config, VQConfig, from_hf, to_hf
from llmprep_jax.models.janus.model import Model
from llmprep_jax.models.janus.vq import VQ

MODEL_TYPES = ("janus",)
__all__ = ["MODEL_TYPES", "PRESETS", "VQ", "Config", "Model", "VQConfig", "from_hf", "to_hf"]
