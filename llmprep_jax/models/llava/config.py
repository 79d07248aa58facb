"""Shapes of LLaVA 1.5 (Liu et al. 2023, Improved Baselines with Visual Instruction Tuning).

CLIP's tower at 336 pixels, of which the last block and norm are not used, a projector of two
layers, and a language model of the llama family. What a config.json leaves out is transformers'
default.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models import clip, llama
from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import TRAINED_BY, ComposedConfig
from llmprep_jax.models.towers import write_tower
from llmprep_jax.nn.param import Compute


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """One LLaVA model.

    Attributes:
      feature_layer: the blocks of the tower whose output is read: so many, or, if negative, all but
        so many and one more (-1: all, -2: all but the last).
      keeps_class_token: whether the class token's feature is one of an image's.
      has_unused: whether a checkpoint holds the blocks that are not read.
      image_id: the token that stands for a feature.
    """

    language: llama.Config
    vision: clip.VisionConfig
    feature_layer: int = -2
    keeps_class_token: bool = False
    projector_act: str = "gelu"
    projector_bias: bool = True
    image_id: int = 32000
    has_unused: bool = dataclasses.field(default=True, metadata=TRAINED_BY)
    model_type: str = "llava"

    def __post_init__(self):
        if not 0 <= self.num_blocks <= self.vision.num_layers:
            raise ValueError(
                f"feature_layer is {self.feature_layer}; the tower has {self.vision.num_layers}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the tower that are read."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.vision.num_layers + 1 + layer

    @property
    def tokens_per_image(self) -> int:
        """Features of an image."""
        return self.vision.num_tokens - (not self.keeps_class_token)

    @property
    def compute(self) -> Compute:
        """How all parts compute."""
        return self.language.compute


_STRATEGIES = {"default": False, "full": True}
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu", "relu": "relu"}
_VISION = clip.VisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type llava.

    Args:
      names: of the checkpoint's tensors: some leave out the blocks that are not read.

    Raises:
      ValueError: a field asks for something that this family does not compute.
    """
    text = {"model_type": "llama", **(hf.get("text_config") or {})}
    refuse_unsupported(
        hf,
        vision_feature_select_strategy=tuple(_STRATEGIES),
        projector_hidden_act=tuple(_ACTIVATIONS),
    )
    refuse_unsupported(text, model_type=llama.MODEL_TYPES)
    given = hf.get("vision_config")
    if given:
        refuse_unsupported(given, model_type=("clip_vision_model",))
    vision = clip.read_vision(given) if given else _VISION
    layer = hf.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"config.json has vision_feature_layer={layer!r}; supported: one number")
    tied = hf.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    cfg = Config(
        llama.from_hf({**_TEXT, **text, "tie_word_embeddings": tied}),
        vision,
        layer,
        _STRATEGIES[hf.get("vision_feature_select_strategy", "default")],
        _ACTIVATIONS[hf.get("projector_hidden_act", "gelu")],
        hf.get("multimodal_projector_bias", True),
        hf.get("image_token_index", 32000),
    )
    require({"image_token_index": cfg.image_id}, "image_token_index")
    if names is None:
        return cfg
    last = f"encoder.layers.{vision.num_layers - 1}."
    return dataclasses.replace(cfg, has_unused=any(last in name for name in names))


# of transformers' LlamaConfig
_TEXT = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers' LlavaForConditionalGeneration reads."""
    text = llama.to_hf(cfg.language)
    text.pop("architectures")
    strategy = {keeps: name for name, keeps in _STRATEGIES.items()}[cfg.keeps_class_token]
    act = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[cfg.projector_act]
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **write_tower(cfg.vision)},
        "vision_feature_layer": cfg.feature_layer,
        "vision_feature_select_strategy": strategy,
        "projector_hidden_act": act,
        "multimodal_projector_bias": cfg.projector_bias,
        "image_token_index": cfg.image_id,
        "image_seq_length": cfg.tokens_per_image,
        "tie_word_embeddings": cfg.language.tie_embeddings,
        **{name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def _released(name: str) -> Config:
    """A release's: Vicuna with 64 more words, of which one stands for images."""
    words = dict(vocab_size=32064, norm_eps=1e-5, pad_id=32001)
    return Config(dataclasses.replace(llama.PRESETS[name], **words), _VISION)


PRESETS: dict[str, Config] = {
    "llava-1.5-7b": _released("llama-2-7b"),
    "llava-1.5-13b": _released("llama-2-13b"),
}
