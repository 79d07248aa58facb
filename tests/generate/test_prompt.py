"""A prompt read in blocks is the prompt read whole."""

import functools

import jax
import numpy as np
import pytest

from llmprep_jax.generate.prompt import block_size, prompt_width, read_prompt
from tests.models.tiny import make_model, make_tokens


@pytest.mark.parametrize(
    ("name", "block"),
    [("gemma3", 8), pytest.param("deepseek-v3", 4, marks=pytest.mark.slow)],
)
def test_blocks_change_neither_hidden_states_nor_what_is_decoded_after_them(name, block):
    model, tokens, mask = make_model(name), make_tokens(2, 16), np.ones((2, 16), bool)
    mask[1, 5:] = False  # a block without a token of the second row
    last = np.array([15, 4])

    @functools.partial(jax.jit, static_argnames=("block", "last_only"))
    def run(model, tokens, mask, block, last_only=False):
        cache = model.init_cache(2, 17)
        x, cache = read_prompt(model, tokens, mask, cache, block=block, last_only=last_only)
        return x, model.features(model.embed_inputs(tokens[:, -1:]), cache=cache)[0]

    @jax.jit
    def run_whole(model):
        x = model.embed_inputs(tokens)
        x, cache = model.features(x, mask=mask, cache=model.init_cache(2, 17))
        return x, model.features(model.embed_inputs(tokens[:, -1:]), cache=cache)[0]

    whole, after = run_whole(model)
    found, after_blocks = run(model, tokens, mask, block)
    np.testing.assert_allclose(found[mask], whole[mask], atol=1e-5)
    np.testing.assert_allclose(after_blocks, after, atol=1e-5)
    # a block of padding alone behind them is not read: the cache has no slots for it
    after_tokens = tokens[:, -1:]
    tokens, mask = [np.pad(x, ((0, 0), (0, block))) for x in (tokens, mask)]
    tokens[:, -1:] = after_tokens
    ends, after_blocks = run(model, tokens, mask, block, last_only=True)
    np.testing.assert_allclose(ends[:, 0], whole[[0, 1], last], atol=1e-5)
    np.testing.assert_allclose(after_blocks, after, atol=1e-5)


def test_prompts_have_two_widths_an_octave_and_long_ones_are_read_in_blocks():
    widths = {1: 32, 32: 32, 33: 48, 48: 48, 49: 64, 96: 96, 97: 128, 129: 192, 193: 256, 385: 512}
    assert {length: prompt_width(length) for length in widths} == widths
    blocks = {32: 32, 192: 192, 4096: 4096, 6144: 3072, 8192: 4096, 24576: 4096}
    assert {width: block_size(width) for width in blocks} == blocks
