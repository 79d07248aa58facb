"""Attention against a float64 loop, and what may see what as pictures."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn import attention as layers
from llmprep_jax.nn.attention import (
    NO_WINDOW,
    Attention,
    Tokens,
    attend_in_order,
    place_tokens,
    visible,
)
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import rope_angles, rope_frequencies
from tests.grids import cases
from tests.programs import equations
from tests.random_modules import random_module

attend = jax.jit(layers.attend, static_argnames=("scale", "soft_cap"))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(num_heads=4, num_kv_heads=2, T=5, S=7, B=2, H=8):
    return (
        draw(B, T, num_heads, H),
        draw(B, num_kv_heads, S, H, seed=1),
        draw(B, num_kv_heads, S, H, seed=2),
    )


def row(*values):
    return np.array([values], np.int32)


def picture(seen_BTS):
    return ["".join("x" if seen else "." for seen in keys) for keys in np.asarray(seen_BTS)[0]]


def slow_attention(q_BTNH, k_BKSH, v_BKSH, seen_BTS, scale, soft_cap=None):
    """One query, head and row at a time, in float64; query head n reads key head n // G."""
    q, k, v, seen = [np.asarray(x) for x in (q_BTNH, k_BKSH, v_BKSH, seen_BTS)]
    q, k, v = [x.astype(np.float64) for x in (q, k, v)]
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = k[b, n // group] @ q[b, t, n] * scale
        if soft_cap is not None:
            scores = np.tanh(scores / soft_cap) * soft_cap
        weights = np.where(seen[b, t], np.exp(scores - scores.max()), 0)
        out[b, t, n] = weights @ v[b, n // group] / weights.sum()
    return out


HEADS = cases(
    itertools.product([(4, 4), (4, 2), (6, 2), (4, 1)], [None, 0.7]),
    fast=[((4, 4), None), ((6, 2), 0.7), ((4, 1), None)],
)


@pytest.mark.parametrize(("heads", "soft_cap"), HEADS, ids=str)
def test_attention_is_a_softmax_over_the_visible_keys(heads, soft_cap):
    q, k, v = qkv(*heads)
    seen = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    seen[:, :, 0] = True
    found = attend(q, k, v, seen, scale=0.3, soft_cap=soft_cap)
    np.testing.assert_allclose(found, slow_attention(q, k, v, seen, 0.3, soft_cap), atol=1e-5)


def test_grouped_queries_are_multi_head_attention_with_shared_keys():
    q, k, v = qkv(6, 2)
    seen = np.ones((2, 5, 7), bool)
    shared = [np.repeat(x, 3, axis=1) for x in (k, v)]
    found = attend(q, k, v, seen, scale=1.0)
    np.testing.assert_allclose(found, attend(q, *shared, seen, scale=1.0), atol=1e-6)


def test_neighbouring_query_heads_share_a_key_head():
    q, k, v = qkv(4, 2, H=2)
    v = np.zeros_like(v)
    v[:, 1] = 1.0
    found = attend(q, k, v, np.ones((2, 5, 7), bool), scale=1.0)
    np.testing.assert_allclose(found[0, 0, :, 0], [0, 0, 1, 1], atol=1e-6)


def test_a_soft_cap_bounds_scores_and_leaves_small_ones_alone():
    q, k, v = qkv()
    seen = np.ones((2, 5, 7), bool)
    plain = attend(q, k, v, seen, scale=1.0)
    np.testing.assert_allclose(attend(q, k, v, seen, scale=1.0, soft_cap=1e4), plain, atol=1e-5)
    capped = attend(1e4 * q, k, v, seen, scale=1.0, soft_cap=1e-3)  # all scores are +- 0.001
    np.testing.assert_allclose(
        capped, np.broadcast_to(v.mean(2).repeat(2, 1)[:, None], q.shape), atol=2e-3
    )


def test_a_query_that_sees_nothing_gives_a_finite_mean_and_finite_gradients():
    q, k, v = qkv()
    blind = np.zeros((2, 5, 7), bool)
    found = attend(q, k, v, blind, scale=1.0)
    np.testing.assert_allclose(found[0, 0, 0], v[0, 0].mean(0), atol=1e-6)
    total = lambda *x: attend(*x, blind, scale=1.0).sum()  # noqa: E731
    chex.assert_tree_all_finite(jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v))


def test_softmax_is_float32_for_bf16_operands():
    q, k, v = [x.astype(jnp.bfloat16) for x in qkv(T=1, S=512, B=1)]
    seen = np.ones((1, 1, 512), bool)
    found = attend(q, k, v, seen, scale=0.1)
    exact = slow_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), seen, 0.1)
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float32) - exact).max() < 2e-3


