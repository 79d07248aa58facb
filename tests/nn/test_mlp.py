"""Activations by their literal values, and the two kinds of feed-forward layer by their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.mlp import ACTIVATIONS, GatedMlp, Mlp
from llmprep_jax.nn.param import Compute
from tests.random_modules import random_module


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("name", "at_one", "at_minus_two"),
    [
        ("silu", 0.7310586, -0.2384058),
        ("gelu", 0.8413447, -0.0455003),
        ("gelu_tanh", 0.8411920, -0.0454023),
        ("quick_gelu", 0.8457958, -0.0643404),
        ("relu", 1.0, 0.0),
    ],
)
def test_activations_have_their_values(name, at_one, at_minus_two):
    found = ACTIVATIONS[name](jnp.array([1.0, -2.0, 0.0]))
    np.testing.assert_allclose(found, [at_one, at_minus_two, 0.0], atol=1e-6)


def test_the_exact_gelu_is_not_the_tanh_one():
    x = jnp.linspace(-4, 4, 4001)
    gap = np.abs(ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)).max()
    assert gap == pytest.approx(4.7e-4, rel=0.05)


def test_silu_has_its_minimum():
    x = jnp.linspace(-2, 0, 200_001)
    y = ACTIVATIONS["silu"](x)
    assert float(y.min()) == pytest.approx(-0.27846, abs=1e-5)
    assert float(x[y.argmin()]) == pytest.approx(-1.27846, abs=2e-3)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_a_gated_layer_multiplies_its_two_halves(act):
    mlp = random_module(
        lambda: GatedMlp(8, 16, act=act, bias=True, compute=Compute(), rngs=nnx.Rngs(0))
    )
    x = draw(2, 3, 8)
    gate, up = x @ mlp.gate.w[...] + mlp.gate.b[...], x @ mlp.up.w[...] + mlp.up.b[...]
    expected = (ACTIVATIONS[act](gate) * up) @ mlp.down.w[...] + mlp.down.b[...]
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_of_a_gated_layer_only_gate_up_and_their_product_are_kept(act):
    mlp = random_module(lambda: GatedMlp(8, 16, act=act, compute=Compute(), rngs=nnx.Rngs(0)))
    _, backward = jax.vjp(lambda mlp, x: mlp(x), mlp, draw(2, 3, 8))
    assert [x.shape for x in jax.tree.leaves(backward)].count((2, 3, 16)) == 3


def test_a_plain_layer_has_one_half():
    mlp = random_module(lambda: Mlp(8, 16, compute=Compute(), rngs=nnx.Rngs(0)))
    x = draw(2, 3, 8)
    hidden = jax.nn.gelu(x @ mlp.up.w[...] + mlp.up.b[...], approximate=False)
    expected = hidden @ mlp.down.w[...] + mlp.down.b[...]
    np.testing.assert_allclose(mlp(x), expected, atol=1e-5)
