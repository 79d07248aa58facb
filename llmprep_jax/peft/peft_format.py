"""Hugging Face PEFT adapter folders, both ways: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as (r, in) and B as (out, r), one pair a layer, under `base_model.model.` and the
base's module path; the base's own weight table therefore gives names and layouts. The one thing a
reader would get wrong: the files decide which layers are adapted, not `target_modules`; layers
without a pair get a zero B.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import adapter
from llmprep_jax.peft.lora import LoRA, num_inputs
from llmprep_jax.sharding import spec
from llmprep_jax.weights.checkpoint import read_json
from llmprep_jax.weights.receipt import probe_difference, save_folder
from llmprep_jax.weights.safetensors import SafetensorsFile
from llmprep_jax.weights.table import Entry, Table, export

CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
)


def adapter_table(weights: Table) -> dict[str, tuple[str, str]]:
    """A weight table for LoRA's parameters, from that of the base model.

    "(n h) d -> d n h" of the weight gives "r d -> d r" of A and "(n h) r -> r n h" of B.
    """
    table = {}
    for path, (name, pattern) in weights.items():
        theirs, ours = (side.strip() for side in pattern.split("->"))
        groups = re.findall(r"\([^)]*\)|\S+", theirs)
        if not path.endswith(".w") or len(groups) != 2:
            continue
        outs, ins = (group.strip("()").split() for group in groups)
        module, ours = name.removesuffix(".weight"), ours.split()
        ordered_ins = " ".join(dim for dim in ours if dim in ins)
        ordered_outs = " ".join(dim for dim in ours if dim in outs)
        layer = path.removesuffix(".w")
        a_name, b_name = [f"{_PREFIX}{module}.lora_{kind}.weight" for kind in "AB"]
        table[f"{layer}.lora_a"] = (a_name, f"r {groups[1]} -> {ordered_ins} r")
        table[f"{layer}.lora_b"] = (b_name, f"{groups[0]} r -> r {ordered_outs}")
    return table


def save(
    model: nnx.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    tolerance: float = 1e-5,
) -> Path:
    """Writes a folder that PEFT loads onto the base model.

    It is written aside, re-opened on the model's own base, and put in place only if the logits
    agree.

    Args:
      base_model: name or path of the base, for `base_model_name_or_path`.
      tolerance: largest allowed difference of the probe's logits, as a share of the largest of
        them.

    Raises:
      ValueError: the model has no adapters, or what was written gives other logits.
      OSError: the folder cannot be written.
    """
    if not adapter.is_adapted(model):
        raise ValueError("the model has no adapters; save_model writes whole models")
    base = adapter.strip(model)
    adapters = nnx.state(model, AdapterParam)
    return save_folder(
        folder,
        _config(model, base_model),
        export(adapters, adapter_table(model.weights)),
        config_name=CONFIG,
        weights_name=WEIGHTS_FILE,
        verify=lambda written: probe_difference(model, load(base, written)),
        tolerance=tolerance,
    )


def _config(model: nnx.Module, base_model: str | None) -> dict[str, Any]:
    methods = adapter.methods(model)
    first = next(iter(methods.values()))
    modules = {
        path: model.weights[adapter.weight_name(path)][0].removesuffix(".weight")
        for path in methods
    }
    leaf = {path: module.rsplit(".", 1)[-1] for path, module in modules.items()}
    ranks = {leaf[path]: m.rank for path, m in methods.items() if m.rank != first.rank}
    alphas = {leaf[path]: m.alpha for path, m in methods.items() if m.alpha != first.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "use_rslora": first.rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(set(leaf.values())),
        "exclude_modules": None,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def load(model: nnx.Module, folder: str | Path) -> nnx.Module:
    """A model with the adapters of a PEFT folder; the given model is unchanged.

    Raises:
      FileNotFoundError, ValueError: the folder is damaged, is of another base or method, or is
        pickled.
    """
    if adapter.is_adapted(model):
        raise ValueError("the model has adapters already; load onto lp.peft.strip(model)")
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    settings = _settings(folder / CONFIG, config)
    file = _open(folder)
    pairs = _pairs(model, file)

    def wrap(path: tuple, node: Any) -> Any:
        name = ".".join(map(str, path))
        if not isinstance(node, Einsum) or name not in pairs:
            return node
        return _read(node, name, settings, model.weights, pairs[name], file)

    return nnx.recursive_map(wrap, model)


def _open(folder: Path) -> SafetensorsFile:
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds a pickled adapter_model.bin, which can run code when opened; where you"
            " trust it, load it with peft and save it again"
        )
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save the adapter again")


def _settings(path: Path, config: Mapping[str, Any]) -> LoRA:
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    if kind != "LORA":
        raise ValueError(f"{path} is of peft_type {kind!r}; supported: LORA")
    asked = [name for name in _UNSUPPORTED if config.get(name)]
    asked += [f"bias={bias!r}"] if bias != "none" else []
    if asked:
        raise ValueError(f"{path} uses {', '.join(asked)}, which plain LoRA lacks")
    try:
        return LoRA(
            rank=operator.index(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora")),
            rank_pattern=tuple((config.get("rank_pattern") or {}).items()),
            alpha_pattern=tuple((config.get("alpha_pattern") or {}).items()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has no sound r and lora_alpha ({error!r})") from error


# our path -> layer (None: not stacked) -> (A's name, B's name)
Pairs = dict[str, dict[int | None, dict[str, str]]]


def _pairs(model: nnx.Module, file: SafetensorsFile) -> Pairs:
    """The tensors of a file by what they adapt.

    Raises:
      ValueError: tensors that the model has no place for, halves of pairs, wrong shapes; all are
        listed.
    """
    bases, table = adapter.bases(model), adapter_table(model.weights)
    known = {}
    for path, base in bases.items():
        layers = [None] if adapter.stacked(base) is None else range(adapter.stacked(base))
        for kind in ("lora_a", "lora_b"):
            name = table[f"{path}.{kind}"][0]
            known |= {name.format(l=layer): (path, layer, kind) for layer in layers}
    pairs: Pairs = {}
    for name in file.names:
        if name in known:
            path, layer, kind = known[name]
            pairs.setdefault(path, {}).setdefault(layer, {})[kind] = name
    each = [(path, names) for path, layers in pairs.items() for names in layers.values()]
    problems = {
        "unexpected": [name for name in file.names if name not in known],
        "without its other half": [n for _, two in each if len(two) == 1 for n in two.values()],
        "of another shape": [
            f"{name} is {file.shape(name)}, expected {expected}"
            for path, names in each
            for kind, name in names.items()
            if file.shape(name) != (expected := _their_shape(bases[path], kind, file.shape(name)))
        ],
    }
    lines = [
        f"{len(names)} {kind}: {', '.join(names[:8])}" + (" ..." if len(names) > 8 else "")
        for kind, names in problems.items()
        if names
    ]
    if lines or not pairs:
        reason = "; ".join(lines) or "it holds no LoRA pair"
        raise ValueError(f"{file.path} does not fit this base model: {reason}")
    return pairs


def _their_shape(base: Einsum, kind: str, found: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that A or B must have, given its rank."""
    ins, outs = num_inputs(base), base.w.shape[-len(base.axes) :]
    fan_in, fan_out = math.prod(outs[:ins]), math.prod(outs[ins:])
    if kind == "lora_a":
        return (found[0] if found else 0, fan_in)
    return (fan_out, found[1] if len(found) > 1 else 0)


