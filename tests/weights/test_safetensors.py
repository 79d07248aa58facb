"""Files that are read, files that are refused, and files that are written whole or not at all."""

import json
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llmprep_jax.weights.safetensors import (
    DTYPES,
    SafetensorsFile,
    atomic_file,
    write_file,
    write_folder,
)
from tests.weights.samples import BF16, entry, file_bytes


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_tensors_are_read_as_they_were_written(tmp_path):
    tensors = {
        name: np.arange(6).reshape(2, 3).astype(dtype)
        for name, dtype in DTYPES.items()
        if name != "F8_E8M0"
    }
    write_file(tmp_path / "a.safetensors", tensors)
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert sorted(file.names) == sorted(tensors)
    for name, array in tensors.items():
        assert file.dtype(name) == array.dtype
        assert file.shape(name) == (2, 3)
        assert file.read(name).tobytes() == array.tobytes()


def test_the_reference_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    tensors = {
        "w": np.float32([[1.5, -2.0], [0.0, np.inf]]),
        "half": np.float16([1.0, 2.0]),
        "ids": np.arange(3),
        "scalar": np.array(3.0, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    write_file(tmp_path / "ours.safetensors", tensors)
    theirs = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = SafetensorsFile(tmp_path / "theirs.safetensors")
    for name, array in tensors.items():
        for found in (theirs[name], ours.read(name)):
            assert found.dtype == array.dtype
            assert found.shape == array.shape
            assert found.tobytes() == array.tobytes()


def test_the_header_says_pt_and_every_tensor_is_aligned(tmp_path):
    tensors = {"a": np.zeros(3, np.int8), "b": np.zeros(1, np.float64), "c": np.zeros(5, BF16)}
    write_file(tmp_path / "a.safetensors", tensors)
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    assert header["b"]["data_offsets"] == [0, 8]
    assert header["c"]["data_offsets"] == [8, 18]
    assert header["a"]["data_offsets"] == [18, 21]


def test_a_tensor_is_a_view_of_the_file(tmp_path):
    write_file(tmp_path / "a.safetensors", {"w": np.ones(1_000_000, np.float32)})
    tracemalloc.start()
    tensor = SafetensorsFile(tmp_path / "a.safetensors").read("w")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000
    assert not tensor.flags.writeable
    assert tensor[-1] == 1


def test_views_that_are_not_contiguous_are_written_in_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_file(tmp_path / "a.safetensors", {"w": array})
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "a.safetensors").read("w"), array)


W = entry("F32", [2], 0, 8)
DAMAGED = {
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"1234567", "has 7 bytes"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "states a header of 100 bytes"),
    "header of 2**60 bytes": ((2**60).to_bytes(8, "little"), "states a header of 11529215046068"),
    "header that is no JSON": (file_bytes(b"{'w'"), "header that cannot be read"),
    "header that is no UTF-8": (file_bytes(b"\xff\xfe{}"), "header that cannot be read"),
    "header nested too deep": (file_bytes(b"[" * 100_000), "header that cannot be read"),
    "header that is a list": (file_bytes([]), "no JSON object"),
    "name twice": (
        file_bytes(b'{"w": %b, "w": %b}' % ((json.dumps(W).encode(),) * 2), bytes(8)),
        "'w' occurs twice",
    ),
    "truncated data": (file_bytes({"w": W}, bytes(7)), "ends before tensor 'w'"),
    "bytes that nobody claims": (file_bytes({"w": W}, bytes(9)), "1 bytes that no tensor claims"),
    "overlap": (
        file_bytes({"w": W, "x": entry("F32", [2], 4, 12)}, bytes(12)),
        "tensor 'x' at byte 4, which overlaps",
    ),
    "gap": (
        file_bytes({"w": W, "x": entry("F32", [1], 12, 16)}, bytes(16)),
        "tensor 'x' at byte 12, which leaves a gap",
    ),
    "gap at the start": (file_bytes({"w": entry("U8", [1], 1, 2)}, bytes(2)), "leaves a gap"),
    "shape of another size": (file_bytes({"w": entry("F32", [3], 0, 8)}, bytes(8)), "has 12"),
    "dtype of another size": (file_bytes({"w": entry("F16", [2], 0, 8)}, bytes(8)), "has 4"),
    "unknown dtype": (file_bytes({"w": entry("F12", [2], 0, 8)}, bytes(8)), "unknown dtype 'F12'"),
    "dtype that is a list": (file_bytes({"w": W | {"dtype": []}}, bytes(8)), "unknown dtype []"),
    "backwards range": (file_bytes({"w": entry("F32", [2], 8, 0)}, bytes(8)), "gives tensor 'w'"),
    "negative dimension": (file_bytes({"w": entry("F32", [-1, -2], 0, 8)}, bytes(8)), "the shape"),
    "fractional dimension": (file_bytes({"w": W | {"shape": [2.0]}}, bytes(8)), "the shape [2.0]"),
    "boolean dimension": (file_bytes({"w": W | {"shape": [True]}}, bytes(8)), "the shape [True]"),
    "three offsets": (file_bytes({"w": W | {"data_offsets": [0, 4, 8]}}, bytes(8)), "byte range"),
    "huge shape": (file_bytes({"w": entry("F32", [2**59] * 30, 0, 8)}, bytes(8)), "gives tensor"),
    "huge empty shape": (file_bytes({"w": entry("F32", [0, *[2**59] * 9], 0, 0)}), "the shape"),
    "entry without shape": (file_bytes({"w": {"dtype": "F32"}}), "without dtype, shape"),
    "entry that is a number": (file_bytes({"w": 1}), "without dtype, shape"),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, reason):
    path = write(tmp_path / "a.safetensors", content)
    tracemalloc.start()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the reason is checked below)
        SafetensorsFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert reason in message
    assert message.endswith("; download or export the file again")
    assert len(message.splitlines()) == 1
    assert peak < 5_000_000


