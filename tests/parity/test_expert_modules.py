"""PEFT's adapters of DeepSeek-VL2, whose own code is in no package: on modules of the same names.

What is adapted and how it is stored depends on the names and classes of modules alone; what an
adapter adds to them is seen in merged weights.
"""

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import llmprep_jax as lp
from llmprep_jax.weights import table
from tests.models.test_deepseek_vl2 import FOLDER, load


class Top(torch.nn.Module):
    """What PEFT asks of a causal language model."""

    def prepare_inputs_for_generation(self) -> None:
        """Is there."""


def modules() -> torch.nn.Module:
    """The linear layers of the golden model with latent attention, by their names in its file."""
    tensors, top = load_file(FOLDER / "mla_noaux" / "model.safetensors"), Top()
    for name, array in tensors.items():
        *parents, last, kind = name.split(".") if "." in name else ("", name, "")
        # a router's weight is a parameter of its own module; the pooling is left out
        is_layer = kind == "weight" and array.ndim == 2 and last not in ("gate", "embed_tokens")
        if not is_layer or "attn_pool" in name:
            continue
        node = top
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        bias = tensors.get(name.removesuffix("weight") + "bias")
        layer = torch.nn.Linear(array.shape[1], array.shape[0], bias=bias is not None)
        layer.weight.data = torch.from_numpy(array.copy())
        node.add_module(last, layer)
    return top


def merged(model: torch.nn.Module) -> dict[str, np.ndarray]:
    weights = model.merge_and_unload().state_dict()
    return {name: x.numpy() for name, x in weights.items() if name.endswith("weight")}


@pytest.mark.parametrize(
    "targets",
    [
        ["gate_proj", "up_proj", "down_proj"],
        ["q_proj", "kv_b_proj", "o_proj", "qkv", "fc1"],
        r"language\..*\.experts\.\d+\.(gate|down)_proj",
    ],
    ids=["mlps", "attention", "experts"],
)
def test_adapters_go_onto_experts_one_by_one_and_back(targets, tmp_path):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    theirs = peft.get_peft_model(modules(), config)
    generator = torch.Generator().manual_seed(0)
    for name, x in theirs.named_parameters():
        if "lora_B" in name:
            x.data = torch.randn(x.shape, generator=generator) * 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lp.peft.load(load("mla_noaux"), tmp_path / "theirs")
    lp.peft.save(ours, tmp_path / "ours", base_model="org/base")
    stored, again = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("theirs", "ours")
    )
    assert stored.keys() == again.keys()
    expected = merged(theirs)
    back = merged(peft.PeftModel.from_pretrained(modules(), tmp_path / "ours"))
    found = dict(table.export(lp.peft.merge(ours), ours.weights))
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(back[name], weight, atol=1e-5, err_msg=name)
    moved = load_file(FOLDER / "mla_noaux" / "model.safetensors")
    assert any(not np.array_equal(moved[name], weight) for name, weight in expected.items())


def test_all_linear_means_the_same_layers(tmp_path):
    """Of what is no transformers model PEFT takes no "all-linear", so by every name."""
    named = modules().named_modules()
    linear = [name for name, x in named if isinstance(x, torch.nn.Linear) and "lm_head" not in name]
    theirs = peft.get_peft_model(modules(), peft.LoraConfig(r=2, target_modules=linear))
    names = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    ours = lp.peft.inject(load("mla_noaux"), lp.peft.LoRA(rank=2, targets="all-linear"))
    lp.peft.save(ours, tmp_path / "ours", base_model="org/base")
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    found = {name for name in stored if "lora_A" in name}
    assert found == {name.replace(".default", "") for name in names}
