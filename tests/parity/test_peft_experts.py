"""LoRA on Mixtral's experts against PEFT's target_parameters: what each adds to the weights."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from tests.peft.test_experts import LAYERS, D, E, F, base

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
