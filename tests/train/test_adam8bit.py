"""8-bit moments: the maps, how near they round, and that training hardly notices.

Codes are compared with bitsandbytes' by vectors that tests/golden/make_adam8bit.py made.
"""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmprep_jax.config import UsageError, override
from llmprep_jax.nn.param import Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.adam8bit import Blocks, decode, encode, make_map, scale_by_adam8bit
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.checkpoint import CheckpointConfig, Checkpoints, abstract_of
from llmprep_jax.train.loop import fit
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from llmprep_jax.train.state import count_bytes, create_state, split_model
from llmprep_jax.train.step import make_train_step
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.train.toy import Rows, make_batch, params_of, toy

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
grid = functools.partial(pytest.param, marks=pytest.mark.grid)
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
MESH = {"fsdp": 4, "tensor": 2}
CFG = OptimConfig(lr=1e-2, warmup_steps=2, optimizer="adamw8bit")
DIM = 256  # of the toy: its embedding and its head then have 8-bit moments


@functools.cache  # one compilation for all tests of one kind of step
def build_step(cfg, ema, mesh):
    split = split_model(toy(dim=DIM), Param)
    tx = make_optimizer(cfg, split.params, 100)
    schedule = make_schedule(cfg, 100)

    def loss_fn(model, batch, key):
        return next_token_loss(model, batch)

    return tx, make_train_step(split.graphdef, tx, loss_fn, schedule, ema_decay=ema)


def start(cfg=CFG, ema=None, mesh=None):
    tx, step = build_step(cfg, ema, mesh)
    split = split_model(toy(dim=DIM), Param)
    return create_state(split.params, tx, seed=0, ema=ema is not None), step


def go_on(state, step, batches, accumulate=1):
    losses = []
    for batch in batches:
        state, metrics = step(state, {}, place_batch(batch, accumulate))
        losses.append(float(metrics["loss"]))
    return losses, state


def blocks_of(state):
    adam = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Blocks))
    return [x for x in adam if isinstance(x, Blocks)]


def assert_equal(now, was):
    chex.assert_trees_all_equal(jax.device_get(now), jax.device_get(was))


def zeros(*shape):
    return {"w": np.zeros(shape, np.float32)}


@SIGNS
def test_the_maps_have_their_literal_values(signed):
    values = make_map(signed)
    assert values.dtype == np.float32
    assert (np.diff(values) > 0).all()
    if signed:
        assert values[[0, 126, 127, 128, 129, 254, 255]].tolist() == pytest.approx(
            [-0.99296875, -5.5e-7, 0, 5.5e-7, 3.25e-6, 0.99296875, 1], rel=1e-6
        )
    else:
        assert values[[0, 1, 2, 3, 254, 255]].tolist() == pytest.approx(
            [0, 3.25e-7, 7.75e-7, 2.125e-6, 0.996484375, 1], rel=1e-6
        )


@SIGNS
def test_codes_decode_to_the_map_and_back(signed):
    codes = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_allclose(decode(codes, signed), make_map(signed), rtol=1e-6)
    np.testing.assert_array_equal(encode(decode(codes, signed), signed), codes)


@SIGNS
def test_every_value_gets_the_nearest_code(signed):
    values = make_map(signed).astype(np.float64)
    turns = (values[1:] + values[:-1]) / 2
    near = np.concatenate([turns * (1 + 3e-6), turns * (1 - 3e-6)])
    x = np.concatenate([np.linspace(-1, 1, 20001), np.geomspace(1e-9, 1, 20001), near])
    x = np.unique(np.float32(x if signed else np.abs(x)))
    codes = np.asarray(jax.jit(encode, static_argnums=1)(x, signed))
    away, least = np.abs(values[codes] - x), np.min(np.abs(values - x[:, None]), axis=1)
    np.testing.assert_allclose(away, least, rtol=1e-4, atol=1e-12)
    assert away.max() == pytest.approx(0.45 / (64 if signed else 128), rel=1e-4)


@SIGNS
def test_maps_and_codes_are_those_of_bitsandbytes(signed):
    name = "signed" if signed else "unsigned"
    golden = np.load(Path(__file__).parents[1] / "golden" / "adam8bit.npz")
    values, x, codes, absmax = (golden[f"{name}/{key}"] for key in ("map", "x", "codes", "absmax"))
    np.testing.assert_allclose(make_map(signed), values, rtol=2e-7)  # theirs is made in float32
    np.testing.assert_array_equal(absmax, np.abs(x).max(-1))
    np.testing.assert_array_equal(encode(x / absmax[:, None], signed), codes)


def grads_like(params, seed=1):
    """Gradients whose sizes differ by a thousand within a block, as those of a model do."""
    rng = np.random.default_rng(seed)
    return {
        name: np.float32(rng.normal(size=p.shape) * 10.0 ** rng.uniform(0, 3, p.shape))
        for name, p in params.items()
    }


