"""A prompt that begins as the last one did is read from there on, and says what it says alone."""

import functools

import jax
import numpy as np
import pytest

import llmprep_jax as lp
from tests.models.tiny import make_model, make_tokens

NEW = 5
model_of = functools.cache(make_model)
TOKENS = make_tokens(1, 90)[0]


@pytest.fixture
def reused(monkeypatch):
    """How many tokens each call had of the prompt already."""
    counts, take = [], lp.PromptCache.take

    def note(self, *args):
        kept = take(self, *args)
        counts.append(kept[1] if kept else 0)
        return kept

    monkeypatch.setattr(lp.PromptCache, "take", note)
    return counts


def say(model, ids, cache=None, **settings):
    tokens = np.array([ids], np.int32)
    found = lp.generate_tokens(
        model, tokens, max_new_tokens=NEW, prompt_cache=cache, return_logprobs=True, **settings
    )
    return np.asarray(found[0])[0].tolist(), np.asarray(found[1])[0]


def check(model, ids, cache, **settings):
    """What is said with the cache is what is said without."""
    found, logprobs = say(model, ids, cache, **settings)
    expected, expected_logprobs = say(model, ids, **settings)
    assert found == expected
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
    return found


@pytest.mark.parametrize(
    "name", ["llama-tied-9-3-heads", "gemma3", pytest.param("deepseek-v3", marks=pytest.mark.slow)]
)
def test_turns_read_only_what_is_new_and_say_the_same(reused, name):
    model, cache, text = model_of(name), lp.PromptCache(), TOKENS[:7].tolist()
    for start in (10, 13, 20):
        text += check(model, text, cache)
        assert cache.num_tokens == len(text) - 1  # the last was not read
        text += TOKENS[start : start + 3].tolist()
    assert reused == [0, 11, 19]


@pytest.mark.parametrize("name", ["llama-tied-9-3-heads", "gemma3"])
def test_a_text_that_goes_on_otherwise_is_cut_back_if_the_cache_allows(reused, name):
    model, cache, text = model_of(name), lp.PromptCache(), TOKENS[:20].tolist()
    check(model, text, cache)
    text[15] = (text[15] + 1) % 96
    check(model, text, cache)
    check(model, text, cache)  # the same again: one token is read
    check(model, TOKENS[40:50].tolist(), cache)  # another text
    # Gemma 3's local layers hold four tokens, and five were said
    assert reused == ([0, 15, 19, 0] if name.startswith("llama") else [0, 0, 0, 0])


def test_a_short_step_back_stays_within_a_ring(reused):
    model, cache, text = model_of("gemma3"), lp.PromptCache(), TOKENS[:20].tolist()
    text += check(model, text, cache)[:-1]
    check(model, [*text, 3, 4], cache)
    assert reused[-1] in (0, 24)  # 24 of 25: the window of the next reaches back three


def test_a_cache_grows_with_its_text_and_starts_again_when_padding_fills_it(reused):
    model, cache, text = model_of("llama-tied-9-3-heads"), lp.PromptCache(), TOKENS[:80].tolist()
    for _ in range(4):
        text += check(model, text, cache, temperature=1.0, repetition_penalty=1.5)
        text.append(1)
    assert reused == [0, 84, 90, 96]


def test_other_weights_are_not_taken_for_those_of_the_cache(reused):
    model, cache, text = make_model("llama-tied-9-3-heads"), lp.PromptCache(), TOKENS[:9].tolist()
    say(model, text, cache)
    model.layers.mlp.up.w[...] = model.layers.mlp.up.w[...] * 2
    check(model, text, cache)
    say(model_of("gemma3"), text, cache)
    assert reused == [0, 0, 0]


def test_a_stream_that_is_left_keeps_what_was_said(reused):
    model, cache, text = model_of("llama-tied-9-3-heads"), lp.PromptCache(), TOKENS[:9].tolist()
    tokens = np.array([text], np.int32)
    pieces = lp.stream_tokens(model, tokens, chunk=2, prompt_cache=cache, max_new_tokens=NEW)
    text += next(pieces)[0].tolist()
    pieces.close()
    check(model, [*text, 5], cache)
    assert reused == [0, 10]  # the last was not read


def test_a_cache_of_an_interrupted_call_is_not_gone_on_with(reused):
    model, cache, text = model_of("llama-tied-9-3-heads"), lp.PromptCache(), TOKENS[:9].tolist()
    say(model, text, cache)
    for leaf in jax.tree.leaves(cache._kept[2]):
        leaf.delete()
    check(model, text, cache)
    assert reused == [0, 0]
