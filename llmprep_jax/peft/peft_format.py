"""Hugging Face PEFT adapter folders, both ways: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as (r, in) and B as (out, r), one pair a layer, under `base_model.model.` and the
base's module path; the base's own weight table therefore gives names and layouts. A stack has one
rank and one scale, so a layer of a smaller rank is padded with zeros, a layer without a pair
(layers_to_transform) is all zeros, stays so in training and is not in the file, and what differs
in a layer's scale goes into its B.
"""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import adapter, biases, injection, tied, tokens, tuned
from llmprep_jax.peft.adapter_file import PREFIX as _PREFIX
from llmprep_jax.peft.adapter_file import names_in
from llmprep_jax.peft.base_spelling import BaseSpelling, named_as
from llmprep_jax.peft.expert_format import expert_layers, expert_module, tensors_of
from llmprep_jax.peft.experts import experts, letters
from llmprep_jax.peft.fused_format import PartsFile, join, join_tensors, marks, split_names
from llmprep_jax.peft.layout import Layout, axes_of, dims
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.peft_config import AdapterConfig, make_config, read_config
from llmprep_jax.peft.targets import (
    Place,
    bases,
    idle_modules,
    is_extra,
    is_table,
    matches,
    modules,
    plain,
    rows,
    stacked,
)
from llmprep_jax.remote import AnyPath, fetch
from llmprep_jax.sharding import on_own_mesh, spec
from llmprep_jax.weights.folder import read_json
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.hub import public_name
from llmprep_jax.weights.receipt import probe_difference, save_folder
from llmprep_jax.weights.rows import Row
from llmprep_jax.weights.safetensors import SafetensorsFile
from llmprep_jax.weights.table import Entry, entry, export

CONFIG, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SHOWN = 8  # names of each kind in an error


def adapter_table(model: nnx.Module, methods: Mapping[str, Method]) -> dict[str, Row]:
    """A weight table for the parameters of adapters, by path of the layer, from the base's table.

    "(n h) d -> d n h" of the weight gives "r d -> d r" of LoRA's A and "(n h) r -> r n h" of its B.
    """
    table, of_model, names_of, shared = {}, bases(model), rows(model), marks(model)
    of_experts = expert_layers(model, methods)
    for path, method in methods.items():
        row = names_of[f"{plain(path)}.w"]
        module = row.name.removesuffix(".weight")
        tensors = tensors_of(method, path, of_model[path], row.pattern, shared.get(path, ""))
        if path in of_experts:
            beside = [other for other in of_experts if _number(other) == _number(path)]
            names = [names_of[f"{plain(x)}.w"].name for x in beside]
            module = expert_module(row.name, names)
        for param, (suffix, theirs) in tensors.items():
            row = Row(f"{_PREFIX}{module}.{suffix}", theirs)
            if table.setdefault(f"{plain(path)}.{param}", row) != row:
                raise ValueError(
                    f"layers of the list of {path} adapt experts unlike each other, for which there"
                    " is no table; adapt all alike"
                )
    return table


def _number(path: str) -> list[str]:
    """Where in lists of layers a path leads."""
    return [part for part in path.split(".") if part.isdigit()]


def trained_table(model: nnx.Module) -> dict[str, Row]:
    """A weight table for all that is trained of a model with adapters."""
    beside = tuned.table(model, _PREFIX) | biases.table(model, _PREFIX)
    beside |= tokens.table(model, _PREFIX)
    return adapter_table(model, adapter.methods(model)) | beside