def run_updates(tx, params, count=3):
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for seed in range(count):
        step, state = update(grads_like(params, seed), state)
    return step, state


def test_the_first_update_is_adams_since_nothing_is_rounded_yet():
    params = {**zeros(64, 320), "scale": np.zeros(64, np.float32)}
    step, _ = run_updates(scale_by_adam8bit(0.9, 0.95), params, 1)
    exact, _ = run_updates(optax.scale_by_adam(0.9, 0.95), params, 1)
    chex.assert_trees_all_close(step, exact, rtol=1e-5, atol=0)


def test_moments_are_within_half_an_interval_of_adams():
    params = zeros(64, 512)
    _, state = run_updates(scale_by_adam8bit(0.9, 0.95), params, 1)
    _, exact = run_updates(optax.scale_by_adam(0.9, 0.95), params, 1)
    for moment, wanted, bound in (
        (state.mu, exact.mu, 0.45 / 64),
        (state.nu, exact.nu, 0.45 / 128),
    ):
        codes, absmax = moment["w"]
        absmax, wanted = np.asarray(absmax), np.asarray(wanted["w"]).reshape(64, 2, 256)
        values = np.asarray(decode(codes, bound > 0.005)).reshape(64, 2, 256) * absmax[..., None]
        away = np.abs(values - wanted) / absmax[..., None]
        assert away.max() <= bound * (1 + 1e-4)
        np.testing.assert_allclose(absmax, np.abs(wanted).max(-1), rtol=1e-6)


def test_small_arrays_and_arrays_without_blocks_stay_float32():
    shapes = {"small": (4095,), "odd": (31, 31, 31), "w": (16, 256)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    step, state = run_updates(scale_by_adam8bit(0.9, 0.95), params)
    exact, _ = run_updates(optax.scale_by_adam(0.9, 0.95), params)
    assert [isinstance(state.mu[name], Blocks) for name in params] == [False, False, True]
    np.testing.assert_allclose(step["small"], exact["small"], rtol=1e-5)
    np.testing.assert_allclose(step["odd"], exact["odd"], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((4, 1024), (4, 4)),
        ((30, 576), (30, 3)),  # blocks of 192
        ((2, 576, 9, 64), (2, 576, 9, 1)),
        ((2, 576, 16), (2, 3, 16)),  # 16 is too short: along the dimension before
        ((2, 32003), (2, 32003)),  # a prime: no blocks
    ],
    ids=str,
)
def test_blocks_run_along_the_last_dimension_that_parts(shape, counts):
    tx = scale_by_adam8bit(min_size=1)
    mu = jax.eval_shape(tx.init, zeros(*shape)).mu["w"]
    assert (mu.absmax.shape if isinstance(mu, Blocks) else mu.shape) == counts


def test_a_second_moment_far_below_its_block_is_kept_above_zero():
    # 1e-9 of the largest: zero is nearest, and the next step would be a first moment over eps
    params, grads = zeros(16, 256), {"w": np.full((16, 256), 1e-2, np.float32)}
    grads["w"][:, 0] = 300.0
    tx = scale_by_adam8bit(0.9, 0.95)
    update = jax.jit(tx.update)
    _, state = update(grads, jax.jit(tx.init)(params))
    assert set(np.unique(state.nu["w"].codes)) == {1, 255}
    step, state = update(params, state)
    assert np.abs(step["w"]).max() < 1.5


def test_zero_gradients_make_zero_moments_and_no_step():
    params, tx = zeros(16, 256), scale_by_adam8bit()
    begun = jax.jit(tx.init)(params)
    step, state = jax.jit(tx.update)(params, begun)
    np.testing.assert_array_equal(step["w"], 0)
    assert_equal(state._replace(count=np.int32(0)), begun)


def test_subnormal_second_moments_do_no_harm():
    grads = {"w": np.full((16, 256), 1e-19, np.float32)}
    tx = scale_by_adam8bit(0.9, 0.95)
    state, update = jax.jit(tx.init)(grads), jax.jit(tx.update)
    for _ in range(2):
        step, state = update(grads, state)
    assert np.isfinite(step["w"]).all()


@pytest.mark.parametrize("chunk", [2**11, 2**13])
def test_an_array_updated_in_parts_is_updated_as_a_whole(chunk, monkeypatch):
    params = zeros(12, 16, 512)
    whole_step, whole = run_updates(scale_by_adam8bit(0.9, 0.95), params)
    monkeypatch.setattr("llmprep_jax.train.adam8bit.CHUNK", chunk)
    tx = scale_by_adam8bit(0.9, 0.95)
    step, state = run_updates(tx, params)
    assert "scan[" in str(jax.make_jaxpr(tx.update)(params, state))
    np.testing.assert_allclose(step["w"], whole_step["w"], rtol=1e-6)
    assert_equal(state, whole)


