"""adapter_config.json of Hugging Face PEFT 0.21: what it asks for, and what we write.

A field is read here, or it is without effect on what the adapter computes. Any other, also of a
newer PEFT, is refused by name when it is set, since it may change the result.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from llmprep_jax.nn.two_towers import TwoTowers
from llmprep_jax.peft import principal
from llmprep_jax.peft.adapter import adapted_modules, methods
from llmprep_jax.peft.expert_format import expert_layers
from llmprep_jax.peft.fused_format import leaves
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.peft_fields import flag, names, shortest
from llmprep_jax.peft.targets import (
    Targets,
    check_regex,
    embedding,
    is_among,
    is_extra,
    matches,
    modules,
    other_modules,
)
from llmprep_jax.peft.tied import is_tied
from llmprep_jax.peft.tokens import trained_ids
from llmprep_jax.peft.tuned import owners, saved_names, tuned
from llmprep_jax.weights.safetensors import quoted

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SELECTION = (*SELECTION, "modules_to_save")
# where it comes from, how it was trained, and settings of what other fields switch on
WITHOUT_EFFECT = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "vera_dropout",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "rank_dropout",
    "rank_dropout_scale",
    "module_dropout",
    "use_effective_conv2d",
    "init_weights",
    "init_ia3_weights",
)
# these start from A and B alone; corda, loftq and lora_ga change the base's weights by what is
# not in the folder
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_ADVICE = "merge it into its base with peft (merge_and_unload) and load that model"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What a config asks for.

    Attributes:
      method: the settings, patterns included.
      targets, excluded: names or a regex of modules; None: whatever the file holds, and none.
      layers: numbers of the only layers that are adapted, None for all.
      containers: regexes of what layers are numbered in, () for anything.
      draws: whether what all layers share is drawn anew where the file does not hold it.
      empty: modules of which nothing is left after AdaLoRA's pruning.
      parameters: names of parameters that hold experts (target_parameters).
      saved: ends of names of the modules that are trained whole.
      tied: whether what trains the embedding trains the head that is tied to it.
    """

    method: Method
    targets: Targets | None
    excluded: Targets | None
    layers: tuple[int, ...] | None
    containers: tuple[str, ...]
    draws: bool = False
    empty: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    tied: bool = False

    def trains(self, module: str) -> bool:
        """Whether PEFT trains a module of this name whole, or one that it is in; it looks at the
        ends of names."""
        return any(name.endswith(self.saved) for name in owners(module))

    def is_in_saved(self, module: str) -> bool:
        """Whether a module is one that is trained whole, or in one: such are not adapted."""
        return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved)

    def adapts(self, module: str, *, parameter: bool = False) -> bool:
        """Whether PEFT adapts a module of this name, or a parameter; or, untold, could."""
        if parameter:
            return matches(self.parameters, [module])
        if module in self.empty:
            return False
        if self.parameters and matches(self.parameters, [f"{module}.weight"]):
            return True
        if self.is_in_saved(module):
            return False
        if self.targets is None:
            return True
        if self.excluded and matches(self.excluded, [module]):
            return False
        if not matches(self.targets, [module]):
            return False
        if isinstance(self.targets, str) or not self.layers:
            return True
        return module in self.targets or is_among(self.layers, self.containers, module)


