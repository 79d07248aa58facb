"""DeepSeek-VL in DeepSeek's own folders (model_type multi_modality), read as Hugging Face's form.

Their config.json names the towers, by timm's and SAM's names, and gives no sizes; what it leaves
out of the language model means the defaults of transformers' Llama. Tensors have other names, and
timm's towers have q, k and v in one. What is saved of a model that was read so has Hugging Face's
form. The thing a reader would get wrong: both towers of 7B are below `vision_model`, and the neck
and convolutions that follow SAM's encoder are inside it.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmprep_jax.models import siglip
from llmprep_jax.weights.rows import Table

MODEL_TYPE = "multi_modality"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# sizes of the towers that a config.json names
LOW = {
    "siglip_large_patch16_384": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=16,
        hidden_act="gelu",
        vision_use_head=False,
    )
}
HIGH: dict[str, dict[str, Any]] = {"sam_b_downsample": {}}
_TEXT = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_attention_heads=32,
    bos_token_id=100000,
    eos_token_id=100001,
)
HYBRID = "HybridVisionTower"
_PROJECTORS = {"CLIPVisionTower": "mlp_gelu", HYBRID: "low_high_hybrid_split_mlp_gelu"}


def config_as_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of theirs as Hugging Face's.

    Raises:
      ValueError: a part is missing, is of another kind, or names a tower of unknown size.
    """
    if "gen_vision_config" in hf:
        raise ValueError(
            "this is Janus in DeepSeek's own form, whose weights are pickled; load Hugging Face's"
            " form of it, e.g. deepseek-community/Janus-Pro-1B"
        )
    parts = {name: _part(hf, f"{name}_config") for name in ("vision", "aligner")}
    kind, tower = parts["vision"]
    if kind not in _PROJECTORS:
        raise ValueError(f"vision_config.cls is {kind!r}; known are {', '.join(_PROJECTORS)}")
    projector = parts["aligner"][1]
    expected = {"projector_type": _PROJECTORS[kind], "depth": 2}
    for name, value in expected.items():
        if projector.get(name, value) != value:
            raise ValueError(f"aligner_config.{name} is {projector[name]!r}; {kind} has {value!r}")
    language = hf.get("language_config")
    if not isinstance(language, Mapping):
        raise ValueError(f"language_config is {language!r}; it must hold the sizes of a Llama")
    whole = {
        "text_config": {**_TEXT, **language},
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
    }
    if kind != HYBRID:
        return whole | {"model_type": "deepseek_vl", "vision_config": _tower(LOW, tower)}
    low, high = tower.get("low_res_cfg") or {}, tower.get("high_res_cfg") or {}
    return whole | {
        "model_type": "deepseek_vl_hybrid",
        "vision_config": _tower(LOW, low),
        "high_res_vision_config": _tower(HIGH, high),
    }


def _part(hf: Mapping[str, Any], name: str) -> tuple[str, Mapping[str, Any]]:
    """The class and the parameters of a part."""
    part = hf.get(name)
    params = part.get("params") if isinstance(part, Mapping) else None
    if not isinstance(params, Mapping):
        raise ValueError(f"{name} is {part!r}; it must hold cls and params")
    return str(part.get("cls")), params


def _tower(known: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a named tower."""
    name = given.get("model_name")
    if name not in known:
        raise ValueError(f"model_name of a tower is {name!r}; known are {', '.join(known)}")
    layer, feature = given.get("select_layer", -1), given.get("select_feature", "same")
    if (layer, feature) != (-1, "same"):
        raise ValueError(
            f"select_layer={layer!r} and select_feature={feature!r}: released models have -1 and"
            " 'same', and others are not computed"
        )
    return {**known[name], "image_size": given.get("image_size", 1024 if known is HIGH else 384)}


_HIGH = "vision_model.vision_tower_high.vision_tower."
_SAM = r"^model\.high_res_vision_model\.vision_encoder\."
_NECK = {"conv1": 0, "layer_norm1": 1, "conv2": 2, "layer_norm2": 3}
# Hugging Face's names to theirs, the first that fits
_NAMES = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.aligner\.linear1\.", "aligner.layers.0."),
    (r"^model\.aligner\.linear2\.", "aligner.layers.2."),
    (r"^model\.aligner\.proj\.", "aligner.layers.1."),
    (r"^model\.aligner\.high_res_vision_proj\.", "aligner.high_up_proj."),
    (r"^model\.aligner\.vision_proj\.", "aligner.low_up_proj."),
    *((rf"{_SAM}neck\.{name}\.", f"{_HIGH}neck.{i}.") for name, i in _NECK.items()),
    *(
        (rf"^model\.high_res_vision_neck\.{name}\.", f"{_HIGH}neck_hd.{i}.")
        for name, i in _NECK.items()
    ),
    (r"^model\.high_res_vision_proj\.conv1\.", f"{_HIGH}downsamples.0."),
    (r"^model\.high_res_vision_proj\.conv2\.", f"{_HIGH}downsamples.1."),
    (r"^model\.high_res_vision_alpha$", f"{_HIGH}hd_alpha_downsamples"),
    (rf"{_SAM}patch_embed\.projection\.", f"{_HIGH}patch_embed.proj."),
    (rf"{_SAM}layers\.(\{{[^}}]*\}})\.layer_norm(\d)\.", rf"{_HIGH}blocks.\1.norm\2."),
    (rf"{_SAM}layers\.", f"{_HIGH}blocks."),
    (_SAM, _HIGH),
)
_LOW = {False: "vision_model.vision_tower.", True: "vision_model.vision_tower_low.vision_tower."}
_BEGINNINGS = ("language_model.", "aligner.", "vision_model.")


def is_released(names: Iterable[str]) -> bool:
    """Whether these are names of tensors in one of their folders, or of modules in their code."""
    return any(name.startswith(_BEGINNINGS) for name in names)


def table_of_released(table: Table, is_hybrid: bool) -> Table:
    """A model's table for the tensors of their folders, which are their code's modules too.

    7B's two norms of towers' features are in the files and in no model, theirs included.
    """
    rows = {
        path: row._replace(name=_released_name(row.name))
        for path, row in table.items()
        if not path.startswith("vision.")
    }
    tower = siglip.TIMM_VISION_WEIGHTS.below("vision", _LOW[is_hybrid])
    return dataclasses.replace(
        table,
        rows={**rows, **tower},
        ignored=(*table.ignored, r"^vision_model\.(high|low)_layer_norm\."),
    )


def _released_name(name: str) -> str:
    """A row's name as theirs."""
    pattern, theirs = next(pair for pair in _NAMES if re.match(pair[0], name))
    return re.sub(pattern, theirs, name)


def image_fields_as_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """7B's preprocessor_config.json as Hugging Face's.

    Theirs is of the large pictures alone; their model makes the small ones, and normalises both.
    """
    edge = fields.get("image_size", 1024)
    return {
        "image_processor_type": "DeepseekVLHybridImageProcessor",
        "size": {"height": 384, "width": 384},
        "resample": 2,
        "min_size": fields.get("min_size", 14),
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "high_res_size": {"height": edge, "width": edge},
        "high_res_image_mean": list(CLIP_MEAN),
        "high_res_image_std": list(CLIP_STD),
    }