def test_a_quadratic_is_minimised_as_by_adamw():
    rng = np.random.default_rng(0)
    scale = np.float32(10.0 ** rng.uniform(-2, 0, (32, 256)))
    target = np.float32(rng.normal(size=(32, 256)))

    def losses(optimizer):
        cfg = OptimConfig(lr=0.05, weight_decay=0.0, clip_norm=None, optimizer=optimizer)
        params = zeros(32, 256)
        tx = make_optimizer(cfg, params, 200)

        def loss_of(params):
            return 0.5 * jnp.mean(scale * jnp.square(params["w"] - target))

        def one(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        @jax.jit
        def run(params):
            return jax.lax.scan(one, (params, tx.init(params)), length=200)[1]

        return np.asarray(run(params))

    exact, rounded = losses("adamw"), losses("adamw8bit")
    # the farthest is 0.21 % of the first loss away, about step 15
    np.testing.assert_allclose(rounded, exact, atol=4e-3 * exact[0])
    assert rounded[-1] < 1e-8 * exact[0]


def test_the_toy_learns_as_with_adamw():
    batches = [make_batch(i) for i in range(60)]
    state, step = start(OptimConfig(lr=1e-2, warmup_steps=2))
    exact, _ = go_on(state, step, batches)
    state, step = start()
    assert len(blocks_of(state)) == 4
    rounded, _ = go_on(state, step, batches)
    # the farthest of the 60 losses is 0.5 % away
    np.testing.assert_allclose(rounded, exact, rtol=0.01)
    assert rounded[-1] < 1.0


def test_accumulation_and_averages_are_as_ever():
    batches = [make_batch(i) for i in range(3)]
    whole, _ = go_on(*start(), batches)
    state, step = start(ema=0.5)
    parts, state = go_on(state, step, batches, accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)


def test_a_step_that_is_not_finite_changes_nothing():
    state, step = start()
    _, state = go_on(state, step, [make_batch()])
    before = jax.device_get(state.opt_state)
    poisoned = make_batch()
    poisoned["loss_mask"][3, 4] = np.inf
    _, state = go_on(state, step, [poisoned])
    assert_equal(state.opt_state, before)
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        grid((8, 2048), ("tensor", "fsdp")),  # whole blocks on every device
        ((8, 576), ("tensor", "fsdp")),  # blocks of 192, shares of 144
        slow((8, 256), (None, ("fsdp", "tensor"))),  # one block over all devices
        slow((128, 16), ("fsdp", "tensor")),  # blocks along the first dimension
        slow((2, 64, 12, 64), (None, "fsdp", "tensor", None)),
    ],
    ids=str,
)
def test_a_mesh_makes_the_codes_of_one_device(shape, spec, monkeypatch):
    monkeypatch.setattr("llmprep_jax.train.adam8bit.CHUNK", 2**11)  # in parts, where it may be
    tx, params = scale_by_adam8bit(0.9, 0.95, min_size=1), zeros(*shape)
    step, state = run_updates(tx, params)
    with use_mesh(make_mesh(MESH)):
        place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec))
        params = jax.device_put(params, place)
        sharded, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        for seed in range(3):
            grads = jax.device_put(grads_like(params, seed), place)
            sharded_step, sharded = update(grads, sharded)
        assert sharded.mu["w"].codes.sharding.is_equivalent_to(place, len(shape))
    assert_equal(sharded, state)
    np.testing.assert_allclose(sharded_step["w"], step["w"], rtol=1e-6)


@pytest.mark.slow  # compiles a training step for eight devices
def test_a_mesh_trains_like_one_device():
    batches = [make_batch(i, rows=16) for i in range(4)]
    alone, _ = go_on(*start(), batches)
    with use_mesh(make_mesh(MESH)):
        state, step = start(mesh=str(MESH))
        losses, state = go_on(state, step, batches)
        assert "fsdp" in str(jax.typeof(blocks_of(state)[0].codes))
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


@pytest.mark.parametrize("offload", [grid(False), True])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tmp_path, offload):
    cfg = OptimConfig(lr=1e-2, warmup_steps=2, optimizer="adamw8bit", offload=offload)
    batches = [make_batch(i) for i in range(6)]
    losses, whole = go_on(*start(cfg), batches)
    state, step = start(cfg)
    _, state = go_on(state, step, batches[:3])
    with Checkpoints(tmp_path, CheckpointConfig(), {}) as checkpoints:
        checkpoints.save(state, None)
        checkpoints.wait()
        abstract = abstract_of(start(cfg)[0])
        state, _ = checkpoints.restore(3, abstract)
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, whole)
    step.clear_cache()  # a resumed run compiles for what was restored
    rest, state = go_on(state, step, batches[3:])
    assert rest == losses[3:]
    assert_equal(state.opt_state, whole.opt_state)
    assert_equal(state.params, whole.params)


