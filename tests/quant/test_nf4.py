"""NF4 and FP4 against bitsandbytes' golden vectors, and the laws of 4-bit blocks."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprep_jax.quant import dequantize, nf4
from llmprep_jax.quant.bitsandbytes_format import from_tensors, to_tensors

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "nf4.npz")
# kinds differ in their numbers alone, so halfway between two of them there are both
golden = pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("ragged", "nf4"), ("odd", "fp4"), ("halfway", "nf4"), ("halfway", "fp4")],
        pytest.param("ragged", "fp4", marks=pytest.mark.grid),
        pytest.param("odd", "nf4", marks=pytest.mark.grid),
    ],
)
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
quantize = jax.jit(nf4.quantize, static_argnums=(1, 2, 3))
rows = jax.jit(lambda packed, start, count: packed.rows(start, count), static_argnums=2)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@jax.jit
def by_tile(packed, x):
    """x w^T of the one tile of all rows."""
    return packed.arrange(x) @ packed.tile(0, packed.shape[0]).T


@kinds
def test_code_books_are_those_of_bitsandbytes_bit_for_bit(kind):
    np.testing.assert_array_equal(nf4.CODES[kind], GOLDEN[f"map/{kind}"], strict=True)
    np.testing.assert_array_equal(nf4.NESTED_MAP, GOLDEN["map/nested"], strict=True)


@golden
def test_bytes_and_values_are_those_of_bitsandbytes(name, kind):
    packed = quantize(jnp.asarray(GOLDEN[f"{name}/w"]), kind, 64, False)
    np.testing.assert_array_equal(packed.codes[:, None], GOLDEN[f"{name}/{kind}/codes"])
    np.testing.assert_array_equal(packed.absmax, GOLDEN[f"{name}/{kind}/absmax"])
    np.testing.assert_array_equal(dequantize(packed), GOLDEN[f"{name}/{kind}/values"])


@golden
def test_double_quantisation_is_that_of_bitsandbytes(name, kind):
    packed = quantize(jnp.asarray(GOLDEN[f"{name}/w"]), kind)
    expected = {key: GOLDEN[f"{name}/{kind}/nested/{key}"] for key in ("absmax", "nested_absmax")}
    offset = GOLDEN[f"{name}/{kind}/nested/offset"]
    np.testing.assert_array_equal(packed.codes[:, None], GOLDEN[f"{name}/{kind}/codes"])
    np.testing.assert_allclose(packed.nested_absmax, expected["nested_absmax"], rtol=1e-6)
    np.testing.assert_allclose(packed.offset, offset, rtol=1e-6)
    # its CPU kernel takes the second nearest of the 256 numbers now and then
    values = [
        nf4.NESTED_MAP[np.asarray(x)] * np.asarray(packed.nested_absmax).repeat(256)[: x.size]
        for x in (packed.absmax, expected["absmax"])
    ]
    apart = np.abs(values[0] - values[1]) > 1e-6
    assert apart.mean() < 0.01


@golden
def test_stored_bytes_of_bitsandbytes_give_its_values(name, kind):
    key = f"{name}/{kind}"
    packed = nf4.Block4(
        jnp.asarray(GOLDEN[f"{key}/codes"][:, 0]),
        *(jnp.asarray(GOLDEN[f"{key}/nested/{x}"]) for x in ("absmax", "nested_absmax", "offset")),
        GOLDEN[f"{name}/w"].shape,
        kind,
        64,
    )
    np.testing.assert_allclose(dequantize(packed), GOLDEN[f"{key}/nested/values"], rtol=1e-6)


@pytest.mark.parametrize("codes", [*nf4.CODES.values(), nf4.NESTED_MAP], ids=[*nf4.CODES, "nested"])
def test_halfway_between_two_numbers_is_the_lower(codes):
    lower, upper = np.sort(codes)[:-1], np.sort(codes)[1:]
    index = jax.jit(functools.partial(nf4.nearest, codes=codes))((lower + upper) / 2)
    np.testing.assert_array_equal(codes[index], lower)


def test_a_block_of_zeros_is_exact_zeros():
    packed = quantize(jnp.zeros((2, 64)), "nf4", 64, False)
    assert set(np.asarray(packed.codes).tolist()) == {0x77}
    assert not np.any(dequantize(packed))


def test_the_even_element_is_in_the_high_half():
    packed = quantize(jnp.array([[-1.0, 1.0, 0.0, 1.0]]), "nf4", 64, False)
    assert np.asarray(packed.codes).tolist() == [0x0F, 0x7F]


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_a_parameter_on_live_buffers(double, bits):
    w = normal(1024, 1024)
    packed = quantize(w, "nf4", 64, double)
    live = sum(x.nbytes for x in jax.tree.leaves(packed))
    assert live == packed.num_bytes
    assert 8 * live / w.size == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("double", [False, True])
def test_the_error_on_a_normal_distribution(double):
    w = normal(1024, 1024)
    error = np.asarray(dequantize(quantize(w, "nf4", 64, double))) - w
    assert np.sqrt(np.square(error).mean()) == pytest.approx(0.0919, abs=0.001)


@kinds
@given(
    shape=st.sampled_from([(1, 1), (3, 33), (4, 64)]),  # few, since each is compiled
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_what_was_unpacked_changes_nothing(kind, shape, scale, seed):
    w = normal(*shape, seed=seed) * np.float32(scale)
    values = dequantize(quantize(w, kind, 8, False))
    np.testing.assert_array_equal(dequantize(quantize(values, kind, 8, False)), values)
    # half the widest gap between codes
    assert (np.abs(np.asarray(values) - w) <= 0.1668 * np.abs(w).max()).all()


# rows of whole blocks, more than share a magnitude; that share a block; and of an odd number
@pytest.mark.parametrize(
    "shape", [(128, 48), (8, 24), (64, 5), pytest.param((12, 64), marks=pytest.mark.grid)]
)
def test_rows_and_tiles_are_those_of_the_whole(shape):
    packed = quantize(normal(*shape), "nf4", 16)
    whole, step = np.asarray(dequantize(packed)), packed.row_step
    for start in range(0, shape[0], step):
        part = rows(packed, start, min(step, shape[0] - start))
        np.testing.assert_array_equal(part, whole[start : start + step])
    x = normal(3, shape[1])
    np.testing.assert_allclose(by_tile(packed, x), x @ whole.T, atol=1e-5)


def test_a_stack_is_a_vmap_of_one():
    w = normal(3, 8, 48)
    stack = jax.jit(jax.vmap(functools.partial(nf4.quantize, double=True)))(w)
    assert stack.stacked == (3,)
    np.testing.assert_allclose(dequantize(stack)[1], dequantize(quantize(w[1])), atol=1e-6)


@kinds
@pytest.mark.parametrize("double", [False, True])
def test_tensors_of_bitsandbytes_are_written_and_read(kind, double):
    packed = quantize(normal(24, 40), kind, 64, double)
    tensors = to_tensors(packed, "x.weight")
    names = {"x.weight", "x.weight.absmax", "x.weight.quant_map"}
    names |= {"x.weight.nested_absmax", "x.weight.nested_quant_map"} if double else set()
    assert set(tensors) == names | {f"x.weight.quant_state.bitsandbytes__{kind}"}
    assert tensors["x.weight"].shape == (480, 1)
    again = from_tensors(tensors, "x.weight")
    assert again.settings() == packed.settings()
    chex.assert_trees_all_equal(again.arrays(), jax.device_get(packed.arrays()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("w.absmax"), "the tensor w.absmax is missing"),
        (lambda t: t.update({"w": t["w"][:-1]}), "w is uint8 of 31 elements; uint8 of 32"),
        (lambda t: t.update({"w.quant_map": t["w.quant_map"] + 1}), "not the code book"),
        (lambda t: t.pop("w.quant_state.bitsandbytes__nf4"), "0 tensors .quant_state"),
        (
            lambda t: t.update({"w.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}),
            "is no JSON text",
        ),
    ],
)
def test_damaged_tensors_are_one_line(change, message):
    tensors = to_tensors(quantize(normal(1, 64)), "w")
    change(tensors)
    with pytest.raises(ValueError, match=message) as caught:
        from_tensors(tensors, "w")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((normal(2, 2), "nf5"), "unknown 4-bit kind 'nf5'; the kinds are nf4, fp4"),
        ((normal(2, 2), "nf4", 63), "block is 63; it must be an even number"),
        ((normal(2, 2), "nf4", 0), "block is 0; it must be an even number"),
        ((normal(2, 2, 2), "nf4"), r"a weight of shape \(2, 2, 2\)"),
        ((jnp.ones((2, 2), jnp.int8), "nf4"), "dtype int8 cannot be quantised"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(*arguments)
