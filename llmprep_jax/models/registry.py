"""Which family a Hugging Face `model_type` is, and the presets by name.

A family is a package of this folder that names what `models.protocol.Family` says; this file is the
only one that lists them.
"""

import difflib
import functools
import importlib.util
from typing import Any

import jax
from flax import nnx

from llmprep_jax.models import (
    clip,
    deepseek,
    deepseek_vl,
    deepseek_vl2,
    gemma3,
    gemma3_text,
    janus,
    llama,
    llava,
    siglip,
)
from llmprep_jax.models.model_config import lost
from llmprep_jax.models.protocol import Family
from llmprep_jax.text.processor import Processor

FAMILIES: tuple[Family, ...] = (
    *(llama, gemma3_text, deepseek),
    *(clip, siglip),
    *(gemma3, llava, deepseek_vl, deepseek_vl2, janus),
)


def family_of_type(model_type: str | None) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
      ValueError: no family has it; near misses are named.
    """
    types = {kind: family for family in FAMILIES for kind in family.MODEL_TYPES}
    if model_type in types:
        return types[model_type]
    near = difflib.get_close_matches(str(model_type), types, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"supported: {', '.join(types)}"
    raise ValueError(f"unknown model_type {model_type!r}; {hint}")


def family_of(cfg: Any) -> Family:
    """The family of a Config."""
    for family in FAMILIES:
        if isinstance(cfg, family.Config):
            return family
    raise ValueError(f"{type(cfg).__name__} is no config of a known family")


def to_hf(cfg: Any) -> dict[str, Any]:
    """The config.json of a Config, from which it is read back as the same model.

    Raises:
      ValueError: config.json has no way to say what the Config does; the fields are named.
    """
    family, kind = family_of(cfg), cfg.model_type
    hf = family.to_hf(cfg)
    try:
        again = family_of_type(hf["model_type"]).from_hf(hf)
    except ValueError as error:
        raise ValueError(
            f"a config.json of model_type {kind!r} cannot hold this config: {error}"
        ) from error
    differing = ", ".join(lost(cfg, again))
    if differing:
        raise ValueError(
            f"a config.json of model_type {kind!r} cannot hold {differing}; transformers has no"
            " such model"
        )
    return hf


def processor_class(model_type: str | None) -> Any:
    """What reads texts, and images where the family has a `processor` module, for a model.

    It is imported when it is asked for: what trains on arrays needs no Pillow.
    """
    families = [family for family in FAMILIES if model_type in family.MODEL_TYPES]
    name = f"{families[0].__name__}.processor" if families else None
    if name is None or importlib.util.find_spec(name) is None:
        return Processor
    return importlib.import_module(name).Processor


def preset(name: str) -> Any:
    """The Config of a released size, e.g. "llama-3.1-8b".

    Raises:
      ValueError: no such preset; near misses are named.
    """
    presets = {key: value for family in FAMILIES for key, value in family.PRESETS.items()}
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
    raise ValueError(f"unknown preset {name!r}; did you mean {', '.join(near or presets)}?")


def build(cfg: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """A model with random weights."""
    return family_of(cfg).Model(cfg, rngs=rngs)


def abstract(cfg: Any) -> nnx.Module:
    """A model of shapes, with their shardings under a mesh; traced once for a config and mesh."""
    return _build.eval_shape(cfg)


@functools.partial(jax.jit, static_argnums=0)
def _build(cfg: Any) -> nnx.Module:
    return build(cfg, rngs=nnx.Rngs(0))
