"""8-bit floats in blocks: errors, ragged shapes, and the pair of tensors that DeepSeek releases."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprep_jax.quant import dequantize, fp8

shapes = st.sampled_from([(1, 1), (7, 20), (16, 8)])  # few, since each is compiled
pack, unpack = jax.jit(fp8.quantize, static_argnums=1), jax.jit(dequantize)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@given(shape=shapes, block=st.sampled_from([3, 8]), seed=st.integers(0, 2**32 - 1))
def test_fp8_keeps_three_bits_of_mantissa(shape, block, seed):
    w = normal(*shape, seed=seed)
    packed = pack(w, block)
    scale = np.kron(packed.scale_inv, np.ones((block, block)))[: shape[0], : shape[1]]
    # half a unit of 2^-3 of the number, or of the smallest subnormal, 2^-9
    limit = np.maximum(np.abs(w) / 16, scale * 2.0**-10) * 1.001
    assert (np.abs(unpack(packed) - w) <= limit).all()


def test_the_largest_number_of_a_block_is_exact():
    w = normal(200, 300)
    packed = fp8.quantize(w)
    assert packed.scale_inv.shape == (2, 3)
    values, w = np.asarray(dequantize(packed)), np.asarray(w)
    at = np.unravel_index(np.abs(w[128:, 256:]).argmax(), (72, 44))
    np.testing.assert_allclose(values[128:, 256:][at], w[128:, 256:][at], rtol=1e-6)


@pytest.mark.parametrize("shape", [(576, 256), (130, 7), (1, 129)])
def test_a_released_pair_is_multiplied_block_by_block(shape):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale_inv = rng.uniform(0.5, 2, [-(-n // 128) for n in shape]).astype(np.float32)
    expected = np.array(weight, np.float32)
    for i in range(shape[0]):
        expected[i] *= scale_inv[i // 128, np.arange(shape[1]) // 128]
    packed = fp8.from_tensors(weight, scale_inv)
    np.testing.assert_array_equal(dequantize(packed), expected)
    if shape[0] > 128:
        np.testing.assert_array_equal(packed.rows(100, 30), expected[100:130])


def test_bits_a_parameter_of_fp8():
    assert 8 * fp8.quantize(normal(512, 1024)).num_bytes / (512 * 1024) == 8 + 32 / 128**2


def test_what_does_not_fit_is_one_line():
    weight = jnp.zeros((576, 256), jnp.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"weight_scale_inv is \(4, 2\) for a weight of \(576, 256\).*\(5, 2\)"
    ):
        fp8.from_tensors(weight, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="it must be a matrix of float8_e4m3fn"):
        fp8.from_tensors(jnp.zeros((2, 2)), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="block is -1; it must be a whole number"):
        fp8.quantize(jnp.ones((2, 2)), -1)
