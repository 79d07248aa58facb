"""Wherever experts lie and however tokens get there, the sum is that of a loop over experts.

Forward and gradients are held against every expert on every token, for each transport that runs on
CPUs; the one that does not is lowered for the backend that it is for. The one thing a reader would
get wrong: gradients are compared with float32 sums in another order, so to 1e-5 of the largest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
from llmprep_jax.nn.dispatch import TRANSPORTS, run_experts
from llmprep_jax.sharding import ShardingRules, make_mesh, spec, use_mesh

E, D, F = 8, 8, 16
AXES = {"up": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}
RUNNABLE = [name for name in TRANSPORTS if name != "ragged"]
MESHES = {
    "expert2": {"expert": 2},
    "expert4": {"expert": 4},
    "expert8": {"expert": 8},
    "data2-expert4": {"data": 2, "expert": 4},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
}


def apply(x_RD, sizes_E, params):
    product = functools.partial(grouped_matmul, dtype=x_RD.dtype)
    y_RF = jnp.tanh(product(x_RD, params["up"], sizes_E))
    return product(y_RF, params["down"], sizes_E)


def every_expert(x_BTD, experts_BTA, weights_BTA, params):
    """The meaning: all experts on all tokens."""
    y_BTD = 0
    for e in range(E):
        weight_BT = jnp.where(experts_BTA == e, weights_BTA, 0).sum(-1)
        h_BTF = jnp.tanh(x_BTD @ params["up"][e])
        y_BTD += weight_BT[..., None] * (h_BTF @ params["down"][e])
    return y_BTD


def draw(rows=8, length=3, active=2, experts=range(E)):
    """Tokens whose experts are drawn from some of all, with their weights."""
    rng = np.random.default_rng(0)
    ids = [rng.permutation(list(experts))[:active] for _ in range(rows * length)]
    params = {"up": rng.normal(size=(E, D, F)), "down": rng.normal(size=(E, F, D))}
    arrays = (
        rng.normal(size=(rows, length, D)),
        np.reshape(ids, (rows, length, active)).astype(np.int32),
        rng.uniform(size=(rows, length, active)),
        params,
    )
    return jax.tree.map(
        lambda z: jnp.asarray(z, jnp.int32 if z.dtype == np.int32 else "float32"), arrays
    )


def place(params):
    """Parameters as a model would be born with them."""
    return {k: jax.reshard(w, spec(*AXES[k], shape=w.shape)) for k, w in params.items()}


def with_gradients(run):
    """(result, gradients of a sum of squares with respect to x, weights and params)."""

    @jax.jit
    def both(x, experts, weights, params):
        def loss(x, weights, params):
            y = run(x, experts, weights, params)
            return jnp.square(y.astype(jnp.float32)).sum(), y

        grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, params)
        return y, grads

    return both


def dispatch(transport, **options):
    def run(*operands):
        options_ = dict(num_experts=E, transport=transport, **options)
        return run_experts(*operands, AXES, apply, **options_)[0]

    return run


def assert_close(found, expected, tolerance=1e-5):
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), path


def assert_dispatch_is_the_loop(mesh, transport, rules=None, **draws):
    *tokens, params = draw(**draws)
    expected = with_gradients(every_expert)(*tokens, params)
    with use_mesh(mesh, rules):
        params = place(params) if mesh else params
        y, grads = with_gradients(dispatch(transport))(*tokens, params)
        for ours, w in zip(jax.tree.leaves(grads[2]), jax.tree.leaves(params), strict=True):
            assert jax.typeof(ours).sharding == jax.typeof(w).sharding
    assert_close((y, grads), expected)


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


@pytest.mark.parametrize("active", [1, 2, 5])
def test_without_a_mesh_tokens_are_sorted_and_put_back(active):
    assert_dispatch_is_the_loop(None, None, active=active)


@pytest.mark.parametrize("transport", RUNNABLE)
@pytest.mark.parametrize("mesh", MESHES)
def test_on_every_mesh_the_sum_is_that_of_the_loop(mesh, transport):
    assert_dispatch_is_the_loop(mesh_of(mesh), transport)


@pytest.mark.parametrize("transport", RUNNABLE)
@pytest.mark.parametrize(
    "draws",
    [
        dict(experts=[5], active=1),
        dict(experts=[0, 3, 6], active=3),
        dict(active=5),
        dict(length=1),
    ],
    ids=["all-to-one-expert", "empty-experts", "more-than-a-device-has", "one-token-each"],
)
def test_uneven_loads_are_computed_whole(draws, transport):
    assert_dispatch_is_the_loop(mesh_of("data2-expert4"), transport, **draws)


@pytest.mark.parametrize("mesh", ["expert8", "fsdp2-expert2-tensor2"])
def test_tokens_that_devices_do_not_divide_are_computed_on_all_of_them(mesh):
    assert_dispatch_is_the_loop(mesh_of(mesh), None, rows=3)


def test_tokens_may_be_split_over_other_axes_than_the_experts():
    rules = ShardingRules(batch=("data", "fsdp"))
    assert_dispatch_is_the_loop(mesh_of("fsdp2-expert2-tensor2"), None, rules)
