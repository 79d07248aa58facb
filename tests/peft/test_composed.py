"""Adapters of a model that is composed of others: names in files, layers that are one, idle ones.

`peft.save` opens what it wrote and compares logits of words and an image, so no test does here.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import Idle
from llmprep_jax.peft import IA3, LoRA
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.peft.peft_fields import shortest
from llmprep_jax.peft.targets import bases
from llmprep_jax.peft.tuned import saved_names, tuned
from llmprep_jax.weights import table
from llmprep_jax.weights.rows import Table
from tests.grids import cases
from tests.models import composed, test_seeing
from tests.models.towers import CONFIGS
from tests.peft.test_methods import scattered
from tests.random_modules import fill

PREFIX = "base_model.model."
WORDS = jnp.asarray([[1, 2, 3]])


@pytest.fixture(scope="module")
def base() -> nnx.Module:
    return composed.make()


def adapted(base: nnx.Module, **settings) -> nnx.Module:
    return scattered(lp.peft.inject(base, LoRA(rank=2, alpha=4, **settings)))


def saved(model: nnx.Module, folder) -> tuple[dict[str, np.ndarray], dict]:
    folder = lp.peft.save(model, folder, base_model="org/base")
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


def test_all_linear_takes_towers_and_projector_and_no_idle_layer(base, tmp_path):
    model = adapted(base, targets="all-linear")
    assert adapters(model).keys() == {
        "vision.patch",
        *(f"vision.blocks.{x}" for x in "qkvo"),
        "projector",
        *(f"language.layers.attn.{x}" for x in "qkvo"),
        *(f"language.layers.mlp.{x}" for x in ("gate", "up", "down")),
    }
    tensors, config = saved(model, tmp_path / "adapter")
    assert sorted(name for name in tensors if "lora_A" in name and ".1." not in name) == [
        f"{PREFIX}model.language_model.layers.0.{name}.lora_A.weight"
        for name in (
            *("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"),
            *(f"self_attn.{x}_proj" for x in "koqv"),
        )
    ] + [
        f"{PREFIX}model.{name}.lora_A.weight"
        for name in (
            "multi_modal_projector.linear",
            "vision_tower.blocks.0.attn.proj",
            "vision_tower.blocks.0.attn.qkv",
            "vision_tower.patch_embed",
        )
    ]
    # by the ends of names PEFT would adapt the idle layers too
    assert sorted(config["target_modules"]) == sorted(
        ["linear", "patch_embed", "down_proj", "gate_proj", "up_proj"]
        + [f"{x}_proj" for x in "koqv"]
        + [f"model.vision_tower.blocks.{i}.attn.{x}" for i in (0, 1) for x in ("proj", "qkv")]
    )


LANGUAGE = {f"language.layers.attn.{x}" for x in "qkvo"}
LANGUAGE |= {f"language.layers.mlp.{x}" for x in ("gate", "up", "down")}


def test_presets_take_the_linear_layers_of_a_part(base, tmp_path):
    model = adapted(base, targets="language", layers_to_transform=0)
    assert adapters(model).keys() == LANGUAGE
    _, config = saved(model, tmp_path / "language")
    names = ["down", "gate", "k", "o", "q", "up", "v"]
    assert config["target_modules"] == [f"{name}_proj" for name in names]
    model = adapted(base, targets="vision", exclude_modules=("patch_embed",))
    assert adapters(model).keys() == {"projector", *(f"vision.blocks.{x}" for x in "qkvo")}
    text = composed.alone(base)
    kinds = [adapters(adapted(text, targets=t)).keys() for t in ("language", "all-linear")]
    assert kinds[0] == kinds[1] == {path.removeprefix("language.") for path in LANGUAGE}
    with pytest.raises(ValueError, match='targets are "vision", but the model has no part that'):
        adapted(text, targets="vision")


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_presets_of_two_towers_are_a_tower_each(name):
    model = registry.abstract(CONFIGS[name])
    language, vision, every = [
        adapters(
            jax.eval_shape(lambda model, t=t: lp.peft.inject(model, LoRA(rank=2, targets=t)), model)
        ).keys()
        for t in ("language", "vision", "all-linear")
    ]
    assert {path.split(".")[0].split("_")[0] for path in language} == {"text"}
    assert {path.split(".")[0].split("_")[0] for path in vision} == {"vision"}
    assert language | vision == every


def test_a_module_that_is_trained_whole_takes_all_that_is_in_it(base, tmp_path):
    model = adapted(base, targets="language", modules_to_save=("vision.blocks", "projector"))
    assert tuned(model).keys() == {"projector", *(f"vision.blocks.{x}" for x in "qkvo")}
    _, config = saved(model, tmp_path / "adapter")
    # "proj" alone would be every q_proj too
    proj = [f"model.vision_tower.blocks.{i}.attn.proj" for i in (0, 1)]
    assert config["modules_to_save"] == ["linear", *proj, "qkv"]
    config["modules_to_save"] = ["multi_modal_projector", *proj, "qkv"]  # as PEFT's users say it
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    again = lp.peft.load(base, tmp_path / "adapter")
    assert tuned(again).keys() == tuned(model).keys()
    np.testing.assert_allclose(again(WORDS).logits, model(WORDS).logits, atol=1e-5)


def test_what_is_in_a_module_that_is_saved_is_not_named_beside_it():
    """Gemma 3's projector is a module with a matrix of its own and a norm in it."""
    model = registry.abstract(test_seeing.CONFIGS["gemma3"])
    method = LoRA(rank=2, targets="language", modules_to_save=("projector",))
    model = jax.eval_shape(lambda model: lp.peft.inject(model, method), model)
    assert tuned(model).keys() == {"projector.norm", "projector.proj"}
    assert saved_names(model) == ["multi_modal_projector"]


