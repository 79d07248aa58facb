"""Arbitrary damage to safetensors files, indices and configs: a right reading, or one line."""

import copy
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import DTYPES, SafetensorsFile, write_file, write_folder
from tests.weights.samples import BF16, check_message, entry, file_bytes

TENSORS = {
    "layers.0.w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layers.1.w": np.arange(4).astype(BF16),
    "none": np.zeros((0, 2), np.float16),
    "flag": np.array(True),
}
FEW = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_file(path: Path) -> None:
    """The file is read to its last byte, or refused in one line that names it."""
    tracemalloc.start()
    try:
        file = SafetensorsFile(path)
        for name in file.names:
            tensor = np.array(file.read(name))
            assert (tensor.dtype, tensor.shape) == (file.dtype(name), file.shape(name))
    except ValueError as error:
        check_message(error, path)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2_000_000


@given(st.data())
@FEW
def test_bytes_changed_anywhere(folder, data):
    path = folder / "a.safetensors"
    write_file(path, TENSORS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["cut", "insert", "replace", "length"]))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = piece
        elif kind == "replace":
            content[at : at + len(piece)] = piece
        else:
            content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    path.write_bytes(content)
    check_file(path)


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**32, 2**59, 2**60, 2**63, 2**64, 10**30, True, 1.0, None, "1"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | NUMBERS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", "", None, 3]) | JSON,
        "shape": st.lists(NUMBERS, max_size=40) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    }
)
WHOLE = st.tuples(
    st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 60)
).map(
    lambda row: entry(
        row[0], row[1], row[2], row[2] + DTYPES[row[0]].itemsize * int(np.prod(row[1]))
    )
)


@given(
    st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRIES | WHOLE | JSON),
    st.binary(max_size=80),
)
@FEW
def test_any_header(folder, header, data):
    path = folder / "b.safetensors"
    path.write_bytes(file_bytes(header, data))
    check_file(path)


@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=6), st.data())
@FEW
def test_a_file_is_read_exactly_when_its_ranges_tile_it(folder, sizes, data):
    codes = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}
    header, at = {}, 0
    for i, size in enumerate(sizes):
        header[f"w{i}"] = entry(codes[size], [1], at, at + size)
        at += size
    moved = data.draw(st.sampled_from(list(header)))
    by = data.draw(st.integers(-2, 2))
    header[moved]["data_offsets"] = [n + by for n in header[moved]["data_offsets"]]
    path = folder / "c.safetensors"
    path.write_bytes(file_bytes(header, bytes(at)))
    if by == 0:
        assert len(SafetensorsFile(path).names) == len(sizes)
    else:
        with pytest.raises(ValueError, match="tensor"):
            SafetensorsFile(path)


def check_folder(folder: Path) -> None:
    try:
        checkpoint = FolderCheckpoint(folder)
        for name in checkpoint.names:
            assert checkpoint.read(name).shape == checkpoint.shape(name)
            assert checkpoint.file(name).is_file()
    except (ValueError, FileNotFoundError) as error:
        check_message(error, folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_folder(folder, list(TENSORS.items()), max_shard_bytes=20)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def shaken(data, value):
    """A JSON value with one part of it replaced."""
    value = copy.deepcopy(value)
    at = value
    while isinstance(at, dict) and at:
        key = data.draw(st.sampled_from(sorted(at)))
        if isinstance(at[key], dict) and data.draw(st.booleans()):
            at = at[key]
            continue
        change = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        old = at.pop(key)
        if change == "replace":
            names = st.sampled_from(["", ".", "..", "/", "a/b", "config.json", "no\nthing", "\0"])
            at[key] = data.draw(JSON | names)
        elif change == "rename":
            at[data.draw(st.text(max_size=6))] = old
        return value
    return data.draw(JSON)


@given(st.data())
@FEW
def test_any_index(sharded, data):
    index = sharded / "model.safetensors.index.json"
    whole = index.read_text()
    try:
        index.write_text(json.dumps(shaken(data, json.loads(whole))))
        check_folder(sharded)
    finally:
        index.write_text(whole)


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@FEW
def test_any_config(sharded, content):
    config = sharded / "config.json"
    config.write_bytes(content)
    check_folder(sharded)
