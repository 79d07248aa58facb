"""PEFT folders beyond the plain ones: other beginnings, single rows, spellings and larger bases."""

import copy

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.peft import LoRA
from tests.parity import torch_models
from tests.parity.test_peft import (
    ALL,
    TOKENS,
    adapt,
    assert_same,
    base,
    check_gradients,
    check_their_folder,
    forward,
    in_peft,
    logits_of,
)
from tests.peft.test_methods import scattered

pytestmark = pytest.mark.parity
assert base  # a fixture
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=96, lora_alpha=8, target_modules=["k_proj", "down_proj"]),
        dict(r=4, target_modules=["q_proj"], exclude_modules=r".*\.1\..*"),
        dict(r=4, target_modules="all-linear", modules_to_save=["k_proj"]),
        dict(r=4, target_modules=["v_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    ],
    ids=["rank", "excluded", "saved", "layers"],
)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_folders_of_every_selection_are_read(base, tmp_path, settings):
    check_their_folder(*base, tmp_path, settings)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_folders_of_adapters_that_began_in_the_weight_are_read(base, tmp_path, init, use_dora):
    theirs, ours = base
    settings = dict(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings, init_lora_weights=init)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "theirs").eval()
    model = lp.peft.load(ours, tmp_path / "theirs")
    assert_same(forward(model, TOKENS), logits_of(loaded))
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), logits_of(loaded))


@pytest.mark.parametrize("base", ["llama", "gemma3"], indirect=True)
@pytest.mark.parametrize("as_dict", [False, True], ids=["list", "object"])
def test_single_rows_of_the_embedding_agree_in_logits_gradients_and_folders(
    base, tmp_path, as_dict
):
    theirs, ours = base
    ids = sorted({int(TOKENS[0, 0]), int(TOKENS[0, 3]), 1})
    rows = {"embed_tokens": ids} if as_dict else ids
    adapted = adapt(theirs, dict(r=4, target_modules=["q_proj"], trainable_token_indices=rows))
    if not as_dict:
        check_gradients(adapted, ours, tmp_path / "grads")
    adapted.save_pretrained(tmp_path / "theirs")
    model = lp.peft.load(ours, tmp_path / "theirs")
    assert_same(forward(model, TOKENS), logits_of(adapted))
    assert_same(forward(lp.peft.merge(model), TOKENS), logits_of(adapted))
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), logits_of(adapted))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_adapters_saved_with_their_embeddings_of_compiled_models_or_from_state_are_read(
    base, tmp_path
):
    theirs, ours = base
    adapted = adapt(theirs, dict(r=4, target_modules=ALL))
    adapted.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    expected = logits_of(adapted)
    assert_same(forward(lp.peft.load(ours, tmp_path / "a"), TOKENS), expected)
    adapted.save_pretrained(tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    for change in (
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_orig_mod.{name}",
    ):
        save_file({change(name): x for name, x in tensors.items()}, tmp_path / "b" / WEIGHTS)
        assert_same(forward(lp.peft.load(ours, tmp_path / "b"), TOKENS), expected)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """transformers' multimodal Gemma 3, its folder, and our language model out of it."""
    text = torch_models.make("gemma3").config
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=3
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("multimodal")
    theirs.save_pretrained(folder)
    return theirs, folder, lp.load_model(folder, only="language")


SPELLINGS = {
    "now": lambda name: name,
    "before 4.52": lambda name: name.replace(
        "model.model.language_model.", "model.language_model.model."
    ),
    "text alone": lambda name: name.replace("model.language_model.", "model."),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_adapters_of_a_multimodal_gemma_are_read_in_every_spelling(multimodal, tmp_path, spell):
    theirs, _, ours = multimodal
    for targets in (["q_proj", "down_proj"], r".*language_model.*\.(q_proj|up_proj)"):
        adapted = adapt(theirs, dict(r=4, target_modules=targets))
        adapted.save_pretrained(tmp_path)
        expected = logits_of(adapted)
        assert np.abs(expected - logits_of(theirs)).max() > 0.02
        tensors = load_file(tmp_path / WEIGHTS)
        if isinstance(targets, str) and spell is SPELLINGS["text alone"]:
            continue  # such a regex is of the larger model's names
        save_file({spell(name): x for name, x in tensors.items()}, tmp_path / WEIGHTS)
        assert_same(forward(lp.peft.load(ours, tmp_path), TOKENS), expected)


def test_adapters_saved_on_a_multimodal_gemma_work_there(multimodal, tmp_path):
    _, folder, ours = multimodal
    model = scattered(lp.peft.inject(ours, LoRA(4, 8, rank_pattern={"o_proj": 2})))
    lp.peft.save(model, tmp_path / "a", base_model=str(folder))
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a"
    ).eval()
    assert_same(logits_of(again), forward(model, TOKENS))
    assert_same(forward(lp.peft.load(ours, tmp_path / "a"), TOKENS), forward(model, TOKENS))
