"""Rules and meshes in force: what jit sees of them, other rules than the default, a tree's mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.sharding import (
    ShardingRules,
    has_mesh,
    make_mesh,
    mesh_of,
    on_mesh_of,
    spec,
    use_mesh,
    without_axes,
)
from llmprep_jax.train.losses import training_loss
from tests.grids import cases
from tests.models.tiny import forward, random_model
from tests.sharding.test_models import CONFIGS, assert_close, make_batch

AXES = {"fsdp": 4, "tensor": 2}


def spec_of(x) -> jax.P:
    return jax.typeof(x).sharding.spec


def test_a_jitted_function_is_traced_anew_under_other_rules():
    lay = jax.jit(lambda x: jax.reshard(x, spec("batch", "act_embed", shape=x.shape)))
    x = jnp.ones((8, 8))
    with use_mesh(make_mesh(AXES)):
        assert spec_of(lay(x)) == jax.P("fsdp", None)
        with use_mesh(make_mesh(AXES), ShardingRules(act_embed="tensor")):
            assert spec_of(lay(x)) == jax.P("fsdp", "tensor")
        with without_axes("fsdp"):
            assert spec_of(lay(x)) == jax.P(None, None)
        assert spec_of(lay(x)) == jax.P("fsdp", None)


def test_no_mesh_inside_a_mesh_takes_it_out_of_force():
    mesh, alone = make_mesh(AXES), jnp.arange(6.0).reshape(2, 3)
    product = jax.jit(lambda a, b: a @ b)

    @jax.jit
    def inside(x):
        with use_mesh(None):
            assert spec("batch") is None
        return x + (0 if spec("batch") is None else 1)

    with use_mesh(mesh):
        with use_mesh(None):
            assert spec("batch") is None
            assert not has_mesh()
            np.testing.assert_array_equal(product(alone, alone.T), [[5, 14], [14, 50]])
            assert len(product(alone, alone.T).devices()) == 1
            np.testing.assert_array_equal(inside(jnp.zeros(2)), [0, 0])
        assert spec("batch") == jax.P("fsdp")
        np.testing.assert_array_equal(inside(jnp.zeros(2)), [1, 1])
        assert len(jnp.ones(8).devices()) == 8


@functools.cache
def model_alone(name: str) -> nnx.Module:
    return random_model(CONFIGS[name])


@jax.jit
def loss_and_grads(model, batch):
    loss_of = lambda model: training_loss(model, batch).total  # noqa: E731
    return jax.value_and_grad(loss_of)(model)


# what a rule does to activations it does in every family; attention differs, and experts
RULES = {
    "seq over tensor": dict(seq="tensor"),
    "seq and head over tensor": dict(seq="tensor", head="tensor"),
    "activations over fsdp": dict(act_embed="fsdp", batch="data"),
    "whole weights": dict(embed=None, latent=None, mlp=None, vocab=None, heads=None, kv_heads=None),
}
PAIRS = cases(
    itertools.product(CONFIGS, RULES),
    fast=[("llama-9-3-heads", "seq and head over tensor")],
    slow=[
        ("llama-tied", "whole weights"),
        ("gemma3-1-kv-head", "seq over tensor"),
        ("deepseek-v3", "seq and head over tensor"),
        ("deepseek-v3", "activations over fsdp"),
    ],
)


@pytest.mark.parametrize(("name", "rules"), PAIRS)
def test_other_rules_give_the_numbers_of_one_device(name, rules):
    batch = make_batch()
    loss, grads = loss_and_grads(model_alone(name), batch)
    with use_mesh(make_mesh(AXES), ShardingRules(**RULES[rules])):
        found_loss, found = loss_and_grads(random_model(CONFIGS[name]), batch)
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-6)
    for (path, ours), (_, expected) in zip(
        *[nnx.to_flat_state(nnx.state(x)) for x in (found, grads)], strict=True
    ):
        assert_close(ours[...], expected[...], path)


# each compiles a decode
@pytest.mark.parametrize("name", cases(CONFIGS, slow=["gemma3-1-kv-head", "deepseek-v3"]))
def test_caches_hold_the_same_under_other_rules(name):
    tokens = make_batch()["tokens"]

    @jax.jit
    def decode(model, tokens):
        out = model(tokens[:, :10], cache=model.init_cache(8, 16))
        return model(tokens[:, 10:12], cache=out.cache).logits

    expected = forward(model_alone(name), tokens)[:, 10:]
    with use_mesh(make_mesh(AXES), ShardingRules(seq="tensor", head="tensor")):
        found = decode(random_model(CONFIGS[name]), tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["llama-tied", "deepseek-v3"])
def test_activations_stay_whole_in_the_model_dimension_where_rows_do_not_divide(name):
    tokens = jax.ShapeDtypeStruct((3, 12), jnp.int32)

    def run(model, tokens):
        layers = model.layers if name == "llama-tied" else model.dense_layers
        attn = jax.tree.map(lambda x: x[0], layers.attn)
        x_BTD = model.embed(tokens)
        low = attn.q(x_BTD) if name == "llama-tied" else attn.kv_a(x_BTD)
        return x_BTD, low, model.features(x_BTD)[0]

    with use_mesh(make_mesh(AXES)):
        model = jax.eval_shape(lambda: registry.build(CONFIGS[name], rngs=nnx.Rngs(0)))
        assert "fsdp" in model.embed.w.get_value().sharding.spec
        for x in jax.eval_shape(run, model, tokens):
            assert "fsdp" not in x.sharding.spec


def test_the_mesh_of_a_tree_is_that_of_its_arrays():
    mesh = make_mesh(AXES)
    alone = {"b": jnp.ones(3), "n": 2, "a": np.ones(3)}
    assert mesh_of(alone) is mesh_of({}) is None
    with use_mesh(mesh):
        tree = {**alone, "w": jnp.ones((4, 2), out_sharding=jax.P("fsdp"))}
        abstract = jax.eval_shape(lambda: jnp.ones((4, 2), out_sharding=jax.P("fsdp")))
    assert mesh_of(tree) == mesh
    assert mesh_of(abstract) == mesh.abstract_mesh
    assert jax.jit(lambda w: w * (mesh_of(w) == mesh.abstract_mesh))(tree["w"]).all()


def test_the_mesh_of_the_weights_is_entered_unless_one_is_in_force():
    mesh, half = make_mesh(AXES), make_mesh({"fsdp": 2}, jax.devices()[:2])
    with use_mesh(mesh):
        w = jnp.ones((4, 2), out_sharding=jax.P("fsdp"))

    def lay(w, x):
        with on_mesh_of(w):
            return jax.reshard(x, spec("batch", None, shape=x.shape)) * jnp.sum(w)

    x = np.ones((8, 3), np.float32)
    on_devices = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P()))
    closed_over = jax.jit(functools.partial(lay, w))  # concrete weights while a function is traced
    for laid in (lay(w, x), jax.jit(lay)(w, x), closed_over(on_devices)):
        assert spec_of(laid) == jax.P("fsdp", None)
    assert not has_mesh()
    with on_mesh_of(jnp.ones(2)):
        assert not has_mesh()
    with use_mesh(half), on_mesh_of(w):
        assert jax.sharding.get_mesh() == half
