"""Shapes of Gemma 3 with images (Gemma 3 technical report 2025, section 2): 4B, 12B and 27B.

A language model as `gemma3_text`, a SigLIP tower at 896 pixels, and 256 tokens an image. Released
files state few fields; those of the tower and of the language model are transformers' defaults.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models import gemma3_text, siglip
from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import ComposedConfig
from llmprep_jax.nn.param import Compute


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """One Gemma 3 model that sees.

    Attributes:
      tokens_per_image: what the tower's patches are averaged to, a square number.
      image_id: the token that stands for a feature. begin_id, end_id: before and after an image's.
    """

    language: gemma3_text.Config
    vision: siglip.VisionConfig
    tokens_per_image: int = 256
    image_id: int = 262144
    begin_id: int = 255999
    end_id: int = 256000
    model_type: str = "gemma3"

    def __post_init__(self):
        side = math.isqrt(self.tokens_per_image)
        patches = self.vision.image_size // self.vision.patch_size
        if side * side != self.tokens_per_image or patches % side:
            raise ValueError(
                f"{patches} x {patches} patches cannot be averaged to {self.tokens_per_image}"
                " tokens; these must be the square of a divisor"
            )

    @property
    def compute(self) -> Compute:
        """How all parts compute."""
        return self.language.compute


_INDICES = {
    "mm_tokens_per_image": "tokens_per_image",
    "image_token_index": "image_id",
    "boi_token_index": "begin_id",
    "eoi_token_index": "end_id",
}
# fields beside `text_config` that are the language model's, whose own are defaults then
_OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_VISION = siglip.VisionConfig(1152, 4304, 27, 16, image_size=896, patch_size=14, has_pool=False)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type gemma3.

    Args:
      names: of the checkpoint's tensors: some hold a pooling head, which nothing reads.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    refuse_unsupported(hf)
    text = hf.get("text_config") or {}
    # the multimodal class caps no logits, whatever its text part says
    text = {**text, "model_type": "gemma3_text", "final_logit_softcapping": None}
    outer = {name: hf[name] for name in _OUTER if hf.get(name) is not None}
    vision = siglip.read_vision(hf.get("vision_config") or siglip.write_vision(_VISION))
    if names is not None:
        has_pool = any(".head.probe" in name for name in names)
        vision = dataclasses.replace(vision, has_pool=has_pool)
    numbers = {ours: hf[theirs] for theirs, ours in _INDICES.items() if hf.get(theirs) is not None}
    require(numbers, *numbers)
    return Config(gemma3_text.from_hf({**text, **outer}), vision, **numbers)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers' Gemma3ForConditionalGeneration reads."""
    text = gemma3_text.to_hf(cfg.language)
    outer = {name: text[name] for name in _OUTER}
    text.pop("architectures")
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": siglip.write_vision(cfg.vision),
        **{theirs: getattr(cfg, ours) for theirs, ours in _INDICES.items()},
        **outer,
    }


PRESETS: dict[str, Config] = {
    f"{name}-multimodal": Config(gemma3_text.PRESETS[name], _VISION)
    for name in ("gemma3-4b", "gemma3-12b", "gemma3-27b")
}
