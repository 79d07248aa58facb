"""Laws that hold for every family, whatever its weights are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.param import Param
from llmprep_jax.nn.stack import unstack
from tests.models.tiny import (
    CONFIGS,
    ODD_CONFIGS,
    forward,
    make_model,
    make_tokens,
    random_model,
)

families = pytest.mark.parametrize("name", CONFIGS)


def only_fast(*names: str) -> list:
    """All families; the others take as long and show no more, and are left to the slow tests."""
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in CONFIGS]


def listed(model):
    """The same model with its layers in a list."""
    model = nnx.merge(*nnx.split(model))
    for name in model.stacks:
        setattr(model, name, unstack(getattr(model, name)))
    return model


def influence(model, length):
    """[T, S]: how much token t's logits change with the embedding of token s."""
    ids = np.arange(length)

    def sums_T(x_TD):
        # each token is another row of the table, and the rows are what is varied
        given = nnx.merge(*nnx.split(model))
        given.embed.w = Param(x_TD)
        hidden_BTD, _ = given.features(ids[None])
        return jnp.sin(model.unembed(hidden_BTD)[0]).sum(-1)

    jacobian_TSD = jax.jit(jax.jacrev(sums_T))(model.embed.w[...][:length])
    return np.linalg.norm(jacobian_TSD, axis=-1)


@families
def test_no_logit_depends_on_a_later_token(name):
    found = influence(make_model(name), 10)
    later = np.triu(np.ones((10, 10), bool), 1)
    assert np.all(found[later] == 0)
    assert np.all(found[~later] > 0)


def test_layers_with_a_window_reach_back_as_far_as_their_windows_add_up():
    cfg = ODD_CONFIGS["gemma3-all-local"]
    back = np.subtract.outer(np.arange(14), np.arange(14))
    for num_layers in (1, 3):
        found = influence(random_model(dataclasses.replace(cfg, num_layers=num_layers)), 14)
        reach = num_layers * (cfg.window - 1)
        np.testing.assert_array_equal(found > 0, (back >= 0) & (back <= reach))


@families
def test_scanned_unrolled_and_listed_layers_agree(name):
    tokens, scanned = make_tokens(), make_model(name)
    expected = forward(scanned, tokens)
    np.testing.assert_allclose(forward(make_model(name, unroll=0), tokens), expected, atol=1e-5)
    np.testing.assert_allclose(forward(listed(scanned), tokens), expected, atol=1e-5)


def test_padding_inside_a_row_of_several_query_blocks_changes_nothing_in_either_layout():
    # a listed layer knows its window, and a scanned one has it as a value
    cfg = dataclasses.replace(CONFIGS["gemma3"], window=40, global_every=2, num_layers=2)
    model, tokens = random_model(cfg), make_tokens(1, 290)
    columns = np.r_[:110, 170:350]
    padded, segments = np.zeros((2, 1, 360), np.int32)
    padded[:, columns], segments[:, columns] = tokens, np.repeat([1, 2], [90, 200])
    expected = forward(model, tokens, segment_ids=segments[:, columns])
    for given in (listed(model), model):
        found = forward(given, padded, segment_ids=segments)[:, columns]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@families
@pytest.mark.parametrize("remat", [pytest.param("full", marks=pytest.mark.slow), "dots"])
def test_rematerialisation_changes_no_gradient(name, remat):
    tokens = make_tokens()

    @jax.jit
    def grads(model):
        return jax.grad(lambda m: jnp.square(m(tokens).logits).mean())(model)

    plain, saved = grads(make_model(name)), grads(make_model(name, remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saved), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def decode(model, tokens, blocks, **masks):
    """Logits of tokens that come in blocks, from the cache."""
    step = jax.jit(lambda model, tokens, cache, **where: model(tokens, cache=cache, **where))
    cache, logits, start = model.init_cache(len(tokens), 20), [], 0
    for size in blocks:
        part = slice(start, start + size)
        out = step(model, tokens[:, part], cache, **{k: v[:, part] for k, v in masks.items()})
        cache, start = out.cache, start + size
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize("name", [*CONFIGS, *ODD_CONFIGS])
@pytest.mark.parametrize("blocks", [[1] * 14, [3, 7, 1, 3]], ids=str)
def test_decoding_from_the_cache_equals_the_full_forward(name, blocks):
    model, tokens = make_model(name), make_tokens()
    found = decode(model, tokens, blocks)
    np.testing.assert_allclose(found, forward(model, tokens), atol=1e-5)


@families
@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_listed_layers_decode_from_a_cache_of_one_buffer_a_layer(name, remat):
    model, tokens = make_model(name, remat=remat), make_tokens()
    found = decode(listed(model), tokens, [9, 1, 1, 3])
    np.testing.assert_allclose(found, forward(model, tokens), atol=1e-5)


@families
def test_padding_on_either_side_changes_nothing(name):
    model, tokens = make_model(name), make_tokens(1, 9)
    expected = forward(model, tokens)
    for left, right in ((4, 0), (0, 4), (2, 2)):
        padded = np.pad(tokens, ((0, 0), (left, right)))
        mask = np.pad(np.ones_like(tokens, bool), ((0, 0), (left, right)))
        found = forward(model, padded, mask=mask)[:, left : left + 9]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@families
def test_left_padded_rows_decode_as_alone(name):
    model, tokens = make_model(name), make_tokens(1, 9)
    padded, mask = [np.pad(x, ((0, 0), (5, 0))) for x in (tokens, np.ones((1, 9), bool))]
    found = decode(model, padded, [8, 1, 1, 4], mask=mask)[:, 5:]
    np.testing.assert_allclose(found, forward(model, tokens), atol=1e-5)


@pytest.mark.parametrize("name", only_fast("gemma3"))
@pytest.mark.parametrize("blocks", [[1] * 18, [10, 8]], ids=str)
def test_padding_inside_rows_is_as_if_it_were_not_there(name, blocks):
    model, mask = make_model(name), np.zeros((2, 18), bool)
    mask[0, [0, 1, 2, 3, 9, 10, 14]], mask[1, [3, 5, *range(7, 18)]] = True, True
    tokens = make_tokens(2, 18)
    found = decode(model, tokens, blocks, mask=mask)
    whole = forward(model, tokens, mask=mask)
    for row in (0, 1):
        alone = np.pad(tokens[row, mask[row]], (0, 18 - mask[row].sum()))[None].repeat(2, axis=0)
        expected = forward(model, alone)[0, : mask[row].sum()]
        np.testing.assert_allclose(found[row, mask[row]], expected, atol=1e-5)
        np.testing.assert_allclose(whole[row, mask[row]], expected, atol=1e-5)


@families
def test_packed_documents_do_not_see_each_other(name):
    model, tokens = make_model(name), make_tokens(1, 14)
    segments = np.array([[1] * 5 + [2] * 6 + [3] * 3], np.int32)
    positions = np.concatenate([np.arange(5), np.arange(6), np.arange(3)])[None].astype(np.int32)
    packed = forward(model, tokens, positions=positions, segment_ids=segments)
    alone = [forward(model, tokens[:, a:b]) for a, b in ((0, 5), (5, 11), (11, 14))]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)


