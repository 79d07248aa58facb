"""A mixture of experts: who is chosen, with what weight, and sums that equal a plain loop's."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn import moe as layers
from llmprep_jax.nn.moe import MoE, Routing
from llmprep_jax.nn.param import Compute, RouterBias
from tests.grids import cases
from tests.random_modules import random_module

V2 = Routing(12, 3, num_groups=4, num_active_groups=2, scale=16.0)
V3 = Routing(
    12,
    3,
    score="sigmoid",
    num_groups=4,
    num_active_groups=2,
    has_bias=True,
    normalize=True,
    scale=2.5,
)
ROUTINGS = {"greedy": Routing(12, 3), "v2": V2, "v3": V3}
each_routing = pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)


choose = jax.jit(layers.choose, static_argnums=2)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logits() -> np.ndarray:
    return draw(4, 16, 12)


def bias_of(routing: Routing) -> np.ndarray | None:
    return 0.5 * draw(12, seed=9) if routing.has_bias else None


@each_routing
def test_experts_are_distinct_and_of_the_allowed_number_of_groups(routing):
    experts = np.asarray(choose(logits(), bias_of(routing), routing).experts_BTA).reshape(-1, 3)
    assert all(len(set(row)) == 3 for row in experts.tolist())
    per_group = 12 // routing.num_groups
    used = [len({e // per_group for e in row}) for row in experts.tolist()]
    assert max(used) <= (routing.num_active_groups if routing.num_groups > 1 else 3)


def test_softmax_groups_are_as_good_as_their_best_expert():
    scores = np.log(np.float32([[[0.30, 0.01, 0.16, 0.16, 0.02, 0.01, 0.17, 0.17]]]))
    routing = Routing(8, 2, num_groups=4, num_active_groups=2)
    # best experts 0.30, 0.16, 0.02, 0.17: groups 0 and 3; two together 0.31, 0.32, 0.03, 0.34
    assert set(np.ravel(choose(scores, None, routing).experts_BTA)) == {0, 6}


def test_sigmoid_groups_are_as_good_as_their_two_best_experts_together():
    p = np.float32([[[0.9, 0.1, 0.6, 0.6, 0.3, 0.3, 0.2, 0.2]]])
    routing = Routing(8, 2, score="sigmoid", num_groups=4, num_active_groups=1)
    assert set(np.ravel(choose(np.log(p / (1 - p)), None, routing).experts_BTA)) == {2, 3}


def test_the_bias_chooses_and_does_not_weigh():
    plain, pushed = [choose(logits(), bias, V3) for bias in np.outer([0, 10], np.eye(12)[5])]
    assert np.all(np.any(pushed.experts_BTA == 5, axis=-1))
    assert not np.all(np.any(plain.experts_BTA == 5, axis=-1))
    np.testing.assert_array_equal(pushed.scores_BTE, plain.scores_BTE)
    chosen = np.take_along_axis(np.asarray(plain.scores_BTE), np.asarray(pushed.experts_BTA), -1)
    expected = 2.5 * chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(pushed.weights_BTA, expected, rtol=1e-6)


def test_no_gradient_reaches_the_bias():
    def loss(bias, logits):
        return jnp.sum(jnp.square(choose(logits, bias, V3).weights_BTA))

    to_bias, to_logits = jax.jit(jax.grad(loss, argnums=(0, 1)))(bias_of(V3), logits())
    assert np.all(to_bias == 0)
    assert np.any(to_logits != 0)


def dense(moe: MoE, x_BTD: jax.Array) -> jax.Array:
    """All experts on all tokens, weighted."""
    choice = moe.router(x_BTD)
    gate, up, down = (getattr(moe.experts, name).w[...] for name in ("gate", "up", "down"))
    products = (jnp.einsum("BTD,EDF->EBTF", x_BTD, w) for w in (gate, up))
    h_EBTF = jax.nn.silu(next(products)) * next(products)
    is_of_BTAE = choice.experts_BTA[..., None] == jnp.arange(len(gate))
    weights_BTE = jnp.sum(is_of_BTAE * choice.weights_BTA[..., None], axis=2)
    y_BTD = jnp.einsum("EBTF,EFD,BTE->BTD", h_EBTF, down, weights_BTE)
    return y_BTD if moe.shared is None else y_BTD + moe.shared(x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def sum_and_gradients(run, moe, x):
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(run(*args))), argnums=(0, 1))(moe, x)


# shared experts and routing do not meet
PAIRS = cases(itertools.product(ROUTINGS, (0, 2)), fast=[("greedy", 0), ("v2", 2), ("v3", 0)])


@pytest.mark.parametrize(("routing", "num_shared"), PAIRS)
def test_the_sum_and_its_gradients_are_those_of_every_expert_on_every_token(routing, num_shared):
    sizes = (8, 6, num_shared, ROUTINGS[routing])
    moe = random_module(lambda: MoE(*sizes, compute=Compute(), rngs=nnx.Rngs(0)))
    x = draw(2, 7, 8, seed=3)
    found = sum_and_gradients(lambda moe, x: moe(x)[0], moe, x)
    chex.assert_trees_all_close(found, sum_and_gradients(dense, moe, x), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_the_load():
    moe = random_module(lambda: MoE(8, 6, 0, V3, compute=Compute(), rngs=nnx.Rngs(0)))
    x, mask = draw(2, 7, 8, seed=3), np.ones((2, 7), bool)
    mask[1, 3:] = False

    @jax.jit
    def run(moe, x):
        return moe(x, mask)[1], moe.router(x).experts_BTA

    load, experts_BTA = run(moe, x)
    counts = np.bincount(np.ravel(experts_BTA[mask]), minlength=12)
    np.testing.assert_array_equal(load.counts_E, counts)
    assert load.counts_E.sum() == 3 * 10
    assert load.dropped == 0


def test_the_bias_is_neither_parameter_nor_in_bf16():
    compute = Compute(dtype="bfloat16", param_dtype="bfloat16")
    moe = jax.eval_shape(lambda: MoE(8, 6, 1, V3, compute=compute, rngs=nnx.Rngs(0)))
    assert isinstance(moe.router.bias, RouterBias)
    assert moe.router.bias.dtype == jnp.float32
    assert moe.router.w.dtype == jnp.bfloat16
    x = jax.ShapeDtypeStruct((1, 2, 8), jnp.bfloat16)
    choice = jax.eval_shape(lambda moe, x: moe.router(x), moe, x)
    assert choice.weights_BTA.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(num_groups=5), "num_experts=12 do not part into num_groups=5"),
        (dict(num_active_groups=5), "num_active_groups=5 of num_groups=4"),
        (dict(num_active=7), "num_active=7 experts of 6 that may be chosen"),
        (dict(num_active=0), "num_active=0 experts"),
    ],
)
def test_a_routing_that_cannot_be_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(V3, **change)
