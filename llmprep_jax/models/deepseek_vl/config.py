"""Shapes of DeepSeek-VL (2403.05525, section 3): 1.3B and 7B.

SigLIP at 384 pixels, in 7B beside SAM's encoder at 1,024 (the hybrid), and a language model as
DeepSeek-LLM's. Hugging Face has two model types for the two.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models import llama, sam, siglip
from llmprep_jax.models.deepseek_vl import released
from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import ComposedConfig
from llmprep_jax.nn.param import Compute

HIGH_RES = "deepseek_vl_hybrid"


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
    image_id: int = 100015
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
    refuse_unsupported(hf)
    text = {"model_type": "llama", **(hf.get("text_config") or {})}
    refuse_unsupported(text, model_type=llama.MODEL_TYPES)
    text["tie_word_embeddings"] = hf.get("tie_word_embeddings", True)
    vision = siglip.read_vision(hf.get("vision_config") or {})
    if names is not None:
        probes = ("vision_model.head.probe", ".attn_pool.latent")
        has_pool = any(name.endswith(probes) for name in names)
        vision = dataclasses.replace(vision, has_pool=has_pool)
    image_id = hf.get("image_token_id", 100015)
    require({"image_token_id": image_id}, "image_token_id")
    kind, high = hf["model_type"], None
    if kind == HIGH_RES:
        high = sam.read(hf.get("high_res_vision_config") or {})
    return Config(llama.from_hf(text), vision, high, image_id, kind)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    text = llama.to_hf(cfg.language)
    text.pop("architectures")
    name = "DeepseekVL" if cfg.high is None else "DeepseekVLHybrid"
    high = {} if cfg.high is None else {"high_res_vision_config": sam.write(cfg.high)}
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": cfg.model_type,
        "text_config": text,
        "vision_config": siglip.write_vision(cfg.vision),
        **high,
        "image_token_id": cfg.image_id,
        **{
            name: text[name]
            for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        },
    }


_SIGLIP = siglip.VisionConfig(
    1024, 4096, 24, 16, image_size=384, patch_size=16, act="gelu", has_pool=False
)
_TEXT = dict(vocab_size=102400, head_dim=128, max_seq_len=16384, bos_id=100000, eos_ids=(100001,))

PRESETS: dict[str, Config] = {
    "deepseek-vl-1.3b": Config(
        llama.Config(dim=2048, mlp_dim=5632, num_layers=24, num_heads=16, num_kv_heads=16, **_TEXT),
        _SIGLIP,
    ),
    "deepseek-vl-7b": Config(
        llama.Config(
            dim=4096, mlp_dim=11008, num_layers=30, num_heads=32, num_kv_heads=32, **_TEXT
        ),
        _SIGLIP,
        sam.Config(),
        model_type=HIGH_RES,
    ),
}
