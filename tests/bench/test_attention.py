"""What the table of attention counts: pairs that see each other, FLOPs and bytes, by hand."""

import pytest

from experiments.bench import attention
from experiments.bench.attention import SHAPES, Shape
from experiments.bench.checks import Absent, Unfit

SMALL = Shape(2, 4, 6, 3, 10, 8)


def test_pairs_are_counted_once():
    assert SMALL.pairs() == 1 + 2 + 3 + 4
    assert Shape(1, 4, 1, 1, 1, 1, window=2).pairs() == 1 + 2 + 2 + 2
    assert Shape(1, 4, 1, 1, 1, 1, causal=False).pairs() == 16


def test_flops_are_those_of_two_products_and_of_five():
    assert SMALL.flops("forward") == 2 * 10 * 6 * 2 * (10 + 8)
    assert SMALL.flops("backward") == 2 * 10 * 6 * 2 * (3 * 10 + 2 * 8)
    assert SMALL.flops("decode") == 2 * 4 * 6 * 2 * (10 + 8)
    # published speeds count 4 B N T^2 H / 2, and 2.5 times that backward
    d128 = SHAPES["d128"]
    published = 2 * 2 * 16 * 8192**2 * 128
    assert d128.flops("forward") == pytest.approx(published, rel=2e-4)
    assert d128.flops("backward") == pytest.approx(2.5 * published, rel=2e-4)


def test_bytes_are_those_of_each_array_once():
    queries, keys = 2 * 4 * 6 * (10 + 8), 2 * 4 * 3 * (10 + 8)
    assert SMALL.bytes("forward") == 2 * (queries + keys)
    assert SMALL.bytes("backward", itemsize=4) == 4 * 2 * (queries + keys)
    assert SMALL.bytes("decode") == 2 * (queries // 4 + keys)
    latent = Shape(2, 4, 6, 1, 10, 8, latent=True)
    assert latent.bytes("decode") == 2 * (2 * 6 * 18 + 2 * 4 * 10)


def test_a_contender_that_cannot_do_a_shape_says_why():
    with pytest.raises(Unfit, match="8 GiB or more"):
        attention.ours("reference", SHAPES["llama-3-8b"], "forward", "bfloat16")
    with pytest.raises(Absent, match="not here: .*nothing_of_this_name"):
        attention.ours("nothing_of_this_name", SMALL, "forward", "bfloat16")


@pytest.mark.parametrize("name", SHAPES)
def test_a_small_shape_keeps_what_makes_it_what_it_is(name):
    full, small = SHAPES[name], SHAPES[name].shrunk(32)
    assert small.N % small.K == 0
    kept = ("H", "U", "causal", "latent", "works")
    assert all(getattr(small, field) == getattr(full, field) for field in kept)
    assert (small.N > small.K) == (full.N > full.K)
    assert small.window is None or small.window < small.T