@on_own_mesh
def save(
    model: nnx.Module,
    folder: str | AnyPath,
    *,
    base_model: str | None = None,
    tolerance: float = 1e-5,
) -> AnyPath:
    """Writes a folder that PEFT loads onto the base model.

    It is written aside, re-opened on the model's own base, and put in place only if the logits
    agree.

    Args:
      base_model: hub id or path of the base, for `base_model_name_or_path`; None: what the model
        was loaded by. Files of a Python package or the hub's cache are named by their hub id; where
        no name is known, a warning asks for one. Where the base is on this machine, the tensors are
        spelled as it has its modules.
      tolerance: largest allowed difference of the probe's logits, as a share of the largest of
        them.

    Raises:
      ValueError: the model has no adapters, the base that is named lacks their layers, or what was
        written gives other logits.
      OSError: the folder cannot be written.
    """
    if not adapter.is_adapted(model):
        raise ValueError("the model has no adapters; save_model writes whole models")
    spelling, base = BaseSpelling(model, base_model), adapter.strip(model)
    wide = join(adapter.widen(spelling.named(model)))
    return save_folder(
        folder,
        spelling.config(make_config(wide, _base_name(model, base_model))),
        spelling.tensors(itertools.chain(_tensors(wide), _shared_tensors(model))),
        config_name=CONFIG,
        weights_name=WEIGHTS_FILE,
        verify=lambda written: probe_difference(model, load(base, written)),
        tolerance=tolerance,
    )


def _base_name(model: nnx.Module, given: str | None) -> str | None:
    """What the folder names as its base."""
    if given is None and isinstance(model, BaseModel):
        given = model.source.path
    name = public_name(given)
    if name is None:
        reason = "" if given is None else f", since {given} is a file of this environment alone"
        warnings.warn(
            f"the adapter names no base model{reason}; give one by save(..., base_model=HUB_ID)",
            stacklevel=3,
        )
    return name


def _shared_tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """(PEFT's name, array) of what all layers share."""
    adapted = next(iter(adapter.adapters(model).values()))
    for name, theirs in adapted.method.shared.items():
        yield theirs, to_host(getattr(adapted, name)[...])


