"""Shapes of DeepSeek-VL2 (Wu et al. 2024): a SigLIP tower, a projector, and a DeepSeek decoder.

The one thing a reader would get wrong: the `language_config` of all three releases says
deepseek_v2, though Tiny has no latent attention (`use_mla` is false) and Base has V3's router
(`topk_method` is noaux_tc): these fields decide. What a file leaves out means the default of the
released classes, which are not transformers'.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from llmprep_jax.models import deepseek, siglip
from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import ComposedConfig
from llmprep_jax.nn.param import Compute

IMAGE_IDS = {129280: 128815}  # of <image>, by the vocabulary's size


@dataclasses.dataclass(frozen=True)
class Config(ComposedConfig):
    """The three parts.

    Attributes:
      vision: its attention pooling, where files have it, is kept and never computed.
      image_id: the token that each feature of an image takes the place of; None: nothing says it,
        and the model reads no images.
      view_order: where the view of the whole picture stands, before its tiles ("head") or after.
      resolutions: of pictures that are tiled, (width, height), as the processor reads them.
    """

    language: deepseek.Config
    vision: siglip.VisionConfig = siglip.VisionConfig()
    image_id: int | None = None
    view_order: Literal["head", "tail"] = "head"
    resolutions: tuple[tuple[int, int], ...] = ()
    model_type: str = "deepseek_vl_v2"

    def with_token_ids(self, find: Callable[[str], int | None]) -> "Config":
        """Small's config.json does not say which token an image's are; its tokenizer does."""
        if self.image_id is not None:
            return self
        return dataclasses.replace(self, image_id=find("<image>"))

    @property
    def compute(self) -> Compute:
        """How all parts compute."""
        return self.language.compute

    @property
    def side(self) -> int:
        """Tokens across a tile, after 2 x 2 patches were joined: 14 of the released models."""
        return -(-(self.vision.image_size // self.vision.patch_size) // 2)


# of the released classes
_LANGUAGE = dict(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    moe_intermediate_size=1407,
    num_hidden_layers=30,
    num_attention_heads=32,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_shared_experts=None,
    moe_layer_freq=1,
    first_k_dense_replace=0,
    routed_scaling_factor=1.0,
    topk_method="gready",
    scoring_func="softmax",
    norm_topk_prob=False,
    aux_loss_alpha=0.001,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    bos_token_id=100000,
    eos_token_id=100001,
)
_VISION = dict(
    image_size=384,
    patch_size=16,
    width=1152,
    layers=27,
    heads=16,
    mlp_ratio=3.7362,
    global_pool="map",
)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type deepseek_vl_v2.

    Args:
      names: of the checkpoint's tensors; the tower's pooling is left out of some.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    refuse_unsupported(hf, tile_tag=("2D",), global_view_pos=("head", "tail"))
    vision = _read_vision({**_VISION, **_given(hf, "vision_config")})
    if names is not None:
        has_pool = any(name.startswith("vision.attn_pool.") for name in names)
        vision = dataclasses.replace(vision, has_pool=has_pool)
    language = _read_language(_given(hf, "language_config"))
    _check_projector(_given(hf, "projector_config"), vision, language)
    image_id = hf.get("image_token_id", hf.get("image_token_index"))
    return Config(
        language,
        vision,
        image_id=IMAGE_IDS.get(language.vocab_size) if image_id is None else image_id,
        view_order=hf.get("global_view_pos", "head"),
        resolutions=tuple((w, h) for w, h in hf.get("candidate_resolutions") or ()),
    )


def _given(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of config.json, without what is null in it."""
    part = hf.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"config.json has {name}={part!r}; it must hold that part's fields")
    keeps_null = ("q_lora_rank", "bos_token_id", "eos_token_id")
    return {key: value for key, value in part.items() if value is not None or key in keeps_null}


def _read_language(given: Mapping[str, Any]) -> deepseek.Config:
    hf = {**_LANGUAGE, **given}
    require(hf, "n_routed_experts", "num_experts_per_tok")
    if hf["topk_method"] == "noaux_tc":  # V3's router, but for groups: these hide others by zeros
        refuse_unsupported(hf, n_group=(1, None), topk_group=(1, None))
        hf |= {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1}
        hf |= {"num_nextn_predict_layers": 0}
    else:
        hf |= {"model_type": "deepseek_v2"}
    return deepseek.from_hf(hf)


def _read_vision(hf: Mapping[str, Any]) -> siglip.VisionConfig:
    refuse_unsupported(hf, class_token=(False,), global_pool=("map", ""))
    require(hf, "image_size", "patch_size", "width", "layers", "heads")
    if hf["width"] % hf["heads"]:
        raise ValueError(
            f"config.json has a tower of width {hf['width']} and {hf['heads']} heads, which do not"
            " divide it"
        )
    return siglip.VisionConfig(
        dim=hf["width"],
        mlp_dim=int(hf["width"] * hf["mlp_ratio"]),
        num_layers=hf["layers"],
        num_heads=hf["heads"],
        image_size=hf["image_size"],
        patch_size=hf["patch_size"],
        has_pool=hf["global_pool"] == "map",
    )


def _check_projector(
    hf: Mapping[str, Any], vision: siglip.VisionConfig, language: deepseek.Config
) -> None:
    """Refuses a projector that is not two layers on 2 x 2 patches."""
    refuse_unsupported(
        hf,
        projector_type=("downsample_mlp_gelu",),
        input_dim=(vision.dim,),
        n_embed=(language.dim,),
        depth=(2,),
        mlp_ratio=(1,),
        downsample_ratio=(2,),
        token_pooling=(False,),
    )


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that the released code reads back as the same model."""
    vision, language = cfg.vision, deepseek.to_hf(cfg.language)
    language |= {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "use_mla": cfg.language.attention == "latent",
    }
    return {
        "architectures": ["DeepseekVLV2ForCausalLM"],
        "model_type": cfg.model_type,
        "tile_tag": "2D",
        "global_view_pos": cfg.view_order,
        "candidate_resolutions": [list(size) for size in cfg.resolutions],
        "image_token_id": cfg.image_id,
        **{name: language[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "vision_config": {
            "model_type": "vision",
            "model_name": "siglip_so400m_patch14_384",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.dim,
            "layers": vision.num_layers,
            "heads": vision.num_heads,
            # the released 3.7362 is of 4,304 to 1,152, rounded up
            "mlp_ratio": math.ceil(vision.mlp_dim / vision.dim * 1e4) / 1e4,
            "global_pool": "map" if vision.has_pool else "",
        },
        "projector_config": {
            "model_type": "mlp_projector",
            "projector_type": "downsample_mlp_gelu",
            "input_dim": vision.dim,
            "n_embed": cfg.language.dim,
            "depth": 2,
            "mlp_ratio": 1,
            "downsample_ratio": 2,
            "token_pooling": False,
        },
        "language_config": language,
    }