@families
def test_only_distances_between_positions_matter(name):
    model, tokens = make_model(name), make_tokens()
    shifted = np.broadcast_to(np.arange(40, 54), (2, 14))
    found = forward(model, tokens, positions=shifted)
    np.testing.assert_allclose(found, forward(model, tokens), atol=1e-4)


@families
def test_rows_of_a_batch_do_not_meet(name):
    model, tokens = make_model(name), make_tokens()
    found = forward(model, tokens[::-1])[::-1]
    np.testing.assert_allclose(found, forward(model, tokens), atol=1e-5)


@families
def test_a_row_of_padding_stays_finite(name):
    model, tokens = make_model(name), make_tokens()
    mask = np.array([[True] * 14, [False] * 14])

    def loss(model):
        return jnp.square(model(tokens, mask=mask).logits).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_mask_and_segments_together_are_refused():
    model, tokens = make_model("gemma3"), make_tokens()
    ones = np.ones_like(tokens)
    with pytest.raises(ValueError, match="not both"):
        model(tokens, mask=ones.astype(bool), segment_ids=ones)


def test_more_tokens_than_cache_slots_are_refused():
    model = make_model("gemma3")
    with pytest.raises(ValueError, match="14 tokens do not fit a cache of 8"):
        model(make_tokens(), cache=model.init_cache(2, 8))


@pytest.mark.parametrize("name", only_fast("gemma3", "deepseek-v3"))
def test_tokens_after_a_caches_last_slot_are_refused_or_compiled_give_nan(name):
    model, tokens = make_model(name), make_tokens(2, 6)
    step = jax.jit(lambda model, cache: model(tokens, cache=cache))
    first = step(model, model.init_cache(2, 8))
    assert np.isfinite(first.logits).all()
    with pytest.raises(ValueError, match="6 tokens do not fit a cache of 8 slots, 6 of them taken"):
        model(tokens, cache=first.cache)
    assert np.isnan(step(model, first.cache).logits).all()


@families
def test_bf16_compute_stays_near_float32(name):
    tokens = make_tokens()
    expected = np.asarray(forward(make_model(name), tokens))
    for compute in ({"matmul_dtype": "bfloat16"}, {"dtype": "bfloat16"}):
        found = forward(make_model(name, **compute), tokens)
        assert found.dtype == jnp.float32
        # a rounded score may send a token to another expert, and its logits elsewhere
        share = 0.5 if "deepseek" in name else 1.0
        assert np.quantile(np.abs(found - expected), share) < 0.05 * np.abs(expected).max()


def test_gemma_caps_logits_by_tanh():
    model, tokens = make_model("gemma3"), make_tokens()
    plain = forward(model, tokens)
    model.cfg = dataclasses.replace(model.cfg, logits_soft_cap=2.0)
    np.testing.assert_allclose(forward(model, tokens), 2 * np.tanh(plain / 2), atol=1e-5)


def test_gemma_scales_embeddings_by_a_root_in_the_dtype_of_the_weights():
    for dtype, scale in (("float32", 48**0.5), ("bfloat16", 6.9375)):
        model = make_model("gemma3", param_dtype=dtype)
        found = model._embed(jnp.array([[7]]))[0, 0]
        expected = model.embed.w[...][7].astype(jnp.float32) * np.float32(scale)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
