"""Sampling and real text against transformers: SmolLM2's weights say the same, word for word."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

import llmprep_jax as lp
from llmprep_jax.generate.sampler import Sampling, shape_logits

pytestmark = pytest.mark.parity

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Give me three uses for a brick.",
    "Who wrote Hamlet?",
    "Translate 'good morning' into German.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a short story about a fox.",
    "Why is the sky blue?",
    "Name a prime number above ten and say why it is prime.",
)

WARPERS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_the_distribution_drawn_from_is_transformers(settings):
    rng = np.random.default_rng(0)
    logits, text = rng.normal(0, 3, (4, 64)).astype(np.float32), rng.integers(0, 64, (4, 10))
    theirs, ids = torch.tensor(logits), torch.tensor(text)
    if penalty := settings.get("repetition_penalty"):
        theirs = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
    for name, warper in WARPERS.items():
        if name in settings:
            theirs = warper(settings[name])(ids, theirs)
    seen = jnp.zeros((4, 64), bool).at[np.arange(4)[:, None], text].set(True)
    ours = shape_logits(jnp.asarray(logits), seen, Sampling(**settings))
    found = np.asarray(jnp.exp(ours - ours.max()))
    expected = torch.exp(theirs - theirs.max()).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.array_equal(found == 0, expected == 0)


@pytest.mark.usefixtures("compiled_as_users_do")
def test_smollm2_answers_ten_questions_as_in_transformers(smollm2):
    # weights, tokenizer and chat template are transformers' own reading of the file
    path, theirs = smollm2
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, padding_side="left"
    )
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.inference_mode():
        ids = theirs.generate(**inputs, max_new_tokens=64, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    expected = tokenizer.batch_decode(new, skip_special_tokens=True)
    found = lp.generate(lp.load_model(path), lp.load_processor(path), chats, max_new_tokens=64)
    assert found == expected
    assert "Paris" in found[0]
