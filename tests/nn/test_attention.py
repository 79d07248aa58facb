"""The layer of attention: where tokens stand, and what its settings do."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.attention import Attention, Tokens, attend, place_tokens
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import rope_angles, rope_frequencies
from tests.programs import equations
from tests.random_modules import random_module


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def row(*values):
    return np.array([values], np.int32)


@pytest.mark.parametrize("window", [None, 40], ids=["all", "window"])
def test_tokens_in_order_attend_as_by_their_positions(window):
    q, k, v = [draw(1, 300, heads, 8, seed=heads) for heads in (4, 2, 1)]
    v = np.concatenate([v, -v], axis=2)
    # padding inside a document: its window of positions reaches over more columns
    segments = row(*[1] * 80, *[2] * 40, *[0] * 60, *[2] * 100, *[0] * 20)
    positions = row(*range(80), *range(40), *[0] * 60, *range(40, 140), *[0] * 20)

    @jax.jit
    def run(q, k, v, positions, segments):
        places = [Tokens(positions, segments, in_order=in_order) for in_order in (True, False)]
        return [attend(q, k, v, tokens, window=window, scale=0.3) for tokens in places]

    in_order, by_value = run(q, k, v, positions, segments)
    np.testing.assert_allclose(in_order, by_value, atol=1e-6)


def test_a_window_counts_positions_that_are_given_and_not_columns():
    q, far = draw(1, 6, 2, 8), row(0, 1, 2, 13, 14, 15)
    found = attend(q, q, q, Tokens(far, None, in_order=True), window=10)
    wanted = [attend(x, x, x, Tokens(row(0, 1, 2), None)) for x in (q[:, :3], q[:, 3:])]
    np.testing.assert_allclose(found, np.concatenate(wanted, axis=1), atol=1e-6)


def test_a_window_as_wide_as_the_row_hides_nothing_and_costs_nothing():
    q = draw(1, 6, 2, 8)
    tokens = Tokens(row(*range(6)), in_order=True, is_counted=True)
    text = [
        str(jax.make_jaxpr(lambda q, w=window: attend(q, q, q, tokens, window=w))(q))
        for window in (None, 6, 5)
    ]
    assert text[0] == text[1] != text[2]


def make_attention(num_kv_heads=2, **options):
    sizes, options = (32, 4, num_kv_heads, 8), dict(compute=Compute()) | options
    return random_module(lambda: Attention(*sizes, rngs=nnx.Rngs(0), **options))


def test_products_within_attention_have_the_dtype_of_activations():
    compute = Compute(dtype="float32", matmul_dtype="bfloat16")
    attention = make_attention(compute=compute)
    jaxpr = jax.make_jaxpr(lambda x: run(attention, x))(draw(2, 5, 32)).jaxpr
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    of_batches = [eqn for eqn in products if eqn.params["dimension_numbers"][1] != ((), ())]
    assert {str(x.aval.dtype) for eqn in of_batches for x in eqn.invars} == {"float32"}
    assert len(of_batches) == 2


@jax.jit
def run(attention, x, positions=None):
    B, T, _ = x.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if positions is None else positions
    rope = rope_angles(positions, *rope_frequencies(8, 10_000.0))
    return attention(x, Tokens(positions), rope)[0]


def test_rows_of_a_batch_do_not_meet():
    attention, x, order = make_attention(), draw(3, 6, 32), np.array([2, 0, 1])
    np.testing.assert_allclose(run(attention, x)[order], run(attention, x[order]), atol=1e-6)


def test_attention_depends_on_the_distances_of_positions_alone():
    attention, x = make_attention(), draw(3, 6, 32)
    shifted = run(attention, x, np.tile(np.arange(50, 56), (3, 1)))
    np.testing.assert_allclose(run(attention, x), shifted, atol=1e-5)


def test_without_rotation_attention_knows_no_positions_but_causality():
    attention, x = make_attention(), draw(1, 6, 32)
    tokens = Tokens(row(*range(6)))
    no_rope = jax.jit(lambda attention, x: attention(x, tokens)[0])
    found, order = no_rope(attention, x), [2, 0, 1, 3, 4, 5]
    moved = no_rope(attention, x[:, order])  # the last three see the same set
    np.testing.assert_allclose(found[:, 3:], moved[:, 3:], atol=1e-5)
    assert np.abs(found[:, 3:] - run(attention, x)[:, 3:]).max() > 1e-3


def test_biases_are_where_they_are_asked_for():
    plain, biased = make_attention(), make_attention(qkv_bias=True, out_bias=True)
    assert [layer.b for layer in (plain.q, plain.k, plain.v, plain.o)] == [None] * 4
    biases = [layer.b[...] for layer in (biased.q, biased.k, biased.v, biased.o)]
    chex.assert_shape(biases, [(4, 8), (2, 8), (2, 8), (32,)])


def test_normed_heads_do_not_see_the_scale_of_their_weights():
    attention, x = make_attention(qk_norm_eps=0.0), draw(1, 6, 32)
    before = run(attention, x)
    for layer, factor in ((attention.q, 100.0), (attention.k, 0.01)):
        layer.w[...] = np.asarray(layer.w[...]) * np.float32(factor)
    np.testing.assert_allclose(run(attention, x), before, atol=1e-5)


@pytest.mark.parametrize(("zero_centered", "same"), [(False, 2.0), (True, 1.0)])
def test_norms_of_heads_scale_by_their_weights_or_by_these_and_one(zero_centered, same):
    x = draw(1, 6, 32)
    plain = make_attention(qk_norm_eps=0.0, scale=4 * 8**-0.5)
    normed = make_attention(qk_norm_eps=0.0, zero_centered=zero_centered)
    for attention, scale in ((plain, 1.0), (normed, same)):  # q and k doubled: scores fourfold
        for norm in (attention.q_norm, attention.k_norm):
            norm.scale[...] = np.full(8, scale, np.float32)
    np.testing.assert_allclose(run(normed, x), run(plain, x), atol=1e-5)


def test_scores_are_scaled_by_the_head_width_unless_told():
    assert make_attention().scale == 8**-0.5
    assert make_attention(scale=0.25).scale == 0.25


place = functools.partial(place_tokens, (2, 5))


def test_positions_count_the_real_tokens_of_a_row():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    tokens, _ = place(None, None, mask)
    np.testing.assert_array_equal(tokens.positions_BT, [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(tokens.segments_BT, mask)
    tokens, _ = place(None, None, None)
    np.testing.assert_array_equal(tokens.positions_BT, [range(5)] * 2)
    assert tokens.segments_BT is None


def test_given_positions_are_in_order_where_their_caller_says_so():
    ones = np.ones((2, 5), np.int32)
    assert place(None, None, None)[0].in_order
    assert place(None, ones, None)[0].in_order
    assert not place(ones, None, None)[0].in_order
    assert place(ones, None, None, in_order=True)[0].in_order


def test_positions_go_on_from_those_in_the_cache():
    cache = KVCache.create(1, 2, 12, 1, (2, 2))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    _, cache = place(None, None, mask, cache)
    tokens, _ = place(None, None, None, cache.end())
    np.testing.assert_array_equal(tokens.positions_BT, [range(3, 8), range(5, 10)])


def test_contradictory_inputs_are_refused():
    ones = np.ones((2, 5), np.int32)
    with pytest.raises(ValueError, match="give mask or segment_ids, not both"):
        place(None, ones, ones.astype(bool))
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        place(None, None, None, KVCache.create(1, 2, 4, 1, (2, 2)))
