"""A prompt read in blocks is the prompt read whole."""

import functools

import jax
import numpy as np
import pytest

from llmprep_jax.generate.prompt import block_size, bucket, read_prompt
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


def test_a_prompt_is_read_at_once_or_by_quarters_that_are_not_all_padding():
    found = {length: block_size(length, bucket(length, 32)) for length in (1, 32, 100, 128)}
    assert found == {1: 32, 32: 32, 100: 128, 128: 128}
    found = {length: block_size(length, bucket(length, 32)) for length in (129, 192, 193, 300, 385)}
    assert found == {129: 64, 192: 64, 193: 256, 300: 128, 385: 512}
    assert [block_size(length, bucket(length, 32)) for length in (5000, 20000)] == [2048, 4096]