def _tensors(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Everything that a model's file holds."""
    table = trained_table(model)
    of_idle = _names_of_idle(model, table)
    tensors = (
        (of_idle.get(name, name), array)
        for name, array in export(nnx.state(model, AdapterParam), table)
    )
    whole = join_tensors((name, array) for name, array in tensors if name is not None)
    yield from tied.head_tensors(model, whole, _PREFIX)


def _names_of_idle(model: nnx.Module, table: Mapping[str, Row]) -> dict[str, str | None]:
    """What becomes of the names of tensors of a stack's layers that are not adapted.

    They are not in the file (None), but for a bias that is trained with all others: no adapter is
    around its layer.
    """
    names: dict[str, str | None] = {}
    for path, adapted in adapter.adapters(model).items():
        parts = [int(part) if part.isdigit() else part for part in path.split(".")]
        for name in adapted.names if adapted.left_out else ():
            row = entry((*parts, name), getattr(adapted, name).shape, table)
            names |= dict.fromkeys(_at(row, adapted.left_out))
        bias = entry((*parts, "base", "b"), adapted.base.b.shape if adapted.base.b else (), table)
        if bias is not None:
            is_trained = adapted.method.bias == "all"
            names |= {
                name: name.replace(".base_layer.", ".") if is_trained else None
                for name in _at(bias, adapted.left_out)
            }
    return names


def _at(row: Entry | None, numbers: Sequence[int]) -> list[str]:
    """Names of the tensors of these layers of a stack."""
    places = {} if row is None else row.names()
    return [name for place, name in places.items() if place[:1] and place[0] in numbers]


@on_own_mesh
def load(model: nnx.Module, folder: str | Path) -> nnx.Module:
    """A model with the adapters of a PEFT folder; the given model is unchanged.

    Raises:
      FileNotFoundError, ValueError: the folder is damaged, is of another base or method, or is
        pickled.
    """
    if adapter.is_adapted(model):
        raise ValueError("the model has adapters already; load onto lp.peft.strip(model)")
    folder = fetch(folder)
    config = read_config(folder / CONFIG, _read_json(folder))
    model, file = _open(model, folder)
    methods, params, kept = {}, {}, {}
    ids = config.method.trainable_token_indices
    whole = tuned.rows_of(model, _trains(model, config, file), file, _PREFIX)
    chosen, of_biases = _layers(model, config, file, whole)
    for path, layers in chosen.items():
        base = bases(model)[path]
        methods[path] = _one_method(path, layers, base)
        params[path] = _read(base, methods[path], layers, file)
        params[path] |= injection.derive(methods[path], base)
        if len({place[:1] for place in layers}) < (stacked(base) or 1):
            kept[path] = tuple(sorted({place[0] for place in layers}))
    shared = _read_shared(config, [bases(model)[path] for path in methods], file)
    tied.check(model, file, _PREFIX)
    adapted = tuned.read(adapter.wrap(model, methods, params, shared, kept), whole, file)
    adapted = biases.read(adapted, of_biases, file, _PREFIX)
    return named_as(tokens.read(adapted, ids, file, _PREFIX), ())


def _trains(
    model: nnx.Module, config: AdapterConfig, file: SafetensorsFile
) -> Callable[[str], bool]:
    """Whether a module is trained whole: as the config has it, or a table unlike the base's.

    Tables that were saved with the adapter (save_embedding_layers) are mostly those of the base.
    """
    changed = tied.changed_tables(model, file, _PREFIX)
    return lambda module: (
        module in changed or (file.is_of(module) and config.trains(file.spelled(module)))
    )


def read_method(folder: str | Path) -> Method:
    """The settings of the adapters in a PEFT folder, but for the names of targets.

    Raises:
      FileNotFoundError, ValueError: the folder holds none, or of a method that we do not have.
    """
    config = read_config(Path(folder) / CONFIG, _read_json(Path(folder)))
    return dataclasses.replace(config.method, modules_to_save=config.saved)


def _read_json(folder: Path) -> dict:
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter")
    return read_json(folder / CONFIG)


def _open(model: nnx.Module, folder: Path) -> tuple[nnx.Module, PartsFile]:
    """The model with the names of the adapter's base, and the adapter's file."""
    if (folder / WEIGHTS_FILE).is_file():
        model = named_as(model, names_in(folder / WEIGHTS_FILE))
        return model, PartsFile(folder / WEIGHTS_FILE, model.weights, idle_modules(model))
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds a pickled adapter_model.bin, which can run code when opened; where you"
            " trust it, load it with peft and save it again"
        )
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save the adapter again")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's tensors.

    Attributes:
      module: Hugging Face's name of the layer. method: as it is set for this layer.
      rows: what each parameter is made of.
    """

    module: str
    method: Method
    rows: Mapping[str, Entry]

    @property
    def names(self) -> list[str]:
        """The tensors' names in the file."""
        return [row.name for row in self.rows.values()]


