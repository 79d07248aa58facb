"""Shapes of SAM's encoder of images (Kirillov et al. 2023, appendix A; Li et al. 2022, ViTDet).

Fields that a config.json leaves out are those of ViT-B at 1024 pixels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.models.model_config import UNSAVED, ModelConfig
from llmprep_jax.nn.param import Compute


@dataclasses.dataclass(frozen=True)
class Config(ModelConfig):
    """One encoder.

    Attributes:
      out_dim: channels after the neck.
      window: sides of the windows that most blocks attend within, in patches.
      global_layers: numbers of the blocks that attend to the whole image.
    """

    dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    image_size: int = 1024
    patch_size: int = 16
    out_dim: int = 256
    window: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    def __post_init__(self):
        layers = self.global_layers
        if not layers or list(layers) != sorted({*layers}) or layers[-1] >= self.num_layers:
            raise ValueError(f"global_layers are {layers}, of {self.num_layers} layers")
        if self.dim % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide a width of {self.dim}")

    @property
    def side(self) -> int:
        """Patches in a row of an image."""
        return self.image_size // self.patch_size


_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "output_channels": "out_dim",
    "window_size": "window",
    "mlp_dim": "mlp_dim",
    "layer_norm_eps": "norm_eps",
    "qkv_bias": "qkv_bias",
}
_SIZES = [name for name in _FIELDS if name not in ("layer_norm_eps", "qkv_bias")]


def read(hf: Mapping[str, Any]) -> Config:
    """The encoder of a `sam_vision_model`'s part of config.json.

    Raises:
      ValueError: a field asks for something that is not computed here.
    """
    refuse_unsupported(
        hf, hidden_act=("gelu",), num_channels=(3,), use_abs_pos=(True,), use_rel_pos=(True,)
    )
    hf = {name: value for name, value in hf.items() if value is not None}
    if "mlp_dim" not in hf and "hidden_size" in hf:
        hf["mlp_dim"] = int(hf["hidden_size"] * hf.get("mlp_ratio", 4.0))
    require(hf, *[name for name in _SIZES if name in hf])
    values = {ours: hf[theirs] for theirs, ours in _FIELDS.items() if theirs in hf}
    if "global_attn_indexes" in hf:
        values["global_layers"] = tuple(hf["global_attn_indexes"])
    return Config(**values)


def write(cfg: Config) -> dict[str, Any]:
    """The inverse of `read`."""
    return {
        "model_type": "sam_vision_model",
        **{theirs: getattr(cfg, ours) for theirs, ours in _FIELDS.items()},
        "mlp_ratio": cfg.mlp_dim / cfg.dim,
        "global_attn_indexes": list(cfg.global_layers),
        "num_channels": 3,
        "hidden_act": "gelu",
        "use_abs_pos": True,
        "use_rel_pos": True,
    }
