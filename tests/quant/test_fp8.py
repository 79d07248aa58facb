"""8-bit floats in blocks: errors, ragged shapes, and the pair of tensors that DeepSeek releases."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprep_jax.quant import dequantize, fp8

# few, since each is compiled: one number, ragged blocks, whole ones
sizes = st.sampled_from([((1, 1), 3), ((7, 20), 3), ((7, 20), 8), ((16, 8), 8)])
pack = jax.jit(fp8.quantize, static_argnums=1)
rows = jax.jit(lambda packed, start, count: packed.rows(start, count), static_argnums=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(sizes=sizes, seed=st.integers(0, 2**32 - 1))
def test_fp8_keeps_three_bits_of_mantissa(sizes, seed):
    shape, block = sizes
    w = normal(*shape, seed=seed)
    packed = pack(w, block)
    scale = np.kron(packed.scale_inv, np.ones((block, block)))[: shape[0], : shape[1]]
    # half a unit of 2^-3 of the number, or of the smallest subnormal, 2^-9
    limit = np.maximum(np.abs(w) / 16, scale * 2.0**-10) * 1.001
    assert (np.abs(np.asarray(dequantize(packed)) - w) <= limit).all()


def test_the_largest_number_of_a_block_is_exact():
    w = normal(200, 300)
    packed = pack(w)
    assert packed.scale_inv.shape == (2, 3)
    values = np.asarray(dequantize(packed))
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
        np.testing.assert_array_equal(rows(packed, 100, 30), expected[100:130])


def test_bits_a_parameter_of_fp8():
    w = np.zeros((512, 1024), np.float32)
    assert 8 * pack(w).num_bytes / w.size == 8 + 32 / 128**2


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
