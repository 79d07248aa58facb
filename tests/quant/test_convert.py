"""The command that converts, on packed weights and adapters."""

import warnings

import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import convert, train
from llmprep_jax.config import UsageError
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from llmprep_jax.nn.param import AdapterParam
from tests.random_modules import random_module
from tests.text.samples import train_byte_level

RUN = """
import pathlib
from llmprep_jax.data import DataConfig
from llmprep_jax.peft import LoRA
from llmprep_jax.train.run import RunConfig

HERE = pathlib.Path(__file__).parent

def get_config():
    return RunConfig(
        model=str(HERE / "model"), adapter=LoRA(rank=2, alpha=4.0), steps=1, out=HERE / "run",
        data=DataConfig(paths=(str(HERE / "text.txt"),), seq_len=16, batch_size=1),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a tokenizer, and an adapter of it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokenizer").mkdir()
    train_byte_level().save(str(folder / "tokenizer" / "tokenizer.json"))
    cfg = Config(416, 64, 128, 1, 4, 2, 16, max_seq_len=64, tie_embeddings=True)
    model = random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))
    lp.save_model(model, folder / "model", processor=lp.load_processor(folder / "tokenizer"))
    graph, trained, rest = nnx.split(lp.peft.inject(model, lp.peft.LoRA(2, 4)), AdapterParam, ...)
    trained = nnx.map_state(lambda _, x: x.replace(x[...] + 0.1), trained)
    lp.peft.save(nnx.merge(graph, trained, rest), folder / "adapter")
    return folder


def test_a_model_is_packed_and_unpacked(folder, tmp_path):
    convert.main([str(folder / "model"), str(tmp_path / "packed"), "dtype=int8"])
    packed = lp.load_model(tmp_path / "packed")
    assert {layer.packed.kind for layer in lp.quant.packed_layers(packed).values()} == {"int8"}
    convert.main([str(tmp_path / "packed"), str(tmp_path / "dense"), "dtype=float32"])
    dense = lp.load_model(tmp_path / "dense")
    np.testing.assert_array_equal(dense.layers.mlp.up.w[...], packed.layers.mlp.up.weight())
    meshed = [str(tmp_path / "packed"), str(tmp_path / "meshed"), "dtype=float32"]
    convert.main([*meshed, "mesh.fsdp=4", "mesh.tensor=2"])
    again = lp.load_model(tmp_path / "meshed")
    np.testing.assert_array_equal(again.layers.mlp.up.w[...], dense.layers.mlp.up.w[...])


def test_an_adapter_is_merged_before_its_base_is_packed(folder, tmp_path):
    adapter = f"adapter={folder / 'adapter'}"
    convert.main([str(folder / "model"), str(tmp_path / "packed"), "dtype=int8", adapter])
    found = lp.load_model(tmp_path / "packed")
    base = lp.load_model(folder / "model", dtype="bfloat16")
    merged = lp.peft.merge(lp.peft.load(base, folder / "adapter"))
    expected = lp.quant.quantize_model(merged, "int8")
    for name, layer in lp.quant.packed_layers(found).items():
        codes = lp.quant.packed_layers(expected)[name].codes[...]
        np.testing.assert_array_equal(layer.codes[...], codes)


@pytest.fixture(scope="module")
def run(folder):
    """A run that trained an adapter on the model for one step."""
    (folder / "config.py").write_text(RUN)
    (folder / "text.txt").write_text("one two three four five six seven eight nine ten " * 20)
    train.main([str(folder / "config.py")])
    return folder / "run"


@pytest.mark.slow  # trains for a step and compiles for four seconds
def test_a_runs_adapter_is_merged_before_its_base_is_packed(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert.main([str(run), str(tmp_path / "packed"), "dtype=int8"])
    found = lp.quant.packed_layers(lp.load_model(tmp_path / "packed"))
    expected = lp.quant.quantize_model(lp.peft.merge(lp.load_model(run, "bfloat16")), "int8")
    expected = lp.quant.packed_layers(expected)
    assert list(found) == list(expected)
    for name, layer in found.items():
        np.testing.assert_array_equal(layer.codes[...], expected[name].codes[...])


@pytest.mark.parametrize("name", ["out.gguf", "model.safetensors", "weights.BIN", "", " "])
def test_a_name_that_is_no_folders_is_refused(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"the name of a file|has no name"):
        convert.main([str(folder / "model"), name])
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_of_others_is_left_alone(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files that are no model of ours \(notes.txt\)"):
        convert.main([str(folder / "model"), str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_of_ours_is_written_anew(folder, tmp_path):
    for dtype in ("bfloat16", "float32"):
        convert.main([str(folder / "model"), str(tmp_path / "new"), f"dtype={dtype}"])
        assert lp.load_model(tmp_path / "new").embed.w.dtype == dtype
