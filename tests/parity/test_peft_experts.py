"""LoRA on experts against PEFT's target_parameters: Mixtral's, and whole models of DeepSeek.

PEFT 0.21 takes DeepSeek's gate_proj, up_proj and down_proj in target_modules for those of experts,
so dense and shared MLPs are targeted by their weights.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft.fused_format import join_tensors
from llmprep_jax.peft.peft_format import trained_table
from llmprep_jax.weights.table import export
from tests.grids import cases
from tests.parity.test_peft import (
    QUICK,
    TOKENS,
    adapt,
    assert_same,
    forward,
    in_peft,
    logits_of,
    of_file,
)
from tests.peft.test_experts import LAYERS, D, E, F, base
from tests.peft.test_methods import scattered

pytestmark = pytest.mark.parity
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SETTINGS = {
    "both": dict(r=2, lora_alpha=4, target_parameters=[UP, DOWN]),
    "down": dict(r=2, lora_alpha=3, use_rslora=True, target_parameters=[DOWN]),
    "patterns": dict(
        r=2,
        lora_alpha=4,
        target_parameters=["gate_up_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"gate_up_proj": 1},
    ),
}


def mixtral() -> transformers.MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, intermediate_size=F, num_local_experts=E, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, vocab_size=96)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))


def wrappers(model: peft.PeftModel) -> dict[tuple[str, int], torch.nn.Module]:
    """PEFT's adapters by parameter and layer."""
    found = {}
    for layer, block in enumerate(model.base_model.model.model.layers):
        module = block.mlp.experts
        while hasattr(module, "base_layer"):
            found[module.parameter_name, layer] = module
            module = module.base_layer
    return found


def deltas(model: nnx.Module) -> dict[tuple[str, int], np.ndarray]:
    """What our adapters add, in Mixtral's layout."""
    merged = lp.peft.merge(model).layers
    up, down = [
        np.asarray(getattr(merged, name).w[...] - getattr(base().layers, name).w[...])
        for name in ("up", "down")
    ]
    up = up.transpose(0, 1, 3, 4, 2).reshape(LAYERS, E, 2 * F, D)
    down = down.transpose(0, 3, 2, 1)
    named = {"gate_up_proj": up, "down_proj": down}
    return {(name, layer): x[layer] for name, x in named.items() for layer in range(LAYERS)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_loras_of_experts_add_what_pefts_do_and_fold_both_ways(settings, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=[], **settings)
    theirs = peft.get_peft_model(mixtral(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model = lp.peft.load(base(), tmp_path / "theirs")
    found, expected = deltas(model), wrappers(theirs)
    assert len(expected) == len(settings["target_parameters"]) * LAYERS
    for key, wrapper in expected.items():
        delta = wrapper.get_delta_weight("default").detach().numpy()
        assert np.abs(delta).max() > 0.1
        np.testing.assert_allclose(found[key], delta, atol=2e-6)
    assert all(not found[key].any() for key in found.keys() - expected.keys())

    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    moved = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1, adapters), rest)
    lp.peft.save(moved, tmp_path / "ours")
    again = wrappers(peft.PeftModel.from_pretrained(mixtral(), tmp_path / "ours"))
    assert again.keys() == expected.keys()
    for key, wrapper in again.items():
        delta = wrapper.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(deltas(moved)[key], delta, atol=2e-6)


ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
DENSE = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
DEEPSEEK = {
    "attention": dict(r=3, lora_alpha=6, target_modules=ATTENTION),
    "linear": dict(r=3, lora_alpha=6, target_modules=ATTENTION, target_parameters=DENSE),
    "experts": dict(r=2, lora_alpha=4, target_parameters=[UP, DOWN]),
    "down": dict(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["q_b_proj"], target_parameters=[DOWN]
    ),
    "patterns": dict(
        r=2,
        lora_alpha=4,
        target_modules=["kv_b_proj"],
        target_parameters=[UP, DOWN, *DENSE],
        rank_pattern={"experts.down_proj": 3, "shared_experts.down_proj.weight": 1},
        alpha_pattern={"gate_up_proj": 1, "kv_b_proj": 7},
    ),
}


@pytest.fixture(scope="module", params=["deepseek-v3", "deepseek-v2"])
def deepseek(request, pair_of):
    """transformers' model and ours with its weights."""
    return pair_of(request.param)


def gradients_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """Of our adapters by PEFT's names; of parts of one tensor as PEFT's is."""
    graph, trained, frozen = nnx.split(model, AdapterParam, ...)

    def loss(trained):
        return jnp.square(nnx.merge(graph, trained, frozen)(TOKENS).logits).mean()

    grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(trained)
    tensors, found = list(export(grads, trained_table(model))), {}
    for name, array in join_tensors(tensors):
        parts = [np.array(x) for n, x in tensors if n.startswith(f"{name}#")]
        found[name] = sum(parts) if parts and "lora_A" in name else np.array(array)
    return found


@pytest.mark.parametrize(
    ("deepseek", "name"),
    cases(
        itertools.product(("deepseek-v3", "deepseek-v2"), DEEPSEEK),
        fast=[
            *[("deepseek-v3", name) for name in ("attention", "experts", "patterns")],
            *[("deepseek-v2", name) for name in ("linear", "down")],
        ],
    ),
    indirect=["deepseek"],
)
def test_adapters_of_deepseek_agree_in_logits_gradients_and_folders_both_ways(
    deepseek, name, tmp_path
):
    theirs, ours = deepseek
    settings = {"target_modules": [], **DEEPSEEK[name]}
    adapted = adapt(theirs, settings)
    adapted.save_pretrained(tmp_path / "theirs")
    model = lp.peft.load(ours, tmp_path / "theirs")
    expected = logits_of(adapted)
    assert np.abs(expected - logits_of(theirs)).max() > 0.02  # the adapter does something
    assert_same(forward(model, TOKENS), expected)

    adapted(torch.tensor(TOKENS)).logits.square().mean().backward()
    wanted = {
        of_file(key): parameter.grad.numpy()
        for key, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }
    found = gradients_of(model)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        scale = max(np.abs(wanted[key]).max(), 1e-5)
        assert np.abs(gradient - wanted[key]).max() / scale < 1e-4, key

    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("float32"), adapters)
    moved = nnx.merge(graph, moved, rest)  # the A of gate and up differ now
    again = in_peft(theirs, moved, tmp_path / "ours")
    assert_same(logits_of(again), forward(moved, TOKENS))


def test_every_layer_that_we_adapt_by_default_is_adapted_in_peft(deepseek, tmp_path):
    theirs, ours = deepseek
    model = scattered(lp.peft.inject(ours, lp.peft.LoRA(2, 4)))
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), forward(model, TOKENS))
    names = {name.split(".lora_A")[0] for name, _ in again.named_parameters() if "lora_A" in name}
    linear = {
        f"base_model.model.{name}"
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {name.replace(".base_layer", "") for name in names} == linear
