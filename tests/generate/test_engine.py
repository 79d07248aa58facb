"""Decoding against the plain forward pass, and the laws of rows, seeds, stops and streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.generate import engine
from llmprep_jax.generate.engine import Engine, engine_of, generate_tokens, stream_tokens
from llmprep_jax.generate.sampler import Sampling
from tests.models.tiny import CONFIGS, forward, make_model, make_tokens

NEW = 6
model_of = functools.cache(make_model)
families = pytest.mark.parametrize("name", CONFIGS)
SAMPLED = {"temperature": 1.0, "top_k": 50}


def by_full_forwards(model, tokens, new=NEW):
    """Greedy tokens and their log-probabilities, each from a forward pass over the whole text."""
    length, logprobs = tokens.shape[1], []
    text = np.pad(tokens, ((0, 0), (0, new)))
    for end in range(length, length + new):
        logits = forward(model, text)[:, end - 1]
        text[:, end] = np.argmax(logits, axis=-1)
        chosen = jax.nn.log_softmax(logits)[np.arange(len(text)), text[:, end]]
        logprobs.append(np.asarray(chosen))
    return text[:, length:], np.stack(logprobs, axis=1)


@families
def test_greedy_decoding_is_the_argmax_of_full_forwards(name):
    model, tokens = model_of(name), make_tokens(2, 9)
    expected, logprobs = by_full_forwards(model, tokens)
    found, found_logprobs = generate_tokens(model, tokens, max_new_tokens=NEW, return_logprobs=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_logprobs, logprobs, atol=1e-4)


@families
def test_layers_in_a_stack_and_in_a_list_decode_alike(name):
    model, tokens = model_of(name), make_tokens(2, 9)
    listed, stacked = Engine(model), Engine(model)
    assert listed._unrolled is not None
    stacked._unrolled = None
    found = []
    for each in (listed, stacked):
        state = each.start(tokens, None, Sampling(), NEW, 0, 0)
        found.append(each.advance(state, NEW, (), Sampling()))
    np.testing.assert_array_equal(found[0].tokens_BT, found[1].tokens_BT)
    np.testing.assert_allclose(found[0].logprobs_BT, found[1].logprobs_BT, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_ragged_rows_say_what_they_say_alone(side, sampling):
    model, rows = model_of("gemma3"), make_tokens(3, 11)
    lengths = (4, 11, 7)
    tokens, mask = np.zeros((3, 11), np.int32), np.zeros((3, 11), bool)
    for row, length in enumerate(lengths):
        where = slice(11 - length, None) if side == "left" else slice(length)
        tokens[row, where], mask[row, where] = rows[row, :length], True
    settings = dict(max_new_tokens=NEW, seed=5, **sampling)
    found = generate_tokens(model, tokens, mask, **settings)
    for row, length in enumerate(lengths):
        # a row's draws depend on the seed and its place, so it keeps its place among copies
        alone = np.repeat(rows[row : row + 1, :length], 3, axis=0)
        np.testing.assert_array_equal(found[row], generate_tokens(model, alone, **settings)[row])


def test_a_seed_fixes_the_text_and_rows_of_a_prompt_differ():
    model, tokens = model_of("qwen2-window"), np.repeat(make_tokens(1, 8), 3, axis=0)
    settings = dict(max_new_tokens=12, **SAMPLED)
    first = np.asarray(generate_tokens(model, tokens, seed=1, **settings))
    np.testing.assert_array_equal(first, generate_tokens(model, tokens, seed=1, **settings))
    assert np.any(first != generate_tokens(model, tokens, seed=2, **settings))
    assert len({tuple(row) for row in first}) == 3


def test_a_stop_id_is_kept_and_padding_follows_it():
    model, tokens = model_of("gemma3"), make_tokens(2, 9)
    free = np.asarray(generate_tokens(model, tokens, max_new_tokens=NEW))
    stop = int(free[0, 2])
    ended = np.asarray(
        generate_tokens(model, tokens, max_new_tokens=NEW, stop_ids=[stop], pad_id=7)
    )
    for row in range(2):
        ends = np.flatnonzero(free[row] == stop)
        end = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(ended[row, :end], free[row, :end])
        assert np.all(ended[row, end:] == 7)


def test_log_probabilities_after_a_stop_are_zero():
    model, tokens = model_of("gemma3"), make_tokens(1, 9)
    stop = int(generate_tokens(model, tokens, max_new_tokens=1)[0, 0])
    _, logprobs = generate_tokens(
        model, tokens, max_new_tokens=4, stop_ids=[stop], return_logprobs=True
    )
    assert logprobs[0, 0] < 0
    np.testing.assert_array_equal(logprobs[0, 1:], 0)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_a_stream_is_the_text_in_pieces(sampling, chunk):
    model, tokens = model_of("gemma3"), make_tokens(2, 9)
    settings = dict(max_new_tokens=NEW, seed=3, **sampling)
    pieces = list(stream_tokens(model, tokens, chunk=chunk, **settings))
    assert all(piece.shape[1] <= chunk for piece in pieces)
    np.testing.assert_array_equal(
        np.concatenate(pieces, axis=1), generate_tokens(model, tokens, **settings)
    )


def test_a_stream_ends_when_every_row_has_ended():
    model, tokens = model_of("gemma3"), make_tokens(1, 9)
    stop = int(generate_tokens(model, tokens, max_new_tokens=1)[0, 0])
    pieces = list(stream_tokens(model, tokens, max_new_tokens=NEW, chunk=2, stop_ids=[stop]))
    assert [piece.tolist() for piece in pieces] == [[[stop]]]


def test_a_penalty_counts_the_prompt_and_the_text():
    model, tokens = model_of("gemma3"), make_tokens(2, 9)
    text = np.asarray(generate_tokens(model, tokens, max_new_tokens=NEW, repetition_penalty=1e6))
    for prompt, new in zip(tokens, text, strict=True):
        assert len({*new}) == NEW
        assert not {*new} & {*prompt}


def test_an_engine_serves_until_its_models_weights_change():
    model = make_model("gemma3")
    first = engine_of(model)
    assert engine_of(model) is first
    model.embed.w[...] = jnp.flip(model.embed.w[...], axis=0)
    assert engine_of(model) is not first
    tokens = make_tokens(1, 9)
    found = generate_tokens(model, tokens, max_new_tokens=2)
    np.testing.assert_array_equal(found, by_full_forwards(model, tokens, 2)[0])
    assert len(engine._engines) == 1


@pytest.mark.parametrize(
    ("tokens", "mask", "settings", "problem"),
    [
        (np.zeros((1, 100), np.int32), None, {"max_new_tokens": 29}, "context of 128"),
        (np.zeros((1, 0), np.int32), None, {}, r"tokens are int32 \(1, 0\)"),
        (np.zeros(4, np.int32), None, {}, r"give integers \[B, T\]"),
        (np.zeros((1, 4)), None, {}, "tokens are float64"),
        (np.zeros((2, 2), np.int32), [[True, True], [False, False]], {}, "hides a row"),
        (np.zeros((1, 4), np.int32), None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_on_one_line(tokens, mask, settings, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        generate_tokens(model_of("gemma3"), tokens, mask, **settings)
    assert "\n" not in str(caught.value)
