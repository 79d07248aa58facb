"""The families' own tables: through files and back, bit by bit, on one device and on meshes."""

import functools
import itertools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import RouterBias
from llmprep_jax.sharding import make_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import SafetensorsFile, write_folder
from tests.models import tiny
from tests.models.test_seeing import CONFIGS as SEEING
from tests.models.tiny import CONFIGS, forward, make_tokens
from tests.random_modules import fill

make_model = functools.cache(tiny.make_model)


def written(model: nnx.Module, folder, max_shard_bytes: int = 20_000):
    (folder / "config.json").write_text(json.dumps(registry.to_hf(model.cfg)))
    write_folder(folder, table.export(model, model.weights), max_shard_bytes)
    return folder


MESHES = {"one": None, "4x2": {"fsdp": 4, "tensor": 2}, "8": {"fsdp": 8}}
# heads and kv heads that devices do not divide, and a router's bias beside weights in bf16
SOME = [
    ("llama-tied-9-3-heads", "float32", "4x2"),
    ("llama-tied-9-3-heads", "bfloat16", "one"),
    ("qwen2-window", "float32", "one"),
    ("qwen2-window", "bfloat16", "8"),
    ("gemma3", "float32", "8"),
    ("gemma3", "bfloat16", "4x2"),
    ("deepseek-v3", "bfloat16", "4x2"),
    ("deepseek-v3", "float32", "8"),
]
REST = [
    pytest.param(*cell, marks=pytest.mark.grid)
    for cell in itertools.product(CONFIGS, ("float32", "bfloat16"), MESHES)
    if cell not in SOME
]


@pytest.mark.parametrize(("name", "dtype", "mesh"), [*SOME, *REST])
def test_a_model_survives_shards_of_safetensors_bit_by_bit(tmp_path, name, dtype, mesh):
    is_bias = lambda x: isinstance(x, RouterBias)  # float32, whatever the weights are  # noqa: E731
    cast = lambda x: x if is_bias(x) else np.asarray(x).astype(dtype)  # noqa: E731
    model = jax.tree.map(cast, make_model(name), is_leaf=is_bias)
    folder = written(model, tmp_path)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    axes = MESHES[mesh]
    loaded = lp.load_model(folder, mesh=axes and make_mesh(axes))
    ours, theirs = [nnx.to_flat_state(nnx.state(m)) for m in (model, loaded)]
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert other.dtype == jnp.dtype("float32" if is_bias(one) else dtype), path
        assert np.asarray(one[...]).tobytes() == np.asarray(other[...]).tobytes(), path


def test_names_are_hugging_face_s():
    model = make_model("llama-tied-9-3-heads")
    names = [name for name, _ in table.export(model, model.weights)]
    assert sorted(name for name in names if ".layers." not in name) == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert sorted(name for name in names if ".layers.2." in name) == [
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.mlp.gate_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.2.post_attention_layernorm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.self_attn.v_proj.weight",
    ]


