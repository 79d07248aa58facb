"""LoRA of a model whose experts are modules one by one, as DeepSeek-VL2's are in its own code."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.weights import table
from tests.models.test_deepseek_vl2 import load

PREFIX = "base_model.model.language.model.layers"


def module(layer, expert, name):
    return f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}"


def written(folder, targets, layers=(1, 2), experts=range(8)):
    """A folder as PEFT writes it, of experts' gates alone, and its products by layer and expert."""
    rng, tensors, products = np.random.default_rng(0), {}, {}
    for layer in layers:
        for expert in experts:
            a, b = [rng.normal(size=s).astype(np.float32) for s in ((2, 64), (40, 2))]
            name = module(layer, expert, "gate_proj")
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            products[layer, expert] = b @ a
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors, products


EXPERTS = r".*\.experts\.\d+\.gate_proj"


@pytest.mark.slow  # compiles the probe of a whole model; the format alone is in test_experts
def test_experts_adapters_are_keys_of_each_expert_both_ways(tmp_path):
    tensors, products = written(tmp_path, EXPERTS)
    base = load()
    model = lp.peft.load(base, tmp_path)
    assert list(adapters(model)) == ["language.moe_layers.mlp.experts.gate"]
    before, after = [dict(table.export(x, x.weights)) for x in (base, lp.peft.merge(model))]
    for (layer, expert), product in products.items():
        name = f"language.model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
        np.testing.assert_allclose(after[name] - before[name], 2 * product, atol=1e-5)
    unlike = [x for x in before if not np.array_equal(before[x], after[x])]
    assert all(re.fullmatch(r".*\.experts\.\d\.gate_proj\.weight", x) for x in unlike)
    lp.peft.save(model, tmp_path / "again", base_model="org/base")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_a_missing_expert_is_named(tmp_path):
    tensors, _ = written(tmp_path, EXPERTS)
    name = module(2, 5, "gate_proj")
    del tensors[f"{name}.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 missing.*layers.2.mlp.experts.5.gate_proj.lora_B"):
        lp.peft.load(load(), tmp_path)
