"""Folders of packed weights: a `Checkpoint` over the tensors, and what a loader makes of them.

`PackedCheckpoint` shows each packed layer as the one tensor `<layer>.weight` that it stands for, so
that tables of names fit packed folders as they are; `read` gives it dequantised and `read_packed`
as stored. `packers` says which of the two, layer by layer. The layers of a stack are one array, so
all of them must be packed alike to stay packed.
"""

import collections
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.quant.kinds import quantize
from llmprep_jax.quant.layouts import FLOATS, Layout, layout_of
from llmprep_jax.quant.linear import (
    expert_spec,
    find_layers,
    is_dense,
    matrix_eqn,
    row_spec,
    to_matrix,
)
from llmprep_jax.quant.packed import Packed, dequantize
from llmprep_jax.weights.folder import MISSHAPEN, MISSING, Checkpoint, dims
from llmprep_jax.weights.table import Entry, Pack

# a mesh, and how stacked dimensions and, by its shape, an array of one matrix lie over it
Place = tuple[jax.sharding.Mesh, jax.P, Callable[[tuple[int, ...]], Iterable[Any]]]
_quantize = jax.jit(quantize, static_argnums=1)


def unpacking(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, or a `PackedCheckpoint` over it where its config says that it is packed.

    Raises:
      ValueError: it is packed in a way that is not read here.
    """
    layout = layout_of(checkpoint.config, checkpoint.path)
    return checkpoint if layout is None else PackedCheckpoint(checkpoint, layout)


class PackedCheckpoint(Checkpoint):
    """A folder whose linear layers are packed, some of them or all.

    Attributes:
      layers: of each packed weight `<layer>.weight`, the stored names of its tensors by their names
        in the layout.
    """

    def __init__(self, stored: Checkpoint, layout: Layout):
        self.path, self._stored, self._layout = stored.path, stored, layout
        self.config = {k: v for k, v in stored.config.items() if k != "quantization_config"}
        self.layers = self._find_layers()
        parts = {name for layer in self.layers.values() for name in layer.values()}
        dense = [name for name in stored.names if name not in parts]
        self.names = [*dense, *self.layers]
        self._float = self._float_dtype(dense)

    def token_id(self, text: str) -> int | None:
        return self._stored.token_id(text)

    def _find_layers(self) -> dict[str, dict[str, str]]:
        names = "|".join(
            re.escape(part) + (r"\w+" if part.endswith("__") else "") for part in self._layout.parts
        )
        by_layer: dict[str, dict[str, str]] = collections.defaultdict(dict)
        for name in self._stored.names:
            if match := re.fullmatch(rf"(.+)\.({names})", name):
                by_layer[match[1]][match[2]] = name

        def is_packed(parts: dict[str, str]) -> bool:
            dtypes = {part: str(self._stored.dtype(name)) for part, name in parts.items()}
            return self._layout.is_packed(dtypes)

        return {f"{layer}.weight": parts for layer, parts in by_layer.items() if is_packed(parts)}

    def _float_dtype(self, dense: list[str]) -> np.dtype:
        """That of config.json, else of most tensors that are not packed."""
        stated = self.config.get("dtype") or self.config.get("torch_dtype")
        counts = collections.Counter(str(self._stored.dtype(name)) for name in dense)
        known = [name for name, _ in counts.most_common() if name in FLOATS]
        return np.dtype(stated if stated in FLOATS else (known or ["float32"])[0])

    def kind(self, name: str) -> str | None:
        """The format of a packed weight; None: it is not packed."""
        return self._layout.kind(tuple(self.layers[name])) if name in self.layers else None

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.layers:
            return self._stored.shape(name)
        return self._layout.shape(self._read(name))

    def dtype(self, name: str) -> np.dtype:
        return self._float if name in self.layers else self._stored.dtype(name)

    def file(self, name: str) -> Path:
        parts = self.layers.get(name, {name: name})
        return self._stored.file(next(iter(parts.values())))

    def read(self, name: str) -> np.ndarray:
        """The tensor, a packed one in float32."""
        if name not in self.layers:
            return self._stored.read(name)
        return np.asarray(dequantize(self.read_packed(name)))

    def read_packed(self, name: str) -> Packed:
        """A packed weight as it is stored.

        Raises:
          ValueError: its tensors make no sense.
        """
        try:
            return self._layout.read(self._read(name))
        except ValueError as error:
            raise ValueError(f"{self.path}: {name} cannot be unpacked: {error}") from error

    def _read(self, name: str) -> dict[str, np.ndarray]:
        return {part: self._stored.read(stored) for part, stored in self.layers[name].items()}

    def misfits(self, name: str, shape: tuple[int, ...]) -> dict[str, list[str]]:
        if name not in self.layers:
            return self._stored.misfits(name, shape)
        layer, parts = name.removesuffix(".weight"), self.layers[name]
        if len(shape) != 2:
            return {MISSHAPEN: [f"{name} is a packed matrix, expected {dims(shape)}"]}
        try:
            expected = self._layout.expected(self._read(name), tuple(shape))
        except ValueError as error:
            return {"that do not fit": [f"{layer}.{error}"]}
        needed = set(expected) - set(self._layout.optional)
        odd = [
            self._misfit(stored, *expected[part])
            for part, stored in parts.items()
            if part in expected
        ]
        lines = {
            MISSING: [f"{layer}.{part}" for part in sorted(needed - set(parts))],
            "unexpected": [parts[part] for part in sorted(set(parts) - set(expected))],
            MISSHAPEN: list(filter(None, odd)),
        }
        return {kind: entries for kind, entries in lines.items() if entries}

    def _misfit(
        self, stored: str, dtypes: tuple[str, ...], size: tuple[int, ...] | int
    ) -> str | None:
        """One line, if a tensor is not of these dtypes and this shape, or number of elements."""
        shape, dtype = self._stored.shape(stored), self._stored.dtype(stored)
        num = int(np.prod(shape)) * (1 if dtypes else dtype.itemsize)
        fits = size in (-1, num) if isinstance(size, int) else tuple(shape) == size
        if fits and (not dtypes or str(dtype) in dtypes):
            return None
        wanted = [] if not dtypes else [" or ".join(dtypes)]
        if isinstance(size, tuple):
            wanted.append(dims(size))
        elif size != -1:
            wanted.append(f"{size} {'elements' if dtypes else 'bytes'}")
        return f"{stored} is {dtype} {dims(shape)}, expected {' '.join(wanted)}"

    def is_spare(self, name: str) -> bool:
        """Of a packed layer of zeros: old GPTQ files have a bias for models without."""
        packed = name.removesuffix(".bias") + ".weight" in self.layers
        return packed and name.endswith(".bias") and not self._stored.read(name).any()


def packers(model: nnx.Module, checkpoint: Checkpoint, kind: str | None) -> dict[str, Pack]:
    """For each linear layer's weight, by path, what `weights.table.load` is to make of its tensors.

    Args:
      model: abstract. kind: the format of all linear layers; None: packed layers as stored, and the
        others dense.
    """
    if kind is None and not isinstance(checkpoint, PackedCheckpoint):
        return {}
    if isinstance(checkpoint, PackedCheckpoint) and kind is not None:
        stored = {checkpoint.kind(name) for name in checkpoint.layers} - {kind}
        if stored:
            warnings.warn(
                f"{checkpoint.path}: weights stored as {', '.join(sorted(stored))} are packed again"
                f" as {kind}, and what both lose adds up; dtype=None, or in a run adapter=LoRA,"
                " keeps them as stored",
                stacklevel=3,
            )
    return {
        f"{path}.w": functools.partial(_pack, checkpoint, base, kind)
        for path, base in find_layers(model, is_dense).items()
    }


def _pack(
    checkpoint: Checkpoint, base: Einsum, kind: str | None, row: Entry, names: list[str]
) -> Packed | None:
    """A parameter in few bits, read one tensor after the other; None: it is to be dense."""
    stored, mesh = {}, jax.sharding.get_mesh()
    # how the stacked dimensions lie over devices, and those of a matrix
    place = jax.P(*[None] * len(row.stacked)), row_spec
    if isinstance(base, ExpertWeights):
        place = expert_spec(row.stacked), lambda shape: (None,) * len(shape)
    place = None if mesh.empty else (mesh, *place)
    if isinstance(checkpoint, PackedCheckpoint):
        stored = {name: packed_as for name in names if (packed_as := checkpoint.kind(name))}
    # a part of a matrix is dense: formats have scales that lie over the rows of two
    if stored and row.row.part[1] == 1 and kind in (None, *stored.values()):
        if len(stored) < len(names):
            dense = next(name for name in names if name not in stored)
            raise ValueError(
                f"{checkpoint.path}: {next(iter(stored))} is packed and {dense} is not, but the"
                ' layers of a stack are one array; load it with dtype="bfloat16"'
            )
        return _stack(checkpoint, names, checkpoint.read_packed, row.stacked, place)
    if kind is None:
        return None

    def pack(name: str) -> Packed:
        w = to_matrix(matrix_eqn(base), row.to_ours(checkpoint.read(name)))
        return _quantize(jax.device_put(w, _replicated()), kind)

    return _stack(checkpoint, names, pack, row.stacked, place)


def _stack(
    checkpoint: Checkpoint,
    names: list[str],
    read: Callable[[str], Packed],
    stacked: tuple[int, ...],
    place: Place | None,
) -> Packed:
    """Packed weights, had one after the other, as one stack of them, of which a device has a part.

    Args:
      place: how the arrays lie over devices; None: on the default device.
    """
    numbers, indices = np.arange(len(names)).reshape(stacked), [(...,)]
    if place is not None:
        lead = jax.sharding.NamedSharding(place[0], place[1])
        indices = lead.addressable_devices_indices_map(stacked).values()
    parts, reference = {}, {}  # devices that hold the same part share it
    for index in indices:
        part = numbers[index]
        if part.tobytes() not in parts:
            read_one = functools.partial(_read_alike, checkpoint, names, read, place, reference)
            parts[part.tobytes()] = _joined(map(read_one, part.reshape(-1).tolist()), part.shape)
    first = reference["first"]

    def array(key: str) -> jax.Array:
        if place is None:
            return jax.device_put(parts[numbers.tobytes()].pop(key))
        rest = first.arrays()[key].shape
        sharding = jax.sharding.NamedSharding(place[0], jax.P(*place[1], *place[2](rest)))
        own = _own_rows(place, rest)

        def find(index: tuple[slice, ...]) -> np.ndarray:
            lead, rows = index[: len(stacked)], index[len(stacked) :]
            part = parts[numbers[lead].tobytes()][key]
            if not rest:
                return part
            start, stop, _ = rows[0].indices(rest[0])
            rows = (slice(start - own.start, stop - own.start), *rows[1:])
            return part[(*[slice(None)] * len(stacked), *rows)]

        return jax.make_array_from_callback((*stacked, *rest), sharding, find)

    return type(first).of(first.settings(), {key: array(key) for key in first.arrays()})


def _own_rows(place: Place | None, shape: tuple[int, ...]) -> slice:
    """The rows of an array that this process's devices hold."""
    if place is None or not shape:
        return slice(None)
    sharding = jax.sharding.NamedSharding(place[0], jax.P(*place[2](shape)))
    spans = [
        index[0].indices(shape[0])[:2]
        for index in sharding.addressable_devices_indices_map(shape).values()
    ]
    return slice(min(start for start, _ in spans), max(stop for _, stop in spans))


def _read_alike(
    checkpoint: Checkpoint,
    names: list[str],
    read: Callable[[str], Packed],
    place: Place | None,
    reference: dict[str, Any],
    number: int,
) -> dict[str, np.ndarray]:
    """This process's rows of one packed weight, which must be packed as the first that was read."""
    packed = read(names[number])
    first, name = reference.setdefault("first", packed), reference.setdefault("name", names[number])
    if _signature(packed) != _signature(first):
        raise ValueError(
            f"{checkpoint.path}: {names[number]} is not packed as {name} is"
            f" ({dict(packed.settings())}, {dict(first.settings())}), but the layers of a stack"
            ' are one array; load it with dtype="bfloat16"'
        )
    return {
        key: np.asarray(value)[_own_rows(place, value.shape)] if value.ndim else np.asarray(value)
        for key, value in packed.arrays().items()
    }


def _joined(
    matrices: Iterable[dict[str, np.ndarray]], stacked: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Arrays that come one after the other as one of each name, with leading dimensions."""
    joined: dict[str, np.ndarray] = {}
    for i, arrays in enumerate(matrices):
        for key, value in arrays.items():
            if key not in joined:
                joined[key] = np.empty((math.prod(stacked), *value.shape), value.dtype)
            joined[key][i] = value
    return {key: value.reshape((*stacked, *value.shape[1:])) for key, value in joined.items()}


def _signature(packed: Packed) -> tuple:
    arrays = {k: (v.shape, v.dtype) for k, v in packed.arrays().items()}
    return type(packed), packed.settings(), arrays


def _replicated() -> jax.sharding.NamedSharding | None:
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.P())
