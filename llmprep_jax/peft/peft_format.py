"""Hugging Face PEFT adapter folders, both ways: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as (r, in) and B as (out, r), one pair a layer, under `base_model.model.` and the
base's module path; the base's own weight table therefore gives names and layouts. The one thing a
reader would get wrong: a stack has one rank and one scale, so a layer of a smaller rank is padded
with zeros, a layer without a pair (layers_to_transform) is all zeros and stays so in training, and
what differs in a layer's scale goes into its B.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import adapter
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.peft_config import AdapterConfig, make_config, read_config
from llmprep_jax.peft.targets import Place, bases, modules, plain, stacked
from llmprep_jax.sharding import spec
from llmprep_jax.weights.checkpoint import read_json
from llmprep_jax.weights.receipt import probe_difference, save_folder
from llmprep_jax.weights.safetensors import SafetensorsFile
from llmprep_jax.weights.table import Entry, Table, export

CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SHOWN = 8  # names of each kind in an error


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
        make_config(model, base_model),
        export(adapters, adapter_table(model.weights)),
        config_name=CONFIG,
        weights_name=WEIGHTS_FILE,
        verify=lambda written: probe_difference(model, load(base, written)),
        tolerance=tolerance,
    )


def load(model: nnx.Module, folder: str | Path) -> nnx.Module:
    """A model with the adapters of a PEFT folder; the given model is unchanged.

    Raises:
      FileNotFoundError, ValueError: the folder is damaged, is of another base or method, or is
        pickled.
    """
    if adapter.is_adapted(model):
        raise ValueError("the model has adapters already; load onto lp.peft.strip(model)")
    folder = Path(folder)
    config = read_config(folder / CONFIG, _read_json(folder))
    file = _open(folder)
    pairs = _pairs(model, config, file)
    found, table = bases(model), adapter_table(model.weights)
    methods, params = {}, {}
    for path, layers in pairs.items():
        methods[path] = _one_method(layers)
        rows = {kind: table[f"{plain(path)}.{kind}"][1] for kind in ("lora_a", "lora_b")}
        params[path] = _read(found[path], methods[path], layers, rows, file)
    return adapter.wrap(model, methods, params)


def _read_json(folder: Path) -> dict:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter")
    return read_json(folder / CONFIG)


def _open(folder: Path) -> SafetensorsFile:
    if (folder / WEIGHTS_FILE).is_file():
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds a pickled adapter_model.bin, which can run code when opened; where you"
            " trust it, load it with peft and save it again"
        )
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save the adapter again")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One layer's tensors.

    Attributes:
      module: Hugging Face's name of the layer. method: LoRA as it is set for this layer.
      shapes: what A and B must be.
    """

    module: str
    method: LoRA
    shapes: tuple[tuple[int, int], tuple[int, int]]

    @property
    def names(self) -> tuple[str, str]:
        """A's and B's names in the file."""
        return tuple(f"{_PREFIX}{self.module}.lora_{kind}.weight" for kind in "AB")


def _pairs(
    model: nnx.Module, config: AdapterConfig, file: SafetensorsFile
) -> dict[str, dict[Place, Pair]]:
    """The layers that a folder adapts, by our path and place in a stack.

    Raises:
      ValueError: the file is not what the config and this model lead to expect; all differences are
        listed.
    """
    pairs: dict[str, dict[Place, Pair]] = {}
    found = bases(model)
    for path, layers in modules(model).items():
        ins, outs = adapter.shape_of(found[path])
        for place, module in layers.items():
            method = config.method.resolve((module,))
            shapes = (method.rank, math.prod(ins)), (math.prod(outs), method.rank)
            pair = Pair(module, method, shapes)
            # without target_modules, what the file holds is what is adapted
            adapted = any(name in file for name in pair.names)
            if config.adapts(module) if config.targets is not None else adapted:
                pairs.setdefault(path, {})[place] = pair
    wanted = [pair for layers in pairs.values() for pair in layers.values()]
    problems = _differences(wanted, file)
    if problems or not wanted:
        reason = "; ".join(problems) or "its target_modules name no layer of the model"
        raise ValueError(
            f"{file.path} does not fit this base model: {reason}; load it on the base that"
            f" {CONFIG} names"
        )
    return pairs


def _differences(wanted: Sequence[Pair], file: SafetensorsFile) -> list[str]:
    """How a file differs from what it must hold, one phrase a kind."""
    shape = {name: file.shape(name) for name in file.names}
    expected = {
        name: dims for pair in wanted for name, dims in zip(pair.names, pair.shapes, strict=True)
    }
    unlike = {
        f"{a} is {_dims(shape[a])} and {b} is {_dims(shape[b])}": (a, b)
        for a, b in (pair.names for pair in wanted)
        if {a, b} <= set(shape) and shape[a][:1] != shape[b][-1:]
    }
    told = {name for names in unlike.values() for name in names}
    kinds = {
        "missing": [name for name in expected if name not in shape],
        "unexpected": [name for name in shape if name not in expected],
        "of two ranks": list(unlike),
        "of another shape": [
            f"{name} is {_dims(shape[name])}, expected {_dims(dims)}"
            for name, dims in expected.items()
            if name in shape and name not in told and shape[name] != dims
        ],
        "not of a float dtype": [
            name for name in shape if not jnp.issubdtype(file.dtype(name), jnp.floating)
        ],
    }
    return [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds.items() if names]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(" ".join(name[:200].split()) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _dims(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _one_method(layers: Mapping[Place, Pair]) -> LoRA:
    """What a stack's layers have in common: the largest rank, with that layer's alpha."""
    return max((pair.method for pair in layers.values()), key=lambda method: method.rank)


def _read(
    base: Einsum,
    method: LoRA,
    layers: Mapping[Place, Pair],
    patterns: Mapping[str, str],
    file: SafetensorsFile,
) -> dict[str, jax.Array]:
    """A and B of one layer or of a stack."""
    (ins, outs), (in_axes, out_axes) = adapter.shape_of(base), adapter.axes_of(base)
    stack = () if stacked(base) is None else (stacked(base),)
    a = np.zeros((*stack, *ins, method.rank), np.float32)
    b = np.zeros((*stack, method.rank, *outs), np.float32)
    for place, pair in layers.items():
        rank, ratio = pair.method.rank, pair.method.scale / method.scale
        a_theirs, b_theirs = map(file.read, pair.names)
        a[place][..., :rank] = Entry("", (*ins, rank), "", patterns["lora_a"]).to_ours(a_theirs)
        b[place][:rank] = Entry("", (rank, *outs), "", patterns["lora_b"]).to_ours(b_theirs)
        b[place] *= np.float32(ratio)
    return {
        "lora_a": _on_devices(a, *("layers",) * len(stack), *in_axes, None),
        "lora_b": _on_devices(b, *("layers",) * len(stack), None, *out_axes),
    }


def _on_devices(array: np.ndarray, *axes: str | None) -> jax.Array:
    sharding = spec(*axes, shape=array.shape)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
