"""The safetensors format: a checked, memory-mapped reader and an atomic writer.

A file is 8 bytes of header length, a JSON header naming each tensor's dtype, shape and byte range,
and the bytes. The reader trusts nothing in the header before it has checked it against the file's
size, so a damaged file is one line of error and never a crash or a giant allocation. Tensors are
views of the mapped file, read from disk as they are touched.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
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
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the reference implementation's own bound
_AGAIN = "download or export the file again"


class SafetensorsFile:
    """One open file. `names`, `shape`, `dtype` and `read` are all there is.

    Raises:
      ValueError: the file is truncated or its header is not one that its bytes bear out.
      OSError: it is not there or cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        size = _size(self.path)
        self._start, self._entries = self._read_header(size)
        self._bytes = np.memmap(self.path, np.uint8, "r")

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

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
            header = json.loads(text.decode(), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that cannot be read ({one_line(error)})")
        if not isinstance(header, dict):
            self._refuse("has a header that is no JSON object")
        header.pop("__metadata__", None)
        entries = {name: self._check_entry(name, entry) for name, entry in header.items()}
        self._check_ranges(entries, size - 8 - length)
        return 8 + length, entries

    def _check_entry(self, name: str, entry: Any) -> tuple:
        label = f"tensor {quoted(name)}"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            self._refuse(f"describes {label} without dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            self._refuse(f"gives {label} the unknown dtype {quoted(code)}")
        if not _are_counts(shape) or len(shape) > 32:
            self._refuse(f"gives {label} the shape {quoted(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2:
            self._refuse(f"gives {label} the byte range {quoted(offsets)}")
        item = DTYPES[code].itemsize
        size, span = item * math.prod(shape), offsets[1] - offsets[0]
        if span != size:
            self._refuse(f"gives {label} {span} bytes; {code} {quoted(shape)} has {size}")
        if item * math.prod(dim or 1 for dim in shape) >= 2**62:
            self._refuse(f"gives {label} the shape {quoted(shape)}")  # empty, yet beyond numpy
        return DTYPES[code], tuple(shape), (offsets[0], offsets[1])

    def _check_ranges(self, entries: Mapping[str, tuple], size: int) -> None:
        """Ranges follow each other without gaps or overlaps, to the end of the file."""
        end = 0
        for name, (_, _, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
            if stop > size:
                self._refuse(f"ends before tensor {quoted(name)}: it is truncated")
            if begin != end:
                kind = "overlaps the one before" if begin < end else "leaves a gap before it"
                self._refuse(f"has tensor {quoted(name)} at byte {begin}, which {kind}")
            end = stop
        if end != size:
            self._refuse(f"has {size - end} bytes that no tensor claims")

    def _refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{self.path} {reason}; {_AGAIN}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}; check the path") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"the name {quoted(name)} occurs twice")
        entries[name] = value
    return entries


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**60 for v in values)


def quoted(value: Any) -> str:
    """A value from a file, for a message: on one line, and not a page of it."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:90]}..."


def one_line(error: Exception) -> str:
    """An exception's message without line breaks, cut where it would fill the screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:190]}..."


def write_file(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one file, aside first and then in place.

    Arrays need not be contiguous; each is copied as it is written, so views cost nothing.

    Raises:
      OSError: it cannot be written (full disk, no permission); what stood there is untouched.
      ValueError: a dtype that the format lacks.
    """
    offset, header = 0, {"__metadata__": {"format": "pt"}}
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


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """`with atomic_file(path) as file`: a temporary file beside `path` that replaces it at the end.

    Raises:
      OSError: it cannot be written; what stood at `path` is untouched.
    """
    path = Path(path)
    aside = beside(path)
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> OSError:
    """What to raise when the disk refuses: one line with what was to be written, and the fix."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "check its permissions"
    reason = error.strerror or one_line(error)
    return OSError(f"cannot write {path}: {reason}; {remedy} or choose another place")


def beside(path: Path) -> Path:
    """A name for a temporary sibling of `path`, hidden and not taken."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def write_folder(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `model.safetensors`, or shards and their index where one file would be too large.

    Holds one shard in memory at a time. Weights that stood in the folder are removed, but only when
    all of the new ones are on the disk.

    Raises:
      OSError: it cannot be written; the folder is as it was.
    """
    folder = Path(folder)
    aside = beside(folder / SINGLE)
    try:
        aside.mkdir()
        _write_shards(aside, tensors, max_shard_bytes)
        new = [path.name for path in aside.iterdir()]
        for path in folder.iterdir():
            if is_weights(path.name) and path.name not in new:
                path.unlink()
        for name in sorted(new):  # the index, whose name sorts last, once its shards are there
            os.replace(aside / name, folder / name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def is_weights(name: str) -> bool:
    """Whether a file of this name in a model folder is what a loader would read weights from."""
    return name in (SINGLE, INDEX) or _SHARD.fullmatch(name) is not None


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    written: list[tuple[Path, list[str]]] = []
    total = 0
    for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
        path = folder / str(number)
        write_file(path, shard)
        written.append((path, list(shard)))
        total += sum(array.nbytes for array in shard.values())
    if len(written) == 1:
        os.replace(written[0][0], folder / SINGLE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(written, start=1):
        final = f"model-{number:05}-of-{len(written):05}.safetensors"
        os.replace(path, folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with atomic_file(folder / INDEX) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())


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