def test_a_token_sees_itself_and_what_is_before_it():
    tokens = Tokens(row(0, 1, 2, 3))
    assert picture(visible(tokens, tokens)) == ["x...", "xx..", "xxx.", "xxxx"]


def test_a_window_counts_the_query_itself():
    tokens = Tokens(row(0, 1, 2, 3, 4))
    expected = ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert picture(visible(tokens, tokens, 2)) == expected
    assert picture(visible(tokens, tokens, jnp.int32(2))) == expected
    assert picture(visible(tokens, tokens, 1)) == ["x....", ".x...", "..x..", "...x.", "....x"]
    for endless in (None, NO_WINDOW):
        assert picture(visible(tokens, tokens, endless))[-1] == "xxxxx"


def test_without_causality_a_window_reaches_both_ways():
    tokens = Tokens(row(0, 1, 2, 3))
    assert picture(visible(tokens, tokens, 2, causal=False)) == ["xx..", "xxx.", ".xxx", "..xx"]


def test_segments_see_themselves_alone_and_padding_is_seen_by_none():
    tokens = Tokens(row(0, 1, 0, 1, 2, 0), row(1, 1, 2, 2, 2, 0))
    assert picture(visible(tokens, tokens)) == [
        "x.....",
        "xx....",
        "..x...",
        "..xx..",
        "..xxx.",
        "......",
    ]


def test_queries_of_one_document_see_only_the_filled_slots_of_a_cache():
    keys = Tokens(row(4, 5, 2, 3), row(1, 1, 1, 0))  # a ring whose oldest slot is still empty
    assert picture(visible(Tokens(row(5)), keys)) == ["xxx."]


@pytest.mark.parametrize("window", [None, 40, jnp.int32(40)], ids=["all", "window", "value"])
def test_attention_by_query_blocks_is_attention(window):
    T = 300  # three blocks
    q, k, v = qkv(T=T, S=T, B=1)
    # padding inside a document: its window of positions reaches over more columns
    segments = row(*[1] * 80, *[2] * 40, *[0] * 60, *[2] * 100, *[0] * 20)
    positions = row(*range(80), *range(40), *[0] * 60, *range(40, 140), *[0] * 20)

    @jax.jit
    def run(q, k, v, tokens):
        found = attend_in_order(q, k, v, tokens, window, scale=0.3)
        return found, layers.attend(q, k, v, visible(tokens, tokens, window), scale=0.3)

    found, expected = run(q, k, v, Tokens(positions, segments))
    real = np.asarray(segments[0]) > 0
    np.testing.assert_allclose(found[:, real], expected[:, real], atol=1e-6)


def test_long_attention_has_at_most_eight_blocks():
    q, k, v = qkv(T=2048, S=2048, B=1, num_heads=1, num_kv_heads=1, H=2)
    tokens = Tokens(jnp.arange(2048)[None])
    text = str(jax.make_jaxpr(lambda *x: attend_in_order(*x, tokens, scale=1.0))(q, k, v))
    assert text.count("dot_general[") == 16


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


def test_scores_are_scaled_by_the_head_width_unless_told():
    assert make_attention().scale == 8**-0.5
    assert make_attention(scale=0.25).scale == 0.25


place = functools.partial(place_tokens, np.zeros((2, 5), np.int32))


def test_positions_count_the_real_tokens_of_a_row():
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    tokens, _ = place(None, None, mask)
    np.testing.assert_array_equal(tokens.positions_BT, [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(tokens.segments_BT, mask)
    tokens, _ = place(None, None, None)
    np.testing.assert_array_equal(tokens.positions_BT, [range(5)] * 2)
    assert tokens.segments_BT is None


def test_positions_go_on_from_those_in_the_cache():
    cache = KVCache.create(1, 2, 12, 1, 2)
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    _, cache = place(None, None, mask, cache)
    tokens, _ = place(None, None, None, cache.end())
    np.testing.assert_array_equal(tokens.positions_BT, [range(3, 8), range(5, 10)])


def test_contradictory_inputs_are_refused():
    ones = np.ones((2, 5), np.int32)
    with pytest.raises(ValueError, match="give mask or segment_ids, not both"):
        place(None, ones, ones.astype(bool))
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        place(None, None, None, KVCache.create(1, 2, 4, 1, 2))