def _layers(
    model: nnx.Module,
    config: AdapterConfig,
    file: SafetensorsFile,
    whole: Mapping[str, Mapping[str, Entry]],
) -> tuple[dict[str, dict[Place, Layer]], biases.Names]:
    """The layers that a folder adapts, by our path and place in a stack, and biases it trains.

    Args:
      whole: rows of what is trained whole, whose tensors the file holds too.

    Raises:
      ValueError: the file is not what the config and this model lead to expect; all differences are
        listed.
    """
    chosen: dict[str, dict[Place, Layer]] = {}
    of_model, named = bases(model), modules(model)
    of_experts = expert_layers(model, named)
    fused_names = [name for path in of_experts for name in named[path].values()]
    parameters = [name for name in fused_names if config.adapts(name, parameter=True)]
    table, shared = rows(model), marks(model)
    for path, modules_of_path in named.items():
        pattern = table[f"{plain(path)}.w"].pattern
        for place, module in modules_of_path.items():
            theirs = file.spelled(module)
            if not file.is_of(module) or not config.adapts(theirs, parameter=path in of_experts):
                continue
            if config.targets == "all-linear" and is_table(of_model[path]):
                continue
            if config.targets is not None:
                injection.refuse_embedding(config.method, {path: of_model[path]})
            method = config.method.resolve((theirs, f"{theirs}.weight"))
            tensors = tensors_of(method, path, of_model[path], pattern, shared.get(path, ""))
            keys = expert_module(module, parameters) if path in of_experts else module
            layer = Layer(module, method, _rows(keys, method, of_model[path], tensors))
            # without target_modules, or beside the layers, what the file holds is what is adapted
            is_stated = config.targets is not None or path in of_experts
            is_stated = is_stated and not is_extra(model, path)
            if is_stated or any(name in file for name in layer.names):
                chosen.setdefault(path, {})[place] = layer
    wanted = [layer for layers in chosen.values() for layer in layers.values()]
    expected = {row.name: row.their_shape() for layer in wanted for row in layer.rows.values()}
    of_biases = biases.names_of(model, config.method.bias, chosen, whole)
    expected |= tuned.shapes(whole) | tied.shapes(model, file, _PREFIX)
    expected |= biases.shapes(model, of_biases, _PREFIX)
    expected |= tokens.shapes(model, config.method.trainable_token_indices, _PREFIX)
    problems = _differences(wanted, expected, file)
    known = [*parameters, *_weights(named, of_experts)]
    if unknown := [x for x in config.parameters if not any(matches((x,), [y]) for y in known)]:
        problems += [f"the model has no experts of target_parameters {', '.join(unknown)}"]
    if problems or not wanted:
        reason = "; ".join(problems) or "its target_modules name no layer of the model"
        raise ValueError(
            f"{file.path} does not fit this base model: {reason}; load it on the base that"
            f" {CONFIG} names"
        )
    return chosen, of_biases


def _weights(named: Mapping[str, Mapping[Place, str]], of_experts: Sequence[str]) -> list[str]:
    """Names of ordinary layers' weights, which target_parameters may take too."""
    ordinary = [layers for path, layers in named.items() if path not in of_experts]
    return [f"{module}.weight" for layers in ordinary for module in layers.values()]


def _rows(
    module: str, method: Method, base: Einsum, tensors: Mapping[str, tuple[str, str]]
) -> dict[str, Entry]:
    """What each parameter of one layer is made of in the file."""
    return {
        # without the experts, where each has tensors of its own
        name: Entry(name, shape[len(shape) - len(pattern.split("->")[1].split()) :], row)
        for name, shape in _shapes(method, base).items()
        for suffix, pattern in [tensors[name]]
        for row in [Row(f"{_PREFIX}{module}.{suffix}", pattern)]
    }


def _shapes(method: Method, base: Einsum) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's parameters."""

    def init(base: Einsum) -> dict[str, jax.Array]:
        base = base if stacked(base) is None else jax.tree.map(lambda x: x[0], base)
        return injection.init_layer(method, base, jax.random.key(0))

    params = jax.eval_shape(init, base)
    return {name: tuple(x.shape) for name, x in params.items() if name not in method.frozen}


