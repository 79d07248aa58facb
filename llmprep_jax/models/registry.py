"""Which family a Hugging Face `model_type` is, and the presets by name.

A family is a folder with `config.py` (Config, from_hf, to_hf), its presets there or in
`presets.py`, `model.py` (Model) and `weights.py` (the table of tensor names); this file is the only
one that lists them. `gemma3` is the multimodal checkpoint's type; its language model is loaded from
it.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from llmprep_jax.models.deepseek import config as deepseek_config
from llmprep_jax.models.deepseek import weights as deepseek_weights
from llmprep_jax.models.deepseek.model import Model as DeepSeek
from llmprep_jax.models.deepseek.presets import PRESETS as DEEPSEEK_PRESETS
from llmprep_jax.models.gemma3 import config as gemma3_config
from llmprep_jax.models.gemma3 import weights as gemma3_weights
from llmprep_jax.models.gemma3.model import Model as Gemma3
from llmprep_jax.models.llama import config as llama_config
from llmprep_jax.models.llama.model import Model as Llama
from llmprep_jax.models.llama.presets import PRESETS as LLAMA_PRESETS


@dataclasses.dataclass(frozen=True)
class Family:
    """What is needed to build, load and save a model of one family.

    Attributes:
      name: of its folder. model_types: Hugging Face's names for it.
      model: the nnx module class, called as `model(cfg, rngs=...)`.
      from_hf: config.json to Config. write_config: the inverse; call `to_hf`, which checks it.
      settle: the Config of a checkpoint, given the one of its config.json and its tensors' names.
      renames, ignored: spellings and tensors outside the model's `weights`, its table of names.
      copies: names under which a folder holds a tensor once more, with its own name.
      unsaved: fields of the Config that config.json does not hold and a model's logits do not need.
      trained_by: of these, what training goes by, which checkpoints of runs keep.
    """

    name: str
    model_types: tuple[str, ...]
    model: type[nnx.Module]
    config: type
    from_hf: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    presets: Mapping[str, Any]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
    settle: Callable[[Any, Sequence[str]], Any] = lambda cfg, names: cfg
    copies: Callable[[Any], Mapping[str, str]] = lambda cfg: {}
    unsaved: tuple[str, ...] = ("compute",)
    trained_by: tuple[str, ...] = ()

    def to_hf(self, cfg: Any) -> dict[str, Any]:
        """The config.json of a Config, from which it is read back as the same model.

        Raises:
          ValueError: config.json has no way to say what the Config does; the fields are named.
        """
        hf = self.write_config(cfg)
        scaling, unsaved = cfg.rope_scaling, self.unsaved
        if scaling is not None and scaling.kind == "ntk" and not scaling.mscale_all_dim:
            unsaved = (*unsaved, "rope_base", "rope_scaling")  # written as the base it amounts to
        try:
            again = self.from_hf(hf)
        except ValueError as error:
            raise ValueError(
                f"a config.json of model_type {cfg.model_type!r} cannot hold this config: {error}"
            ) from error
        lost = [
            f"{name}={getattr(cfg, name)!r}"
            for name in (field.name for field in dataclasses.fields(cfg))
            if name not in unsaved and getattr(again, name) != getattr(cfg, name)
        ]
        if lost:
            raise ValueError(
                f"a config.json of model_type {cfg.model_type!r} cannot hold {', '.join(lost)};"
                " transformers has no such model"
            )
        return hf


FAMILIES = (
    Family(
        "llama",
        ("llama", "qwen2"),
        Llama,
        llama_config.Config,
        llama_config.from_hf,
        llama_config.to_hf,
        LLAMA_PRESETS,
    ),
    Family(
        "gemma3",
        ("gemma3_text", "gemma3"),
        Gemma3,
        gemma3_config.Config,
        gemma3_config.from_hf,
        gemma3_config.to_hf,
        gemma3_config.PRESETS,
        gemma3_weights.RENAMES,
        lambda cfg: gemma3_weights.IGNORED,
        # `layer_types` say which layers are local, and `local_layers` again when it is read
        unsaved=("compute", "multimodal", "is_local"),
    ),
    Family(
        "deepseek",
        ("deepseek_v2", "deepseek_v3"),
        DeepSeek,
        deepseek_config.Config,
        deepseek_config.from_hf,
        deepseek_config.to_hf,
        DEEPSEEK_PRESETS,
        ignored=deepseek_weights.ignored,
        settle=deepseek_weights.settle,
        copies=deepseek_weights.copies,
        unsaved=("compute", "mtp_weight", "balance", "transport", "buffer_factor"),
        trained_by=("mtp_weight", "balance", "buffer_factor"),  # a transport is of a machine
    ),
)


def family_of_type(model_type: str | None) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
      ValueError: no family has it; near misses are named.
    """
    types = {kind: family for family in FAMILIES for kind in family.model_types}
    if model_type in types:
        return types[model_type]
    near = difflib.get_close_matches(str(model_type), types, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"supported: {', '.join(types)}"
    raise ValueError(f"unknown model_type {model_type!r}; {hint}")


def family_of(model_or_config: Any) -> Family:
    """The family of a model or of its Config."""
    config = getattr(model_or_config, "cfg", model_or_config)
    for family in FAMILIES:
        if isinstance(config, family.config):
            return family
    raise ValueError(f"{type(config).__name__} is no config of a known family")


def preset(name: str) -> Any:
    """The Config of a released size, e.g. "llama-3.1-8b".

    Raises:
      ValueError: no such preset; near misses are named.
    """
    presets = {key: value for family in FAMILIES for key, value in family.presets.items()}
    if name in presets:
        return presets[name]
    near = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
    raise ValueError(f"unknown preset {name!r}; did you mean {', '.join(near or presets)}?")


def build(cfg: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """A model with random weights."""
    return family_of(cfg).model(cfg, rngs=rngs)


def abstract(cfg: Any) -> nnx.Module:
    """A model of shapes, with their shardings under a mesh; traced once for a config and mesh."""
    return _build.eval_shape(cfg)


@functools.partial(jax.jit, static_argnums=0)
def _build(cfg: Any) -> nnx.Module:
    return build(cfg, rngs=nnx.Rngs(0))