def test_a_config_of_other_sizes_is_answered_with_every_tensor_that_does_not_fit(tmp_path):
    folder = written(make_model("qwen2-window"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit the model's config") as caught:
        lp.load_model(folder)
    message = str(caught.value)
    assert "12 unexpected: model.layers.2.input_layernorm.weight" in message
    assert "6 of another shape" in message
    assert "mlp.down_proj.weight is [48, 64], expected [48, 32]" in message
    assert len(message.splitlines()) == 1


def add_head(folder, change: float) -> None:
    """Puts a head beside the tensors of a tied model."""
    checkpoint = FolderCheckpoint(folder)
    tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.names}
    head = tensors["model.embed_tokens.weight"].copy()
    head[0, 0] += change
    write_folder(folder, [*tensors.items(), ("lm_head.weight", head)])


def test_a_stored_head_wins_over_tied_in_the_config_when_it_differs(tmp_path):
    model = make_model("llama-tied-9-3-heads")
    folder = written(model, tmp_path)
    add_head(folder, 0.0)
    assert lp.load_model(folder).head is None
    add_head(folder, 5.0)
    untied, tokens = lp.load_model(folder), make_tokens()
    assert not untied.cfg.tie_embeddings
    assert np.abs(forward(untied, tokens) - forward(model, tokens))[..., 0].max() > 0.1


def test_older_spellings_of_gemma_load_by_part_and_its_vision_tower_is_left_alone(tmp_path):
    model = make_model("gemma3")
    prefix = "language_model."
    tensors = [(prefix + name, array) for name, array in table.export(model, model.weights)]
    tensors += [("vision_tower.vision_model.post_layernorm.weight", np.zeros(4, np.float32))]
    write_folder(tmp_path, tensors)
    text = registry.to_hf(model.cfg)
    config = {"model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, tokens = lp.load_model(tmp_path, only="language"), make_tokens()
    np.testing.assert_array_equal(forward(loaded, tokens), forward(model, tokens))


def test_a_folder_that_lost_its_tower_says_how_its_language_model_is_loaded(tmp_path):
    whole = fill(registry.abstract(SEEING["gemma3"]))
    tensors = list(table.export(whole, whole.weights))
    language = [(name, x) for name, x in tensors if name.startswith("language_model.")]
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf(whole.cfg)))
    write_folder(tmp_path, language)
    remedy = re.escape('language is all there: lp.load_model(path, only="language") reads it')
    with pytest.raises(ValueError, match=f"missing: .* {remedy}$"):
        lp.load_model(tmp_path)
    tokens = make_tokens()
    alone = lp.load_model(tmp_path, only="language")
    np.testing.assert_array_equal(forward(alone, tokens), forward(whole.language, tokens))
    for some in ([*language, tensors[-1]], language[1:]):  # one of the projector's, one less
        write_folder(tmp_path, some)
        with pytest.raises(ValueError, match=r"missing: .* use the config.json that came with"):
            lp.load_model(tmp_path)


def bare(name: str) -> str:
    return name.removeprefix("model.")


SPELLINGS = {
    "a base model": bare,
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "compiled for several devices": lambda name: f"module._orig_mod.{name}",
    "of a larger model": lambda name: f"language_model.{name}",
    "of a larger base model": lambda name: f"language_model.{bare(name)}",
    "of an encoder": lambda name: name if name == "lm_head.weight" else f"transformer.{bare(name)}",
}


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        *(("qwen2-window", spelling) for spelling in SPELLINGS),
        ("llama-tied-9-3-heads", "a base model"),
        ("gemma3", "a base model"),
        ("deepseek-v3", "a base model"),
        ("deepseek-v3", "compiled"),
    ],
)
def test_names_are_brought_to_the_table_from_every_wrapping(tmp_path, name, spelling):
    model = make_model(name)
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf(model.cfg)))
    copies = model.weights.copies
    tensors = dict(table.export(model, model.weights))
    tensors |= {copy: tensors[original] for copy, original in copies.items()}
    write_folder(tmp_path, [(SPELLINGS[spelling](name), x) for name, x in tensors.items()])
    loaded = lp.load_model(tmp_path)
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (model, loaded)))


def test_a_base_model_that_has_no_head_but_needs_one_is_named(tmp_path):
    model = make_model("qwen2-window")
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf(model.cfg)))
    tensors = [(bare(name), x) for name, x in table.export(model, model.weights)]
    write_folder(tmp_path, [(name, x) for name, x in tensors if name != "lm_head.weight"])
    with pytest.raises(ValueError, match="1 missing: lm_head.weight; a base model") as caught:
        lp.load_model(tmp_path)
    assert "tie_word_embeddings" in str(caught.value)


def test_a_strange_tensor_is_named_as_it_is_stored(tmp_path):
    model = make_model("qwen2-window")
    (tmp_path / "config.json").write_text(json.dumps(registry.to_hf(model.cfg)))
    tensors = [(bare(name), x) for name, x in table.export(model, model.weights)]
    write_folder(tmp_path, [*tensors, ("score.weight", np.zeros(2, np.float32))])
    with pytest.raises(ValueError, match="1 unexpected: score.weight;"):
        lp.load_model(tmp_path)


def test_saving_from_a_mesh_gathers_every_shard(tmp_path):
    model = make_model("llama-tied-9-3-heads")
    plain = lp.save_model(model, tmp_path / "plain")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    sharded = lp.load_model(plain, mesh=mesh)
    lp.save_model(sharded, tmp_path / "sharded")
    one, other = [SafetensorsFile(tmp_path / p / "model.safetensors") for p in ("plain", "sharded")]
    assert one.names == other.names
    for name in one.names:
        np.testing.assert_array_equal(one.read(name), other.read(name))
