"""adapter_config.json of Hugging Face PEFT 0.21: what it asks for, and what we write.

Every field is one of three kinds: read here, without effect on what the adapter computes, or
refused by name when it is set. The one thing a reader would get wrong: a field that is in none of
the three lists (of a newer PEFT) is refused too when it is set, since it may change the result.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from llmprep_jax.peft.adalora import AdaLoRA
from llmprep_jax.peft.adapter import Method, methods
from llmprep_jax.peft.dora import DoRA
from llmprep_jax.peft.expert_format import expert_layers
from llmprep_jax.peft.fused_format import leaves
from llmprep_jax.peft.ia3 import IA3
from llmprep_jax.peft.loha import LoHa
from llmprep_jax.peft.lokr import LoKr
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.targets import (
    Number,
    Targets,
    as_pattern,
    check_number,
    check_regex,
    is_extra,
    matches,
    modules,
)
from llmprep_jax.peft.tied import EMBED, is_tied
from llmprep_jax.peft.tuned import saved_names, tuned
from llmprep_jax.peft.vera import VeRA
from llmprep_jax.weights.safetensors import quoted

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SELECTION = (*SELECTION, "modules_to_save")
RANKS = ("r", "rank_pattern", "alpha_pattern")
ADALORA = {  # our settings by their names
    "init_r": "rank",
    "target_r": "target_rank",
    "tinit": "warmup_steps",
    "tfinal": "final_steps",
    "deltaT": "every",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
    "total_step": "total_steps",
}
# of LoRA's fields AdaLoRA ignores r, alpha_pattern and use_rslora, and PEFT refuses use_dora
READ = {
    "LORA": (
        *RANKS,
        *("lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "bias"),
        *("ensure_weight_tying", "lora_dropout", "target_parameters"),
    ),
    "LOHA": (*RANKS, "alpha"),
    "LOKR": (*RANKS, "alpha", "decompose_both", "decompose_factor"),
    "IA3": ("feedforward_modules",),
    "ADALORA": (
        *(*ADALORA, *RANKS, "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "bias"),
        *("ensure_weight_tying", "lora_dropout"),
    ),
    "VERA": ("r", "d_initial", "projection_prng_key", "save_projection", "bias"),
}
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
REFUSED = (
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",  # of methods other than LoRA
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
# these start from A and B alone; pissa, olora, corda, loftq and lora_ga change the base's weights
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
        """Whether PEFT trains a module of this name whole; it looks at the end of the name."""
        return module.endswith(self.saved)

    def adapts(self, module: str, *, parameter: bool = False) -> bool:
        """Whether PEFT adapts a module of this name, or a parameter; or, untold, could."""
        if parameter:
            return matches(self.parameters, [module])
        if module in self.empty:
            return False
        if self.parameters and matches(self.parameters, [f"{module}.weight"]):
            return True
        if self.targets is None:
            return True
        if self.excluded and matches(self.excluded, [module]):
            return False
        if not matches(self.targets, [module]):
            return False
        if isinstance(self.targets, str) or not self.layers:
            return True
        within = [rf"(?:.*?\.)??(?:{name})" for name in self.containers] or [r".*?\.[^.]*"]
        found = [re.match(rf"{each}\.(?P<layer>\d+)\.", module) for each in within]
        number = next((match["layer"] for match in found if match), None)
        return number is not None and int(number) in self.layers


def read_config(path: Path, config: Mapping[str, Any]) -> AdapterConfig:
    """Checks a config.

    Args:
      path: of its file, for the errors.

    Raises:
      ValueError: it is of another method, sets what plain LoRA lacks, or makes no sense.
    """
    kind = config.get("peft_type")
    if kind not in READ:
        raise ValueError(f"{path} is of peft_type {quoted(kind)}; supported: {', '.join(READ)}")
    known = {"peft_type", *SELECTION, *READ[kind], *WITHOUT_EFFECT}
    asked = [name for name, value in config.items() if name not in known and value]
    asked += ["init_lora_weights"] if config.get("init_lora_weights") not in _INITS else []
    if asked:
        lacks = ", ".join(f"{name}={quoted(config[name])}" for name in sorted(asked))
        raise ValueError(f"{path} sets {lacks}, which is not supported; {_ADVICE}")
    try:
        return _read(config)
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; save the adapter again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(config: Mapping[str, Any]) -> AdapterConfig:
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform is {quoted(layers)}; it must hold layers' numbers")
    containers = _names(config, "layers_pattern") or ()
    containers = (containers,) if isinstance(containers, str) else containers
    for name in containers:
        check_regex("layers_pattern", name)
    targets = [_names(config, name) for name in ("target_modules", "exclude_modules")]
    for text in targets:
        if isinstance(text, str):
            check_regex("target_modules or exclude_modules", text)
    parameters = _names(config, "target_parameters") or ()
    if isinstance(parameters, str):
        raise ValueError(f"target_parameters is {quoted(parameters)}; it must be a list of names")
    draws = config.get("save_projection") is False
    selection = *targets, tuple(layers) or None, containers
    saved = _names(config, "modules_to_save") or ()
    whole = {
        "saved": (saved,) if isinstance(saved, str) else saved,
        "tied": _flag(config, "ensure_weight_tying"),
    }
    if config["peft_type"] != "ADALORA":
        return AdapterConfig(_method(config), *selection, draws, parameters=parameters, **whole)
    left = _kept(config)
    ranks = {re.escape(module): rank for module, rank in left.items() if rank}
    empty = tuple(module for module, rank in left.items() if not rank)
    return AdapterConfig(_adalora(config, ranks), *selection, empty=empty, **whole)


def _adalora(config: Mapping[str, Any], rank_pattern: Mapping[str, int]) -> AdaLoRA:
    settings = {ours: config[theirs] for theirs, ours in ADALORA.items() if theirs in config}
    for name in ("init_r", "total_step"):
        check_number(name, config.get(name), whole=True)
    for name in {*ADALORA, "lora_alpha"} & config.keys():
        if isinstance(config[name], bool) or not isinstance(config[name], (int, float)):
            raise ValueError(f"{name} is {quoted(config[name])}; it must be a number")
    alpha = config.get("lora_alpha", 8)
    # as PEFT has it: an alpha of 0 or less stands for the rank
    alpha = alpha if alpha > 0 else settings["rank"]
    return AdaLoRA(**settings, alpha=alpha, rank_pattern=rank_pattern)


def _kept(config: Mapping[str, Any]) -> dict[str, int]:
    """How many triplets AdaLoRA's pruning left, by module; modules that it says nothing of lack."""
    pattern, kept = config.get("rank_pattern") or {}, {}
    if not isinstance(pattern, dict):
        raise ValueError(f"rank_pattern is {quoted(pattern)}; it must be an object")
    for name, left in pattern.items():
        is_list = isinstance(left, list) and all(isinstance(each, bool) for each in left)
        if not is_list or len(left) != config.get("init_r"):
            raise ValueError(
                f"rank_pattern of {quoted(name)} is {quoted(left)}; it must hold true or false for"
                " each of init_r triplets"
            )
        kept[name.split(".lora_E")[0]] = sum(left)
    return kept


