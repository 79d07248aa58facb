"""Adapters around latent attention and routed experts, which use layers by their weights."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import part
from llmprep_jax.peft import DoRA, LoRA, peft_format
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.models.tiny import CONFIGS, forward, make_tokens, random_model
from tests.peft.test_methods import QUICK, assert_near, scattered
from tests.random_modules import random_module

NAME = "deepseek-v3"
EVERY = r"moe_layers\.(attn|mlp\.shared|mlp\.experts)\..*"
ATTENTION = {f"attn.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")}
MLP = {"gate", "up", "down"}
METHODS = {"lora": LoRA(3, 6, targets=EVERY), "dora": DoRA(3, 6, targets=EVERY)}
each_method = pytest.mark.parametrize(
    "name",
    ["lora", pytest.param("dora", marks=pytest.mark.slow)],  # another ten seconds to compile
)


@functools.cache
def base() -> nnx.Module:
    return random_model(CONFIGS[NAME])


@functools.cache
def small() -> nnx.Module:
    """Two layers of experts alone: the dense one has the same attention."""
    return random_model(dataclasses.replace(CONFIGS[NAME], num_layers=2, num_dense=0, num_mtp=0))


@functools.cache
def fresh(name: str) -> nnx.Module:
    return lp.peft.inject(small(), METHODS[name])


@functools.cache
def trained(name: str = "lora") -> nnx.Module:
    return scattered(fresh(name))


@functools.partial(jax.jit, compiler_options=QUICK)
def grads_of(model: nnx.Module, tokens: jax.Array) -> nnx.State:
    graph, trainable, frozen = nnx.split(model, AdapterParam, ...)

    def loss(trainable):
        return jnp.square(nnx.merge(graph, trainable, frozen)(tokens).logits).mean()

    return jax.grad(loss)(trainable)


@jax.jit
def decode(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    """Logits from the cache: of some tokens, and of one more, whose attention is absorbed."""
    cache, logits = model.init_cache(len(tokens), 16), []
    for start, end in ((0, 13), (13, 14)):
        out = model(tokens[:, start:end], cache=cache)
        cache = out.cache
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1)


def test_by_default_experts_and_prediction_modules_are_left_alone():
    model = jax.eval_shape(lambda m: lp.peft.inject(m, LoRA(2)), base())
    found = set(adapters(model))
    dense = {f"dense_layers.{x}" for x in (*ATTENTION, *(f"mlp.{name}" for name in MLP))}
    moe = {f"moe_layers.{x}" for x in (*ATTENTION, *(f"mlp.shared.{name}" for name in MLP))}
    assert found == dense | moe


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("down_proj",), ["dense_layers.mlp.down", "moe_layers.mlp.shared.down"]),
        (("shared_experts.up_proj",), ["moe_layers.mlp.shared.up"]),
        (("experts.down",), ["moe_layers.mlp.experts.down"]),
        (r".*\.experts\.(gate|up)", ["moe_layers.mlp.experts.gate", "moe_layers.mlp.experts.up"]),
        (r"mtp\..*\.kv_b", ["mtp.0.block.attn.kv_b"]),
        (r".*\.kv_b", ["dense_layers.attn.kv_b", "moe_layers.attn.kv_b"]),
        (r"mtp.*experts\.up", ["mtp.0.block.mlp.experts.up"]),
    ],
    ids=str,
)
def test_experts_and_prediction_modules_are_adapted_where_a_target_says_so(targets, expected):
    model = jax.eval_shape(lambda m: lp.peft.inject(m, LoRA(2, targets=targets)), base())
    assert set(adapters(model)) == set(expected)


@each_method
def test_adapters_start_as_identity_bit_for_bit(name):
    @jax.jit
    def project(layers):
        stacked, build = part(layers)
        first, rng = build([x[0] for x in stacked]), np.random.default_rng(0)
        x_BTD, o_BTNU = rng.normal(size=(2, 14, 48)), rng.normal(size=(2, 14, 4, 10))
        return [first.q_a(x_BTD), first.kv_a(x_BTD), first.o(o_BTNU)]

    adapted = fresh(name)
    attention = [x.moe_layers.attn for x in (adapted, small())]
    chex.assert_trees_all_equal(*map(project, attention))
    found, expected = [forward(x, make_tokens()) for x in (adapted, small())]
    # beside DoRA's norms XLA takes the sums of kv_a in another order
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-5 if name == "dora" else 0)


@each_method
def test_a_merge_and_decoding_from_the_cache_say_the_same(name):
    model, tokens = trained(name), make_tokens()
    expected = forward(model, tokens)
    assert np.abs(expected - forward(small(), tokens)).max() > 0.1
    merged = lp.peft.merge(model)
    assert jax.tree.structure(merged) == jax.tree.structure(small())
    np.testing.assert_allclose(forward(merged, tokens), expected, atol=1e-5)
    np.testing.assert_allclose(decode(model, tokens), expected, atol=1e-5)


def test_every_adapter_gets_a_gradient_and_an_expert_only_where_a_token_goes():
    grads = grads_of(trained(), make_tokens(1, 2))
    for path, grad in nnx.to_flat_state(grads):
        moved_LX = np.any(np.asarray(grad[...]) != 0, axis=tuple(range(2, grad.ndim)))
        if "experts" in path:
            assert np.all((moved_LX.sum(1) >= 3) & (moved_LX.sum(1) <= 6)), path  # of 8
        else:
            assert np.all(moved_LX.any(1)), path


@pytest.mark.slow  # compiles for ten seconds
def test_rows_with_adapters_of_their_own_decode_as_alone():
    attention = r".*_layers\.attn\..*"
    each = {
        name: scattered(lp.peft.inject(small(), LoRA(rank, targets=attention), seed=rank))
        for name, rank in (("a", 2), ("b", 3))
    }
    tokens = make_tokens()
    found = decode(lp.peft.select(lp.peft.combine(each), ["b", None]), tokens)
    np.testing.assert_allclose(found[:1], forward(each["b"], tokens)[:1], atol=1e-5)
    np.testing.assert_allclose(found[1:], forward(small(), tokens)[1:], atol=1e-5)


def test_what_experts_cannot_have_is_one_line():
    with pytest.raises(ValueError, match="moe_layers.mlp.experts.down: dropout is 0.1, but"):
        lp.peft.inject(small(), LoRA(2, targets=("experts.down",), dropout=0.1))
    both = lp.peft.combine({"a": trained(), "b": trained()})
    with pytest.raises(ValueError, match="experts.down is adapted, and ECD,.* keeps no rows"):
        lp.peft.select(both, ["a", "b"])
    with pytest.raises(ValueError, match="holds several adapters: a, b; choose one"):
        both.moe_layers.mlp.experts.down.weight()
    kv_b = lp.peft.inject(small(), LoRA(2, targets=("kv_b",), dropout=0.1))
    kv_b = lp.peft.train_mode(kv_b, jax.random.key(0)).moe_layers.attn.kv_b
    with pytest.raises(ValueError, match="has dropout=0.1, but the layer is used by its weight"):
        kv_b.weight()


def test_a_folder_has_one_lora_for_gate_and_up_of_twice_the_rank(tmp_path, monkeypatch):
    # of logits, which compiles for ten seconds and which parity does
    monkeypatch.setattr(peft_format, "probe_difference", lambda *models: 0.0)
    targets = r"(dense_layers\.mlp|moe_layers\.mlp\.experts)\..*|.*\.kv_b"
    method = LoRA(3, 6, targets=targets)
    model = random_module(
        lambda: lp.peft.inject(registry.build(CONFIGS[NAME], rngs=nnx.Rngs(0)), method)
    )
    folder = lp.peft.save(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    experts = "base_model.model.model.layers.1.mlp.experts"
    found = {name: x.shape for name, x in tensors.items() if name.startswith(experts)}
    assert found == {  # of 8 experts
        f"{experts}.base_layer.lora_A.weight": (8 * 6, 48),
        f"{experts}.base_layer.lora_B.weight": (2 * 24, 6 * 8),
        f"{experts}.lora_A.weight": (8 * 3, 24),
        f"{experts}.lora_B.weight": (48, 3 * 8),
    }
    b_FRE = tensors[f"{experts}.base_layer.lora_B.weight"].reshape(2, 24, 2, 3, 8)
    assert not b_FRE[0, :, 1].any()
    assert not b_FRE[1, :, 0].any()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["kv_b_proj"]
    dense = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert config["target_parameters"] == ["down_proj", "gate_up_proj", *dense]
    assert (config["r"], config["rank_pattern"]) == (3, {"gate_up_proj": 6})
    again = lp.peft.load(lp.peft.strip(model), folder).moe_layers.mlp.experts
    np.testing.assert_array_equal(again.gate.lora_a[...], again.up.lora_a[...])
    expected = model.moe_layers.mlp.experts.up
    assert_near(again.up.merged()[0], expected.merged()[0], 1e-6)


def test_a_part_of_what_transformers_fuses_is_not_saved_alone(tmp_path):
    model = lp.peft.inject(base(), LoRA(2, targets=("experts.gate",)))
    with pytest.raises(ValueError, match=r"experts.gate and .*experts.up are one parameter in tra"):
        lp.peft.save(model, tmp_path / "adapter")


@pytest.mark.slow  # compiles for eight devices
def test_a_mesh_with_experts_over_devices_changes_nothing():
    expected = forward(trained(), make_tokens(8))
    with use_mesh(make_mesh({"fsdp": 2, "expert": 4})):
        model = scattered(lp.peft.inject(small.__wrapped__(), METHODS["lora"]))
        spec = jax.typeof(model.moe_layers.mlp.experts.up.lora_a[...]).sharding.spec
        assert spec == jax.P(None, "expert", "fsdp", None)
        assert_near(forward(model, make_tokens(8)), expected)