def _differences(
    wanted: Sequence[Layer], expected: Mapping[str, tuple[int, ...]], file: SafetensorsFile
) -> list[str]:
    """How a file differs from what it must hold, one phrase a kind."""
    # AdaLoRA's of layers that are pruned whole are empty
    names = split_names(file.names, expected)
    shape = {name: file.shape(name) for name in names if 0 not in file.shape(name)}
    unlike = {
        f"{a} is {_dims(shape[a])} and {b} is {_dims(shape[b])}": (a, b)
        for a, b in (
            layer.names[:2] for layer in wanted if {"lora_a", "lora_b"} <= layer.rows.keys()
        )
        if {a, b} <= set(shape) and shape[a][:1] != shape[b][-1:]
    }
    shared = {name for layer in wanted for name in layer.method.shared.values()}
    unequal = {name for names in unlike.values() for name in names}
    kinds = {
        "missing": [name for name in expected if name not in shape],
        "unexpected": [name for name in shape if name not in expected and name not in shared],
        "of two ranks": list(unlike),
        "of another shape": [
            f"{name} is {_dims(shape[name])}, expected {_dims(dims)}"
            for name, dims in expected.items()
            if name in shape and name not in unequal and shape[name] != dims
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


def _one_method(path: str, layers: Mapping[Place, Layer], base: Einsum) -> Method:
    """What a stack's layers have in common: the largest rank, with that layer's alpha."""
    methods = {layer.method for layer in layers.values()}
    whole = len({place[:1] for place in layers}) >= (stacked(base) or 1)
    largest = max(methods, key=lambda method: getattr(method, "rank", 0))
    if (largest.takes_part or not largest.pads) and (len(methods) > 1 or not whole):
        raise ValueError(
            f"the folder adapts layers of the stack {path} unlike each other by"
            f" {type(largest).__name__}; unstack(model.layers) first, or adapt all alike"
        )
    return largest


def _read_shared(
    config: AdapterConfig, layers: Sequence[Einsum], file: SafetensorsFile
) -> dict[str, jax.Array]:
    """What all layers share: as the file has it, else as the config has it drawn."""
    method, theirs = config.method, config.method.shared
    if not theirs:
        return {}
    if config.draws and not any(name in file for name in theirs.values()):
        return injection.place_shared(method.draw_shared(layers))
    arrays = {}
    for name, shape in method.shared_shapes(layers).items():
        dims = file.shape(theirs[name]) if theirs[name] in file else None
        if dims != shape:
            reason = "is missing" if dims is None else f"is {_dims(dims)}"
            raise ValueError(
                f"{file.path} does not fit this base model: {theirs[name]} {reason}, expected"
                f" {_dims(shape)}; load it on the base that {CONFIG} names, or save it again"
            )
        arrays[name] = np.array(file.read(theirs[name]), np.float32)
    return injection.place_shared(arrays)


def _read(
    base: Einsum, method: Method, layers: Mapping[Place, Layer], file: SafetensorsFile
) -> dict[str, jax.Array]:
    """The parameters of one layer or of a stack, those of a lower rank filled up with zeros."""
    stack = () if stacked(base) is None else (stacked(base),)
    params = {
        name: np.zeros((*stack, *shape), np.float32)
        for name, shape in _shapes(method, base).items()
    }
    for place, layer in layers.items():
        for name, row in layer.rows.items():
            corner = tuple(slice(size) for size in row.shape)
            params[name][place][corner] = row.to_ours(file.read(row.name))
        if layer.method != method:  # of another rank or scale, which goes into its B
            params[method.scaled][place] *= np.float32(layer.method.scale / method.scale)
    axes = _axes(method, base)
    return {
        name: _on_devices(array, *[None] * len(stack), *axes[name])
        for name, array in params.items()
    }


def _axes(method: Method, base: Einsum) -> dict[str, tuple[str | None, ...]]:
    """The logical axes of one layer's parameters, from the dimensions in their patterns."""
    _, ins, outs, _ = dims(base)
    in_axes, out_axes = axes_of(base)
    by_letter = dict(zip(ins + outs, (*in_axes, *out_axes), strict=True))
    layout = Layout(" ".join(ins), " ".join(outs), " ".join(ins), " ".join(outs))
    of_experts = tuple(base.axes[letters(base)[1].index(dim)] for dim in experts(base))
    axes = {}
    for name, (_, pattern) in method.tensors(layout).items():
        parts = pattern.split("->")[1].split()
        # vectors without a rank are whole on every device, as `init` makes them: they scale
        # activations, whose rows may be on the mesh axis that the weight's outputs are on
        by = {} if all(dim in by_letter for dim in parts) else by_letter
        axes[name] = (*of_experts, *map(by.get, parts))
    return axes


def _on_devices(array: np.ndarray, *axes: str | None) -> jax.Array:
    sharding = spec(*axes, shape=array.shape)
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