def _method(config: Mapping[str, Any]) -> Method:
    """The settings of the method itself."""
    kind = config["peft_type"]
    if kind == "IA3":
        return IA3(feedforward=_names(config, "feedforward_modules") or ())
    if kind == "VERA":
        check_number("r", config["r"], whole=True)
        initial, seed = config.get("d_initial", 0.1), config.get("projection_prng_key", 0)
        return VeRA(int(config["r"]), initial, seed)
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise ValueError(f"{name} is {quoted(config[name])}; it must be an object")
    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    check_number("r", config["r"], whole=True)
    check_number(alpha, config[alpha], whole=False)
    common = dict(
        rank=int(config["r"]),
        alpha=config[alpha],
        rank_pattern=as_pattern("rank_pattern", config.get("rank_pattern") or {}, whole=True),
        alpha_pattern=as_pattern("alpha_pattern", config.get("alpha_pattern") or {}, whole=False),
    )
    if kind == "LORA":
        method = DoRA if _flag(config, "use_dora") else LoRA
        dropout = config.get("lora_dropout") or 0.0
        if not isinstance(dropout, (int, float)):
            raise ValueError(f"lora_dropout is {quoted(dropout)}; it must be a number")
        more = {"rslora": _flag(config, "use_rslora"), "bias": config.get("bias") or "none"}
        return method(**common, **more, dropout=float(dropout))
    if kind == "LOHA":
        return LoHa(**common)
    factor = config.get("decompose_factor", -1)
    if not isinstance(factor, int) or isinstance(factor, bool) or not (factor == -1 or factor > 0):
        raise ValueError(f"decompose_factor is {quoted(factor)}; it must be -1 or at least 1")
    return LoKr(**common, decompose_both=_flag(config, "decompose_both"), decompose_factor=factor)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {quoted(value)}; it must be true or false")
    return value


def _names(config: Mapping[str, Any], field: str) -> str | tuple[str, ...] | None:
    """A field that holds a string or a list of them."""
    value = config.get(field)
    if not value or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{field} is {quoted(value)}; it must hold names")
    return tuple(value)