def read_config(path: Path, config: Mapping[str, Any]) -> AdapterConfig:
    """Checks a config.

    Args:
      path: of its file, for the errors.

    Raises:
      ValueError: it is of another method, sets what plain LoRA lacks, or makes no sense.
    """
    kind = config.get("peft_type")
    readers = Method.readers.get(kind, []) if isinstance(kind, str) else []
    if not readers:
        supported = ", ".join(sorted(Method.readers))
        raise ValueError(f"{path} is of peft_type {quoted(kind)}; supported: {supported}")
    known = {"peft_type", *SELECTION, *readers[0].peft_fields, *WITHOUT_EFFECT}
    unsupported = [name for name, value in config.items() if name not in known and value]
    init = config.get("init_lora_weights")
    is_known = init in _INITS or principal.is_one(str(init))
    unsupported += [] if is_known else ["init_lora_weights"]
    if unsupported:
        lacks = ", ".join(f"{name}={quoted(config[name])}" for name in sorted(unsupported))
        raise ValueError(f"{path} sets {lacks}, which is not supported; {_ADVICE}")
    try:
        return _read(config, next(reader for reader in readers if reader.reads(config)))
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; save the adapter again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(config: Mapping[str, Any], reader: type[Method]) -> AdapterConfig:
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform is {quoted(layers)}; it must hold layers' numbers")
    containers = names(config, "layers_pattern") or ()
    containers = (containers,) if isinstance(containers, str) else containers
    for name in containers:
        check_regex("layers_pattern", name)
    targets = [names(config, name) for name in ("target_modules", "exclude_modules")]
    for text in targets:
        if isinstance(text, str):
            check_regex("target_modules or exclude_modules", text)
    parameters = names(config, "target_parameters") or ()
    if isinstance(parameters, str):
        raise ValueError(f"target_parameters is {quoted(parameters)}; it must be a list of names")
    saved = names(config, "modules_to_save") or ()
    method, biases = reader.from_peft(config), config.get("bias") or "none"
    if method.bias != biases:
        name = type(method).__name__
        raise ValueError(
            f"bias is {quoted(biases)}, but of {name} none are trained here; {_ADVICE}"
        )
    return AdapterConfig(
        method,
        *targets,
        tuple(layers) or None,
        containers,
        draws=reader.draws_shared(config),
        empty=reader.emptied(config),
        parameters=parameters,
        saved=(saved,) if isinstance(saved, str) else saved,
        tied=flag(config, "ensure_weight_tying"),
    )


def make_config(model: nnx.Module, base_model: str | None) -> dict[str, Any]:
    """The config of a model's adapters, for PEFT."""
    of_model, adapted = modules(model), methods(model)
    of_adapted = adapted_modules(model)
    by_name = {name: adapted[path] for path in adapted for name in of_adapted[path].values()}
    of_experts = expert_layers(model, of_model)
    every = {
        name
        for path in of_model
        for name in of_model[path].values()
        if path in adapted or not is_extra(model, path)
    }
    parameters = {name for path in of_experts for name in of_model[path].values()} & every
    is_plain = all(method.adds_product for method in adapted.values())
    fused = leaves(model) if is_plain else frozenset()
    by_weight = {x for x in every - parameters if x.rsplit(".", 1)[-1] in fused}
    others = other_modules(model)
    targets, of_parameters, weights = [
        sorted(shortest(dict.fromkeys([x for x in by_name if x in kind], True), kind | beside))
        for kind, beside in (
            (every - parameters - by_weight, others),
            (parameters, set()),
            (by_weight, set()),
        )
    ]
    of_parameters += [f"{name}.weight" for name in weights]
    first = next(iter(by_name.values()))
    settings = {"peft_type": first.peft_type, **type(first).to_peft(by_name)}
    ids = trained_ids(model)
    if of_parameters:
        settings["lora_dropout"] = 0.0  # with parameters PEFT refuses it; it is of training alone
    for field in ("rank_pattern", "alpha_pattern") if weights else ():
        settings[field] = {
            name + (r"(\.weight)?" if name.rsplit(".", 1)[-1] in fused else ""): value
            for name, value in settings[field].items()
        }
    return {
        # with a task PEFT wraps what generates, which two towers do not
        "task_type": None if isinstance(model, TwoTowers) else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets,
        **({"target_parameters": of_parameters} if of_parameters else {}),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved_names(model) or None,
        **settings,
        **({"trainable_token_indices": list(ids)} if ids else {}),
        **_tying(model, by_name),
    }


def _tying(model: nnx.Module, by_name: Mapping[str, Method]) -> dict[str, Any]:
    """What has PEFT train the head with the embedding that it is."""
    if not is_tied(model) or embedding(model) not in {*tuned(model), *methods(model)}:
        return {}
    if next(iter(by_name.values())).ties_tables:
        return {"ensure_weight_tying": True}
    head = model.weights.in_memory()[model.weights.head].name.removesuffix(".weight")
    return {"modules_to_save": sorted([*saved_names(model), head])}