def test_a_lora_of_a_fused_layer_has_one_a_and_is_the_three_of_ours(base, tmp_path):
    """By a file written as PEFT does: B A is added to the qkv that transformers has."""
    rng, rank = np.random.default_rng(3), 2
    module = f"{PREFIX}model.vision_tower.blocks.{{}}.attn.qkv.lora_{{}}.weight"
    shapes = {"A": (rank, composed.WIDTH), "B": (24, rank)}
    tensors = {
        module.format(layer, x): rng.normal(size=shape).astype(np.float32)
        for layer in range(composed.DEPTH)
        for x, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["qkv"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = lp.peft.load(base, tmp_path)
    assert adapters(model).keys() == {f"vision.blocks.{x}" for x in "qkv"}
    before, after = [dict(table.export(x, x.weights)) for x in (base, lp.peft.merge(model))]
    for layer in range(composed.DEPTH):
        name = f"vision_tower.blocks.{layer}.attn.qkv.weight"
        product = tensors[module.format(layer, "B")] @ tensors[module.format(layer, "A")]
        np.testing.assert_allclose(after[name] - before[name], 2 * product, atol=1e-5)
    written, _ = saved(model, tmp_path / "again")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(written[name], array)


def test_layers_of_one_that_are_trained_apart_are_saved_at_thrice_the_rank(base, tmp_path):
    model = adapted(base, targets=("qkv",))
    tensors, config = saved(model, tmp_path / "adapter")
    a = tensors[f"{PREFIX}model.vision_tower.blocks.1.attn.qkv.lora_A.weight"]
    assert (a.shape, config["r"], config["lora_alpha"]) == ((6, 8), 6, 12)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_layers_that_are_one_are_saved_as_one(base, tmp_path, bias):
    model = adapted(base, targets=("qkv",), bias=bias)
    tensors, _ = saved(model, tmp_path / "adapter")
    biases = {name: x for name, x in tensors.items() if name.endswith("bias")}
    assert biases.keys() == {
        f"{PREFIX}model.vision_tower.blocks.{layer}.attn.qkv.base_layer.bias" for layer in (0, 1)
    }
    k = model.vision.blocks.k.base.b[...]
    name = f"{PREFIX}model.vision_tower.blocks.1.attn.qkv.base_layer.bias"
    np.testing.assert_array_equal(biases[name][8:16], np.asarray(k)[1].reshape(-1))


def test_layers_that_are_one_are_trained_whole_together(base, tmp_path):
    model = adapted(base, targets=("q_proj",), modules_to_save=("qkv", "linear"))
    tensors, config = saved(model, tmp_path / "adapter")
    assert config["modules_to_save"] == ["linear", "qkv"]
    v = model.vision.blocks.v.trained.w[...]
    name = f"{PREFIX}model.vision_tower.blocks.0.attn.qkv.weight"
    np.testing.assert_array_equal(tensors[name][16:], np.moveaxis(v[0], 0, -1).reshape(8, 8))


def test_what_cannot_be_told_of_a_part_is_refused(base, tmp_path):
    model = lp.peft.inject(base, IA3(targets=("qkv", "k_proj"), feedforward=()))
    with pytest.raises(ValueError, match=r"vision\.blocks\.\w is a part of one layer .* no IA3;"):
        lp.peft.save(model, tmp_path / "adapter", base_model="org/base")
    model = lp.peft.inject(base, LoRA(rank=2, targets=("blocks.q",)))
    with pytest.raises(ValueError, match="blocks.k and .* are one parameter in transformers"):
        lp.peft.save(model, tmp_path / "adapter", base_model="org/base")


def test_an_adapter_of_the_language_model_alone_goes_onto_the_whole_and_back(base, tmp_path):
    text = composed.alone(base)
    model = adapted(text, targets=("q_proj", "down_proj"))
    tensors, _ = saved(model, tmp_path / "text")
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    whole = lp.peft.load(base, tmp_path / "text")
    np.testing.assert_allclose(whole(WORDS).logits, model(WORDS).logits, atol=1e-5)
    tensors, _ = saved(whole, tmp_path / "whole")
    assert f"{PREFIX}model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    back = lp.peft.load(text, tmp_path / "whole")
    np.testing.assert_allclose(back(WORDS).logits, model(WORDS).logits, atol=1e-5)


FAMILIES = cases(list(test_seeing.CONFIGS), fast=[])


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_a_family_s_language_model_are_the_whole_s(name, tmp_path):
    folder = tmp_path / "base"
    base = fill(registry.abstract(test_seeing.CONFIGS[name]))
    lp.save_model(base, folder)
    base, text = lp.load_model(folder), lp.load_model(folder, only="language")
    words = jnp.asarray([[1, 2, 3]])
    # a tower has q_proj and norms too
    model = adapted(text, targets=("q_proj", "down_proj"), modules_to_save=("norm",))
    for path, place in ((tmp_path / "text", "org/base"), (tmp_path / "in its whole", None)):
        lp.peft.save(model, path, base_model=place)
        again = lp.peft.load(base, path)
        np.testing.assert_allclose(again(words).logits, model(words).logits, atol=1e-5)
        assert all(name.startswith("language.") for name in adapters(again))
    names = load_file(path / "adapter_model.safetensors").keys()
    assert all(f"{PREFIX}model.language_model." in name for name in names)
    config = json.loads((path / "adapter_config.json").read_text())
    assert not re.fullmatch(config["exclude_modules"], "model.language_model.norm")
    others = {row.name.rsplit(".", 1)[0] for row in base.weights.in_memory().values()}
    others = {name for name in others if name.endswith(("q_proj", "down_proj"))}
    towers = {name for name in others if "language_model" not in name}
    assert towers
    assert all(re.fullmatch(config["exclude_modules"], name) for name in towers)

    model = adapted(base, targets="all-linear", exclude_modules=("up_proj",))
    lp.peft.save(model, tmp_path / "whole", base_model="org/base")
    with pytest.warns(UserWarning, match="tensors are of parts that this model has not"):
        again = lp.peft.load(text, tmp_path / "whole")
    np.testing.assert_allclose(again(words).logits, model(words).logits, atol=1e-5)


def test_a_regex_of_the_whole_s_names_takes_its_language_model_s_layers(base, tmp_path):
    model = adapted(base, targets=r".*language_model.*\.q_proj")
    assert adapters(model).keys() == {"language.layers.attn.q"}
    saved(model, tmp_path / "whole")
    config = json.loads((tmp_path / "whole/adapter_config.json").read_text())
    config["target_modules"] = r"model\.language_model\..*q_proj"
    (tmp_path / "whole/adapter_config.json").write_text(json.dumps(config))
    for onto in (base, composed.alone(base)):
        again = lp.peft.load(onto, tmp_path / "whole")
        np.testing.assert_allclose(again(WORDS).logits, model(WORDS).logits, atol=1e-5)


def test_tables_of_the_language_model_are_the_whole_s(tmp_path):
    tied = composed.make(tied=True)
    model = adapted(tied, targets=("q_proj",), modules_to_save=("embed_tokens",))
    tensors, config = saved(model, tmp_path / "table")
    assert config["ensure_weight_tying"] is True
    assert {name for name in tensors if "lora" not in name} == {
        f"{PREFIX}model.language_model.embed_tokens.weight",
        f"{PREFIX}lm_head.weight",
    }
    apart = lp.peft.untie(tied)
    assert not apart.cfg.language.tie_embeddings
    assert not apart.language.cfg.tie_embeddings
    np.testing.assert_array_equal(apart.language.head.w[...].T, tied.language.embed.w[...])
    for name in ("head", "language.head", "lm_head"):
        with pytest.raises(ValueError, match="the model's head is its embedding"):
            lp.peft.inject(tied, LoRA(rank=2, targets=("q_proj",), modules_to_save=(name,)))


def test_rows_of_the_language_model_s_embedding_are_trained(base, tmp_path):
    model = adapted(base, targets=("q_proj",), trainable_token_indices=(7, 3))
    assert model.language.embed.ids == (7, 3)
    tensors, _ = saved(model, tmp_path / "rows")
    suffix = "embed_tokens.token_adapter.trainable_tokens_delta"
    rows = tensors[f"{PREFIX}model.language_model.{suffix}"]
    np.testing.assert_array_equal(rows, model.language.embed.rows[...])


def test_idle_weights_are_counted_and_nothing_else(base):
    idle = jax.tree.leaves(nnx.state(base.vision.pool, Idle))
    assert sum(x.size for x in idle) == 4 * 64 + 3 * 8
    model = adapted(base, targets="all-linear", bias="all")
    assert not {path for path in adapters(model) if "pool" in path}
    everything = sum(x.size for x in jax.tree.leaves(nnx.state(base)))
    assert lp.peft.count(base).frozen == everything
    with pytest.raises(ValueError, match="matches no module"):
        lp.peft.inject(base, LoRA(rank=2, targets=("q_proj",), modules_to_save=("pool.q",)))


class Attentions(composed.Model):
    """The toy with torch's MultiheadAttention in its blocks, and a parameter for a projector."""

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        spelled = {"qkv.weight": "in_proj_weight", "attn.proj": "attn.out_proj"}
        spelled |= {"linear.weight": "linear_weight"}

        def rename(name: str) -> str:
            for ours, theirs in spelled.items():
                name = name.replace(ours, theirs)
            return name

        rows = {path: row._replace(name=rename(row.name)) for path, row in composed.WEIGHTS.items()}
        return dataclasses.replace(composed.WEIGHTS, rows=rows)


def test_what_is_no_layer_in_transformers_is_none_here():
    model = jax.eval_shape(lambda: Attentions(composed.Config(), rngs=nnx.Rngs(0)))
    assert sorted(path for path in bases(model) if not path.startswith("language")) == [
        "vision.patch"
    ]
    with pytest.raises(ValueError, match="target 'blocks.o' matches no linear layer"):
        lp.peft.inject(model, LoRA(rank=2, targets=("blocks.o",)))


def test_a_number_is_no_name_of_a_layer():
    every = ["projector.layers.0", "projector.layers.2", "up"]
    assert shortest(dict.fromkeys(every, 1), every) == dict.fromkeys(every, 1)
