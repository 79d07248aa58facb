"""Modules that are trained whole beside an adapter, PEFT's `modules_to_save`: tables, norms, heads.

A `Tuned` keeps the module as it was and a copy of it, whose variables are adapter parameters; the
copy alone computes. Where the output head is the embedding, training the embedding trains the head
with it (see `tied`).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.param import AdapterParam, Compute, Idle, Param
from llmprep_jax.peft.targets import Names, Place, Targets, plain, select, table_of
from llmprep_jax.peft.tied import refuse_head
from llmprep_jax.quant.linear import find_layers
from llmprep_jax.sharding import has_mesh
from llmprep_jax.types import Array, Float
from llmprep_jax.weights.rows import Row
from llmprep_jax.weights.safetensors import SafetensorsFile
from llmprep_jax.weights.table import Entry


class Tuned(nnx.Module):
    """A module and its trained copy, which is used in its place."""

    def __init__(self, base: nnx.Module, trained: nnx.Module):
        self.base, self.trained = base, trained

    def __call__(self, x: Array) -> Array:
        return self.trained(x)

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, of a tied embedding."""
        return self.trained.unembed(x_BTD)

    is_by_row = False

    def weight(self) -> Float[Array, "..."]:
        """The trained weight, for what uses a layer by its weight."""
        return self.trained.weight()

    @property
    def w(self) -> nnx.Variable:
        """The trained weight's variable."""
        return self.trained.w

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of a head's operands."""
        return self.trained.dtype

    @property
    def compute(self) -> Compute:
        """How an embedding computes."""
        return self.trained.compute

    @property
    def table_dtype(self) -> jnp.dtype:
        """dtype of an embedding's table as it was."""
        return self.base.table_dtype

    def merged(self) -> nnx.Module:
        """The module with the trained values, in the dtypes it had."""
        graph, state = nnx.split(self.base)
        trained = nnx.to_pure_dict(nnx.state(self.trained))
        before = nnx.to_pure_dict(state)
        return nnx.merge(graph, jax.tree.map(lambda x, y: y.astype(x.dtype), before, trained))


def modules_of(model: nnx.Module) -> dict[str, dict[str, Entry]]:
    """Modules with weights of their own by path; of each its variables' rows in the weight table.

    A row's path is the variable's name.
    """
    table, by_path = table_of(model).in_memory(), {}
    for (*owner, name), variable in nnx.to_flat_state(nnx.state(model)):
        path = ".".join(map(str, owner)).removesuffix(".base")
        row = table.get(f"{plain(path)}.{name}")
        if row is None or path.endswith(".trained") or isinstance(variable, Idle):
            continue
        place = tuple(part for part in owner if isinstance(part, int))
        by_path.setdefault(path, {})[name] = Entry(name, tuple(variable.shape), row, place)
    return by_path


def theirs(rows: Mapping[str, Entry]) -> dict[Place, str]:
    """Hugging Face's names of a module, by place in the stack."""
    row = next(iter(rows.values()))
    return {place: name.rsplit(".", 1)[0] for place, name in row.names().items()}


def choose(model: nnx.Module, names: Targets) -> list[str]:
    """The paths of the modules that go by `names`, which are matched as targets are, or are in one
    that does: a projector's name takes all that it is made of.

    Raises:
      ValueError: a name matches no module, some layers of a stack alone, a packed one, a table of
        positions, or the head of a model that ties it.
    """
    if not names:
        return []
    modules = modules_of(model)
    known: dict[str, list[Names]] = {
        path: [owners(path, plain(path), name) for name in theirs(rows).values()]
        for path, rows in modules.items()
    }
    refuse_head(model, names)
    paths = select(names, known, label="module to save", kind="module with weights")
    for path in paths:
        if "table" in modules[path]:
            raise ValueError(
                f"{path} is a table of positions, and no module to save: targets beside it adapt;"
                " where it is to change, train the model itself, with freeze= on all else"
            )
        if "w" not in modules[path] and "scale" not in modules[path]:
            raise ValueError(f"{path} is packed, and cannot be trained whole; target it instead")
    return paths


