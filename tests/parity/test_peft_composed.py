"""LoRAs of a composed model, of layers that files have as one too, both ways with PEFT; and by
presets, of the live models that see."""

import copy
import json
from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import llmprep_jax as lp
from llmprep_jax.peft import LoRA
from llmprep_jax.weights import table
from tests.grids import cases
from tests.models import composed, test_deepseek_vl_released
from tests.parity import test_seeing, test_towers
from tests.peft.test_methods import scattered

pytestmark = pytest.mark.parity
own_form = test_deepseek_vl_released.folder


def stub(
    tensors: dict[str, np.ndarray], in_memory: Callable[[str], str] = composed.WEIGHTS.module_name
) -> nn.Module:
    """Torch modules that hold the tensors, under the names that the toy has in memory."""
    root = nn.Module()
    root.prepare_inputs_for_generation = None  # PEFT keeps that of a causal language model
    for name, array in sorted(tensors.items()):
        *path, leaf = in_memory(name).split(".")
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


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "qkv", "fc1"],
        r".*aligner\.(layers\.\d|\w+_up_proj)|.*blocks\.\d+\.(attn\.qkv|mlp\.\w*\d)",
    ],
    ids=str,
)
def test_adapters_go_onto_deepseeks_own_modules_and_back(own_form, tmp_path, targets):
    """Their code is in no package: PEFT goes by names and classes of modules alone."""
    _, path = own_form
    tensors, base = load_file(path / "model.safetensors"), lp.load_model(path)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(stub(tensors, str), config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lp.peft.load(base, tmp_path / "theirs")
    lp.peft.save(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(stub(tensors, str), tmp_path / "ours")
    merged = lp.peft.merge(ours).named_as(list(tensors))
    found = dict(table.export(merged, merged.weights))
    expected, again = [dict(x.merge_and_unload().named_parameters()) for x in (theirs, back)]
    moved = [
        name
        for name, x in expected.items()
        # the pooling computes nothing, and PEFT adapts it too
        if "attn_pool" not in name and not np.array_equal(tensors[name], x.detach())
    ]
    assert len(moved) > 4
    assert {name.split(".")[0] for name in moved} >= {"vision_model"}
    for name in moved:
        np.testing.assert_allclose(found[name], expected[name].detach(), atol=1e-5, err_msg=name)
        np.testing.assert_allclose(again[name].detach(), expected[name].detach(), atol=1e-5)


SEEING = cases(
    ["gemma3-4-tokens", "llava", "deepseek-vl-hybrid", "janus"],
    fast=["gemma3-4-tokens", "deepseek-vl-hybrid", "janus"],
)
SAVED = {"gemma3": "multi_modal_projector", "llava": "multi_modal_projector"}


@pytest.fixture(scope="module", params=SEEING)
def seeing(request, tmp_path_factory):
    return test_seeing.make(request.param, str(tmp_path_factory.getbasetemp() / request.param))


def logits_of(theirs, tokens, mask, images):
    given = test_seeing.their_inputs(theirs, tokens, mask, images)
    with torch.no_grad():
        return theirs(**given).logits.numpy()[mask]


@pytest.mark.parametrize("preset", ["language", "vision"])
def test_presets_go_both_ways_with_a_projector_trained_whole(seeing, preset, tmp_path):
    theirs, ours, tokens, mask, images = seeing
    saved = SAVED.get(ours.cfg.model_type, "aligner")
    whole = {"modules_to_save": (saved,)} if preset == "language" else {}
    method = LoRA(rank=3, alpha=6, targets=preset, **whole)
    model = scattered(lp.peft.inject(ours, method))
    lp.peft.save(model, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    found = test_seeing.forward(model, tokens, mask, images)[mask]
    np.testing.assert_allclose(found, logits_of(wrapped, tokens, mask, images), atol=1e-4)
    plain = test_seeing.forward(ours, tokens, mask, images)[mask]
    assert np.abs(found - plain).max() > 1e-2

    is_language = [".language_model." in name for name, _ in adapted_by(wrapped, "lora_A")]
    assert len(is_language) > 7
    assert set(is_language) == {preset == "language"}
    trained = {name for name, _ in adapted_by(wrapped, "modules_to_save")}
    assert bool(trained) == (preset == "language")
    assert all(f"{saved}." in name for name in trained)  # of a name its end

    config = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    if whole:  # as users of PEFT name it
        config = peft.LoraConfig(
            r=3, lora_alpha=6, target_modules=config["target_modules"], modules_to_save=[saved]
        )
        wrapped = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "theirs")
    again = lp.peft.load(ours, tmp_path / "theirs")
    found = test_seeing.forward(again, tokens, mask, images)[mask]
    np.testing.assert_allclose(found, logits_of(wrapped, tokens, mask, images), atol=1e-4)
    merged = lp.peft.merge(again)
    np.testing.assert_allclose(
        test_seeing.forward(merged, tokens, mask, images)[mask], found, atol=1e-4
    )


def test_adapters_of_the_language_model_alone_are_saved_for_its_whole(seeing, tmp_path):
    theirs, ours, tokens, *_ = seeing
    text = lp.load_model(ours.source.path, only="language")
    method = LoRA(rank=3, alpha=6, targets=("q_proj", "down_proj"), modules_to_save=("norm",))
    model = scattered(lp.peft.inject(text, method))
    lp.peft.save(model, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    names = [name for name, _ in adapted_by(wrapped, "lora_A")]
    assert names
    assert all(".language_model." in name for name in names)
    words = np.where(tokens[1:] >= test_seeing.IMAGE, 5, tokens[1:])
    real = np.ones_like(words, bool)
    expected = logits_of(wrapped, words, real, {})
    np.testing.assert_allclose(model(words).logits.reshape(expected.shape), expected, atol=1e-4)
    again = lp.peft.load(ours, tmp_path / "ours")
    np.testing.assert_allclose(again(words).logits, model(words).logits, atol=1e-5)


def adapted_by(wrapped, word):
    return [(name, p) for name, p in wrapped.named_parameters() if f".{word}." in name]


@pytest.mark.parametrize(("preset", "tower"), [("language", "text"), ("vision", "vision")])
def test_presets_of_two_towers_go_both_ways(preset, tower, tmp_path):
    name = "clip-openclip"
    given = test_towers.inputs(name)
    del given["mask"]
    test_towers.make(name).save_pretrained(tmp_path / "base")
    base = lp.load_model(tmp_path / "base")
    model = scattered(lp.peft.inject(base, LoRA(rank=2, alpha=4, targets=preset)))
    lp.peft.save(model, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(test_towers.make(name), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = test_towers.theirs_of(wrapped, **given).logits_per_image.numpy()
    np.testing.assert_allclose(model(**given).logits_per_image, expected, atol=1e-4)
    ends = (f".{tower}_model.", ".text_projection." if tower == "text" else ".visual_projection.")
    names = [name for name, _ in adapted_by(wrapped, "lora_A")]
    assert all(any(end in name for end in ends) for name in names)
    layers = {"text": 3, "vision": 2}[tower]
    assert len(names) == 6 * layers + 1
