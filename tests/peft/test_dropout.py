"""Dropout of LoRA's inputs is a function of a key: by layer, by step, and the same when redone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import DoRA, LoRA
from llmprep_jax.peft.adapter import drop
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from llmprep_jax.train.state import create_state, split_model
from llmprep_jax.train.step import make_train_step
from tests.models.tiny import make_tokens
from tests.peft.test_methods import assert_near, base, scattered, small
from tests.random_modules import random_module

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
METHOD = LoRA(rank=4, alpha=8, targets=("q_proj", "o_proj", "down_proj"), dropout=0.3)


@functools.cache
def adapted(method: LoRA = METHOD) -> nnx.Module:
    return scattered(lp.peft.inject(base(), method))


@functools.partial(jax.jit, compiler_options=QUICK)
def logits_of(model: nnx.Module, key: jax.Array | None) -> jax.Array:
    return lp.peft.train_mode(model, key)(make_tokens(8)).logits


def test_it_drops_the_share_asked_for_and_keeps_the_mean():
    x = jnp.full((400, 500), 2.0, jnp.bfloat16)
    found = np.asarray(drop(x, 0.3, jax.random.key(1)), np.float32)
    assert set(np.unique(found)) == {0.0, np.float32(jnp.bfloat16(2.0 / 0.7))}
    assert (found == 0).mean() == pytest.approx(0.3, abs=0.005)  # 200,000 draws: 5 sigma
    assert (found == 0).mean(0).std() == pytest.approx((0.21 / 400) ** 0.5, rel=0.1)
    assert (found == 0).mean(1).std() == pytest.approx((0.21 / 500) ** 0.5, rel=0.1)


def test_every_layer_and_every_key_drops_its_own():
    switched = lp.peft.train_mode(adapted(), jax.random.key(0))
    other = lp.peft.train_mode(adapted(), jax.random.key(1))
    paths = [path for path in lp.peft.adapter.adapters(switched)]
    keys = [
        jax.random.key_data(lp.peft.adapter.adapters(model)[path].key[...])
        for model in (switched, other)
        for path in paths
    ]
    rows = np.concatenate(keys)
    assert len(paths) == 3
    assert len(rows) == 2 * 3 * 2
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_only_a_model_in_training_with_a_key_drops(kind):
    settings = dict(rank=4, alpha=8, targets=("q_proj", "o_proj", "down_proj"))
    model = adapted(kind(**settings, dropout=0.3))
    plain = logits_of(adapted(kind(**settings)), jax.random.key(0))
    np.testing.assert_array_equal(logits_of(model, None), plain)
    one, two, again = [logits_of(model, jax.random.key(seed)) for seed in (0, 1, 0)]
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 0.05
    assert np.abs(one - two).max() > 0.05


def test_a_key_alone_changes_nothing_where_nothing_is_dropped():
    model = adapted(LoRA(rank=4, alpha=8, targets=("q_proj",)))
    assert lp.peft.train_mode(model, jax.random.key(0)) is model


@functools.partial(jax.jit, compiler_options=QUICK)
def grads_of(model: nnx.Module) -> tuple:
    graph, trained, frozen = nnx.split(model, AdapterParam, ...)

    def loss(trained):
        model = lp.peft.train_mode(nnx.merge(graph, trained, frozen), jax.random.key(3))
        logits = model(make_tokens(8)).logits
        return jnp.square(logits).mean(), logits

    return jax.grad(loss, has_aux=True)(trained)


@pytest.mark.slow  # compiles for eight devices
def test_layers_in_a_list_remat_and_a_mesh_drop_the_same():
    def make(remat="none"):
        return random_module(lambda: lp.peft.inject(small(remat), METHOD))

    model = make()
    grads, logits = grads_of(model)
    assert_near(grads_of(make("full")), (grads, logits))
    model.layers = unstack(model.layers)
    assert_near(logits_of(model, jax.random.key(3)), logits)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        assert_near(grads_of(make()), (grads, logits), 2e-5)


@pytest.mark.slow  # compiles for three seconds
def test_a_step_taken_again_from_its_state_is_the_same_to_the_bit_and_steps_differ():
    parts, tokens = split_model(adapted(), AdapterParam), make_tokens()
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
    cfg = OptimConfig(lr=0.0, weight_decay=0.0, warmup_steps=0)  # steps differ by what they drop
    tx = make_optimizer(cfg, parts, 10)
    step = make_train_step(
        parts.graphdef,
        tx,
        lambda model, batch, key: next_token_loss(lp.peft.train_mode(model, key), batch),
        make_schedule(cfg, 10),
    )
    state = create_state(jax.tree.map(jnp.copy, parts.params), tx, seed=5)
    losses = []
    for _ in range(3):
        saved = jax.tree.map(jnp.copy, state)
        state, metrics = step(state, parts.frozen, place_batch(batch, 2))
        losses.append(float(metrics["loss"]))
    again, metrics = step(saved, parts.frozen, place_batch(batch, 2))
    assert float(metrics["loss"]) == losses[2]
    assert len(set(losses)) == 3
    assert int(again.step) == 3


def test_the_share_goes_into_the_folder_and_comes_back(tmp_path):
    found = lp.peft.load(base(), lp.peft.save(adapted(), tmp_path / "adapter"))
    assert found.layers.attn.q.method.dropout == 0.3


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"dropout is .*; it must be at least 0 and below 1"):
        LoRA(dropout=share)
