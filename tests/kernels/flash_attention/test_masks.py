"""What may see what, as pictures; and that blocks which may not are told apart by their ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention.masks import Places, Rule, may_see, ranges, visible
from tests.kernels.flash_attention.problems import Problem


def row(*values):
    return jnp.array([values], jnp.int32)


def picture(q, k=None, **rule):
    k = q if k is None else k
    sizes = [jax.tree.leaves(side)[0].shape[1] for side in (q, k)]
    seen_BTS = visible(q, k, Rule(**rule), *map(jnp.arange, sizes))
    return ["".join("x" if seen else "." for seen in keys) for keys in np.asarray(seen_BTS)[0]]


def test_a_token_sees_itself_and_what_is_before_it():
    assert picture(Places(row(0, 1, 2, 3))) == ["x...", "xx..", "xxx.", "xxxx"]
    by_column = visible(Places(), Places(), Rule(), jnp.arange(2, 4), jnp.arange(4))
    assert np.asarray(by_column).astype(int).tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]]]


def test_positions_need_not_be_in_order():
    assert picture(Places(row(2, 0, 3, 1))) == ["xx.x", ".x..", "xxxx", ".x.x"]


def test_a_window_counts_the_query_itself():
    tokens = Places(row(0, 1, 2, 3, 4))
    assert picture(tokens, window=2) == ["x....", "xx...", ".xx..", "..xx.", "...xx"]
    assert picture(tokens, window=1) == ["x....", ".x...", "..x..", "...x.", "....x"]


def test_without_causality_a_window_reaches_both_ways():
    tokens = Places(row(0, 1, 2, 3))
    assert picture(tokens, window=2, causal=False) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert visible(tokens, tokens, Rule(causal=False), *[jnp.arange(4)] * 2) is None


def test_segments_see_themselves_alone_and_padding_is_seen_by_none():
    tokens = Places(row(0, 1, 0, 1, 2, 0), row(1, 1, 2, 2, 2, 0))
    wanted = ["x.....", "xx....", "..x...", "..xx..", "..xxx.", "......"]
    assert picture(tokens) == wanted
    assert picture(tokens, causal=False) == ["xx....", "xx....", *["..xxx."] * 3, "......"]


def test_tokens_of_a_span_see_each_other_within_segment_and_window():
    places = row(0, 1, 2, 3, 4), row(1, 1, 1, 1, 1), row(0, 7, 7, 7, 0)
    assert picture(Places(*places)) == ["x....", "xxxx.", "xxxx.", "xxxx.", "xxxxx"]
    assert picture(Places(*places), window=2) == ["x....", "xxxx.", ".xxx.", "..xx.", "...xx"]
    two = Places(places[0], row(1, 1, 2, 2, 2), places[2])
    assert picture(two) == ["x....", "xx...", "..xx.", "..xx.", "..xxx"]


def test_queries_of_one_document_see_only_the_filled_slots_of_a_cache():
    keys = Places(row(4, 5, 2, 3), row(1, 1, 1, 0))  # a ring whose oldest slot is still empty
    assert picture(Places(row(5), row(1)), keys) == ["xxx."]


PROBLEMS = [
    Problem(T=41, values=values, window=window, causal=causal)
    for values in ("", "p", "s", "e", "i", "r", "rsi")
    for window, causal in ((None, True), (6, True), (6, False))
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_blocks_that_are_left_out_hold_no_visible_pair_and_most_others_do(problem):
    options = {name: x if x is None else jnp.asarray(x) for name, x in problem.options().items()}
    q, k = [
        Places(*[options.get(f"{side}_{name}") for name in ("positions", "segments", "spans")])
        for side in "qk"
    ]
    rule, columns, size = Rule(problem.causal, problem.window), jnp.arange(41), 5
    seen = np.asarray(visible(q, k, rule, columns, columns))
    seen = np.broadcast_to(seen, (problem.B, 41, 41))
    padded = np.pad(seen, ((0, 0), (0, 4), (0, 4))).reshape(problem.B, 9, 5, 9, 5)
    wanted = padded.any((2, 4))
    found = np.asarray(may_see(ranges(q, 41, size), ranges(k, 41, size), rule))
    found = np.broadcast_to(found, wanted.shape)
    assert not (wanted & ~found).any()
    if problem.values in ("", "p", "s", "e"):
        np.testing.assert_array_equal(found, wanted)
