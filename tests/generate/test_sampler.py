"""The sampler against numbers worked out by hand."""

import jax
import numpy as np
import pytest

from llmprep_jax.generate.sampler import Sampling, draw, likeliest, shape_logits

shape, pick = jax.jit(shape_logits), jax.jit(draw)  # one program for each kind of settings
# probabilities 0.5, 0.3, 0.15, 0.05
LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))


def kept(**settings):
    """Which of the four tokens can still be drawn."""
    shaped = shape(LOGITS, None, Sampling(**{"temperature": 1.0, **settings}))
    return [int(i) for i in np.flatnonzero(np.asarray(shaped[0]) > -1e30)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),  # the token that reaches p is kept
        ({"top_p": 0.01}, [0]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 0.29}, [0, 1, 2]),  # 0.15 / 0.5 = 0.3
        ({"min_p": 0.31}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        # top-p sums what top-k left, renormalised: 0.5 / 0.8 = 0.625 falls short of 0.63
        ({"top_k": 2, "top_p": 0.62}, [0]),
        ({"top_k": 2, "top_p": 0.63}, [0, 1]),
        # min-p comes last: first, it would leave two, of which the first has 0.625 of the whole
        ({"top_p": 0.62, "min_p": 0.31}, [0, 1]),
        # temperature comes first: at 0.5 the shares are 0.685, 0.247, 0.062, 0.007
        ({"temperature": 0.5, "top_p": 0.68}, [0]),
        ({"temperature": 0.5, "min_p": 0.29}, [0, 1]),
    ],
    ids=str,
)
def test_each_truncation_keeps_the_tokens_it_should(settings, expected):
    assert kept(**settings) == expected


def test_what_is_kept_keeps_its_proportions():
    shaped = shape(LOGITS, None, Sampling(temperature=1.0, top_k=3))
    np.testing.assert_allclose(jax.nn.softmax(shaped)[0], [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0])


def test_the_likeliest_token_is_the_first_of_the_largest():
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 4, (50, 3, 37)).astype(np.float32)
    np.testing.assert_array_equal(likeliest(logits), np.argmax(logits, axis=-1))
    strange = np.array([[-np.inf, -np.inf], [1, np.inf], [np.nan, np.nan]], np.float32)
    assert likeliest(strange)[:2].tolist() == [0, 1]
    assert int(likeliest(strange)[2]) in (0, 1)


def test_draws_are_those_of_jax():
    keys = jax.random.split(jax.random.key(3), 5)
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(pick(logits, Sampling(temperature=1.0), keys), expected)


def test_temperature_divides_the_logits():
    shaped = shape(LOGITS, None, Sampling(temperature=0.5))
    np.testing.assert_allclose(shaped, LOGITS * 2, rtol=1e-6)


def test_a_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen():
    logits = np.array([[2.0, -2.0, 2.0, -2.0]], np.float32)
    seen = np.array([[True, True, False, False]])
    found = shape(logits, seen, Sampling(repetition_penalty=4.0))
    np.testing.assert_allclose(found, [[0.5, -8.0, 2.0, -2.0]])


def test_temperature_zero_takes_the_most_likely_token():
    keys = jax.random.split(jax.random.key(0), 1)
    assert int(pick(np.array([[0.1, 3.0, 2.9]], np.float32), Sampling(), keys)[0]) == 1


@pytest.mark.parametrize("temperature", [1e-4, 1e-37, 1e-45])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_colder_the_surer_is_the_most_likely_token(temperature, settings):
    settings = Sampling(temperature=temperature, **settings)
    logits = np.array([[-9.0, -7.0, -100.0], [90.0, -2.0, 91.0]], np.float32)
    shaped = shape(logits, None, settings)
    keys = jax.random.split(jax.random.key(0), 2)
    assert pick(shaped, settings, keys).tolist() == [1, 2]


def test_draws_have_the_frequencies_of_the_softmax():
    draws, settings = 20_000, Sampling(temperature=0.7, top_p=0.97)
    shaped = shape(LOGITS, None, settings)
    expected = np.asarray(jax.nn.softmax(shaped))[0]
    keys = jax.random.split(jax.random.key(3), draws)
    rows = np.tile(shaped, (draws, 1))
    tokens = pick(rows, settings, keys)
    found = np.bincount(np.asarray(tokens), minlength=4) / draws
    assert found[3] == 0
    # four standard deviations of a frequency
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}; it must be"):
        Sampling(**wrong)
