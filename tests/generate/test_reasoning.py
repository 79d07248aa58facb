"""Thoughts apart from answers in generation, with R1's distills as folders of their two forms."""

import json
from typing import Any

import pytest

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.text import Reply
from tests.generate.scripted import scripted
from tests.text.samples import ASSISTANT, R1, USER, write_r1

# what the released config.json files say, less what is of transformers alone
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536,
    "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072,
    "max_window_layers": 21, "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA3_ROPE = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
RELEASED = {"qwen-1.5b": QWEN, "llama-8b": LLAMA}
SMALL = {
    "hidden_size": 128, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SCRIPT = f"{ASSISTANT}<think>\nhm, so</think>42."  # no token twice
REPLY = Reply("hm, so", "42.")
LENGTH = {"max_new_tokens": 16}
QUESTION = [{"role": "user", "content": "6 * 7?"}]


def read(config: dict) -> Any:
    return registry.family_of_type(config["model_type"]).from_hf(config)


# the tags are the template's and the tokenizer's, which both have alike: one of the two is enough
@pytest.fixture(
    scope="module", params=[pytest.param("qwen-1.5b", marks=pytest.mark.grid), "llama-8b"]
)
def folder(request, tmp_path_factory):
    """A released config made small, the first template, and weights that say SCRIPT."""
    folder = tmp_path_factory.mktemp("r1") / "model"
    tokenizer = lp.load_processor(write_r1(folder, R1["first"])).tokenizer
    eos = tokenizer.eos_id
    sizes = SMALL | {"vocab_size": tokenizer.vocab_size, "bos_token_id": eos, "eos_token_id": eos}
    config = RELEASED[request.param] | sizes
    lp.save_model(scripted(read(config), [*tokenizer.encode(SCRIPT), eos]), folder)
    (folder / "config.json").write_text(json.dumps(config))
    write_r1(folder, R1["first"])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return lp.load_model(folder)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_preset(name):
    assert read(RELEASED[name]) == registry.preset(f"deepseek-r1-distill-{name}")


@pytest.mark.parametrize("tags_are_special", [False, True], ids=["plain tags", "special tags"])
@pytest.mark.parametrize("template", R1)
def test_thoughts_come_apart_whoever_opens_them(model, tmp_path, template, tags_are_special):
    processor = lp.load_processor(write_r1(tmp_path, R1[template], tags_are_special))
    assert lp.generate(model, processor, QUESTION, reasoning=True, **LENGTH) == REPLY
    pieces = list(lp.generate(model, processor, QUESTION, stream=True, reasoning=True, **LENGTH))
    thoughts = [piece for piece in pieces if piece.reasoning_content]
    answers = [piece for piece in pieces if piece.content]
    assert pieces == thoughts + answers  # each is of one part
    assert Reply(*map("".join, zip(*pieces, strict=True))) == REPLY


def test_each_prompt_of_a_batch_says_for_itself_whether_it_opens_the_thoughts(model, folder):
    processor = lp.load_processor(folder)
    prompts = [f"{USER}6 * 7?{ASSISTANT}", f"{ASSISTANT}<think>\n", "so</think>"]
    found = lp.generate(model, processor, prompts, reasoning=True, **LENGTH)
    assert found == [REPLY, REPLY, Reply("", "42.")]


@pytest.mark.parametrize("template", R1)
def test_thoughts_that_are_cut_off_leave_no_answer(model, tmp_path, template):
    processor = lp.load_processor(write_r1(tmp_path, R1[template]))
    settings = dict(stop="</think>", reasoning=True, **LENGTH)
    assert lp.generate(model, processor, QUESTION, **settings) == ("hm, so", "")
    pieces = lp.generate(model, processor, QUESTION, stream=True, **settings)
    assert Reply(*map("".join, zip(*pieces, strict=True))) == ("hm, so", "")


def test_without_reasoning_the_text_is_as_the_model_says_it(model, folder):
    said = lp.generate(model, lp.load_processor(folder), QUESTION, **LENGTH)
    assert said == SCRIPT.removeprefix(ASSISTANT)