def owners(*names: str) -> Names:
    """The names of a module, then those of the modules that it is in."""
    parts = [name.split(".") for name in names]
    around = [".".join(part[:end]) for part in parts for end in range(len(part) - 1, 0, -1)]
    return tuple(dict.fromkeys((*names, *around)))


def tune(model: nnx.Module, paths: list[str], dtype: str) -> nnx.Module:
    """A model whose modules of these paths have a trained copy, in `dtype`."""

    def visit(path: tuple, node: object) -> object:
        if not isinstance(node, nnx.Module) or ".".join(map(str, path)) not in paths:
            return node
        return Tuned(node, _copy(node, dtype))

    return nnx.recursive_map(visit, model) if paths else model


def _copy(module: nnx.Module, dtype: str) -> nnx.Module:
    copied = nnx.merge(*nnx.split(module))
    for name, value in list(vars(copied).items()):
        if isinstance(value, Param):  # a true copy: a step of training may take its arrays over
            setattr(copied, name, AdapterParam(jnp.array(value[...], dtype, copy=True)))
    return copied


def tuned(model: nnx.Module) -> dict[str, Tuned]:
    """The modules that are trained whole, by path."""
    return find_layers(model, lambda node: isinstance(node, Tuned))


def saved_names(model: nnx.Module) -> list[str]:
    """What `modules_to_save` is in PEFT's config, which goes by the ends of names."""
    modules = modules_of(model)
    chosen = {name for path in tuned(model) for name in theirs(modules[path]).values()}
    named = (name for rows in modules.values() for name in theirs(rows).values())
    every = {around for name in named for around in owners(name)}

    def shortest(name: str) -> str:
        leaf = name.rsplit(".", 1)[-1]
        is_taken = all(other in chosen for other in every if other.endswith(leaf))
        return leaf if is_taken and not leaf.isdigit() else name

    # what is in a module that is saved goes with it
    return sorted({shortest(name) for name in chosen if chosen.isdisjoint(owners(name)[1:])})


def table(model: nnx.Module, prefix: str) -> dict[str, Row]:
    """A weight table of what is trained whole, with PEFT's names."""
    modules = modules_of(model)
    return {
        f"{plain(path)}.trained.{name}": row.renamed(prefix + row.name).row
        for path in tuned(model)
        for name, row in modules[path].items()
    }


def rows_of(
    model: nnx.Module, trains: Callable[[str], bool], file: SafetensorsFile, prefix: str
) -> dict[str, dict[str, Entry]]:
    """The rows, named as in PEFT's file, of the modules that are trained whole.

    Args:
      trains: whether a module of this name is.

    Raises:
      ValueError: it takes some layers of a stack alone.
    """
    chosen = {}
    for path, rows in modules_of(model).items():
        are_trained = {trains(name) for name in theirs(rows).values()}
        if len(are_trained) > 1:
            raise ValueError(
                f"{file.path}: modules_to_save takes some layers of the stack {path} and leaves"
                " others; unstack(model.layers) first"
            )
        if are_trained == {True}:
            chosen[path] = {key: row.renamed(prefix + row.name) for key, row in rows.items()}
    return chosen


def shapes(rows: Mapping[str, Mapping[str, Entry]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that these rows expect."""
    entries = [row for of_path in rows.values() for row in of_path.values()]
    return {name: row.their_shape() for row in entries for name in row.names().values()}


def read(
    model: nnx.Module, rows: Mapping[str, Mapping[str, Entry]], file: SafetensorsFile
) -> nnx.Module:
    """The model with modules of these paths trained as a file holds them, by `rows`."""
    model = tune(model, list(rows), "float32")
    for path, module in tuned(model).items():
        for name, row in rows[path].items():
            variable, array = getattr(module.trained, name), np.empty(row.shape, np.float32)
            for place, name_of_file in row.names().items():
                array[(*place, ...)] = row.to_ours(file.read(name_of_file))
            sharding = variable[...].sharding if has_mesh() else None
            variable[...] = jax.device_put(array, sharding)
    return model
