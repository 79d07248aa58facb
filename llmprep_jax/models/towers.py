"""What folders of CLIP and SigLIP have in common: fields of a tower, and names of its tensors.

Hugging Face writes a tower's fields into `text_config` and `vision_config`, most of them left out
where they are the class's defaults, which are those of the Configs.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from llmprep_jax.models.hf_config import refuse_unsupported, require
from llmprep_jax.weights.rows import Table

_LAYER, _ATTN = "encoder.layers.{l}", "encoder.layers.{l}.self_attn"

BLOCKS = Table(
    {
        "layers.attn_norm.scale": (f"{_LAYER}.layer_norm1.weight", "d -> d"),
        "layers.attn_norm.bias": (f"{_LAYER}.layer_norm1.bias", "d -> d"),
        "layers.attn.q.w": (f"{_ATTN}.q_proj.weight", "(n h) d -> d n h"),
        "layers.attn.q.b": (f"{_ATTN}.q_proj.bias", "(n h) -> n h"),
        "layers.attn.k.w": (f"{_ATTN}.k_proj.weight", "(n h) d -> d n h"),
        "layers.attn.k.b": (f"{_ATTN}.k_proj.bias", "(n h) -> n h"),
        "layers.attn.v.w": (f"{_ATTN}.v_proj.weight", "(n h) d -> d n h"),
        "layers.attn.v.b": (f"{_ATTN}.v_proj.bias", "(n h) -> n h"),
        "layers.attn.o.w": (f"{_ATTN}.out_proj.weight", "d (n h) -> n h d"),
        "layers.attn.o.b": (f"{_ATTN}.out_proj.bias", "d -> d"),
        "layers.mlp_norm.scale": (f"{_LAYER}.layer_norm2.weight", "d -> d"),
        "layers.mlp_norm.bias": (f"{_LAYER}.layer_norm2.bias", "d -> d"),
        "layers.mlp.up.w": (f"{_LAYER}.mlp.fc1.weight", "f d -> d f"),
        "layers.mlp.up.b": (f"{_LAYER}.mlp.fc1.bias", "f -> f"),
        "layers.mlp.down.w": (f"{_LAYER}.mlp.fc2.weight", "d f -> f d"),
        "layers.mlp.down.b": (f"{_LAYER}.mlp.fc2.bias", "d -> d"),
    }
)
TEXT = BLOCKS | Table(
    {
        "embed.w": ("embeddings.token_embedding.weight", "v d -> v d"),
        "positions.table": ("embeddings.position_embedding.weight", "t d -> t d"),
        "norm.scale": ("final_layer_norm.weight", "d -> d"),
        "norm.bias": ("final_layer_norm.bias", "d -> d"),
    }
)
IMAGE = BLOCKS | Table(
    {
        "patches.w": ("embeddings.patch_embedding.weight", "d c p q -> p q c d"),
        "positions.table": ("embeddings.position_embedding.weight", "i d -> i d"),
        "norm.scale": ("post_layernorm.weight", "d -> d"),
        "norm.bias": ("post_layernorm.bias", "d -> d"),
    }
)

_SIZES = ("vocab_size", "dim", "mlp_dim", "num_layers", "num_heads", "max_seq_len")
_SIZES += ("image_size", "patch_size", "projection_dim")
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_TOWER = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "intermediate_size": "mlp_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layer_norm_eps": "norm_eps",
}
Tower = TypeVar("Tower")


def read_tower(
    kind: type[Tower], hf: Mapping[str, Any], more: Mapping[str, str] = MappingProxyType({})
) -> Tower:
    """A tower's Config from its part of config.json; what that leaves out is the Config's default.

    Args:
      more: further fields, theirs to ours.

    Raises:
      ValueError: a field has a value that is not computed here.
    """
    if not isinstance(hf, Mapping):
        raise ValueError(f"config.json has {hf!r} for a tower; it must hold its fields by name")
    refuse_unsupported(hf, hidden_act=tuple(_ACTIVATIONS), num_channels=(3,))
    own = {field.name for field in dataclasses.fields(kind)}
    names = {theirs: ours for theirs, ours in (_TOWER | dict(more)).items() if ours in own}
    values = {ours: hf[theirs] for theirs, ours in names.items() if theirs in hf}
    for name in ("image_size", "patch_size"):  # some files give two sides
        sides = values.get(name)
        if isinstance(sides, list | tuple) and len(set(sides)) == 1:
            values[name] = sides[0]
    require(values, *[name for name in values if name in _SIZES])
    if "hidden_act" in hf:
        values["act"] = _ACTIVATIONS[hf["hidden_act"]]
    tower = kind(**values)
    if tower.dim % tower.num_heads:
        raise ValueError(
            f"config.json has a tower of width {tower.dim} and {tower.num_heads} heads, which do"
            " not divide it"
        )
    return tower


def write_tower(tower: Any) -> dict[str, Any]:
    """The inverse of `read_tower`."""
    fields = {
        theirs: getattr(tower, ours) for theirs, ours in _TOWER.items() if hasattr(tower, ours)
    }
    act = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == tower.act)
    channels = {"num_channels": 3} if "image_size" in fields else {}
    return {**fields, **channels, "hidden_act": act, "attention_dropout": 0.0}
