"""The step: learning, exact accumulation, meshes, adapters, averages, and the guard."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.param import AdapterParam, Compute, Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from llmprep_jax.train.state import count, create_state, split_model
from llmprep_jax.train.step import make_train_step
from tests.train.toy import make_batch, toy

CFG = OptimConfig(lr=1e-2, warmup_steps=2)


def loss_fn(model, batch, key):
    return next_token_loss(model, batch)


@functools.cache  # one compilation for all tests of one kind of step
def build_step(trainable, ema, mesh, **kwargs):
    abstract = split_model(toy(**kwargs), trainable)
    tx = make_optimizer(CFG, abstract.params, 100)
    step = make_train_step(abstract.graphdef, tx, loss_fn, make_schedule(CFG, 100), ema_decay=ema)
    return tx, step


def build(trainable=Param, ema=None, mesh=None, **kwargs):
    tx, step = build_step(trainable, ema, mesh, **kwargs)
    split = split_model(toy(**kwargs), trainable)
    return split, create_state(split.params, tx, seed=0, ema=ema is not None), step


def run(num_steps=5, accumulate=1, batch=None, **kwargs):
    split, state, step = build(**kwargs)
    losses = []
    for _ in range(num_steps):
        arrays = place_batch(batch or make_batch(), accumulate)
        state, metrics = step(state, split.frozen, arrays)
        losses.append(float(metrics["loss"]))
    return losses, state, metrics


def test_the_loss_falls_and_the_metrics_say_what_happened():
    losses, state, metrics = run(40)
    assert losses[0] > 3.0
    assert losses[-1] < 1.0
    assert int(state.step) == 40
    assert float(metrics["tokens"]) == make_batch()["loss_mask"].sum()
    assert float(metrics["input_tokens"]) == 96.0
    assert float(metrics["lr"]) == pytest.approx(float(make_schedule(CFG, 100)(39)))
    leaves = [np.asarray(x).ravel() for x in jax.tree.leaves(state.params)]
    norm = np.linalg.norm(np.concatenate(leaves))
    assert float(metrics["param_norm"]) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_the_whole_batch_with_uneven_token_counts(accumulate):
    batch = make_batch()
    batch["loss_mask"][:2] = 0.0  # two rows without a target, one microbatch of eight at most
    batch["loss_mask"][5, :] = 1.0
    whole, state, _ = run(3, batch=batch)
    parts, state_of_parts, _ = run(3, accumulate, batch=batch)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    chex.assert_trees_all_close(state.params, state_of_parts.params, atol=2e-5, rtol=1e-7)


@pytest.mark.parametrize(
    ("axes", "accumulate"),
    [
        ({"fsdp": 4, "tensor": 2}, 2),
        pytest.param({"data": 2, "fsdp": 4}, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_trains_like_one_device(axes, accumulate):
    batch = make_batch(rows=16)
    alone, state, _ = run(4, accumulate, batch=batch)
    with use_mesh(make_mesh(axes)):
        sharded, sharded_state, _ = run(4, accumulate, batch=batch, mesh=str(axes))
        assert "fsdp" in str(jax.typeof(sharded_state.params["head"]["w"]))
    np.testing.assert_allclose(sharded, alone, rtol=1e-5)
    found, expected = jax.device_get((sharded_state.params, state.params))
    chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-7)


def test_adapters_train_and_the_base_stays_bit_for_bit():
    before = toy(lora=True)
    split, state, step = build(AdapterParam, lora=True)
    losses = []
    assert count(split.params) == 2 * 16 * 2
    for _ in range(20):
        state, metrics = step(state, split.frozen, place_batch(make_batch()))
        losses.append(float(metrics["loss"]))
    assert float(jnp.abs(state.params["lora_b"]).max()) > 0.01
    np.testing.assert_array_equal(split.frozen["head"]["w"], before.head.w[...])
    np.testing.assert_array_equal(split.frozen["embed"]["w"], before.embed.w[...])
    assert losses[-1] < losses[0] - 0.1


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        split_model(toy(), AdapterParam)


def test_bf16_compute_keeps_float32_masters_and_moments():
    compute = Compute(dtype="bfloat16", param_dtype="float32")
    losses, state, _ = run(40, compute=compute)
    assert losses[-1] < 1.0
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}


def test_bf16_parameters_stay_bf16():
    compute = Compute(dtype="bfloat16", param_dtype="bfloat16")
    losses, state, _ = run(40, compute=compute, ema=0.9)
    assert losses[-1] < losses[0]
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.ema)} == {"float32"}


def test_the_average_follows_its_formula():
    split, state, step = build(ema=0.15)
    average = np.asarray(state.params["head"]["w"])
    for i in range(3):
        state, _ = step(state, split.frozen, place_batch(make_batch(i), 2))
        decay = min(0.15, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * np.asarray(state.params["head"]["w"])
    np.testing.assert_allclose(state.ema["head"]["w"], average, rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_non_finite_step_changes_nothing(value):
    accumulate = 2
    split, state, step = build(ema=0.15)
    state, _ = step(state, split.frozen, place_batch(make_batch(), accumulate))
    before = jax.device_get((state.step, state.params, state.opt_state, state.ema))
    poisoned = make_batch()
    poisoned["loss_mask"][3, 4] = value
    state, metrics = step(state, split.frozen, place_batch(poisoned, accumulate))
    assert not bool(metrics["finite"])
    after = jax.device_get((state.step, state.params, state.opt_state, state.ema))
    chex.assert_trees_all_equal(before, after)
    state, metrics = step(state, split.frozen, place_batch(make_batch(), accumulate))
    assert bool(metrics["finite"])
    assert int(state.step) == 2


def test_a_batch_without_targets_moves_nothing_but_the_step():
    split, state, step = build()
    before = jax.device_get(state.params)
    empty = make_batch() | {"loss_mask": np.zeros((8, 12), np.float32)}
    state, metrics = step(state, split.frozen, place_batch(empty))
    assert (float(metrics["loss"]), float(metrics["tokens"]), int(state.step)) == (0.0, 0.0, 1)
    chex.assert_trees_all_equal(before, jax.device_get(state.params))


def test_the_state_is_donated_and_the_step_compiles_once():
    split, state, step = build()
    first = state.params["head"]["w"]
    state, _ = step(state, split.frozen, place_batch(make_batch()))
    assert first.is_deleted()
    compiled = step._cache_size()
    for i in range(3):
        state, _ = step(state, split.frozen, place_batch(make_batch(i)))
    assert step._cache_size() == compiled


def test_each_step_has_its_own_key():
    keys = []

    def noisy(model, batch, key):
        loss = next_token_loss(model, batch)
        return loss._replace(total=loss.total + jax.random.uniform(key))

    split = split_model(toy(), Param)
    cfg = OptimConfig(lr=0.0)
    tx = make_optimizer(cfg, split.params, 10)
    state = create_state(split.params, tx, seed=0)
    step = make_train_step(split.graphdef, tx, noisy, make_schedule(cfg, 10))
    for _ in range(3):
        state, metrics = step(state, split.frozen, place_batch(make_batch()))
        keys.append(float(metrics["loss"]))
    assert len(set(keys)) == 3


def test_rows_that_do_not_part_are_refused():
    with pytest.raises(ValueError, match="8 rows is no multiple of accumulate=3"):
        place_batch(make_batch(), 3)
    with use_mesh(make_mesh({"fsdp": 8})), pytest.raises(ValueError, match="mesh fsdp=8"):
        place_batch(make_batch(), 2)
