"""Checkpoints: bit-exact, onto any mesh, retained as asked, and nothing lost when a save fails."""

import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.param import AdapterParam, Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    abstract_of,
    all_steps,
    latest_step,
    read_meta,
    read_params,
)
from llmprep_jax.train.optim import OptimConfig, make_optimizer
from llmprep_jax.train.state import TrainState, create_state, split_model
from tests.full_disk import disk_for_files_of
from tests.train.toy import toy

KEEP = CheckpointConfig()
# after an error Orbax's other writes find its loop closed; `Checkpoints` hides that, pytest tells
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed")


def make_state(step=0, seed=0, ema=False, trainable=Param) -> TrainState:
    split = split_model(toy(seed, lora=True), trainable)
    tx = make_optimizer(OptimConfig(), split.params, 10)
    state = create_state(split.params, tx, seed=seed, ema=ema)
    return at_step(state, step)


def at_step(state: TrainState, step: int) -> TrainState:
    return TrainState(jnp.int32(step), state.params, state.opt_state, state.ema, state.key)


def numbers(state: TrainState) -> list[np.ndarray]:
    state = TrainState(
        state.step, state.params, state.opt_state, state.ema, jax.random.key_data(state.key)
    )
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def save(out, states, cfg=KEEP, data=None):
    with Checkpoints(out, cfg, {"base": "some/model"}) as checkpoints:
        for state in states:
            checkpoints.save(state, data or {"place": int(state.step)})
            checkpoints.wait()


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_bit_for_bit_with_its_data_state(tmp_path, ema):
    state = make_state(3, ema=ema)
    save(tmp_path, [state], data={"files": [1, {"row": 7}]})
    other = make_state(seed=1, ema=ema)
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints:
        back, data = checkpoints.restore(3, abstract_of(other))
    assert data == {"files": [1, {"row": 7}]}
    assert jax.tree.structure(back) == jax.tree.structure(state)
    chex.assert_trees_all_equal(numbers(back), numbers(state))


def test_a_state_is_saved_as_it_was_though_its_arrays_are_donated_at_once(tmp_path):
    state = make_state(1)
    big = {"w": jnp.arange(2**22, dtype=jnp.float32)}
    state = TrainState(state.step, big, state.opt_state, None, state.key)
    double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints:
        checkpoints.save(state, None)
        for _ in range(3):
            big = double(big)
        checkpoints.wait()
        target = jax.eval_shape(lambda: {"w": jnp.zeros(2**22)})
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=big["w"].sharding), target
        )
    saved = read_params(tmp_path, target)
    np.testing.assert_array_equal(saved["w"], np.arange(2**22, dtype=np.float32))


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    axes = {"fsdp": 4, "tensor": 2}
    state = make_state(2)
    save(tmp_path, [state])
    with use_mesh(make_mesh(axes)), Checkpoints(tmp_path, KEEP, {}) as checkpoints:
        target = abstract_of(make_state(seed=1))
        back, _ = checkpoints.restore(2, target)
        back = at_step(back, 4)
        checkpoints.save(back, {"place": 4})
    assert "fsdp" in str(back.params["head"]["w"].sharding)
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints:  # and back to one device
        again, _ = checkpoints.restore(4, abstract_of(make_state(seed=1)))
    chex.assert_trees_all_equal(numbers(at_step(again, 2)), numbers(state))


def test_the_last_and_every_so_many_are_kept(tmp_path):
    state = make_state()
    save(tmp_path, [at_step(state, i) for i in range(1, 9)], CheckpointConfig(1, 2, 3))
    assert all_steps(tmp_path) == [3, 6, 7, 8]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"3", "6", "7", "8"}


def test_only_what_is_trained_is_copied(tmp_path):
    save(tmp_path, [make_state(1, trainable=AdapterParam)])
    names = {path.name for path in (tmp_path / "checkpoints" / "1").iterdir() if path.is_dir()}
    assert names == {"params", "optim", "data", "meta"}
    split = split_model(toy(lora=True), AdapterParam)
    assert set(read_params(tmp_path, abstract_of(split.params))) == {"lora_a", "lora_b"}


def test_meta_and_parameters_can_be_read_alone(tmp_path):
    states = [make_state(1, ema=True), make_state(2, seed=5, ema=True)]
    save(tmp_path, states)
    assert read_meta(tmp_path) == {"base": "some/model", "step": 2}
    assert read_meta(tmp_path, 1)["step"] == 1
    target = abstract_of(make_state().params)
    params = read_params(tmp_path, target, step=1)
    np.testing.assert_array_equal(params["head"]["w"], states[0].params["head"]["w"])
    average = read_params(tmp_path, target, item="ema")
    np.testing.assert_array_equal(average["head"]["w"], states[1].params["head"]["w"])


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no checkpoint$"):
        read_meta(tmp_path)
    save(tmp_path, [make_state(1)])
    with pytest.raises(ValueError, match="holds no checkpoint 7; there are 1"):
        read_meta(tmp_path, 7)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    save(tmp_path, [make_state(1)])
    other = make_state(trainable=AdapterParam)
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints, pytest.raises(ValueError) as error:  # noqa: PT011
        checkpoints.restore(1, abstract_of(other))
    assert "params lora_a is not there in the checkpoint and (16, 2) in this run" in str(
        error.value
    )
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints, pytest.raises(ValueError, match="no ema"):
        checkpoints.restore(1, abstract_of(make_state(ema=True)))


def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path):
    save(tmp_path, [make_state(1)])
    path = tmp_path / "checkpoints" / "1"
    for file in (path / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints, pytest.raises(ValueError) as error:  # noqa: PT011
        checkpoints.restore(1, abstract_of(make_state()))
    assert str(error.value).startswith(f"{path} does not read")
    assert "\n" not in str(error.value)


def test_what_a_killed_run_left_half_is_ignored_and_removed(tmp_path):
    save(tmp_path, [make_state(1)])
    folder = tmp_path / "checkpoints"
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-17", ".deleted"):
        (folder / name / "params").mkdir(parents=True)
    assert latest_step(tmp_path) == 1
    save(tmp_path, [])
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_an_unwritable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoints(tmp_path / "file", KEEP, {})


def test_a_full_disk_is_one_line_and_keeps_the_earlier_checkpoint(tmp_path):
    state = make_state()
    state = TrainState(state.step, {"w": jnp.ones(2**18)}, state.opt_state, None, state.key)

    def save_two():
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=1), {}) as checkpoints:
            checkpoints.save(at_step(state, 1), {})
            checkpoints.wait()
            with disk_for_files_of(2**16):
                checkpoints.save(at_step(state, 2), {})
                checkpoints.wait()

    with pytest.raises(OSError, match="a checkpoint could not be written") as error:
        save_two()
    (line,) = str(error.value).splitlines()
    assert "File too large" in line or "Failed to write" in line
    assert "whole are 1; free space" in line
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert read_meta(tmp_path) == {"step": 1}


def test_saving_holds_the_step_up_for_a_tenth_of_a_second_at_most(tmp_path):
    state = make_state(1)
    big = {f"w{i}": jnp.ones((1000, 1000)) for i in range(16)}  # 64 MB
    state = TrainState(state.step, big, state.opt_state, None, state.key)
    with Checkpoints(tmp_path, KEEP, {}) as checkpoints:
        jax.block_until_ready(big)
        held = []
        for step in range(1, 4):
            begin = time.perf_counter()
            checkpoints.save(at_step(state, step), {})
            held.append(time.perf_counter() - begin)
            checkpoints.wait()
    assert min(held) < 0.1
