"""Folders that transformers saves and folders that we save, tensor by tensor, live."""

import json

import numpy as np
import pytest
import torch
import transformers

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.weights import table
from llmprep_jax.weights.safetensors import write_folder
from tests.parity import torch_models

pytestmark = pytest.mark.parity
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def bits(tensor: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(tensor).tobytes()


def on_disk(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-mqa", "llama-mha-biases", "qwen2", "qwen3", "gemma3"]
)
def test_shards_of_transformers_load_bit_by_bit(tmp_path, name, dtype):
    theirs = torch_models.make(name).to(DTYPES[dtype])
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = lp.load_model(tmp_path)
    exported = {n: bits(a) for n, a in table.export(ours, ours.weights)}
    expected = {n: bits(t) for n, t in on_disk(theirs).items()}
    assert exported.keys() == expected.keys()
    assert [n for n in expected if exported[n] != expected[n]] == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-mqa", "qwen2-tied", "qwen3-layer-types", "mistral", "gemma3"]
)
def test_shards_of_ours_load_in_transformers_bit_by_bit(tmp_path, name, dtype):
    theirs = torch_models.make(name).to(DTYPES[dtype])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lp.load_model(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    config = registry.to_hf(ours.cfg) | {"dtype": dtype}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    write_folder(tmp_path / "ours", table.export(ours, ours.weights), max_shard_bytes=20_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values())
    assert again.dtype == DTYPES[dtype]
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert bits(tensor) == bits(expected[key]), key
