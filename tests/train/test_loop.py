"""Runs as a whole: bit-equal however they are stopped, and stopped as they should be."""

import dataclasses
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console

from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.nn.param import AdapterParam, Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.checkpoint import CheckpointConfig, all_steps, read_meta
from llmprep_jax.train.loop import fit
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.monitor import NonFiniteError
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.train.toy import Rows, make_batch, params_of, toy

CFG = FitConfig(
    steps=12, optim=OptimConfig(lr=1e-2), checkpoint=CheckpointConfig(every=4), eval_every=5
)


def train(out, cfg=CFG, batches=None, trainable=Param, **kwargs):
    quiet = rich.console.Console(quiet=True)
    batches = batches or Rows()
    trainer = Trainer(toy(lora=True), trainable, cfg)
    return fit(trainer, batches, out=out, console=quiet, **kwargs)


def losses(out) -> dict[int, float]:
    records = read_jsonl(out / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert len(steps) == len(set(steps)), "a step is recorded twice"
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run that nothing stops ends with, and its folder; made once for each config."""

    @functools.cache
    def run(cfg=CFG, trainable=Param):
        out = tmp_path_factory.mktemp("whole")
        return train(out, cfg, trainable=trainable), out

    return run


class StopAt(Rows):
    """Sends this process SIGTERM while a batch is fetched."""

    def __init__(self, place):
        super().__init__()
        self.stop = place

    def __next__(self):
        if self.place == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def test_a_run_learns_logs_every_step_evaluates_and_keeps_checkpoints(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(perplexity(model, [make_batch(99)]))
        return {"eval_loss": seen[-1].nll}

    result = train(tmp_path, evaluate=evaluate, meta={"base": "b"})
    found = losses(tmp_path)
    assert sorted(found) == list(range(1, 13))
    assert found[12] < found[1] - 1
    assert (result.step, result.preempted, result.ema_model) == (12, False, None)
    assert result.metrics["loss"] == found[12]
    evaluations = [r for r in read_jsonl(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    assert [(r["step"], r["eval_loss"]) for r in evaluations] == [
        (5, seen[0].nll),
        (10, seen[1].nll),
        (12, seen[2].nll),
    ]
    assert all_steps(tmp_path) == [8, 12]
    assert read_meta(tmp_path) == {"base": "b", "step": 12}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_looking_at_the_metrics_seldom_changes_no_number(tmp_path, whole):
    train(tmp_path, dataclasses.replace(CFG, log_every=7))
    assert losses(tmp_path) == losses(whole()[1])


@pytest.mark.parametrize(("trainable", "ema_decay"), [(Param, None), (AdapterParam, 0.9)])
def test_sigterm_saves_and_the_same_call_goes_on_to_the_bit(tmp_path, whole, trainable, ema_decay):
    cfg = dataclasses.replace(CFG, ema_decay=ema_decay)
    unstopped, out = whole(cfg, trainable)
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(tmp_path, cfg, StopAt(6), trainable=trainable)
    assert (stopped.step, stopped.preempted) == (7, True)
    assert all_steps(tmp_path) == [4, 7]
    assert signal.getsignal(signal.SIGTERM) == before
    ended = train(tmp_path, cfg, trainable=trainable)
    assert (ended.step, ended.preempted) == (12, False)
    assert losses(tmp_path) == losses(out)
    assert (ended.ema_model is None) == (ema_decay is None)
    for one, other in ((unstopped.model, ended.model), (unstopped.ema_model, ended.ema_model)):
        jax.tree.map(np.testing.assert_array_equal, params_of(one), params_of(other))


def test_a_run_that_is_over_returns_at_once(whole):
    first, out = whole()
    again = train(out)
    assert (again.step, again.preempted) == (12, False)
    jax.tree.map(np.testing.assert_array_equal, params_of(first.model), params_of(again.model))


def test_a_run_goes_on_upon_another_mesh(tmp_path, whole):
    train(tmp_path, batches=StopAt(5))
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        train(tmp_path)
    alone, moved = losses(whole()[1]), losses(tmp_path)
    np.testing.assert_allclose(list(moved.values()), list(alone.values()), rtol=1e-5)


def test_a_non_finite_loss_stops_the_run_and_saves_nothing_of_it(tmp_path, whole):
    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, batches=Rows(poison=9))
    ids = ", ".join(str(i) for i in range(900, 908))
    assert f"step 10: loss nan, gradient norm nan; documents of its batch: {ids};" in str(
        error.value
    )
    assert str(error.value).endswith(f"last good checkpoint: {tmp_path / 'checkpoints' / '8'}")
    assert all_steps(tmp_path) == [4, 8]
    train(tmp_path)  # with the batch mended the run goes on from there
    assert losses(tmp_path) == losses(whole()[1])


@pytest.mark.parametrize("poison", [3, 11])
def test_a_non_finite_loss_at_a_checkpoint_is_found_before_it_is_written(tmp_path, poison):
    cfg = dataclasses.replace(CFG, log_every=100)
    with pytest.raises(NonFiniteError, match=f"step {poison + 1}:"):
        train(tmp_path, cfg, Rows(poison=poison))
    assert poison + 1 not in all_steps(tmp_path)


def test_data_that_end_early_are_named_with_the_remedy(tmp_path):
    class Few(Rows):
        def __next__(self):
            if self.place == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="the data ended before step 4 of 12; give more data"):
        train(tmp_path, batches=Few())


def test_two_runs_cannot_share_a_folder(tmp_path):
    class Intrude(Rows):
        def __next__(self):
            with pytest.raises(ValueError, match="is in use by another run"):
                train(tmp_path)
            return super().__next__()

    train(tmp_path, dataclasses.replace(CFG, steps=1), Intrude())


def test_an_unwritable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("accumulate", 0), ("log_every", 0), ("ema_decay", 1.0), ("seed", -1)],
)
def test_a_setting_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        FitConfig(**{field: value})


def kill_and_resume(folder: pathlib.Path, *, kills: int, steps: int, seed: int) -> str:
    module = "tests.train.kill_and_resume"
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, folder / "runs", str(kills), str(steps), str(seed)],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ | cache,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow  # twenty fresh processes, a second or two each
def test_kill_9_at_twenty_random_moments_leaves_every_loss_bit_equal(tmp_path):
    out = kill_and_resume(tmp_path, kills=20, steps=80, seed=2)
    print(out)
    assert out.count("\nkill ") == 20
    assert int(re.search(r"(\d+) kills left half a checkpoint", out)[1]) >= 3
