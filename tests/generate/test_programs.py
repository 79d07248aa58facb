"""What generation compiles, and what it holds: few programs, and nothing once the model is gone."""

import dataclasses
import functools
import gc
import itertools
import re
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.generate import engine, speculative
from llmprep_jax.models import registry
from tests.generate.drafting import drafting_model
from tests.grids import cases
from tests.models.tiny import CONFIGS, make_model, make_tokens, random_model
from tests.random_modules import random_module

LONG = dataclasses.replace(CONFIGS["llama-tied-9-3-heads"], num_layers=1, max_seq_len=1024)


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through():
    """The collector sees what tests make from here on; six times all there is takes seconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def traces(monkeypatch):
    """How often a prefill and a decode step were traced, which is once a program."""
    counts = dict.fromkeys(("read", "step"), 0)

    def counting(name, function):
        def call(*args, **options):
            counts[name] += 1
            return function(*args, **options)

        return call

    for module in (engine, speculative):
        monkeypatch.setattr(module, "read_prompt", counting("read", module.read_prompt))
    monkeypatch.setattr(engine, "_step", counting("step", engine._step))
    return counts


def test_temperatures_and_lengths_share_programs(traces):
    # a config of its own, of which no program is there
    cfg = dataclasses.replace(LONG, max_seq_len=900)
    model, tokens = random_model(cfg), make_tokens(1, 100)
    temperatures, new_tokens, lengths = (0.3, 1.0, 1.7), (4, 20, 200), (5, 33, 35, 100)
    calls = zip(itertools.cycle(temperatures), itertools.product(new_tokens, lengths))
    for temperature, (new, length) in calls:
        settings = dict(temperature=temperature, top_k=5 + new, seed=new, pad_id=length)
        found = lp.generate_tokens(
            model, tokens[:, :length], max_new_tokens=new, stop_ids=range(new % 8), **settings
        )
        assert found.shape == (1, new)
    # hot: what is drawn is as good as noise, which is another one at each step
    hot = lp.generate_tokens(model, tokens, max_new_tokens=200, temperature=1e3, top_k=95)
    assert len({*np.asarray(hot)[0].tolist()}) > 50
    assert traces == {"read": 3, "step": 2}  # prompts of up to 32, 64 and 128; 256 slots, or 512


def test_draws_do_not_depend_on_how_long_prompts_and_caches_are():
    model, tokens = random_model(LONG), make_tokens(2, 60)
    settings = dict(temperature=1.0, top_p=0.9, seed=3)
    short = lp.generate_tokens(model, tokens[:, -20:], max_new_tokens=5, **settings)
    long = lp.generate_tokens(model, tokens[:, -20:], max_new_tokens=200, **settings)
    np.testing.assert_array_equal(short, long[:, :5])
    mask = np.arange(60) >= 40
    wide = lp.generate_tokens(model, [tokens[0], tokens[1, -20:]], max_new_tokens=5, **settings)
    np.testing.assert_array_equal(short[1], wide[1])
    padded = lp.generate_tokens(model, tokens, np.tile(mask, (2, 1)), max_new_tokens=5, **settings)
    np.testing.assert_array_equal(short, padded)


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def build(adapter):
    model = registry.build(LONG, rngs=nnx.Rngs(0))
    return model if adapter is None else lp.peft.inject(model, adapter)


# DoRA computes things before it generates
ADAPTED = {"DoRA": lp.peft.DoRA(rank=2, targets=("q_proj", "down_proj")), "none": None}


@pytest.mark.parametrize("adapter", cases(ADAPTED, fast=["DoRA"], slow=["none"]))
def test_nothing_of_a_model_is_kept_when_it_is_gone(adapter):
    engine._engines.clear()  # of another test's model
    before = live_bytes()
    model = random_module(functools.partial(build, ADAPTED[adapter]))
    size = live_bytes() - before
    lp.generate_tokens(model, make_tokens(1, 11), max_new_tokens=4)
    assert live_bytes() - before > 1.2 * size  # layers are laid out anew
    ref = weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None
    assert live_bytes() == before
    assert not engine._engines


def test_a_stream_holds_its_model_until_it_ends():
    pieces = lp.stream_tokens(random_model(LONG), make_tokens(1, 11), max_new_tokens=12, chunk=4)
    first = next(pieces)
    gc.collect()
    assert np.concatenate([first, *pieces], axis=1).shape == (1, 12)
    gc.collect()
    assert not engine._engines


def test_weights_that_change_are_not_kept_either():
    model = random_model(LONG)
    lp.generate_tokens(model, make_tokens(1, 11), max_new_tokens=4)
    old = weakref.ref(model.layers.mlp.up.w[...])
    model.layers.mlp.up.w[...] = model.layers.mlp.up.w[...] * 2
    gc.collect()
    assert old() is None


@pytest.mark.parametrize(
    "name",
    [
        # for each kind of cache; test_engine has Gemma 3's rings, where its programs are there
        "llama-tied-9-3-heads",
        pytest.param("gemma3", marks=pytest.mark.grid),
        pytest.param("deepseek-v3", marks=pytest.mark.slow),
    ],
)
def test_samples_of_a_prompt_are_those_of_copies_of_it(name):
    model, tokens = make_model(name), make_tokens(2, 11)
    settings = dict(max_new_tokens=6, temperature=1.0, return_logprobs=True)
    found, logprobs = lp.generate_tokens(model, tokens, num_samples=3, **settings)
    expected = lp.generate_tokens(model, np.repeat(tokens, 3, axis=0), **settings)
    np.testing.assert_array_equal(found, expected[0].reshape(2, 3, 6))
    np.testing.assert_allclose(logprobs, expected[1].reshape(2, 3, 6), atol=1e-5)
    assert len({tuple(row) for row in np.asarray(found[0])}) > 1


@pytest.mark.slow  # compiles for ten seconds
def test_samples_are_drafted_for_too():
    model, tokens = drafting_model(1), make_tokens(2, 11)
    settings = dict(max_new_tokens=6, temperature=1.5, draft="mtp")
    found = lp.generate_tokens(model, tokens, num_samples=3, **settings)
    expected = lp.generate_tokens(model, np.repeat(tokens, 3, axis=0), **settings)
    np.testing.assert_array_equal(found, np.reshape(expected, (2, 3, 6)))


def test_rows_of_unequal_length_are_padded():
    model, tokens = random_model(LONG), make_tokens(2, 11)
    rows = [tokens[0].tolist(), tokens[1, :4].tolist()]
    mask = np.array([[True] * 11, [True] * 4 + [False] * 7])
    expected = lp.generate_tokens(model, tokens, mask, max_new_tokens=4)
    np.testing.assert_array_equal(lp.generate_tokens(model, rows, max_new_tokens=4), expected)


OUTSIDE = "outside the model's vocabulary of 96 (ids 0 to 95)"


@pytest.mark.parametrize(
    ("tokens", "settings", "problem"),
    [
        ([[1, 96]], {}, f"token 96 (row 0, column 1) is {OUTSIDE}"),
        ([[1, 2], [-1, 2]], {}, f"token -1 (row 1, column 0) is {OUTSIDE}"),
        (np.array([[2**40]]), {}, f"token {2**40} (row 0, column 0) is {OUTSIDE}"),
        ([[1, 2], []], {}, "row 1 of the tokens is []; give whole numbers"),
        ([[1, 2], [0.5]], {}, "row 1 of the tokens is [0.5]; give whole numbers"),
        ([[1]], {"do_sample": True}, "unknown setting do_sample; here it is temperature"),
        ([[1]], {"eos_token_id": 2}, "unknown setting eos_token_id; here it is stop_ids"),
        ([[1]], {"topk": 2}, "unknown setting topk; did you mean top_k"),
        ([[1]], {"num_samples": 2}, "num_samples is 2 at temperature 0"),
        ([[1], [2]], {"prompt_cache": lp.PromptCache()}, "a prompt_cache is of one prompt"),
    ],
    ids=lambda x: re.sub(" object at 0x[0-9a-f]+", "", str(x)),  # alike in all workers
)
@pytest.mark.parametrize("call", [lp.generate_tokens, lp.stream_tokens])
def test_what_cannot_be_read_is_named_on_one_line(call, tokens, settings, problem):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(random_model(LONG), tokens, **settings)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_that_are_masked_may_be_any():
    model, tokens = random_model(LONG), make_tokens(1, 5)
    padded = np.concatenate([np.full((1, 3), -100), tokens], axis=1)
    found = lp.generate_tokens(model, padded, padded >= 0, max_new_tokens=4)
    np.testing.assert_array_equal(found, lp.generate_tokens(model, tokens, max_new_tokens=4))
