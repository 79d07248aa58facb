"""Norms: literal values, the identities between them, and where the cast stands."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.norm import LayerNorm, RMSNorm


def draw(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, shape), dtype)


def rms(dim, scale=None, **options):
    norm = RMSNorm(dim, **options, rngs=nnx.Rngs(0))
    if scale is not None:
        norm.scale[...] = jnp.asarray(scale, norm.scale.dtype)
    return norm


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    found = rms(2, [1.0, 10.0], eps=0.0)(jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(found, [3 / 12.5**0.5, 40 / 12.5**0.5], rtol=1e-6)


def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation():
    norm = LayerNorm(2, eps=0.0, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.array([2.0, 3.0]), jnp.array([0.5, 0.25])
    np.testing.assert_allclose(norm(jnp.array([1.0, 5.0])), [-1.5, 3.25], rtol=1e-6)


def test_layer_norm_is_rms_norm_of_the_centred_input():
    x = draw(4, 32)
    centred = x - x.mean(-1, keepdims=True)
    layer = LayerNorm(32, eps=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(x), rms(32, eps=1e-5)(centred), atol=1e-6)
    assert np.abs(layer(x) - rms(32, eps=1e-5)(x)).max() > 0.1


def test_norms_do_not_see_the_scale_of_their_input():
    x = draw(4, 32)
    np.testing.assert_allclose(rms(32)(1000 * x), rms(32)(x), atol=1e-5)


def test_a_zero_centred_norm_begins_as_a_plain_one():
    x = draw(4, 32)
    np.testing.assert_array_equal(rms(32, zero_centered=True)(x), rms(32)(x))


def test_the_epsilon_stands_under_the_root():
    assert float(rms(4, eps=4.0)(jnp.zeros(4))[0]) == 0.0
    np.testing.assert_allclose(rms(1, eps=3.0)(jnp.ones(1)), [0.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_keep_the_dtype_of_their_input(dtype):
    x = draw(4, 32, dtype=dtype)
    for norm in (rms(32), rms(32, zero_centered=True), LayerNorm(32, rngs=nnx.Rngs(0))):
        assert norm(x).dtype == x.dtype


def test_statistics_are_float32_for_bf16_inputs():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(64.0)
    # a bf16 sum of 4095 ones would stop at 256
    expected = 1 / np.sqrt((4095 + 4096) / 4096)
    assert float(rms(4096)(x)[0, 1]) == pytest.approx(expected, rel=4e-3)


def test_llama_casts_before_it_scales_and_gemma_after():
    x, scale = draw(1, 64, dtype=jnp.bfloat16), np.linspace(0.9, 1.1, 64)
    exact = np.asarray(rms(64, scale)(x.astype(jnp.float32)))
    llama = rms(64, scale)(x)
    gemma = rms(64, scale - 1.0, zero_centered=True)(x)
    np.testing.assert_array_equal(gemma, jnp.asarray(exact, jnp.bfloat16))
    once = rms(64)(x)
    np.testing.assert_array_equal(llama, once * jnp.asarray(scale, jnp.bfloat16))
    assert np.any(np.asarray(llama != gemma))