def test_names_with_line_breaks_do_not_break_the_message(tmp_path):
    path = write(
        tmp_path / "a", file_bytes({"a\nb\ud800" * 100: entry("F32", [3], 0, 8)}, bytes(8))
    )
    with pytest.raises(ValueError, match="gives tensor 'a\\\\nb") as caught:
        SafetensorsFile(path)
    assert len(str(caught.value)) < 400


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*a\.safetensors; check the path"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_header_without_tensors_is_a_file_without_tensors(tmp_path):
    path = write(tmp_path / "a", file_bytes({"__metadata__": {"format": "pt"}}))
    assert SafetensorsFile(path).names == []


def test_a_dtype_that_the_format_lacks_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'w' has dtype complex128"):
        write_file(tmp_path / "a.safetensors", {"w": np.zeros(2, complex)})
    assert list(tmp_path.iterdir()) == []


class full_disk:
    """A file system that takes no file beyond `size` bytes, for a `with` block."""

    def __init__(self, size: int):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "a.safetensors", b"before")
    with (
        full_disk(10_000),
        pytest.raises(OSError, match=r"cannot write .*a\.safetensors: File too large; free some"),
    ):
        write_file(path, {"w": np.zeros(1_000_000, np.float32)})
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*none/a: No such file or directory; check"):
        write_file(tmp_path / "none" / "a", {})


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "a", b"before")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def numbered(count: int) -> list[tuple[str, np.ndarray]]:
    return [(f"w{i}", np.full(25, i, np.float32)) for i in range(count)]  # 100 bytes each


def test_a_small_model_is_one_file_and_a_large_one_is_shards_with_an_index(tmp_path):
    write_folder(tmp_path, numbered(3))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    write_folder(tmp_path, numbered(5), max_shard_bytes=250)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 500}
    assert index["weight_map"]["w1"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["w4"] == "model-00003-of-00003.safetensors"
    write_folder(tmp_path, numbered(1))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_larger_than_a_shard_gets_a_shard_of_its_own(tmp_path):
    write_folder(tmp_path, numbered(2), max_shard_bytes=10)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == 2


def test_a_full_disk_leaves_the_weights_that_were_there(tmp_path):
    write_folder(tmp_path, numbered(3))
    before = (tmp_path / "model.safetensors").read_bytes()
    large = [("w0", np.zeros(10, np.float32)), ("w1", np.zeros(100_000, np.float32))]
    with (
        full_disk(50_000),
        pytest.raises(OSError, match=f"cannot write {tmp_path}: File too large"),
    ):
        write_folder(tmp_path, large, max_shard_bytes=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_power_of_two_scales_are_read(tmp_path):
    scales = np.array([1, 2, 4], ml_dtypes.float8_e8m0fnu)
    write_file(tmp_path / "a", {"s": scales})
    assert SafetensorsFile(tmp_path / "a").read("s").astype(np.float32).tolist() == [1, 2, 4]
