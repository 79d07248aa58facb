"""8- and 4-bit integers: their errors, and the tensors of GPTQ and AWQ."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprep_jax.quant import dequantize, int4, int8, quantize
from llmprep_jax.quant.int4_formats import from_awq, from_gptq

SHAPES = ((1, 1), (3, 33), (4, 40))  # few, since each is compiled
seeds = st.integers(0, 2**32 - 1)
pack8, pack4 = jax.jit(int8.quantize), jax.jit(int4.quantize, static_argnums=(1, 2, 3))
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def by_tile(packed, x):
    """x w^T of the one tile of all rows."""
    return packed.arrange(x) @ packed.tile(0, packed.shape[0]).T


@given(shape=st.sampled_from(SHAPES), seed=seeds)
def test_int8_is_off_by_half_a_step_at_most(shape, seed):
    w = normal(*shape, seed=seed)
    packed = pack8(w)
    values = np.asarray(dequantize(packed))
    error = np.abs(values - w)
    assert (error <= 0.5001 * np.asarray(packed.scale)[:, None]).all()
    np.testing.assert_allclose(packed.scale, np.abs(w).max(axis=1) / 127, rtol=1e-6)
    np.testing.assert_array_equal(pack8(values).codes, packed.codes)


@pytest.mark.parametrize("symmetric", [False, True])
@given(
    # groups of one, that leave a rest, that are odd, and that are longer than a row
    sizes=st.sampled_from([((1, 1), 3), ((3, 33), 8), ((4, 40), 3), ((4, 40), 128)]),
    seed=seeds,
)
def test_int4_is_off_by_half_a_step_at_most(sizes, symmetric, seed):
    check_int4(*sizes, symmetric, seed)


@pytest.mark.grid
@given(
    shape=st.sampled_from(SHAPES),
    group=st.sampled_from([3, 8, 128]),
    symmetric=st.booleans(),
    seed=seeds,
)
def test_int4_of_any_size_is_off_by_half_a_step_at_most(shape, group, symmetric, seed):
    check_int4(shape, group, symmetric, seed)


def check_int4(shape, group, symmetric, seed):
    w = normal(*shape, seed=seed)
    packed = pack4(w, group, symmetric, "float32")
    step = np.asarray(packed.scale).repeat(packed.group, axis=1)[:, : shape[1]]
    # the zero is rounded too
    limit = 0.5001 if symmetric else 1.0001
    assert (np.abs(np.asarray(dequantize(packed)) - w) <= limit * step + 1e-6).all()


@pytest.mark.parametrize("lowest", [-15, -6, 0])
def test_int4_is_exact_where_a_group_is_sixteen_even_steps(lowest):
    w = np.arange(lowest, lowest + 16, dtype=np.float32)[None] / 2
    np.testing.assert_array_equal(dequantize(pack4(w, 16)), w)


@pytest.mark.parametrize(("inputs", "group"), [(40, 8), (33, 8), (36, 3), (36, 8)])
def test_tiles_have_the_inputs_in_the_order_of_arrange(inputs, group):
    packed, x = pack4(normal(4, inputs), group), normal(2, inputs)
    values = np.asarray(dequantize(packed))
    np.testing.assert_allclose(by_tile(packed, x), x @ values.T, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_weights_stay_zero_in_integers(symmetric):
    w = normal(4, 256)
    w[1] = w[2, 3] = 0
    for packed in (pack4(w, 128, symmetric), pack8(w)):
        values = np.asarray(dequantize(packed))
        assert not values[1].any()
        assert values[2, 3] == 0


def test_bits_a_parameter_of_integers():
    w = np.zeros((512, 1024), np.float32)
    bits = lambda packed: 8 * packed.num_bytes / w.size  # noqa: E731
    assert bits(pack8(w)) == 8 + 32 / 1024
    assert bits(pack4(w, 128, True)) == 4 + 16 / 128
    assert bits(pack4(w)) == 4 + 24 / 128


def pack_int32(rows, order=tuple(range(8))):
    """Eight numbers of a list an int32: the one at order[i] in bits 4i to 4i + 3."""
    packed = []
    for row in rows:
        words = []
        for at in range(0, len(row), 8):
            word = 0
            for i, place in enumerate(order):
                word |= int(row[at + place]) << (4 * i)
            words.append(word)
        packed.append(words)
    return np.array(packed, np.uint32).view(np.int32)


def numbers(inputs, outs, groups):
    rng = np.random.default_rng(0)
    codes, zero = rng.integers(0, 16, (inputs, outs)), rng.integers(0, 16, (groups, outs))
    return codes, zero, rng.uniform(0.01, 0.1, (groups, outs)).astype(np.float16)


def expected(codes, zero, scales, group_of):
    scales = scales.astype(np.float32)
    return ((codes - zero[group_of]) * scales[group_of]).T


@pytest.mark.parametrize("order", ["side by side", "by activation"])
@pytest.mark.parametrize("v2", [False, True])
def test_tensors_of_gptq_are_read(order, v2):
    codes, zero, scales = numbers(32, 16, 4)
    group_of = np.arange(32) // 8
    if order == "by activation":
        group_of = np.random.default_rng(1).permutation(group_of)
    qweight = pack_int32(codes.T).T
    qzeros = pack_int32(zero)
    if not v2:
        qzeros = (qzeros.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    packed = from_gptq(qweight, qzeros, scales, group_of.astype(np.int32), v2=v2)
    assert (packed.group_of is None) == (order == "side by side")
    values, x = np.asarray(dequantize(packed)), normal(3, 32)
    np.testing.assert_allclose(values, expected(codes, zero, scales, group_of), rtol=1e-6)
    np.testing.assert_allclose(by_tile(packed, x), x @ values.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("column", [0, 3, 7, 15])
def test_a_zero_of_0_in_gptqs_first_version_borrows_from_its_neighbour(column):
    codes, zero, scales = numbers(8, 16, 1)
    zero[:, column] = 0
    qzeros = (pack_int32(zero).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    packed = from_gptq(pack_int32(codes.T).T, qzeros, scales)
    group_of = np.zeros(8, int)
    np.testing.assert_allclose(
        dequantize(packed), expected(codes, zero, scales, group_of), rtol=1e-6
    )


def test_tensors_of_awq_are_read():
    codes, zero, scales = numbers(32, 24, 4)
    packed = from_awq(pack_int32(codes, AWQ_OUTPUTS), pack_int32(zero, AWQ_OUTPUTS), scales)
    np.testing.assert_allclose(
        dequantize(packed), expected(codes, zero, scales, np.arange(32) // 8), rtol=1e-6
    )


def test_tensors_that_do_not_fit_are_one_line():
    codes, zero, scales = numbers(32, 16, 4)
    qweight, qzeros = pack_int32(codes.T).T, pack_int32(zero)
    with pytest.raises(ValueError, match=r"no 4-bit GPTQ tensors .* scales float16 \(4, 15\)"):
        from_gptq(qweight, qzeros, scales[:, 1:])
    with pytest.raises(ValueError, match=r"no 4-bit AWQ tensors of one weight: qweight int32"):
        from_awq(qweight, qzeros, scales)
    with pytest.raises(ValueError, match=r"from 0 to 4; it must name one of 4 groups"):
        from_gptq(qweight, qzeros, scales, np.arange(32) // 7)


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match="group is 0; it must be a whole number of at least 1"):
        int4.quantize(normal(2, 2), 0)
    with pytest.raises(
        ValueError, match="unknown kind 'int5' of packed weights; the kinds are nf4"
    ):
        quantize(normal(2, 2), "int5")
    with pytest.raises(ValueError, match="give a matrix of floats"):
        int8.quantize(normal(4))
