"""Layers as data: run in every way they give one result, and remat keeps what it says it keeps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.mlp import GatedMlp
from llmprep_jax.nn.param import Compute, Shared
from llmprep_jax.nn.stack import InPlace, Run, depth, plan_runs, scan, stack, take, unstack
from tests.grids import cases
from tests.random_modules import random_module

FORMS = {"stacked": lambda layers: layers, "listed": unstack, "in place": InPlace}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
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
@forms
def test_every_way_to_run_layers_is_a_loop_over_them(unroll, remat, form):
    layers, x = make_layers(), draw()
    expected = x
    for index, scale in enumerate(SCALES):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        expected = expected + scale * layer(expected)
    found = run(form(layers), x, unroll=unroll, remat=remat)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("unroll", "layers_a_step"), [(1, 1), (2, 2), (0, 4)])
def test_unrolling_by_zero_leaves_no_loop(unroll, layers_a_step):
    jaxpr = jax.make_jaxpr(lambda x: run(make_layers(), x, unroll=unroll))(draw()).jaxpr
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert loop.params["unroll"] == layers_a_step


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_in_a_list_are_traced_once_a_kind_and_get_their_own_numbers(remat):
    traced, layers = [], unstack(make_layers())

    def add(layer, x, scale, sign):
        traced.append(sign)
        return x + sign * scale

    kinds = (1, -1, 1, 1)
    found = scan(add, layers, draw(), SCALES, kinds=kinds, compute=Compute(remat=remat))
    np.testing.assert_allclose(found, draw() + (1.0 - 0.5 + 2.0 - 1.0))
    assert sorted(traced) == [-1, 1]


@pytest.mark.parametrize(
    ("remat", "products", "activations"), [("none", 9, 2), ("dots", 9, 3), ("full", 11, 3)]
)
def test_remat_repeats_what_it_says_it_repeats(remat, products, activations):
    # a gated MLP: 3 products forward, 6 backward; the result of the last is not needed again, and
    # the backward pass of gate and up computes their activation itself
    layers, x = make_layers(), draw()
    gradient = jax.make_jaxpr(jax.grad(lambda layers: run(layers, x, remat=remat).sum()))(layers)
    assert count("dot_general", gradient.jaxpr) == products
    assert count("logistic", gradient.jaxpr) == activations


class Scaled(nnx.Module):
    """A layer with a weight of its own and a factor that all layers share."""

    def __init__(self, *, rngs):
        self.up = make_layer(rngs=rngs)

    def __call__(self, x):
        return self.factor[...] * self.up(x)


@forms
def test_what_layers_share_is_sliced_by_none_of_them(form):
    layers, x = random_module(lambda: stack(Scaled, 4, rngs=nnx.Rngs(0))), draw()
    factor = jnp.linspace(0.5, 1.5, 8)
    layers.factor = Shared(factor)
    expected = x
    for index, scale in enumerate(SCALES):
        up = jax.tree.map(lambda leaf, index=index: leaf[index], layers.up)
        expected = expected + scale * factor * up(expected)
    found = run(form(layers), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@forms
def test_some_layers_are_those_layers_whatever_form_they_have(form):
    layers, x = make_layers(), draw()
    expected = list(unstack(layers))[2]
    some = take(take(form(layers), 1, 4), 1, 2)
    found = scan(lambda layer, x, scale: scale * layer(x), some, x, [3.0], compute=Compute())
    np.testing.assert_allclose(found, 3 * expected(x), atol=1e-6)
    assert (depth(form(layers)), depth(some)) == (4, 1)


def test_all_layers_of_a_stack_are_the_stack():
    layers = make_layers()
    assert take(layers, 0, 4) is layers


L, G = True, False  # a local layer, a global one


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        (4 * [L, L, L, L, L, G] + [L, L], [(0, 6, 4), (24, 2, 1)]),
        (3 * [L, L, L, L, L, G], [(0, 6, 3)]),
        (2 * [L, G] + [G], [(0, 2, 2), (4, 1, 1)]),
        ([L, G, G], [(0, 1, 1), (1, 1, 2)]),
        ([L, L, G], [(0, 1, 2), (2, 1, 1)]),
        ([L, G], [(0, 2, 1)]),
        (9 * [L] + 9 * [G], [(0, 1, 9), (9, 1, 9)]),
        (12 * [L] + 9 * [G] + 8 * [L], [(0, 1, 12), (12, 1, 9), (21, 8, 1)]),
    ],
    ids=["26", "18", "odd", "first", "last", "two", "halves", "thirds"],
)
def test_layers_of_several_kinds_are_run_by_their_longest_repetition(kinds, runs):
    assert plan_runs(tuple(kinds)) == tuple(Run(*run) for run in runs)


KINDS = ("up", "down", "up", "down", "up")


def turn(layer, x, scale, kind):
    """A step that is another function, not another number, by the kind of a layer."""
    return step(layer, x, scale) if kind == "up" else jnp.sin(step(layer, x, -scale))


def run_kinds(layers, x, kinds=KINDS, **compute):
    scales = np.linspace(1.0, 2.0, 5, dtype=np.float32)
    return scan(turn, layers, x, scales, kinds=kinds, compute=Compute(**compute))


def loop_over_kinds(layers, x, kinds=KINDS):
    for index, kind in enumerate(kinds):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
        x = turn(layer, x, 1.0 + index / 4, kind)
    return x


@pytest.mark.parametrize("unroll", [1, 3, 0])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@forms
def test_layers_of_several_kinds_are_a_loop_over_them(unroll, remat, form):
    layers, x = make_layers(5), draw()
    found = run_kinds(form(layers), x, unroll=unroll, remat=remat)
    np.testing.assert_allclose(found, loop_over_kinds(layers, x), atol=1e-5)


def test_layers_of_one_kind_are_told_it():
    layers, x = make_layers(5), draw()
    found = run_kinds(layers, x, ("down",) * 5)
    np.testing.assert_allclose(found, loop_over_kinds(layers, x, ("down",) * 5), atol=1e-5)


@pytest.mark.parametrize("remat", cases(["none", "full", "dots"], fast=["none", "full"]))
def test_layers_of_several_kinds_have_the_gradients_of_a_loop(remat):
    layers, x = make_layers(5), draw()
    found, expected = [
        jax.jit(jax.grad(lambda layers, loop=loop: loop(layers, x).sum()))(layers)
        for loop in (functools.partial(run_kinds, remat=remat), loop_over_kinds)
    ]
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def compiled_gradient(kinds, remat):
    """(temporary bytes, bytes read and written by a program that goes through loops once)."""
    make = functools.partial(GatedMlp, 64, 128, compute=Compute())
    layers = random_module(lambda: stack(make, len(kinds), rngs=nnx.Rngs(0)))

    def total(layers, x):
        one = lambda layer, x, kind: turn(layer, x, 1.0, kind)  # noqa: E731
        return scan(one, layers, x, kinds=kinds, compute=Compute(remat=remat)).sum()

    program = jax.jit(jax.grad(total)).lower(layers, jnp.ones((1, 1, 64))).compile()
    return program.memory_analysis().temp_size_in_bytes, program.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(("remat", "rest"), [("none", ()), ("full", ("up",))], ids=str)
def test_super_blocks_copy_no_stack_of_weights_forward_or_backward(remat, rest):
    few, many = [compiled_gradient(count * ("up", "down") + rest, remat) for count in (4, 16)]
    more = 24 * 3 * 64 * 128 * 4  # bytes of the weights that one has more
    # a copy of all weights, or of their gradients, is 1; beside a rest one gradient at a time is
    assert many[0] - few[0] < (0.4 if rest else 0.05) * more
    # gradients begin as zeros (1) and the rest's are added (3); were each layer's, 3 each
    assert many[1] - few[1] < (4 if rest else 1.5) * more
