"""The GGUF container (ggml-org/ggml, docs/gguf.md): its key-value pairs and its table of tensors.

Every length and offset is checked against the file before it is used, so a damaged file is one line
of error and never a crash or a giant allocation; Gemma's 262144 pieces take 0.2 s. A tensor's
dimensions are listed innermost first.
"""

import dataclasses
import functools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.weights.safetensors import one_line, quoted

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<?"}
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_DTYPES = {kind: np.dtype(name) for kind, name in _SCALARS.items()}
_FIRST = 24  # bytes of magic, version and the two counts


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
      shape: outermost dimension first, as in Hugging Face's files.
      kind: ggml's number of the type. begin: its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    begin: int


class GgufFile:
    """One file: `metadata` (str, int, float, bool or lists of these) and `tensors` by name.

    Raises:
      ValueError: it is no GGUF file of version 2 or 3, or is damaged.
      OSError: it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        if size < _FIRST:
            raise ValueError(f"{self.path} is no GGUF file ({size} bytes); download it again")
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:4] != b"GGUF":
                raise ValueError(
                    f"{self.path} is no GGUF file; give a .gguf file or a Hugging Face folder"
                )
            version, num_tensors, num_pairs = struct.unpack_from("<IQQ", data, 4)
            if version not in (2, 3):
                raise ValueError(
                    f"{self.path} is GGUF of version {version}; convert it to version 3,"
                    " little-endian"
                )
            try:
                reader = _Reader(data, _FIRST)
                self.metadata = reader.pairs(num_pairs)
                self.tensors = self._tensors(reader, num_tensors, size)
            except (struct.error, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{self.path} is damaged ({one_line(error)}); download it again"
                ) from None

    def data(self, tensor: GgufTensor, num_bytes: int) -> np.ndarray:
        """The tensor's bytes, a read-only view of the file.

        Raises:
          ValueError: the file ends before them.
        """
        stored = self._bytes[tensor.begin : tensor.begin + num_bytes]
        if stored.size != num_bytes:
            raise ValueError(
                f"{self.path} ends before tensor {quoted(tensor.name)}; download it again"
            )
        return stored

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))

    def _tensors(self, reader: "_Reader", count: int, size: int) -> dict[str, GgufTensor]:
        infos = [reader.tensor() for _ in _counted(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise ValueError(f"an alignment of {quoted(alignment)}")
        start = -(-reader.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for info in infos:
            if info.name in tensors:
                raise ValueError(f"tensor {quoted(info.name)} occurs twice")
            begin = start + info.begin
            if begin > size:
                raise ValueError(f"it ends before tensor {quoted(info.name)}")
            tensors[info.name] = dataclasses.replace(info, begin=begin)
        return tensors


def _counted(count: int) -> range:
    if count >= 2**40:  # range() itself takes any count; this one cannot be true
        raise ValueError(f"a count of {count}")
    return range(count)


class _Reader:
    """A place in the file that moves on as values are read."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def pairs(self, count: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in _counted(count):
            name = self.string()
            pairs[name] = self.typed(self.number("<I"))
        return pairs

    def tensor(self) -> GgufTensor:
        """A row of the tensor table; `begin` counts from the end of the table."""
        name, num_dims = self.string(), self.number("<I")
        if num_dims > 8:
            raise ValueError(f"tensor {quoted(name)} has {num_dims} dimensions")
        shape = tuple(self.number("<Q") for _ in range(num_dims))[::-1]
        if math.prod(dim or 1 for dim in shape) >= 2**60:
            raise ValueError(f"tensor {quoted(name)} has the shape {quoted(shape)}")
        return GgufTensor(name, shape, self.number("<I"), self.number("<Q"))

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Strings one after another; a loop without calls, for there are a million of them."""
        data, at, size = self.data, self.at, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in _counted(count):
            (length,) = unpack(data, at)
            end = at + 8 + length
            if end > size:
                raise ValueError("a string runs past the end of the file")
            strings.append(data[at + 8 : end].decode())
            at = end
        self.at = at
        return strings

    def typed(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.array(kind, 1)[0]
        kind, count = self.number("<I"), self.number("<Q")
        return self.strings(count) if kind == _STRING else self.array(kind, count)

    def array(self, kind: int, count: int) -> list:
        if kind not in _DTYPES:
            raise ValueError(f"a value of the unknown type {kind}")
        end = self.at + count * _DTYPES[kind].itemsize
        if end > len(self.data):
            raise ValueError("an array runs past the end of the file")
        values = np.frombuffer(self.data[self.at : end], _DTYPES[kind]).tolist()
        self.at = end
        return values


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs alone."""
    return GgufFile(path).metadata
