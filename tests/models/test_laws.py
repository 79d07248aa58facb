"""Laws that hold for every family, whatever its weights are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.stack import unstack
from tests.models.tiny import CONFIGS, forward, make_model, make_tokens

families = pytest.mark.parametrize("name", CONFIGS)


@families
def test_no_feature_depends_on_a_later_token(name):
    model = make_model(name)
    tokens = np.arange(10, dtype=np.int32)[None]  # distinct: a row of the table is one position

    def feature_sum(model, t):
        return model.features(tokens)[0][0, t].sum()

    grad = jax.jit(lambda model, t: jax.grad(feature_sum)(model, t).embed.w[...])
    for t in (0, 4, 9):
        grad_VD = np.asarray(grad(model, t))
        assert np.all(grad_VD[t + 1 :] == 0)
        assert np.any(grad_VD[t] != 0)


@families
def test_scanned_unrolled_and_looped_layers_agree(name):
    tokens = make_tokens()
    scanned = make_model(name)
    expected = forward(scanned, tokens)
    unrolled = make_model(name, unroll=0)
    np.testing.assert_allclose(forward(unrolled, tokens), expected, atol=1e-5)
    scanned.layers = unstack(scanned.layers)
    np.testing.assert_allclose(forward(scanned, tokens), expected, atol=1e-5)


@families
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(name, remat):
    tokens = make_tokens()

    def grads(model):
        return jax.jit(jax.grad(lambda m: jnp.square(m(tokens).logits).mean()))(model)

    plain, saved = grads(make_model(name)), grads(make_model(name, remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@families
@pytest.mark.parametrize("blocks", [[14], [1] * 14, [3, 7, 1, 3], [6, 1, 1, 1, 5]], ids=str)
def test_decoding_from_the_cache_equals_the_full_forward(name, blocks):
    model, tokens = make_model(name), make_tokens()
    expected = forward(model, tokens)
    cache, found, start = model.init_cache(2, 20), [], 0
    step = jax.jit(lambda model, tokens, cache: model(tokens, cache=cache))
    for size in blocks:
        out = step(model, tokens[:, start : start + size], cache)
        found.append(out.logits)
        cache, start = out.cache, start + size
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)


@families
def test_padding_on_either_side_changes_nothing(name):
    model, tokens = make_model(name), make_tokens(1, 9)
    expected = forward(model, tokens)
    for left, right in ((3, 0), (0, 3), (2, 2)):
        padded = np.pad(tokens, ((0, 0), (left, right)))
        mask = np.pad(np.ones_like(tokens, bool), ((0, 0), (left, right)))
        found = forward(model, padded, mask=mask)[:, left : left + 9]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@families
def test_left_padded_rows_decode_as_alone(name):
    model, tokens = make_model(name), make_tokens(1, 9)
    padded, mask = np.pad(tokens, ((0, 0), (5, 0))), np.pad(np.ones((1, 9), bool), ((0, 0), (5, 0)))
    step = jax.jit(lambda model, tokens, mask, cache: model(tokens, mask=mask, cache=cache))
    out = step(model, padded[:, :8], mask[:, :8], model.init_cache(1, 16))
    out = step(model, padded[:, 8:], mask[:, 8:], out.cache)
    np.testing.assert_allclose(out.logits, forward(model, tokens)[:, 3:], atol=1e-5)


@families
def test_packed_documents_do_not_see_each_other(name):
    model, tokens = make_model(name), make_tokens(1, 14)
    segments = np.array([[1] * 5 + [2] * 6 + [3] * 3], np.int32)
    positions = np.concatenate([np.arange(5), np.arange(6), np.arange(3)])[None].astype(np.int32)
    packed = forward(model, tokens, positions=positions, segment_ids=segments)
    alone = [forward(model, tokens[:, a:b]) for a, b in ((0, 5), (5, 11), (11, 14))]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


@families
def test_a_row_of_padding_stays_finite(name):
    model, tokens = make_model(name), make_tokens()
    mask = np.array([[True] * 14, [False] * 14])

    def loss(model):
        return jnp.square(model(tokens, mask=mask).logits).mean()

    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(model)))


def test_a_mask_and_segments_together_are_refused():
    model, tokens = make_model("gemma3"), make_tokens()
    ones = np.ones_like(tokens)
    with pytest.raises(ValueError, match="not both"):
        model(tokens, mask=ones.astype(bool), segment_ids=ones)


def test_more_tokens_than_cache_slots_are_refused():
    model = make_model("gemma3")
    with pytest.raises(ValueError, match="14 tokens do not fit a cache of 8"):
        model(make_tokens(), cache=model.init_cache(2, 8))


@families
def test_bf16_compute_stays_near_float32(name):
    tokens = make_tokens()
    expected = np.asarray(forward(make_model(name), tokens))
    for compute in ({"matmul_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        found = np.asarray(forward(make_model(name, **compute), tokens))
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
