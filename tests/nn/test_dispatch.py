"""Wherever experts lie and however tokens get there, the sum is that of a loop over experts.

Forward and gradients are held against every expert on every token, for each transport that runs on
CPUs; the one that does not is lowered for the backend that it is for. Gradients are compared to
1e-5 of the largest, since float32 sums are in another order.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.grouped_matmul import reference
from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
from llmprep_jax.nn.dispatch import TRANSPORTS, exchange_gathered, run_experts
from llmprep_jax.nn.routes import Routes, combine, gather_rows, share
from llmprep_jax.sharding import ShardingRules, make_mesh, spec, use_mesh
from tests.grids import cases
from tests.programs import equations

E, D, F = 8, 8, 16
AXES = {"up": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}
RUNNABLE = [name for name in TRANSPORTS if name != "ragged"]
MESHES = {
    "expert1": {"expert": 1},
    "expert2": {"expert": 2},
    "expert4": {"expert": 4},
    "expert8": {"expert": 8},
    "data2-expert4": {"data": 2, "expert": 4},
    "fsdp2-expert2-tensor2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp4-tensor2": {"fsdp": 4, "tensor": 2},
}


def apply(x_RD, sizes_E, params, product=reference.grouped_matmul):
    y_RF = jnp.tanh(product(x_RD, params["up"], sizes_E))
    return product(y_RF, params["down"], sizes_E)


apply_in_bf16 = functools.partial(
    apply, product=functools.partial(grouped_matmul, dtype=jnp.bfloat16)
)


def every_expert(x_BTD, experts_BTA, weights_BTA, params):
    """The meaning: all experts on all tokens."""
    weights_BTAE = weights_BTA[..., None] * jax.nn.one_hot(experts_BTA, E)
    h_EBTF = jnp.tanh(jnp.einsum("BTD,EDF->EBTF", x_BTD, params["up"]))
    return jnp.einsum("EBTF,EFD,BTAE->BTD", h_EBTF, params["down"], weights_BTAE)


def loop(x_BTD, experts_BTA, weights_BTA, params):
    """The meaning in float64: (result, gradients of its sum of squares), expert by expert."""
    x, weights, up, down = map(np.float64, (x_BTD, weights_BTA, params["up"], params["down"]))
    is_of_EBTA = np.arange(E)[:, None, None, None] == np.asarray(experts_BTA)
    h_EBTF = np.tanh(np.einsum("BTD,EDF->EBTF", x, up))
    y_EBTD = np.einsum("EBTF,EFD->EBTD", h_EBTF, down)
    share_EBT = (is_of_EBTA * weights).sum(-1)
    y = (share_EBT[..., None] * y_EBTD).sum(0)
    dy_EBTD = share_EBT[..., None] * 2 * y
    dh_EBTF = np.einsum("EBTD,EFD->EBTF", dy_EBTD, down) * (1 - h_EBTF**2)
    dparams = {
        "up": np.einsum("BTD,EBTF->EDF", x, dh_EBTF),
        "down": np.einsum("EBTF,EBTD->EFD", h_EBTF, dy_EBTD),
    }
    dx = np.einsum("EBTF,EDF->BTD", dh_EBTF, up)
    dweights = np.einsum("EBTA,EBTD,BTD->BTA", is_of_EBTA, y_EBTD, 2 * y)
    return y, (dx, dweights, dparams)


def draw(rows=8, length=3, active=2, experts=tuple(range(E))):
    """Tokens whose experts are drawn from some of all, with their weights."""
    rng = np.random.default_rng(0)
    ids = [rng.permutation(list(experts))[:active] for _ in range(rows * length)]
    params = {"up": rng.normal(size=(E, D, F)), "down": rng.normal(size=(E, F, D))}
    tree = (
        rng.normal(size=(rows, length, D)),
        np.reshape(ids, (rows, length, active)).astype(np.int32),
        rng.uniform(size=(rows, length, active)),
        params,
    )
    return jax.tree.map(
        lambda z: jnp.asarray(z, jnp.int32 if z.dtype == np.int32 else "float32"), tree
    )


def place(params):
    """Parameters as a model would be born with them."""
    return {k: jax.reshard(w, spec(*AXES[k], shape=w.shape)) for k, w in params.items()}


def with_gradients(run):
    """(result, gradients of a sum of squares with respect to x, weights and params, dropped)."""

    @jax.jit
    def both(x, experts, weights, params):
        def loss(x, weights, params):
            y, dropped = run(x, experts, weights, params)
            return jnp.square(y).sum(), (y, dropped)

        grads, (y, dropped) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, weights, params)
        return y, grads, dropped

    return both


def dispatch(transport, apply=apply):
    return lambda *operands: run_experts(*operands, AXES, apply, num_experts=E, transport=transport)


def assert_close(found, expected, tolerance=1e-5):
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max(), path


def mesh_of(name):
    sizes = MESHES[name]
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


# one program for all draws of a shape
program = functools.cache(lambda transport, *_: with_gradients(dispatch(transport)))


def assert_dispatch_is_the_loop(mesh, transport, rules=None, **draws):
    *tokens, params = draw(**draws)
    expected = loop(*tokens, params)
    with use_mesh(mesh and mesh_of(mesh), rules):
        params = place(params) if mesh else params
        y, grads, dropped = program(transport, mesh)(*tokens, params)
        for ours, w in zip(jax.tree.leaves(grads[2]), jax.tree.leaves(params), strict=True):
            assert mesh is None or jax.typeof(ours).sharding == jax.typeof(w).sharding
    assert_close((y, grads), expected)
    assert dropped == 0


@pytest.mark.parametrize("active", cases([1, 5], fast=[5]))
def test_without_a_mesh_tokens_are_sorted_and_put_back(active):
    assert_dispatch_is_the_loop(None, None, active=active)


# each compiles for a second: each kind of mesh, and each transport
PAIRS = cases(
    itertools.product(MESHES, [None, *RUNNABLE]),
    fast=[
        ("fsdp2-expert2-tensor2", "emulated"),
        ("expert8", "ring"),
        ("data2-expert4", "capacity"),
    ],
    slow=[
        ("expert1", None),
        ("expert2", "ring"),
        ("expert4", "emulated"),
        ("fsdp2-expert2-tensor2", "ring"),
        ("fsdp2-expert2-tensor2", "capacity"),
    ],
)


@pytest.mark.parametrize(
    "draws",
    [{}, dict(experts=(4, 5)), dict(experts=(0, 3, 6))],
    ids=["even", "all-to-one-device", "empty-experts"],
)
@pytest.mark.parametrize(("mesh", "transport"), PAIRS)
def test_on_every_mesh_the_sum_is_that_of_the_loop_and_nothing_is_dropped(mesh, transport, draws):
    assert_dispatch_is_the_loop(mesh, transport, **draws)


@pytest.mark.parametrize("transport", cases(RUNNABLE, slow=["emulated"]))
def test_one_expert_may_get_all_tokens(transport):
    assert_dispatch_is_the_loop("data2-expert4", transport, experts=(5,), active=1)


def test_a_token_may_go_to_more_experts_than_a_device_has():
    assert_dispatch_is_the_loop("expert8", "emulated", active=5, length=1)


@pytest.mark.parametrize(
    "mesh", cases(["expert8", "fsdp2-expert2-tensor2"], fast=["fsdp2-expert2-tensor2"])
)
def test_tokens_that_devices_do_not_divide_are_computed_on_all_of_them(mesh):
    assert_dispatch_is_the_loop(mesh, None, rows=3)


def test_tokens_may_be_split_over_other_axes_than_the_experts():
    rules = ShardingRules(batch=("data", "fsdp"))
    assert_dispatch_is_the_loop("fsdp2-expert2-tensor2", None, rules)


def gradients_of_layers(layer, x, experts, weights, params):
    """Gradients through two layers of experts, the second with its weights turned round."""

    def loss(x, weights, params):
        def body(x, params):
            return x + jax.checkpoint(layer)(x, experts, weights, params), None

        params = jax.tree.map(lambda w: jnp.stack([w, -w]), params)
        return jnp.square(jax.lax.scan(body, x, params)[0].astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, params)


def draw_in_bf16():
    x, experts, weights, params = draw()
    params = jax.tree.map(lambda w: w / 4, params)
    x, params = jax.tree.map(lambda z: z.astype(jnp.bfloat16), (x, params))
    return x, experts, weights, params


@functools.cache
def gradients_in_float32():
    tokens = jax.tree.map(
        lambda z: z.astype("f4" if z.dtype == "bfloat16" else z.dtype), draw_in_bf16()
    )
    return gradients_of_layers(every_expert, *tokens)


@pytest.mark.parametrize("transport", cases(["emulated", "ring"], fast=["ring"], slow=["emulated"]))
def test_layers_are_scanned_and_rematerialised_in_bf16(transport):
    x, experts, weights, params = draw_in_bf16()
    with use_mesh(mesh_of("expert2")):
        x = jax.reshard(x, spec("batch", "seq", "act_embed", shape=x.shape))
        layer = lambda *tokens: dispatch(transport, apply_in_bf16)(*tokens)[0]  # noqa: E731
        found = gradients_of_layers(layer, x, experts, weights, place(params))
    assert found[0].dtype == found[2]["up"].dtype == jnp.bfloat16
    found = jax.tree.map(lambda z: np.asarray(z, np.float32), found)
    assert_close(found, gradients_in_float32(), 0.03)


@pytest.mark.parametrize(
    ("mesh", "kept"),
    cases(
        [("data2-expert4", 1), ("fsdp2-expert2-tensor2", 2)], fast=[("fsdp2-expert2-tensor2", 2)]
    ),
)
def test_copies_beyond_the_capacity_are_dropped_and_counted(mesh, kept):
    # a device has 3 or 6 of 24 tokens, all for one of 8 experts: 2 x 3 / 8 and 2 x 6 / 8 rows
    *tokens, params = draw(experts=(5,), active=1)
    expected = loop(*tokens, params)[0]
    options = dict(num_experts=E, transport="capacity", buffer_factor=2.0)
    with use_mesh(mesh_of(mesh)):
        run = jax.jit(functools.partial(run_experts, axes=AXES, apply=apply, **options))
        y, dropped = run(*tokens, place(params))
    per_device = 3 if mesh == "data2-expert4" else 6
    expected = expected.reshape(-1, per_device, D)
    expected[:, kept:] = 0
    np.testing.assert_allclose(np.asarray(y).reshape(expected.shape), expected, atol=1e-5)
    assert int(dropped) == 24 - kept * (24 // per_device)


def run_on(mesh, transport, factor, *tokens, mask=None, params):
    """(result, dropped copies)."""
    options = dict(num_experts=E, transport=transport, buffer_factor=factor)
    with use_mesh(mesh_of(mesh)):
        run = functools.partial(run_experts, axes=AXES, apply=apply, **options)
        y, dropped = jax.jit(lambda *args, mask: run(*args, mask_BT=mask))(
            *tokens, place(params), mask=mask
        )
        return np.asarray(y), int(dropped)


@pytest.mark.parametrize("transport", cases([None, *RUNNABLE], fast=["ring", "capacity"]))
def test_padding_goes_to_no_expert_and_takes_no_room(transport):
    x, experts, weights, params = draw(rows=4, length=5, active=2)
    # before real tokens, and to the experts that those go to
    experts = np.tile(experts[:, 3:4], (1, 5, 1))
    mask = np.tile(np.arange(5) >= 3, (4, 1))
    expected = np.where(mask[..., None], loop(x, experts, weights, params)[0], 0)
    # two real tokens of one expert each: 0.8 x an even load of all five tokens
    found, dropped = run_on(
        "expert4", transport, 4.0, x, experts, weights, mask=mask, params=params
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert dropped == 0


def test_a_mask_hides_padding_from_experts_without_a_mesh():
    x, experts, weights, params = draw(rows=2, length=3)
    mask = np.array([[True, False, True], [False, False, True]])

    @jax.jit
    def run(*tokens):
        sizes = []

        def apply_and_see(x_RD, sizes_E, params):
            sizes.append(sizes_E)
            return apply(x_RD, sizes_E, params)

        return run_experts(*tokens, AXES, apply_and_see, num_experts=E, mask_BT=mask)[0], *sizes

    y, sizes_E = run(x, experts, weights, params)
    expected = np.where(mask[..., None], loop(x, experts, weights, params)[0], 0)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert sizes_E.sum() == 2 * 3


@pytest.mark.parametrize("transport", cases(["emulated", "ring"], fast=["ring"]))
def test_beyond_the_buffers_the_last_tokens_of_the_busiest_lose(transport):
    # 4 devices of 6 tokens; the first two send all to expert 0, the others one each to expert 1
    x, experts, weights, params = draw(rows=8, length=3, active=1)
    experts = np.arange(24).reshape(8, 3, 1) % 6 + 2
    experts[:4], experts[4:, 0] = 0, 1
    experts[[5, 7], 0] = 7
    # an even load is 6 rows a device; room for 9: 2 for expert 1, of which 3 and 3 are left
    found, dropped = run_on("expert4", transport, 1.5, x, experts, weights, params=params)
    kept = np.ones((8, 3), bool)
    kept[[1, 3]] = False
    expected = loop(x, experts, weights, params)[0] * kept[..., None]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert dropped == 6


def test_what_is_kept_is_the_most_that_one_limit_allows():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes, room = rng.integers(0, 9, (3, 4)), int(rng.integers(1, 60))
        limits = [n for n in range(10) if np.minimum(sizes, n).sum() <= room]
        found = share(jnp.asarray(sizes), room)
        np.testing.assert_array_equal(found, np.minimum(sizes, limits[-1]))


def test_no_float32_array_is_as_large_as_all_copies_where_they_are_summed():
    x, weights, rows = np.ones((64, 16), jnp.bfloat16), np.ones((64, 4), "f4"), np.arange(256)
    routes = Routes(rows, rows.reshape(64, 4))

    def loss(x, weights):
        return combine(gather_rows(x, routes), weights, routes).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, weights)
    sizes = [x.aval.size for e in equations(jaxpr.jaxpr) for x in e.outvars if x.aval.dtype == "f4"]
    assert max(sizes) == 64 * 16


def test_the_emulated_exchange_is_the_one_that_jax_documents():
    operand, output = jnp.array([1, 2, 2, 3, 4, 0]), jnp.zeros(8, jnp.int32)
    sizes = [jnp.array(z) for z in ([0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1])]
    exchange = functools.partial(exchange_gathered, axis_name="expert")
    with use_mesh(mesh_of("expert2")):
        each = spec("expert")
        operands = [jax.reshard(z, each) for z in (operand, output, *sizes)]
        run = lambda x, y, *places: exchange(x[:, None], y[:, None], *places)[:, 0]  # noqa: E731
        found = jax.jit(jax.shard_map(run, in_specs=(each,) * 6, out_specs=each))(*operands)
    np.testing.assert_array_equal(found, [1, 3, 0, 0, 2, 2, 4, 0])


def test_the_ragged_exchange_lowers_for_tpus_with_its_collectives_alone():
    *tokens, params = draw()
    with use_mesh(mesh_of("fsdp2-expert2-tensor2")):
        traced = with_gradients(dispatch("ragged")).trace(*tokens, place(params))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all") == 4  # there and back, twice
    assert text.count("stablehlo.reduce_scatter") == 2  # the gradients of weights over fsdp


def primitives(*args):
    return str(jax.make_jaxpr(dispatch(None))(*args))


def test_the_default_transport_is_by_the_devices_of_the_mesh():
    *tokens, params = draw()
    with use_mesh(mesh_of("expert4")):
        assert "ragged_all_to_all" not in primitives(*tokens, params)
    mesh = mesh_of("expert4").abstract_mesh.update(abstract_device=None)
    with jax.sharding.use_abstract_mesh(mesh):
        assert "ragged_all_to_all" in primitives(*tokens, params)


def test_bad_calls_say_what_is_wrong():
    *tokens, params = draw()
    with pytest.raises(ValueError, match="unknown transport 'pigeon'; they are ragged, emulated"):
        dispatch("pigeon")(*tokens, params)
    with (
        use_mesh(make_mesh({"expert": 3}, jax.devices()[:3])),
        pytest.raises(ValueError, match="8 experts do not divide over 3 devices"),
    ):
        dispatch(None)(*tokens, params)