@pytest.mark.slow  # four runs of `fit`
def test_a_run_may_go_on_with_its_moments_elsewhere(tmp_path):
    def run(out, steps, offload):
        optim = OptimConfig(lr=1e-2, schedule="constant", optimizer="adamw8bit", offload=offload)
        cfg = FitConfig(steps=steps, optim=optim, ema_decay=0.5, accumulate=2)
        trainer = Trainer(toy(dim=DIM), Param, cfg)
        return params_of(fit(trainer, Rows(), out=tmp_path / out).model)

    whole = run("whole", 3, False)
    run("parts", 1, True)
    run("parts", 2, True)
    assert_equal(run("parts", 3, False), whole)


@pytest.mark.parametrize("offload", [grid(False), True])
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, offload):
    cfg = OptimConfig(lr=1e-2, warmup_steps=2, optimizer="adamw8bit", offload=offload)
    _, state = go_on(*start(cfg), [make_batch()])
    with Checkpoints(tmp_path, CheckpointConfig(), {}) as checkpoints:
        checkpoints.save(state, None)
        checkpoints.wait()
        with use_mesh(make_mesh(MESH)):
            there = start(cfg, mesh=str(MESH))[0]
            back, _ = checkpoints.restore(1, abstract_of(there))
            assert "fsdp" in str(blocks_of(back)[0].codes.sharding)
            assert jax.tree.map(jax.typeof, back) == jax.tree.map(jax.typeof, there)
    assert_equal(back.opt_state, state.opt_state)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_offloaded_moments_wait_on_the_host_and_change_no_bit(optimizer):
    batches = [make_batch(i) for i in range(4)]
    plain = OptimConfig(lr=1e-2, warmup_steps=2, optimizer=optimizer)
    losses, state = go_on(*start(plain), batches)
    away, step = start(OptimConfig(lr=1e-2, warmup_steps=2, optimizer=optimizer, offload=True))
    for turn in range(2):
        kinds = {x.ndim > 0: x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state)}
        assert kinds == {True: "pinned_host", False: "device"}
        more, away = go_on(away, step, batches[2 * turn : 2 * turn + 2])
        assert more == losses[2 * turn : 2 * turn + 2]
    assert step._cache_size() == 1
    assert_equal(away.opt_state, state.opt_state)
    assert_equal(away.params, state.params)


@pytest.mark.slow  # compiles a training step for eight devices
def test_offloaded_moments_are_sharded_as_the_others():
    cfg = OptimConfig(lr=1e-2, warmup_steps=2, optimizer="adamw8bit", offload=True)
    batches = [make_batch(i) for i in range(2)]
    with use_mesh(make_mesh(MESH)):
        losses, state = go_on(*start(mesh=str(MESH)), batches)
        away_losses, away = go_on(*start(cfg, mesh=str(MESH)), batches)
        for was, now in zip(blocks_of(state), blocks_of(away), strict=True):
            assert now.codes.sharding == was.codes.sharding.with_memory_kind("pinned_host")
    np.testing.assert_allclose(away_losses, losses, rtol=1e-6)  # XLA may sum in another order


def test_offload_where_the_host_cannot_be_addressed_is_refused(monkeypatch):
    monkeypatch.setattr("llmprep_jax.train.offload.HOST", "far_away")
    with pytest.raises(ValueError, match="offload: cpu has no far_away memory"):
        make_optimizer(OptimConfig(offload=True), {"w": jnp.zeros(2)}, 10)


def test_the_state_takes_two_bytes_a_parameter():
    params = {**zeros(8, 1024), "scale": np.zeros(256, np.float32)}

    def size(optimizer):
        tx = make_optimizer(OptimConfig(optimizer=optimizer), params, 10)
        return count_bytes(jax.eval_shape(tx.init, params))

    counters = 4 * 2  # Adam's and the schedule's
    assert size("adamw") == 8 * (8 * 1024 + 256) + counters
    assert size("adamw8bit") == 2 * (8 * 1024 + 4 * 8 * 4) + 8 * 256 + counters


def test_the_optimizer_is_chosen_by_name():
    cfg = override(OptimConfig(), ["optimizer=adamw8bit"])
    assert cfg.optimizer == "adamw8bit"
    with pytest.raises(UsageError, match="adamw8bit"):
        override(OptimConfig(), ["optimizer=adam8"])
    with pytest.raises(ValueError, match="moment_dtype=bfloat16 is for optimizer=adamw"):
        OptimConfig(optimizer="adamw8bit", moment_dtype="bfloat16")
    with pytest.raises(ValueError, match="block must be at least 32, not 16"):
        scale_by_adam8bit(block=16)
