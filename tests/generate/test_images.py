"""Pictures that are drawn: with caches, in pairs of rows and in batches they are what a full
forward pass after each code makes of them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.generate.images import decode, generate_codes, guided, without_prompt
from llmprep_jax.generate.prompt import read_batch
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.models.drawing import BEGIN, CONFIG, EACH, model
from tests.models.seeing import seeing
from tests.models.tiny import random_model

PAD = 3
ROWS = [[1, 9, 17, 33, 5, BEGIN], [1, BEGIN], [1, 8, 60, BEGIN]]
draw_codes = functools.partial(generate_codes, pad_id=PAD, temperature=0.0)


@jax.jit
def hidden_of(model, tokens, codes):
    """Final hidden states of prompts and the codes after them, without a cache."""
    x_BTD = jnp.concatenate([model.embed_inputs(tokens), model.drawing.embed(codes)], axis=1)
    return model.drawing.unembed(model.language.features(x_BTD)[0])


def by_full_passes(row: list[int], guidance: float) -> list[int]:
    """The likeliest codes after one prompt, each from a pass over all before it."""
    bare = [row[0], *[PAD] * (len(row) - 2), row[-1]]
    codes: list[int] = []
    while len(codes) < EACH:
        padded = jnp.asarray([codes + [0] * (EACH - len(codes))] * 2)
        logits = hidden_of(model(), jnp.asarray([row, bare]), padded)[:, len(row) - 1 + len(codes)]
        codes.append(int(np.argmax(logits[1] + guidance * (logits[0] - logits[1]))))
    return codes


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_codes_are_those_of_full_passes_over_each_prompt_alone(guidance):
    found = np.asarray(draw_codes(model(), ROWS, guidance=guidance)).tolist()
    assert found == [by_full_passes(row, guidance) for row in ROWS]
    assert len({tuple(row) for row in found}) == 3


def test_without_its_prompt_a_row_keeps_its_first_and_last_token():
    rows = without_prompt(*read_batch(ROWS, None, 96), PAD)
    expected = [[1, 3, 3, 3, 3, BEGIN], [1, BEGIN, 0, 0, 0, 0], [1, 3, 3, BEGIN, 0, 0]]
    np.testing.assert_array_equal(rows, expected)


def test_guidance_moves_away_from_what_is_drawn_of_no_prompt():
    logits = jnp.array([[1.0, 2.0], [0.0, 4.0], [3.0, 3.0], [1.0, 0.0]])
    np.testing.assert_allclose(guided(logits, 2.0), [[-1.0, 1.0], [-1.0, 8.0]])
    np.testing.assert_allclose(guided(logits, None), logits)


def test_each_code_of_a_picture_is_drawn_anew():
    # so hot that all codes are as likely: nothing but the draws tells them apart
    codes = np.asarray(draw_codes(model(), ROWS[:1], temperature=1e6, guidance=1.0))
    assert len(set(codes[0].tolist())) > EACH // 4


def test_a_picture_depends_on_its_seed_and_prompt_and_not_on_its_batch():
    draw = functools.partial(draw_codes, model(), temperature=1.0)
    whole, other = np.asarray(draw(ROWS, seed=3)), np.asarray(draw(ROWS, seed=4))
    np.testing.assert_array_equal(whole[:2], draw(ROWS[:2], seed=3))
    assert (whole != other).mean() > 0.5
    # a prompt's samples are further rows: the first of the first prompt is the one without
    told = []
    several = np.asarray(
        draw(ROWS[:2], seed=3, num_samples=2, report=lambda *counts: told.append(counts))
    )
    np.testing.assert_array_equal(several[0], whole[0])
    assert (several[0] != several[1]).any()
    assert told == [(4, 16), (8, 16), (12, 16), (16, 16)]


def test_pictures_are_bytes_of_what_the_codes_are_decoded_to():
    inputs = dict(zip(("tokens", "mask"), read_batch(ROWS, None, 96), strict=True))
    processor = SimpleNamespace(for_drawing=lambda prompts: inputs, pad_id=PAD)
    settings = dict(temperature=0.5, seed=1, num_samples=2)
    found = lp.generate_images(model(), processor, ["a", "b", "c"], **settings)
    assert (found.shape, found.dtype) == ((3, 2, 8, 8, 3), np.uint8)
    codes = generate_codes(model(), **inputs, pad_id=PAD, **settings)
    values = np.asarray(model().decode_codes(codes)).reshape(found.shape)
    np.testing.assert_array_equal(found, np.clip((values + 1) * 127.5, 0, 255).astype(np.uint8))
    assert found.min() < found.max()
    np.testing.assert_array_equal(decode(model(), codes[4:5])[0], found[2, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty is of words"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidence": 2}, "unknown setting guidence; did you mean guidance"),
        ({"temperature": -1}, "temperature is -1.0; it must be finite and at least 0"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
    ],
)
def test_settings_that_will_not_do_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        draw_codes(model(), ROWS, **settings)


def test_what_cannot_be_drawn_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="does not draw; give a Janus model"):
        lp.generate_images(seeing("llama-tied-9-3-heads").language, None, "a cat")
    with pytest.raises(ValueError, match="120 prompt tokens and 16 new exceed the model's context"):
        draw_codes(model(), [[1] * 120])


@pytest.mark.grid
def test_pictures_on_a_mesh_are_those_of_one_device():
    rows = [*ROWS, ROWS[0]]
    expected = np.asarray(draw_codes(model(), rows))
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        ours = random_model(CONFIG)
    np.testing.assert_array_equal(draw_codes(ours, rows), expected)
    pictures = decode(ours, expected).astype(int)
    assert np.abs(pictures - decode(model(), expected)).max() <= 1
