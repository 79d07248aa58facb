"""LoRAs of a composed model, of layers that files have as one too, both ways with PEFT."""

import numpy as np
import peft
import pytest
import torch
from torch import nn

import llmprep_jax as lp
from llmprep_jax.peft import LoRA
from llmprep_jax.weights import table
from tests.models import composed
from tests.peft.test_methods import scattered

pytestmark = pytest.mark.parity


def stub(tensors: dict[str, np.ndarray]) -> nn.Module:
    """Torch modules that hold the tensors, under the names that the toy has in memory."""
    root = nn.Module()
    root.prepare_inputs_for_generation = None  # PEFT keeps that of a causal language model
    for name, array in sorted(tensors.items()):
        *path, leaf = composed.WEIGHTS.module_name(name).split(".")
        if leaf != "weight" or array.ndim != 2:
            continue
        node = root
        for part in path[:-1]:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        bias = tensors.get(name.removesuffix("weight") + "bias")
        layer = nn.Linear(*array.shape[::-1], bias=bias is not None)
        layer.weight.data = torch.tensor(array)
        if bias is not None:
            layer.bias.data = torch.tensor(bias)
        node.add_module(path[-1], layer)
    return root


def exported(model) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in table.export(model, model.weights)}


def assert_merged_alike(ours: dict[str, np.ndarray], theirs: nn.Module, changed: str) -> None:
    merged, moved = dict(theirs.named_parameters()), 0
    for name, array in ours.items():
        spelled = composed.WEIGHTS.module_name(name)
        if spelled in merged and "attn_pool" not in name:  # computes nothing, PEFT adapts it too
            np.testing.assert_allclose(array, merged[spelled].detach(), atol=1e-5, err_msg=name)
            moved += changed in name
    assert moved


@pytest.mark.parametrize(
    ("targets", "bias"),
    [
        (["qkv", "linear"], "none"),
        (["qkv", "patch_embed"], "lora_only"),
        (["q_proj", "proj"], "none"),
    ],
    ids=str,
)
def test_loras_go_both_ways(tmp_path, targets, bias):
    base = composed.make()
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, bias=bias, init_lora_weights=False
    )
    theirs = peft.get_peft_model(stub(exported(base)), config)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data += torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lp.peft.merge(lp.peft.load(base, tmp_path / "theirs"))
    assert_merged_alike(exported(ours), theirs.merge_and_unload(), targets[0])

    model = scattered(lp.peft.inject(base, LoRA(rank=2, targets=tuple(targets), bias=bias)))
    lp.peft.save(model, tmp_path / "ours", base_model="org/base")
    theirs = peft.PeftModel.from_pretrained(stub(exported(base)), tmp_path / "ours")
    assert_merged_alike(exported(lp.peft.merge(model)), theirs.merge_and_unload(), targets[0])
