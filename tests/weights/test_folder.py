"""Model folders as checkpoints: one file, shards, and what is refused."""

import json

import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import write_file, write_folder
from tests.weights.samples import check_message

INDEX = "model.safetensors.index.json"
TENSORS = [(f"w{i}", np.full((2, i + 1), i, np.float32)) for i in range(4)]


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dim": 3}')
    write_folder(tmp_path, TENSORS, max_shard_bytes=40)
    return tmp_path


def test_shards_read_like_one_file(sharded, tmp_path_factory):
    single = tmp_path_factory.mktemp("single")
    (single / "config.json").write_text("{}")
    write_folder(single, TENSORS)
    for folder, num_files in ((single, 1), (sharded, 3)):
        checkpoint = FolderCheckpoint(folder)
        assert sorted(checkpoint.names) == ["w0", "w1", "w2", "w3"]
        assert len({checkpoint.file(name) for name in checkpoint.names}) == num_files
        for name, array in TENSORS:
            assert checkpoint.shape(name) == array.shape
            assert checkpoint.dtype(name) == np.float32
            np.testing.assert_array_equal(checkpoint.read(name), array)
    assert FolderCheckpoint(sharded).config == {"model_type": "llama", "dim": 3}


def test_one_file_wins_over_an_index_as_in_transformers(sharded):
    write_file(sharded / "model.safetensors", {"only": np.zeros(1, np.float32)})
    assert FolderCheckpoint(sharded).names == ["only"]


def refused(folder, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        FolderCheckpoint(folder)
    check_message(caught.value, folder)
    return str(caught.value)


def edit_index(folder, **weight_map) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= weight_map
    (folder / INDEX).write_text(json.dumps(index))


def test_an_absent_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    message = refused(sharded, FileNotFoundError)
    assert "names the shard 'model-00002-of-00003.safetensors', which is not there" in message


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    edit_index(sharded, w9="model-00001-of-00003.safetensors")
    assert "places 'w9' in 'model-00001-of-00003.safetensors', which has no such" in refused(
        sharded
    )


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b", "", ".", 3, None, ["x"]]
)
def test_a_shard_outside_the_folder_is_never_opened(sharded, name):
    edit_index(sharded, w0=name)
    message = refused(sharded, (ValueError, FileNotFoundError))
    assert "which is no file name" in message or "which is not there" in message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map_is_refused(sharded, index):
    (sharded / INDEX).write_text(index)
    assert "has no weight_map" in refused(sharded)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no JSON"),
        (b"{'a': 1}", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1]", "holds a list, no JSON object"),
    ],
    ids=["empty", "single quotes", "no UTF-8", "too deep", "list"],
)
def test_a_damaged_config_is_one_line(sharded, content, reason):
    (sharded / "config.json").write_bytes(content)
    assert reason in refused(sharded)


def test_a_folder_without_config_is_no_model(tmp_path):
    assert "holds no config.json; is it a model folder?" in refused(tmp_path, FileNotFoundError)


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "holds no model.safetensors and no model.safet" in refused(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    message = refused(tmp_path)
    assert f"only pickled weights ({name})" in message
    assert "transformers' from_pretrained, then save_pretrained" in message


def test_safetensors_beside_pickles_are_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"pickle")
    write_folder(tmp_path, TENSORS)
    assert len(FolderCheckpoint(tmp_path).names) == 4


@pytest.mark.parametrize("base", [None, "org/base"])
@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_told_from_a_model(tmp_path, has_config, base):
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    config = json.dumps({"base_model_name_or_path": base})
    (tmp_path / "adapter_config.json").write_text(config)
    message = refused(tmp_path)
    assert "holds an adapter; load its base model" in message
    assert ("adapter_config.json does not name it" if base is None else "('org/base')") in message
    assert f"adapter={tmp_path}" in message
    for load in (lp.load_model, lp.load_processor):
        with pytest.raises(ValueError, match="holds an adapter; load its base model"):
            load(tmp_path)
