"""Shapes of DeepSeek-VL (2403.05525, section 3): 1.3B and 7B.

SigLIP at 384 pixels, in 7B beside SAM's encoder at 1,024 (the hybrid), and a language model as
DeepSeek-LLM's. Hugging Face has two model types for the two.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models import llama, sam, siglip
from llmprep_jax.models.deepseek_parts import LANGUAGE, SIGLIP, read_language, write_language
from llmprep_jax.models.deepseek_vl import released
from llmprep_jax.models.model_config import ComposedConfig
from llmprep_jax.nn.param import Compute

HIGH_RES, IMAGE_ID = "deepseek_vl_hybrid", 100015


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """One DeepSeek-VL model.

    Attributes:
      high: the tower of high resolution, None in 1.3B.
      image_id: the token that stands for a feature.
    """

    language: llama.Config
    vision: siglip.VisionConfig
    high: sam.Config | None = None
    image_id: int = IMAGE_ID
    model_type: str = "deepseek_vl"

    def __post_init__(self):
        if (self.high is None) != (self.model_type != HIGH_RES):
            raise ValueError(f"model_type {self.model_type} with high={self.high}")
        if self.high is not None and self.language.dim % 2:
            raise ValueError(f"the two towers' halves do not make a width of {self.language.dim}")

    @property
    def tokens_per_image(self) -> int:
        """Features of an image."""
        return self.vision.num_tokens

    @property
    def compute(self) -> Compute:
        """How all parts compute."""
        return self.language.compute


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type deepseek_vl or deepseek_vl_hybrid, or DeepSeek's own.

    Args:
      names: of the checkpoint's tensors: some hold a pooling head, which nothing reads.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    if hf["model_type"] == released.MODEL_TYPE:
        hf = released.config_as_hf(hf)
    language, image_id = read_language(hf, IMAGE_ID)
    vision = siglip.read_vision(hf.get("vision_config") or {})
    if names is not None:
        probes = ("vision_model.head.probe", ".attn_pool.latent")
        has_pool = any(name.endswith(probes) for name in names)
        vision = dataclasses.replace(vision, has_pool=has_pool)
    kind, high = hf["model_type"], None
    if kind == HIGH_RES:
        high = sam.read(hf.get("high_res_vision_config") or {})
    return Config(language, vision, high, image_id, kind)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    name = "DeepseekVL" if cfg.high is None else "DeepseekVLHybrid"
    high = {} if cfg.high is None else {"high_res_vision_config": sam.write(cfg.high)}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": cfg.model_type,
        **write_language(cfg.language, cfg.image_id),
        "vision_config": siglip.write_vision(cfg.vision),
        **high,
    }


PRESETS: dict[str, Config] = {
    "deepseek-vl-1.3b": Config(LANGUAGE["1.3b"], SIGLIP),
    "deepseek-vl-7b": Config(LANGUAGE["7b"], SIGLIP, sam.Config(), model_type=HIGH_RES),
}