def _read(
    base: Einsum,
    path: str,
    settings: LoRA,
    weights: Table,
    layers: Mapping[int | None, Mapping[str, str]],
    file: SafetensorsFile,
) -> adapter.Adapted:
    """One (stack of) layer(s) with its adapter; layers of a smaller rank are padded with zeros."""
    module = weights[f"{path}.w"][0].removesuffix(".weight")
    own = {layer: settings.resolve((module.format(l=layer),)) for layer in layers}
    ranks = {layer: file.shape(names["lora_a"])[0] for layer, names in layers.items()}
    own = {layer: dataclasses.replace(one, rank=ranks[layer]) for layer, one in own.items()}
    method = max(own.values(), key=lambda one: one.rank)
    shape, ins = base.w.shape[-len(base.axes) :], num_inputs(base)
    num_layers = adapter.stacked(base)
    stack = () if num_layers is None else (num_layers,)
    table = adapter_table(weights)
    params = {}
    for kind, dims, axes in (
        ("lora_a", (*shape[:ins], method.rank), (*base.axes[:ins], None)),
        ("lora_b", (method.rank, *shape[ins:]), (None, *base.axes[ins:])),
    ):
        out = np.zeros((*stack, *dims), np.float32)
        for layer, names in layers.items():
            rank = ranks[layer]
            one = (*dims[:-1], rank) if kind == "lora_a" else (rank, *dims[1:])
            value = Entry(path, one, "", table[f"{path}.{kind}"][1]).to_ours(file.read(names[kind]))
            # a layer's own scale goes into B where it is not the stack's
            value = value * (own[layer].scale / method.scale if kind == "lora_b" else 1.0)
            at = out if layer is None else out[layer]
            at[(..., slice(rank)) if kind == "lora_a" else slice(rank)] = value
        axes = axes if num_layers is None else ("layers", *axes)
        sharding = spec(*axes, shape=out.shape)
        params[kind] = jnp.asarray(out) if sharding is None else jax.device_put(out, sharding)
    return adapter.Adapted(base, method, params)
