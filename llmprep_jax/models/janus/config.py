"""Shapes of Janus (2410.13848) and Janus-Pro (2501.17811): 1B and 7B.

SigLIP reads images, a VQ autoencoder (LlamaGen's) turns pictures that are drawn to codes and back,
and a language model as DeepSeek-LLM's does both. Pictures have as many codes as SigLIP has patches:
what `num_patches` says of the VQ in config.json is not read, in transformers neither.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models import llama, siglip
from llmprep_jax.models.deepseek_parts import LANGUAGE, SIGLIP, read_language, write_language
from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import UNSAVED, ComposedConfig, ModelConfig
from llmprep_jax.nn.param import Compute

GROUPS = 32  # of channels, that the VQ's norms are over
IMAGE_ID = 100581


@dataclasses.dataclass(frozen=True)
class VQConfig(ModelConfig):
    """The autoencoder of pictures that are drawn.

    Attributes:
      num_codes, code_dim: rows and width of its codebook.
      latent_dim: channels between the codes and the convolutions.
      base_dim: channels at full resolution; `multipliers` of them at each, which halve.
      num_blocks: residual blocks of each resolution; the decoder has one more.
    """

    num_codes: int = 16384
    code_dim: int = 8
    latent_dim: int = 256
    base_dim: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_blocks: int = 2
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    def __post_init__(self):
        odd = [n for n in self.multipliers if not 0 < n <= 64 or self.base_dim * n % GROUPS]
        if not 1 <= len(self.multipliers) <= 8 or odd:
            raise ValueError(
                f"the VQ has {self.base_dim} channels times {self.multipliers}; these are 1 to 8"
                f" numbers up to 64, and channels a multiple of {GROUPS}"
            )

    @property
    def scale(self) -> int:
        """Pixels of a side that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """One Janus model.

    Attributes:
      image_id: the token that stands for a feature.
    """

    language: llama.Config
    vision: siglip.VisionConfig
    vq: VQConfig = VQConfig()
    image_id: int = IMAGE_ID
    model_type: str = "janus"

    def __post_init__(self):
        vision, grid = self.vision, self.vq.scale
        if vision.image_size % vision.patch_size or vision.patch_size != grid:
            raise ValueError(
                f"images of {vision.image_size} pixels are read in patches of {vision.patch_size}"
                f" and drawn by codes of {grid}; both must be alike, and divide the images"
            )

    @property
    def side(self) -> int:
        """Codes in a row of a picture, and patches in one of an image."""
        return self.vision.image_size // self.vision.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Features of an image, and codes of a picture."""
        return self.vision.num_tokens

    @property
    def compute(self) -> Compute:
        """How all parts compute."""
        return self.language.compute


_VISION = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}
_VQ = {
    "num_embeddings": "num_codes",
    "embed_dim": "code_dim",
    "latent_channels": "latent_dim",
    "base_channels": "base_dim",
    "num_res_blocks": "num_blocks",
}


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type janus.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    language, image_id = read_language(hf, IMAGE_ID)
    vision = _read_vision(hf.get("vision_config") or {}, language.dim)
    return Config(language, vision, _read_vq(hf.get("vq_config") or {}, language.dim), image_id)


def _read_vision(hf: Mapping[str, Any], width: int) -> siglip.VisionConfig:
    hf = _given(hf, "vision_config")
    refuse_unsupported(
        hf,
        hidden_act=("gelu",),
        num_channels=(3,),
        attention_bias=(True,),
        use_qk_norm=(False,),
        depth=(2,),
        projection_dim=(width,),
    )
    require(hf, *[name for name in _VISION if name in hf and name != "layer_norm_eps"])
    changes = {ours: hf[theirs] for theirs, ours in _VISION.items() if theirs in hf}
    dim = changes.get("dim", SIGLIP.dim)
    vision = dataclasses.replace(SIGLIP, **changes, mlp_dim=int(dim * hf.get("mlp_ratio", 4.0)))
    tokens = hf.get("num_image_tokens", vision.num_tokens)
    if tokens != vision.num_tokens:
        raise ValueError(
            f"config.json has num_image_tokens={tokens!r}; images of {vision.image_size} pixels in"
            f" patches of {vision.patch_size} have {vision.num_tokens}"
        )
    return vision


def _read_vq(hf: Mapping[str, Any], width: int) -> VQConfig:
    hf = _given(hf, "vq_config")
    refuse_unsupported(
        hf,
        hidden_act=("gelu",),
        in_channels=(3,),
        out_channels=(3,),
        double_latent=(False,),
        num_hidden_layers=(2,),
        projection_dim=(width,),
        image_token_embed_dim=(width,),
    )
    require(hf, *[name for name in _VQ if name in hf])
    changes = {ours: hf[theirs] for theirs, ours in _VQ.items() if theirs in hf}
    multipliers = tuple(hf.get("channel_multiplier", VQConfig.multipliers))
    for multiplier in multipliers:
        require({"channel_multiplier": multiplier}, "channel_multiplier")
    return VQConfig(**changes, multipliers=multipliers)


def _given(hf: Any, name: str) -> dict[str, Any]:
    if not isinstance(hf, Mapping):
        raise ValueError(f"config.json has {name}={hf!r}; it must hold fields by name")
    return {key: value for key, value in hf.items() if value is not None}


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    vision, width = cfg.vision, cfg.language.dim
    ratio = vision.mlp_dim / vision.dim
    if int(vision.dim * ratio) < vision.mlp_dim:
        ratio = math.nextafter(ratio, math.inf)
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        **write_language(cfg.language, cfg.image_id),
        "vision_config": {
            "model_type": "janus_vision_model",
            **{theirs: getattr(vision, ours) for theirs, ours in _VISION.items()},
            "mlp_ratio": ratio,
            "hidden_act": "gelu",
            "attention_bias": True,
            "num_image_tokens": vision.num_tokens,
            "projection_dim": width,
            "depth": 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            **{theirs: getattr(cfg.vq, ours) for theirs, ours in _VQ.items()},
            "channel_multiplier": list(cfg.vq.multipliers),
            "num_patches": cfg.side,
            "projection_dim": width,
            "image_token_embed_dim": width,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
        },
    }


PRESETS: dict[str, Config] = {
    "janus-pro-1b": Config(LANGUAGE["1.3b"], SIGLIP),
    "janus-pro-7b": Config(LANGUAGE["7b"], SIGLIP),
}
