"""RoPE: literal angles, the context extensions' formulas, and what a rotation must leave alone."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.rope import (
    RopeScaling,
    apply_rope,
    rope_angles,
    rope_frequencies,
    yarn_mscale,
)

DEEPSEEK_YARN = RopeScaling("yarn", 40.0, 4096)
SCALINGS = {
    "plain": None,
    "linear": RopeScaling("linear", 4.0),
    "ntk": RopeScaling("ntk", 8.0),
    "llama3": RopeScaling("llama3", 8.0, 8192),
    "yarn": DEEPSEEK_YARN,
}


def rotate(x_NH, positions, base=10_000.0, scaling=None, interleaved=False):
    """[T, H] vectors at positions [T], as one head of one row."""
    x_BTNH = jnp.asarray(x_NH, jnp.float32)[None, :, None]
    cos, sin = rope_angles(
        jnp.asarray([positions], jnp.int32), *rope_frequencies(x_BTNH.shape[-1], base, scaling)
    )
    return np.asarray(apply_rope(x_BTNH, cos, sin, interleaved=interleaved))[0, :, 0]


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_first_pair_turns_by_one_radian_a_position():
    x = rotate([[1.0, 0.0]] * 4, [0, 1, 2, 3])
    angles = np.unwrap(np.arctan2(x[:, 1], x[:, 0]))
    np.testing.assert_allclose(angles, [0, 1, 2, 3], atol=1e-6)


def test_the_slowest_pair_turns_by_the_base_to_the_power_of_its_place():
    inv_freq, factor = rope_frequencies(8, 10_000.0)
    np.testing.assert_allclose(inv_freq, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert factor == 1.0


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", SCALINGS)
def test_scores_depend_on_the_distance_alone(kind, interleaved):
    q, k = draw(2, 64)
    q, k = q / np.linalg.norm(q), k / np.linalg.norm(k)
    scores = []
    for shift in (0, 1, 77, 1000):
        a, b = rotate(
            [q, k], [7 + shift, 3 + shift], scaling=SCALINGS[kind], interleaved=interleaved
        )
        scores.append(float(a @ b))
    # 1000 positions in float32 leave an angle good to 6e-5
    assert np.ptp(scores[:3]) < 1e-5
    assert np.ptp(scores) < 1e-4


def test_a_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = draw(5, 32)
    np.testing.assert_array_equal(rotate(x, [0] * 5), x)
    turned = rotate(x, [1, 10, 100, 1000, 10_000])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


def test_interleaved_pairs_are_complex_numbers():
    x, positions = draw(6, 16), np.array([0, 1, 2, 30, 400, 5000])
    inv_freq, _ = rope_frequencies(16, 10_000.0)
    angles = (positions[:, None].astype(np.float32) * inv_freq).astype(np.float64)
    expected = (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * angles)
    found = rotate(x, positions, interleaved=True)
    np.testing.assert_allclose(found[:, 0::2] + 1j * found[:, 1::2], expected, atol=1e-5)


def test_the_two_layouts_differ_by_a_permutation():
    x = draw(3, 16)
    halves = np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)
    found, turned = rotate(halves, [1, 2, 3]), rotate(x, [1, 2, 3], interleaved=True)
    np.testing.assert_allclose(found, np.concatenate([turned[:, 0::2], turned[:, 1::2]], axis=1))


def test_positions_beyond_every_context_are_not_clamped():
    cos, _ = rope_angles(jnp.array([[131_071, 131_072, 1_000_000]]), np.float32([1.0, 1e-6]))
    expected = np.cos(np.float64([[131_071, 131_072, 1_000_000]])[..., None] * [1.0, 1e-6])
    np.testing.assert_allclose(np.asarray(cos)[..., 0], expected[..., 0], atol=1e-5)
    np.testing.assert_allclose(np.asarray(cos)[..., 1], expected[..., 1], atol=1e-6)


def test_linear_scaling_divides_positions():
    x = draw(2, 16)
    found = rotate(x, [8, 40], scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(found, rotate(x, [2, 10]), atol=1e-5)


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, _ = rope_frequencies(128, 10_000.0)
    scaled, factor = rope_frequencies(128, 10_000.0, RopeScaling("ntk", 8.0))
    assert scaled[0] == plain[0] == 1.0
    assert plain[-1] / scaled[-1] == pytest.approx(8.0, rel=1e-5)
    assert scaled[1] ** -64.0 == pytest.approx(82_684.6, rel=1e-4)  # the base it amounts to
    assert factor == 1.0


def test_llama3_keeps_short_wavelengths_divides_long_ones_and_blends_between():
    plain, _ = rope_frequencies(128, 500_000.0)
    scaled, _ = rope_frequencies(128, 500_000.0, SCALINGS["llama3"])
    wavelengths = 2 * math.pi / plain.astype(np.float64)
    for frequency, wavelength, found in zip(plain, wavelengths, scaled, strict=True):
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert found == pytest.approx(expected, rel=1e-5)
    kept, divided = int((scaled == plain).sum()), int((scaled == plain / 8).sum())
    assert (kept, divided) == (29, 29)


def test_yarn_has_deepseeks_frequencies():
    inv_freq, _ = rope_frequencies(64, 10_000.0, DEEPSEEK_YARN)
    expected = {
        0: 1.0,
        1: 0.7498942,
        9: 0.07498942,
        10: 0.05623413,
        11: 0.03900693,
        12: 0.02687936,
        16: 0.005500000,
        20: 7.905694e-4,
        22: 1.778279e-4,
        23: 3.333803e-5,
        24: 2.500000e-5,
        31: 3.333804e-6,
    }
    for pair, frequency in expected.items():
        assert inv_freq[pair] == pytest.approx(frequency, rel=1e-6), pair


def test_yarn_without_truncation_moves_its_borders():
    exact = RopeScaling("yarn", 40.0, 4096, truncate=False)
    inv_freq, _ = rope_frequencies(64, 10_000.0, exact)
    plain, _ = rope_frequencies(64, 10_000.0)
    ramp = (11 - 10.4722) / (22.5134 - 10.4722)  # pairs that turn 32 times and once in 4096
    assert inv_freq[10] == plain[10]
    assert inv_freq[11] == pytest.approx(plain[11] * (1 - ramp + ramp / 40), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({}, 1.3688879),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0.707}, 1.3688879 / 1.2608038),
        ({"attention_factor": 1.5}, 1.5),
    ],
    ids=["paper", "V2.5", "V2", "unequal", "given"],
)
def test_yarn_scales_cos_and_sin(fields, factor):
    scaling = RopeScaling("yarn", 40.0, 4096, **fields)
    _, found = rope_frequencies(64, 10_000.0, scaling)
    assert found == pytest.approx(factor, rel=1e-6)
    cos, sin = rope_angles(jnp.array([[0]]), *rope_frequencies(64, 10_000.0, scaling))
    assert float(cos[0, 0, 0]) == pytest.approx(factor, rel=1e-6)
    assert float(sin[0, 0, 0]) == 0.0


def test_yarns_temperature_begins_at_one():
    assert yarn_mscale(1.0) == 1.0
    assert yarn_mscale(0.5) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1.2608038)
    # what DeepSeek multiplies its scores by, 192^-0.5 * m^2
    assert 192**-0.5 * yarn_mscale(40.0, 0.707) ** 2 == pytest.approx(0.11472139)
    assert 192**-0.5 * yarn_mscale(40.0, 1.0) ** 2 == pytest.approx(0.13523378)


def test_angles_are_float32_and_results_keep_their_dtype():
    inv_freq, factor = rope_frequencies(16, 10_000.0)
    cos, sin = rope_angles(jnp.array([[3000]]), inv_freq, factor)
    assert cos.dtype == sin.dtype == inv_freq.dtype == jnp.float32
    assert apply_rope(jnp.ones((1, 1, 1, 16), jnp.bfloat16), cos, sin).dtype == jnp.bfloat16
