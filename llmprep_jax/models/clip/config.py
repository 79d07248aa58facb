"""Shapes of CLIP (Radford et al. 2021), as OpenAI and OpenCLIP released them.

The one thing a reader would get wrong: hub files say that the end of a text is token 2, which it is
not; 2 means that it is the greatest id of the row. Legacy files state towers twice, and
`text_config_dict` and `vision_config_dict` count for more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models.hf_config import refuse_unsupported
from llmprep_jax.models.model_config import UNSAVED, ModelConfig
from llmprep_jax.models.towers import read_tower, write_tower
from llmprep_jax.nn.param import Compute

GREATEST = 2  # eos_id of files from before transformers 4.31


@dataclasses.dataclass(frozen=True)
class TextConfig(ModelConfig):
    """The tower of texts.

    Attributes:
      act: "quick_gelu" of OpenAI's, "gelu" of OpenCLIP's models.
      eos_id: of the token that stands for the text: the first one in it; 2: the greatest id.
    """

    vocab_size: int = 49408
    dim: int = 512
    mlp_dim: int = 2048
    num_layers: int = 12
    num_heads: int = 8
    max_seq_len: int = 77
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    bos_id: int | None = 49406
    eos_id: int = 49407
    pad_id: int | None = 1
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)


@dataclasses.dataclass(frozen=True)
class VisionConfig(ModelConfig):
    """The tower of images; sizes in pixels."""

    dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    act: str = "quick_gelu"
    norm_eps: float = 1e-5
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    @property
    def num_tokens(self) -> int:
        """Of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """Both towers.

    Attributes:
      projection_dim: of the space that both are projected to.
      logit_scale_init: log of the factor of dot products before training, ln(1 / 0.07).
    """

    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init: float = 2.6592
    model_type: str = "clip"

    @property
    def compute(self) -> Compute:
        """How both towers compute."""
        return self.text.compute

    @property
    def vocab_size(self) -> int:
        """Of texts."""
        return self.text.vocab_size


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type clip.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    refuse_unsupported(hf)
    text, vision = _read_part(hf, "text"), _read_part(hf, "vision")
    ids = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
    return Config(
        text=read_tower(TextConfig, text, ids),
        vision=read_vision(vision),
        projection_dim=hf.get("projection_dim", 512),
        logit_scale_init=float(hf.get("logit_scale_init_value", 2.6592)),
    )


def read_vision(hf: Mapping[str, Any]) -> VisionConfig:
    """The tower of images of a `vision_config`."""
    return read_tower(VisionConfig, hf)


def _read_part(hf: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The fields of a tower. Those of a legacy dictionary replace all, defaults too."""
    fields, legacy = hf.get(f"{part}_config") or {}, hf.get(f"{part}_config_dict")
    return dict(fields if legacy is None else legacy)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    text, vision = cfg.text, cfg.vision
    ids = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": text.pad_id}
    width = {"projection_dim": cfg.projection_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "logit_scale_init_value": cfg.logit_scale_init,
        "text_config": {"model_type": "clip_text_model", **write_tower(text), **ids, **width},
        "vision_config": {"model_type": "clip_vision_model", **write_tower(vision), **width},
    }
