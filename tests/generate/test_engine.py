"""Decoding against the plain forward pass, and the laws of rows, seeds, stops and streams.

Every test that can decodes three rows of eleven tokens, so that few programs are compiled.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.generate import engine, layout
from llmprep_jax.generate.decoding import generate_tokens, stream_tokens
from llmprep_jax.generate.engine import Engine, engine_of
from llmprep_jax.generate.sampler import Sampling
from llmprep_jax.models import registry
from llmprep_jax.peft import LoRA
from tests.grids import cases
from tests.models.tiny import CONFIGS, forward, make_model, make_tokens
from tests.random_modules import random_module

NEW = 6
TOKENS = make_tokens(3, 11)
SAMPLED = {"temperature": 1.0, "top_k": 50}
model_of = functools.cache(make_model)
ways = pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])


def by_full_forwards(model, tokens):
    """Greedy tokens and their log-probabilities, each from a forward pass over the whole text."""
    length, logprobs = tokens.shape[1], []
    text = np.pad(tokens, ((0, 0), (0, NEW)))
    for end in range(length, length + NEW):
        logits = np.asarray(forward(model, text))[:, end - 1]
        text[:, end] = np.argmax(logits, axis=-1)
        chosen = scipy.special.log_softmax(logits, axis=-1)[np.arange(len(text)), text[:, end]]
        logprobs.append(chosen)
    return text[:, length:], np.stack(logprobs, axis=1)


@functools.cache
def greedy(name):
    """The same of TOKENS."""
    return by_full_forwards(model_of(name), TOKENS)


@functools.cache
def free(name="gemma3", **sampling):
    """What a model says after TOKENS, with nothing to stop it."""
    return np.asarray(generate_tokens(model_of(name), TOKENS, max_new_tokens=NEW, **sampling))


# llama's and Qwen2's caches are of the kinds that Gemma 3 has
@pytest.mark.parametrize("name", cases(CONFIGS, fast=["gemma3", "deepseek-v3"]))
def test_greedy_decoding_is_the_argmax_of_full_forwards(name):
    expected, logprobs = greedy(name)
    found = generate_tokens(model_of(name), TOKENS, max_new_tokens=NEW, return_logprobs=True)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_allclose(found[1], logprobs, atol=1e-4)


def in_layout(model, tokens, is_laid_out=True, new=NEW):
    """Greedy tokens and log-probabilities, laid out for this CPU or as the model is."""
    engine = Engine(model)
    assert engine.is_on_cpu
    engine.is_on_cpu = is_laid_out
    state = engine.start(tokens, None, Sampling(), NEW, 0, 0)
    state = engine.advance(state, new, (), Sampling())
    return np.asarray(state.tokens_BT)[:, :new], np.asarray(state.logprobs_BT)[:, :new]


grid = functools.partial(pytest.param, marks=pytest.mark.grid)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "max_inputs"),
    [
        # each family; a head of its own and the table as one; whole products, or two and more
        ("llama-tied-9-3-heads", 2048),
        grid("llama-tied-9-3-heads", 20),
        slow("qwen2-window", 2048),
        grid("qwen2-window", 20),
        grid("gemma3", 2048),
        ("gemma3", 20),
        grid("deepseek-v3", 2048),
        slow("deepseek-v3", 20),
    ],
)
def test_one_row_decodes_alike_in_its_layout(monkeypatch, name, max_inputs):
    monkeypatch.setattr(layout, "MAX_INPUTS", max_inputs)
    tokens, logprobs = in_layout(model_of(name), TOKENS[:1])
    np.testing.assert_array_equal(tokens, greedy(name)[0][:1])
    np.testing.assert_allclose(logprobs, greedy(name)[1][:1], atol=1e-4)


@pytest.mark.slow  # compiles for four seconds
@pytest.mark.parametrize("num_rows", [1, 3])
def test_an_adapted_bf16_model_decodes_alike_in_its_layout(num_rows):
    cfg = dataclasses.replace(CONFIGS["llama-tied-9-3-heads"], num_layers=2)
    cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype="bfloat16"))
    base = lambda: registry.build(cfg, rngs=nnx.Rngs(0))  # noqa: E731
    model = random_module(lambda: lp.peft.inject(base(), LoRA(rank=4)))
    laid_out, plain = [in_layout(model, TOKENS[:num_rows], is_cpu, 2) for is_cpu in (True, False)]
    # the first token's logits come from the prompt, the second's from a step; rounding may tip the
    # choice of the latter, but hardly moves its log-probability
    np.testing.assert_array_equal(laid_out[0][:, 0], plain[0][:, 0])
    np.testing.assert_allclose(laid_out[1], plain[1], atol=0.05)


def check_ragged(name, side, **sampling):
    lengths = (4, 11, 7)
    tokens, mask = np.zeros((3, 11), np.int32), np.zeros((3, 11), bool)
    for row, length in enumerate(lengths):
        where = slice(11 - length, None) if side == "left" else slice(length)
        tokens[row, where], mask[row, where] = TOKENS[row, :length], True
    settings = dict(max_new_tokens=NEW, seed=5, **sampling)
    found = generate_tokens(model_of(name), tokens, mask, **settings)
    for row, length in enumerate(lengths):
        # a row's draws depend on the seed and its place, so it keeps its place among copies
        alone = np.repeat(TOKENS[row : row + 1, :length], 3, axis=0)
        expected = generate_tokens(model_of(name), alone, **settings)
        np.testing.assert_array_equal(found[row], expected[row])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", cases(CONFIGS, fast=["gemma3", "deepseek-v3"]))
def test_ragged_rows_say_what_they_say_alone(name, side):
    check_ragged(name, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_draw_what_they_draw_alone(side):
    check_ragged("gemma3", side, **SAMPLED)


def test_a_seed_fixes_the_text_and_rows_of_a_prompt_differ():
    tokens = np.repeat(TOKENS[:1], 3, axis=0)
    draws = functools.partial(
        generate_tokens, model_of("gemma3"), tokens, max_new_tokens=NEW, **SAMPLED
    )
    first = np.asarray(draws(seed=1))
    np.testing.assert_array_equal(first, draws(seed=1))
    assert np.any(first != draws(seed=2))
    assert len({tuple(row) for row in first}) == 3


def test_samples_of_a_prompt_are_those_of_copies_of_it():
    settings = dict(max_new_tokens=NEW, return_logprobs=True, **SAMPLED)
    found = generate_tokens(model_of("gemma3"), TOKENS[:1], num_samples=3, **settings)
    copies = np.repeat(TOKENS[:1], 3, axis=0)
    expected = generate_tokens(model_of("gemma3"), copies, **settings)
    np.testing.assert_array_equal(found[0][0], expected[0])
    np.testing.assert_allclose(found[1][0], expected[1], atol=1e-5)
    assert len({tuple(row) for row in np.asarray(found[0][0])}) > 1


def test_a_stop_id_is_kept_and_padding_without_log_probabilities_follows_it():
    stop = int(free()[0, 2])
    ended, logprobs = generate_tokens(
        model_of("gemma3"), TOKENS, max_new_tokens=NEW, stop_ids=[stop], pad_id=7,
        return_logprobs=True,
    )  # fmt: skip
    for row in range(3):
        ends = np.flatnonzero(free()[row] == stop)
        end = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(ended[row, :end], free()[row, :end])
        assert np.all(logprobs[row, :end] < 0)
        assert np.all(ended[row, end:] == 7)
        assert np.all(logprobs[row, end:] == 0)


@ways
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_stream_is_the_text_in_pieces(sampling, chunk):
    settings = dict(max_new_tokens=NEW, **sampling)
    pieces = list(stream_tokens(model_of("gemma3"), TOKENS, chunk=chunk, **settings))
    assert [piece.shape[1] for piece in pieces[:-1]] == [chunk] * (len(pieces) - 1)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), free(**sampling))


def test_a_stream_ends_when_every_row_has_ended():
    tokens, stop = np.repeat(TOKENS[:1], 3, axis=0), int(free()[0, 0])
    settings = dict(max_new_tokens=NEW, chunk=2, stop_ids=[stop])
    pieces = list(stream_tokens(model_of("gemma3"), tokens, **settings))
    assert [piece.tolist() for piece in pieces] == [[[stop]] * 3]


def test_a_penalty_counts_the_prompt_and_the_text():
    for prompt, new in zip(TOKENS, free(repetition_penalty=1e6), strict=True):
        assert len({*new}) == NEW
        assert not {*new} & {*prompt}


def test_an_engine_serves_until_its_models_weights_change():
    model = make_model("gemma3")
    first = engine_of(model)
    assert engine_of(model) is first
    model.embed.w[...] = jnp.flip(model.embed.w[...], axis=0)
    assert engine_of(model) is not first
    found = generate_tokens(model, TOKENS, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, by_full_forwards(model, TOKENS)[0])
    assert len(engine._engines) == 1


@pytest.mark.parametrize(
    ("tokens", "mask", "settings", "problem"),
    [
        (np.zeros((1, 100), np.int32), None, {"max_new_tokens": 29}, "context of 128"),
        (np.zeros((1, 0), np.int32), None, {}, r"tokens are int32 \(1, 0\)"),
        (np.zeros(4, np.int32), None, {}, r"give integers \[B, T\]"),
        (np.zeros((1, 4)), None, {}, "tokens are float64"),
        (np.zeros((2, 2), np.int32), [[True, True], [False, False]], {}, "hides a row"),
        (np.zeros((2, 2), np.int32), [[True, True]], {}, r"mask is \(1, 2\) for tokens \(2, 2\)"),
        (np.zeros((1, 4), np.int32), None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (np.zeros((1, 4), np.int32), None, {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_on_one_line(tokens, mask, settings, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        generate_tokens(model_of("gemma3"), tokens, mask, **settings)
    assert "\n" not in str(caught.value)


def test_prompt_and_new_tokens_may_fill_the_context():
    tokens = make_tokens(3, 128 - NEW)
    found = generate_tokens(model_of("gemma3"), tokens, max_new_tokens=NEW)
    np.testing.assert_array_equal(found, by_full_forwards(model_of("gemma3"), tokens)[0])
