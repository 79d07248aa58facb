"""Shapes of SigLIP (Zhai et al. 2023), and of SigLIP 2 (Tschannen et al. 2025) at one resolution.

Files of SigLIP 2 with a fixed resolution are of the same model type, with another vocabulary. The
token ids that files state are not the tokenizer's, and nothing goes by them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models.hf_config import refuse_unsupported
from llmprep_jax.models.model_config import UNSAVED, ModelConfig
from llmprep_jax.models.towers import read_tower, write_tower
from llmprep_jax.nn.param import Compute


@dataclasses.dataclass(frozen=True)
class TextConfig(ModelConfig):
    """The tower of texts.

    Attributes:
      projection_dim: of the vectors that texts become; None: `dim`.
    """

    vocab_size: int = 32000
    dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_seq_len: int = 64
    projection_dim: int | None = None
    act: str = "gelu_tanh"
    norm_eps: float = 1e-6
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)


@dataclasses.dataclass(frozen=True)
class VisionConfig(ModelConfig):
    """The tower of images; sizes in pixels.

    Attributes:
      has_pool: whether there is attention pooling, without which it gives features alone.
    """

    dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    act: str = "gelu_tanh"
    norm_eps: float = 1e-6
    has_pool: bool = True
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    @property
    def num_tokens(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Both towers."""

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    model_type: str = "siglip"

    def __post_init__(self):
        width = self.text.projection_dim or self.text.dim
        if width != self.vision.dim or not self.vision.has_pool:
            raise ValueError(
                f"texts become vectors of {width}, images of {self.vision.dim}, pooled:"
                f" {self.vision.has_pool}; both must be as wide, and images pooled"
            )

    @property
    def compute(self) -> Compute:
        """How both towers compute."""
        return self.text.compute

    @property
    def vocab_size(self) -> int:
        """Of texts."""
        return self.text.vocab_size


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type siglip.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    refuse_unsupported(hf)
    text = hf.get("text_config") or {}
    more = {"projection_size": "projection_dim"} if _has(text, "projection_size") else {}
    return Config(read_tower(TextConfig, text, more), read_vision(hf.get("vision_config") or {}))


def read_vision(hf: Mapping[str, Any]) -> VisionConfig:
    """The tower of images of a `vision_config`."""
    more = {"vision_use_head": "has_pool"} if _has(hf, "vision_use_head") else {}
    return read_tower(VisionConfig, hf, more)


def _has(hf: Any, name: str) -> bool:
    return isinstance(hf, Mapping) and hf.get(name) is not None


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    text, vision = write_tower(cfg.text), write_vision(cfg.vision)
    if cfg.text.projection_dim is not None:
        text["projection_size"] = cfg.text.projection_dim
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **text},
        "vision_config": vision,
    }


def write_vision(vision: VisionConfig) -> dict[str, Any]:
    """The inverse of `read_vision`."""
    head = {"vision_use_head": vision.has_pool}
    return {"model_type": "siglip_vision_model", **write_tower(vision), **head}
