"""What the table of attention counts: pairs that see each other, FLOPs and bytes, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import attention, attention_contenders
from experiments.bench.checks import Absent, Unfit
from experiments.bench.shapes import SHAPES, Shape
from llmprep_jax.kernels import flash_attention

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
        attention_contenders.ours("reference", SHAPES["llama-3-8b"], "forward", "bfloat16")
    with pytest.raises(Absent, match="not here: .*nothing_of_this_name"):
        attention_contenders.ours("nothing_of_this_name", SMALL, "forward", "bfloat16")


@pytest.mark.parametrize(
    ("name", "asked"),
    [("mosaic_latents", None), ("pallas_tpu on latents", "pallas_tpu"), ("chunked", "chunked")],
)
def test_latents_are_keys_and_values_for_kernels_that_read_them_once(name, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(
        flash_attention, "attention", lambda q, k, v, **options: calls.append((v, options))
    )
    shape = Shape(1, 3, 2, 1, 4, 2, latent=True, works=("decode",))
    z = jnp.arange(12.0).reshape(1, 3, 1, 4)
    attention.function(name, shape, "decode")(jnp.ones((1, 1, 2, 4)), z, None)
    ((v, options),) = calls
    assert options["impl"] == asked
    assert options["q_positions"].tolist() == [[2]]
    assert options["k_positions"].tolist() == [[0, 1, 2]]
    if name == "chunked":
        assert np.ravel(v).tolist() == [0, 1, 4, 5, 8, 9]
    else:
        assert v is None
        assert options["value_width"] == 2


def test_a_kernel_of_latents_is_asked_whether_it_can_read_them_so():
    reason = attention.refusal(
        "mosaic_latents", SHAPES["deepseek-v3-decode"], "bfloat16", backward=False
    )
    assert reason == "it is for Hopper GPUs, not cpu"  # and not that values are no part of keys


@pytest.mark.parametrize("name", SHAPES)
def test_a_small_shape_keeps_what_makes_it_what_it_is(name):
    full, small = SHAPES[name], SHAPES[name].shrunk(32)
    assert small.N % small.K == 0
    kept = ("H", "U", "causal", "latent", "works")
    assert all(getattr(small, field) == getattr(full, field) for field in kept)
    assert (small.N > small.K) == (full.N > full.K)
    assert small.window is None or small.window < small.T
