"""Layers as data: run in every way they give one result, and remat keeps what it says it keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.mlp import GatedMlp
from llmprep_jax.nn.param import Compute, Shared
from llmprep_jax.nn.stack import scan, stack, take, unstack
from tests.random_modules import random_module

make_layer = functools.partial(GatedMlp, 8, 16, compute=Compute())
SCALES = np.array([1.0, 0.5, 2.0, -1.0], np.float32)


def make_layers(num_layers=4):
    return random_module(lambda: stack(make_layer, num_layers, rngs=nnx.Rngs(0)))


def step(layer, x, scale):
    return x + scale * layer(x)


def run(layers, x, **compute):
    return scan(step, layers, x, SCALES, compute=Compute(**compute))


def draw():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)


def count(primitive, jaxpr):
    """Times that a primitive occurs in a jaxpr, scans and remats looked into."""
    inner = jax.tree.leaves(
        [eqn.params for eqn in jaxpr.eqns],
        is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
    )
    jaxprs = [getattr(x, "jaxpr", x) for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
    here = sum(eqn.primitive.name == primitive for eqn in jaxpr.eqns)
    return here + sum(count(primitive, each) for each in jaxprs)


def test_a_stack_is_one_layer_with_a_leading_axis_and_other_weights_in_each_place():
    w = stack(make_layer, 4, rngs=nnx.Rngs(0)).up.w[...]
    assert w.shape == (4, 8, 16)
    assert len({float(layer[0, 0]) for layer in w}) == 4


@pytest.mark.parametrize("unroll", [1, 2, 0])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_every_way_to_run_layers_is_a_loop_over_them(unroll, remat, listed):
    layers, x = make_layers(), draw()
    expected = x
    for index, scale in enumerate(SCALES):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        expected = expected + scale * layer(expected)
    layers = unstack(layers) if listed else layers
    np.testing.assert_allclose(run(layers, x, unroll=unroll, remat=remat), expected, atol=1e-5)


@pytest.mark.parametrize(("unroll", "layers_a_step"), [(1, 1), (2, 2), (0, 4)])
def test_unrolling_by_zero_leaves_no_loop(unroll, layers_a_step):
    jaxpr = jax.make_jaxpr(lambda x: run(make_layers(), x, unroll=unroll))(draw()).jaxpr
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert loop.params["unroll"] == layers_a_step


def test_layers_in_a_list_get_plain_numbers_whatever_is_rematerialised():
    seen = []

    def note(layer, x, scale):
        seen.append(scale)
        return x

    for remat in ("none", "full"):
        layers = unstack(make_layers())
        scan(note, layers, draw(), SCALES, compute=Compute(remat=remat))
    assert seen == [1.0, 0.5, 2.0, -1.0] * 2
    assert all(type(scale) is float for scale in seen)


@pytest.mark.parametrize(
    ("remat", "products", "activations"), [("none", 9, 1), ("dots", 9, 2), ("full", 11, 2)]
)
def test_remat_repeats_what_it_says_it_repeats(remat, products, activations):
    # a gated MLP: 3 products forward, 6 backward; the result of the last is not needed again
    layers, x = make_layers(), draw()
    gradient = jax.make_jaxpr(jax.grad(lambda layers: run(layers, x, remat=remat).sum()))(layers)
    assert count("dot_general", gradient.jaxpr) == products
    assert count("logistic", gradient.jaxpr) == activations


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown remat policy 'some'; the policies are none"):
        run(make_layers(), draw(), remat="some")


class Scaled(nnx.Module):
    """A layer with a weight of its own and a factor that all layers share."""

    def __init__(self, *, rngs):
        self.up = make_layer(rngs=rngs)

    def __call__(self, x):
        return self.factor[...] * self.up(x)


@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_what_layers_share_is_sliced_by_none_of_them(listed):
    layers, x = random_module(lambda: stack(Scaled, 4, rngs=nnx.Rngs(0))), draw()
    factor = jnp.linspace(0.5, 1.5, 8)
    layers.factor = Shared(factor)
    expected = x
    for index, scale in enumerate(SCALES):
        up = jax.tree.map(lambda leaf, index=index: leaf[index], layers.up)
        expected = expected + scale * factor * up(expected)
    found = run(unstack(layers) if listed else layers, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_some_layers_of_a_stack_or_list_are_those_layers():
    layers, x = make_layers(), draw()
    expected = list(unstack(layers))[1:3]
    for some in (take(layers, 1, 3), take(unstack(layers), 1, 3)):
        found = scan(lambda layer, x: layer(x), some, x, compute=Compute())
        np.testing.assert_allclose(found, expected[1](expected[0](x)), atol=1e-6)
    assert take(layers, 0, 4) is layers
