"""The safetensors format: a checked, memory-mapped reader and an atomic writer.

A file is 8 bytes of header length, a JSON header naming each tensor's dtype, shape and byte range, and the
bytes. The reader trusts nothing in the header before it has checked it against the file's size, so a damaged
file is one line of error and never a crash or a giant allocation. The one thing a reader would get wrong:
tensors are views of the mapped file, read from disk as they are touched.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U64": np.dtype("uint64"),
    "U32": np.dtype("uint32"),
    "U16": np.dtype("uint16"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the reference implementation's own bound
_AGAIN = "download or export the file again"


class SafetensorsFile:
    """One open file. `names`, `shape`, `dtype` and `read` are all there is.

    Raises:
      ValueError: the file is truncated or its header is not one that its bytes bear out.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = self.path.stat().st_size
        self._start, self._entries = self._read_header(size)
        self._bytes = np.memmap(self.path, np.uint8, "r") if size else np.zeros(0, np.uint8)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name][0]

    def read(self, name: str) -> np.ndarray:
        """The tensor, a read-only view of the file."""
        dtype, shape, (begin, end) = self._entries[name]
        data = self._bytes[self._start + begin : self._start + end]
        return np.asarray(data).view(dtype).reshape(shape)

    def _read_header(self, size: int) -> tuple[int, dict[str, tuple]]:
        if size < 8:
            self._refuse(f"has {size} bytes, too few for a header")
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _MAX_HEADER):
                self._refuse(f"states a header of {length} bytes, but the file has {size}")
            text = file.read(length)
        try:
            header = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that is no JSON ({error})")
        if not isinstance(header, dict):
            self._refuse("has a header that is no JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._check_entry(name, entry) for name, entry in header.items()}
        self._check_ranges(entries, size - 8 - length)
        return 8 + length, entries

    def _check_entry(self, name: str, entry: Any) -> tuple:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            self._refuse(f"describes tensor {name!r} without dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            self._refuse(f"gives tensor {name!r} the unknown dtype {code!r}")
        if not _are_counts(shape) or len(shape) > 32:
            self._refuse(f"gives tensor {name!r} the shape {shape!r}")
        if not _are_counts(offsets) or len(offsets) != 2:
            self._refuse(f"gives tensor {name!r} the byte range {offsets!r}")
        size = DTYPES[code].itemsize
        for dim in shape:
            size *= dim
        if offsets[1] - offsets[0] != size:
            self._refuse(
                f"gives tensor {name!r} {offsets[1] - offsets[0]} bytes; {code} {shape} has {size}"
            )
        return DTYPES[code], tuple(shape), (offsets[0], offsets[1])

    def _check_ranges(self, entries: Mapping[str, tuple], size: int) -> None:
        """Ranges follow each other without gaps or overlaps, to the end of the file."""
        end = 0
        for name, (_, _, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
            if stop > size:
                self._refuse(f"ends before tensor {name!r}: it is truncated")
            if begin != end:
                kind = "overlaps the one before" if begin < end else "leaves a gap before it"
                self._refuse(f"has tensor {name!r} at byte {begin}, which {kind}")
            end = stop
        if end != size:
            self._refuse(f"has {size - end} bytes that no tensor claims")

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{self.path} {reason}; {_AGAIN}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**60 for v in values)


def write_file(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, aside first and then in place.

    Raises:
      OSError: it cannot be written (full disk, no permission); what stood there is untouched.
    """
    path, offset, header = Path(path), 0, {"__metadata__": {"format": "pt"}}
    # widest dtypes first, as the reference writer does, so that every tensor is aligned
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        array = tensors[name]
        if array.dtype not in _CODES:
            raise ValueError(f"tensor {name!r} has dtype {array.dtype}, which safetensors lacks")
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": _CODES[array.dtype], "shape": array.shape, "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


class atomic_file:  # noqa: N801  (used as a function)
    """`with atomic_file(path) as file`: a temporary file beside `path` that replaces it at the end."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def __enter__(self):
        try:
            handle, self._temporary = tempfile.mkstemp(
                dir=self._path.parent, prefix=f".{self._path.name}."
            )
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}") from error
        self._file = os.fdopen(handle, "wb")
        return self._file

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.chmod(self._temporary, 0o666 & ~_umask())
                os.replace(self._temporary, self._path)
                return
        except OSError as failure:
            kind, error = OSError, failure
        Path(self._temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {self._path}: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model.safetensors`, or shards and their index where one file would be too large.

    Holds one shard in memory at a time.
    """
    folder = Path(folder)
    shards: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes), start=1):
        path = folder / f"model-{number:05}.safetensors"
        write_file(path, shard)
        shards.append((path, list(shard)))
        total += sum(array.nbytes for array in shard.values())
    if len(shards) == 1:
        os.replace(shards[0][0], folder / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05}-of-{len(shards):05}.safetensors"
        os.replace(path, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shards(tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> Iterator[dict]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard
