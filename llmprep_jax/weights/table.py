"""Weights by table: Hugging Face tensors into a module's parameters, and back.

A `rows.Table` has a Hugging Face name for each path of ours, and an einops pattern, theirs -> ours.
Placeholders run over the parameter's leading, stacked dimensions. Sizes come from the abstract
parameter, and swapping the pattern's sides exports. The loader reports everything that does not fit
in one error, before it fills a parameter.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.sharding import on_devices
from llmprep_jax.weights.folder import MISSHAPEN, MISSING, Checkpoint
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.names import canonical_names
from llmprep_jax.weights.rows import PLACEHOLDER, Row, Table, fill

Rows = Mapping[str, Row]
Index = tuple[Any, ...]  # slices, or an ellipsis
_SHOWN = 12  # lines of each kind in an error
_BAND = 2**21  # bytes; a transposing copy whose rows outgrow the cache runs at half speed


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensors that make it up, or that it is a part of.

    Attributes:
      path: ours, e.g. "layers.attn.q.w". shape: ours, stacked dimensions first.
      row: of the table.
      place: values of the first placeholders where layers are a list and not stacked.
    """

    path: str
    shape: tuple[int, ...]
    row: Row
    place: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Theirs, with placeholders."""
        return self.row.name

    def renamed(self, name: str) -> "Entry":
        """The same of tensors that have another name."""
        return dataclasses.replace(self, row=self.row._replace(name=name))

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading dimensions that the placeholders run over."""
        return self.shape[: len(PLACEHOLDER.findall(self.name)) - len(self.place)]

    def names(self) -> dict[tuple[int, ...], str]:
        """Hugging Face names by place in the stacked dimensions."""
        places = itertools.product(*map(range, self.stacked))
        return {place: fill(self.name, (*self.place, *place)) for place in places}

    def sizes(self) -> dict[str, int]:
        """The pattern's letters, from our shape."""
        letters = self.row.pattern.split("->")[1].split()
        return dict(zip(letters, self.shape[len(self.stacked) :], strict=True))

    def their_shape(self) -> tuple[int, ...]:
        """The shape that each tensor must have, with the parts that are others'."""
        sizes = {"1": 1, **self.sizes()}
        groups = re.findall(r"\([^)]*\)|\S+", self.row.pattern.split("->")[0])
        own = [math.prod(sizes[dim] for dim in group.strip("()").split()) for group in groups]
        _, count = self.row.part
        return tuple(own) if count == 1 else (count * own[0], *own[1:])

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """A view of one tensor, or of this parameter's part of it, with our dimensions."""
        number, count = self.row.part
        if count > 1:
            size = len(tensor) // count
            tensor = tensor[number * size : (number + 1) * size]
        return einops.rearrange(tensor, self.row.pattern, **self._letters())

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`: one tensor, or this parameter's part of it."""
        theirs, ours = self.row.pattern.split("->")
        return einops.rearrange(array, f"{ours.strip()} -> {theirs.strip()}", **self._letters())

    def _letters(self) -> dict[str, int]:
        return {name: size for name, size in self.sizes().items() if name != "1"}


Pack = Callable[[Entry, list[str]], Any]  # see `load`


def entries(
    module: nnx.Module | nnx.State, table: Rows, kind: type = nnx.Variable
) -> dict[str, Entry]:
    """The table's rows for a module's variables of `kind`, by path.

    A number in a path (layers in a list) is the value of the row's first placeholder.

    Raises:
      ValueError: the module has a variable that the table does not name.
    """
    rows, unnamed = {}, []
    for path, variable in nnx.to_flat_state(nnx.state(module, kind)):
        full, row = ".".join(map(str, path)), entry(path, tuple(variable.shape), table)
        if row is None:
            unnamed.append(full)
        else:
            rows[full] = row
    if unnamed:
        raise ValueError(f"the weight table names no tensor for {_listed(sorted(unnamed))}")
    return rows


def entry(path: Sequence[str | int], shape: tuple[int, ...], table: Rows) -> Entry | None:
    """The table's row for a parameter; None if it has none."""
    name = ".".join(part for part in path if isinstance(part, str))
    if name not in table:
        return None
    place = tuple(part for part in path if not isinstance(part, str))
    return Entry(".".join(map(str, path)), shape, table[name], place)


def load(
    abstract: nnx.Module,
    checkpoint: Checkpoint,
    table: Table,
    *,
    dtype: str | None = None,
    dtypes: Sequence[tuple[type, str]] = (),
    progress: Callable[[str], None] | None = None,
    pack: Callable[[str], Pack | None] | None = None,
) -> nnx.Module:
    """Fills an abstract module from a checkpoint.

    Each parameter is read tensor by tensor into the dtype and sharding of its place; under a mesh a
    process reads only what its devices hold.

    Args:
      abstract: from `jax.eval_shape` of the model's constructor, under the mesh if there is one.
      dtype: of all parameters; None: each as stored.
      dtypes: (class of Variable, dtype) pairs of those that have one of their own.
      progress: called with each parameter's path before it is read.
      pack: gives, for a parameter's path, None or a function of its row and its tensors' stored
        names; the function reads them, and its result takes the parameter's place, unless it is
        None.

    Raises:
      ValueError: tensors are missing, unexpected or misshapen (all are listed), or a tied model's
        file has a head that is not the embedding.
    """
    rows = entries(abstract, table)
    stored = canonical_names(checkpoint, table)
    _check(rows, table, stored, checkpoint)
    graph, state = nnx.split(abstract)
    flat = []
    # the copies transpose, which is slow and lets other threads run
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for path, variable in nnx.to_flat_state(state):
            row = rows[".".join(map(str, path))]
            if progress is not None:
                progress(row.path)
            names = {place: stored[name] for place, name in row.names().items()}
            packer = None if pack is None else pack(row.path)
            value = None if packer is None else packer(row, list(names.values()))
            if value is None:
                sharding = on_devices(variable.get_value().sharding)
                param_dtype = next((x for kind, x in dtypes if isinstance(variable, kind)), dtype)
                value = _read(row, names, checkpoint, param_dtype, sharding, pool)
            flat.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _check(
    rows: Mapping[str, Entry], table: Table, stored: Mapping[str, str], checkpoint: Checkpoint
) -> None:
    wanted = _by_tensor(rows)
    unexpected = set(stored) - set(wanted) - _spare_head(rows, table, stored, checkpoint)
    faults = {
        MISSING: sorted(set(wanted) - set(stored)),
        "unexpected": sorted(x for x in map(stored.get, unexpected) if not checkpoint.is_spare(x)),
        MISSHAPEN: [],
    }
    for name, parts in sorted(wanted.items()):
        shapes = dict.fromkeys(part.their_shape() for part in parts if name in stored)
        for shape in shapes:
            for kind, lines in checkpoint.misfits(stored[name], shape).items():
                faults[kind] = faults.get(kind, []) + lines
    problems = [f"{len(x)} {kind}: {_listed(x)}" for kind, x in faults.items() if x]
    if problems:
        raise ValueError(
            f"{checkpoint.path}: the weights do not fit the model's config: {'; '.join(problems)};"
            f" {_remedy(faults, wanted, table, stored)}"
        )


def _remedy(
    faults: Mapping[str, Sequence[str]],
    wanted: Mapping[str, Sequence[Entry]],
    table: Table,
    stored: Mapping[str, str],
) -> str:
    """What helps where tensors do not fit."""
    if [kind for kind, lines in faults.items() if lines] == [MISSING]:
        if table.head is not None and faults[MISSING] == [table[table.head].name]:
            return (
                "a base model has no output head: save the whole one by AutoModelForCausalLM, or"
                " set tie_word_embeddings to true in config.json if its head is the embedding"
            )
        part, *inner = (table.embed or "").split(".")
        there = {row.path.split(".")[0] for name in stored for row in wanted.get(name, ())}
        rows = [wanted.get(name) for name in faults[MISSING]]  # None: of packed weights
        lost = {row.path.split(".")[0] for parts in rows for row in parts or ()}
        if len(inner) > 1 and there == {part} and part not in lost and None not in rows:
            return f'{part} is all there: lp.load_model(path, only="{part}") reads it'
    return "use the config.json that came with them"


def _by_tensor(rows: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """By name, the one parameter that a tensor makes up, or all that it has the parts of.

    Raises:
      ValueError: two parameters are one tensor's, or a part is nobody's.
    """
    by_name: dict[str, list[Entry]] = {}
    for row in rows.values():
        for name in row.names().values():
            by_name.setdefault(name, []).append(row)
    for name, parts in by_name.items():
        count = parts[0].row.part[1]
        if sorted(part.row.part for part in parts) != [(i, count) for i in range(count)]:
            paths = ", ".join(part.path for part in parts)
            raise ValueError(f"{name} has {count} parts in the weight table, and is for {paths}")
    return by_name


def _spare_head(
    rows: Mapping[str, Entry], table: Table, stored: Mapping[str, str], checkpoint: Checkpoint
) -> set[str]:
    """The name of a stored head that a tied model repeats, once it is seen to be its embedding."""
    if table.head is None or table.head in rows or table.embed not in rows:
        return set()
    head, embed = table[table.head].name, table[table.embed].name
    if head not in stored or embed not in stored:
        return set()
    if not _equal(checkpoint.read(stored[head]), checkpoint.read(stored[embed])):
        raise ValueError(
            f"{checkpoint.path}: {head} is not the embedding, but the model ties the two;"
            " load it with tie_embeddings=False"
        )
    return {head}


def _listed(lines: Sequence[str]) -> str:
    rest = len(lines) - _SHOWN
    shown = ", ".join(line[:200] for line in lines[:_SHOWN])
    return " ".join(shown.split()) + (f" and {rest} more" if rest > 0 else "")


def _read(
    row: Entry,
    names: Mapping[tuple[int, ...], str],
    checkpoint: Checkpoint,
    dtype: str | None,
    sharding: jax.sharding.Sharding | None,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    """One parameter, on its devices."""
    stored = [checkpoint.dtype(name) for name in names.values()]
    dtype = jnp.dtype(dtype) if dtype else functools.reduce(jnp.promote_types, stored)
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share it

    def part(index: Index) -> np.ndarray:
        key = tuple(span.indices(size) for span, size in zip(index, row.shape, strict=True))
        if key not in parts:
            parts[key] = _assemble(row, names, checkpoint, dtype, index, pool)
        return parts[key]

    if sharding is None:
        return jax.device_put(part((slice(None),) * len(row.shape)))
    return jax.make_array_from_callback(row.shape, sharding, part)


def _assemble(
    row: Entry,
    names: Mapping[tuple[int, ...], str],
    checkpoint: Checkpoint,
    dtype: np.dtype,
    index: Index,
    pool: concurrent.futures.Executor,
) -> np.ndarray:
    """Our array's part `index`, reading only the tensors in it."""
    depth = len(row.stacked)
    steps = [range(*span.indices(size)) for span, size in zip(index, row.shape, strict=True)]
    places = list(itertools.product(*steps[:depth]))
    shape = tuple(map(len, steps))
    out = _empty((len(places), *shape[depth:]), dtype)
    across = map if len(places) > 1 else pool.map  # one tensor is shared out in bands

    def fill(i: int) -> None:
        tensor = row.to_ours(checkpoint.read(names[places[i]]))[(*index[depth:], ...)]
        copy = lambda band: np.copyto(out[(i, *band)], tensor[band], casting="unsafe")  # noqa: E731
        list(across(copy, _bands(tensor)))

    list((pool.map if len(places) > 1 else map)(fill, range(len(places))))
    return out.reshape(shape)


def _bands(tensor: np.ndarray) -> Iterator[Index]:
    """Indices of parts of about `_BAND` bytes that lie together where the tensor is read from."""
    if tensor.nbytes <= _BAND:
        yield (...,)
        return
    axis = int(np.argmax(tensor.strides))
    size = tensor.shape[axis]
    step = max(1, size * _BAND // tensor.nbytes)
    for start in range(0, size, step):
        yield (slice(None),) * axis + (slice(start, start + step),)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX takes over on a CPU instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def head_is_separate(checkpoint: Checkpoint, table: Table) -> bool:
    """True when the file holds an output head that is not the embedding; it wins over "tied"."""
    if table.head is None or table.embed is None:
        return False
    stored = canonical_names(checkpoint, table)
    tables = [stored.get(table[path].name) for path in (table.head, table.embed)]
    return None not in tables and not _equal(*map(checkpoint.read, tables))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return np.array_equal(*(np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b)))


def export(
    module: nnx.Module | nnx.State, table: Rows, *, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array) of every tensor, one layer's in host memory at a time.

    Arrays are views where they can be, not contiguous ones: copy what is to be kept.

    Raises:
      ValueError: a parameter has no row, or a tensor lacks a part.
    """
    rows = entries(module, table)
    variables = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(nnx.state(module))}
    for parts in _parts(rows):
        for place, name in parts[0].names().items():
            arrays = [part.to_theirs(to_host(variables[part.path][...], place)) for part in parts]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            yield name, array if dtype is None else array.astype(jnp.dtype(dtype))


def _parts(rows: Mapping[str, Entry]) -> list[list[Entry]]:
    """The parameters that share tensors, in the order of the parts."""
    together: dict[Any, list[Entry]] = {}
    for row in rows.values():
        # the order of the first is that of all processes, which gather alike
        key = (row.name, row.place) if row.row.part[1] > 1 else row.path
        together.setdefault(key, []).append(row)
    groups = [sorted(parts, key=lambda part: part.row.part) for parts in together.values()]
    for parts in groups:
        if len(parts) != parts[0].row.part[1]:
            paths = ", ".join(part.path for part in parts)
            raise ValueError(f"{parts[0].name} is stored whole, and of its parts only {paths} here")
    return groups