def make_config(model: nnx.Module, base_model: str | None) -> dict[str, Any]:
    """The config of a model's adapters, for PEFT."""
    of_model, adapted = modules(model), methods(model)
    by_name = {name: method for path, method in adapted.items() for name in of_model[path].values()}
    of_experts = expert_layers(model, of_model)
    every = {
        name
        for path in of_model
        for name in of_model[path].values()
        if path in adapted or not is_extra(model, path)
    }
    parameters = {name for path in of_experts for name in of_model[path].values()} & every
    is_plain = all(type(method) is LoRA for method in adapted.values())
    taken = leaves(model) if is_plain else frozenset()
    by_weight = {x for x in every - parameters if x.rsplit(".", 1)[-1] in taken}
    targets, of_parameters, weights = [
        sorted(_shortest(dict.fromkeys([x for x in by_name if x in kind], True), kind))
        for kind in (every - parameters - by_weight, parameters, by_weight)
    ]
    of_parameters += [f"{name}.weight" for name in weights]
    settings = _settings(by_name)
    if of_parameters:
        settings["lora_dropout"] = 0.0  # with parameters PEFT refuses it; it is of training alone
    for field in ("rank_pattern", "alpha_pattern") if weights else ():
        settings[field] = {
            name + (r"(\.weight)?" if name.rsplit(".", 1)[-1] in taken else ""): value
            for name, value in settings[field].items()
        }
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "target_modules": targets,
        **({"target_parameters": of_parameters} if of_parameters else {}),
        "modules_to_save": saved_names(model) or None,
        **settings,
        **_tying(model, by_name),
    }


def _tying(model: nnx.Module, by_name: Mapping[str, Method]) -> dict[str, Any]:
    """What has PEFT train the head with the embedding that it is."""
    if not is_tied(model) or EMBED not in {*tuned(model), *methods(model)}:
        return {}
    if isinstance(next(iter(by_name.values())), LoRA):
        return {"ensure_weight_tying": True}
    head = model.weights["head.w"][0].removesuffix(".weight")
    return {"modules_to_save": sorted([*saved_names(model), head])}


def _settings(by_name: Mapping[str, Method]) -> dict[str, Any]:
    """The method's own fields."""
    first = next(iter(by_name.values()))
    if isinstance(first, IA3):
        inputs = {name: True for name, method in by_name.items() if method.feedforward}
        return {
            "peft_type": "IA3",
            "feedforward_modules": sorted(_shortest(inputs, by_name)),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }
    if isinstance(first, AdaLoRA):
        return _of_adalora(by_name)
    if isinstance(first, VeRA):
        return _of_vera(first)

    def pattern(field: str) -> dict[str, Any]:
        values = _shortest({name: getattr(m, field) for name, m in by_name.items()}, by_name)
        default = getattr(first, field)
        return {name: _whole(value) for name, value in values.items() if value != default}

    common = {
        "r": first.rank,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": pattern("rank"),
        "alpha_pattern": pattern("alpha"),
    }
    if isinstance(first, LoRA):
        own = {
            "lora_alpha": _whole(first.alpha),
            "lora_dropout": first.dropout,
            "use_rslora": first.rslora,
            "use_dora": isinstance(first, DoRA),
            "fan_in_fan_out": False,
            "bias": first.bias,
            "init_lora_weights": True,
        }
        return {"peft_type": "LORA", **common, **own}
    own = {
        "alpha": _whole(first.alpha),
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "init_weights": True,
    }
    if isinstance(first, LoHa):
        return {"peft_type": "LOHA", **common, **own}
    own |= {"decompose_both": first.decompose_both, "decompose_factor": first.decompose_factor}
    return {"peft_type": "LOKR", **common, **own}


def _of_vera(method: VeRA) -> dict[str, Any]:
    return {
        "peft_type": "VERA",
        "r": method.rank,
        "d_initial": method.initial,
        "projection_prng_key": method.seed,
        "save_projection": True,
        "vera_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _of_adalora(by_name: Mapping[str, AdaLoRA]) -> dict[str, Any]:
    first = next(iter(by_name.values()))
    left = {
        f"{name}.lora_E": [i < method.rank for i in range(first.initial_rank)]
        for name, method in by_name.items()
    }
    return {
        "peft_type": "ADALORA",
        **{theirs: getattr(first, ours) for theirs, ours in ADALORA.items()},
        "init_r": first.initial_rank,
        "rank_pattern": left if any(False in each for each in left.values()) else None,
        "lora_alpha": _whole(first.alpha),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _shortest(values: Mapping[str, Any], every: Iterable[str]) -> dict[str, Any]:
    """The values by a module's last name where all of that name have one value, else by module."""
    of_leaf: dict[str, set] = {}
    for module in every:
        of_leaf.setdefault(module.rsplit(".", 1)[-1], set()).add(values.get(module))
    short = {}
    for module, value in values.items():
        leaf = module.rsplit(".", 1)[-1]
        short[leaf if len(of_leaf[leaf]) == 1 else module] = value
    return short


def _whole(number: Number) -> Number:
    """PEFT's lora_alpha is a whole number where it can be."""
    return int(number) if int(number) == number else number
