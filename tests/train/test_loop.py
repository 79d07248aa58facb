"""Runs as a whole: bit-equal however they are stopped, and stopped as they should be."""

import dataclasses
import functools
import io
import os
import pathlib
import re
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest
import rich.console

from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.nn.param import AdapterParam, Param
from llmprep_jax.sharding import has_mesh, make_mesh, use_mesh
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


_steps = {}


def make_trainer(cfg=CFG, trainable=Param):
    """A trainer whose step is compiled once for all runs that take the same."""
    trainer = Trainer(toy(lora=True), trainable, cfg)
    key = cfg.optim, cfg.horizon, cfg.ema_decay, cfg.skip_nonfinite > 0, trainable, has_mesh()
    trainer.step = _steps.setdefault(key, trainer.step)
    return trainer


def train(out, cfg=CFG, batches=None, trainable=Param, **kwargs):
    quiet = rich.console.Console(quiet=True)
    return fit(make_trainer(cfg, trainable), batches or Rows(), out=out, console=quiet, **kwargs)


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


@pytest.mark.parametrize(
    ("trainable", "ema_decay"),
    [pytest.param(Param, None, marks=pytest.mark.slow), (AdapterParam, 0.9)],
)
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
        chex.assert_trees_all_equal(params_of(one), params_of(other))


def test_a_run_that_is_over_returns_at_once(whole):
    first, out = whole()
    again = train(out)
    assert (again.step, again.preempted) == (12, False)
    chex.assert_trees_all_equal(params_of(first.model), params_of(again.model))


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


class Few(Rows):
    """Ends after so many batches."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __next__(self):
        if self.place == self.count:
            raise StopIteration
        return super().__next__()


@pytest.mark.parametrize("count", [3, 4])  # 4 is saved already when the end is noticed
def test_the_end_of_the_data_saves_and_ends_the_run(tmp_path, whole, count):
    evaluated = []

    def evaluate(model):
        evaluated.append(model)
        return {"eval_loss": 1.0}

    ended = train(tmp_path, batches=Few(count), evaluate=evaluate)
    assert (ended.step, ended.stopped, ended.preempted) == (count, "data", False)
    assert (all_steps(tmp_path), len(evaluated)) == ([count], 1)
    again = train(tmp_path, batches=Few(count))  # nothing is left to do
    assert (again.step, again.stopped) == (count, "data")
    train(tmp_path)  # with more data the run goes on
    assert losses(tmp_path) == losses(whole()[1])


def test_data_without_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the data hold no batch"):
        train(tmp_path, batches=Few(0))


def test_batches_that_are_not_finite_are_skipped_counted_and_named(tmp_path, capsys):
    cfg = dataclasses.replace(CFG, skip_nonfinite=2, log_every=3)

    class Poisoned(Rows):
        def __next__(self):
            self.poison = self.place if self.place in (2, 5, 9) else None
            return super().__next__()

    said = io.StringIO()
    with pytest.raises(NonFiniteError) as error:
        fit(make_trainer(cfg), Poisoned(), out=tmp_path, console=rich.console.Console(file=said))
    text = " ".join(said.getvalue().split())
    assert "skipped step 3: loss nan, gradient norm nan; documents of its batch: 200" in text
    assert "1 of 2 to be skipped" in text
    assert "step 10: loss nan" in str(error.value)
    assert "it is one more than skip_nonfinite=2" in str(error.value)
    assert all_steps(tmp_path) == [4, 8]
    found = losses(tmp_path)
    assert [step for step, loss in found.items() if loss is None] == [3, 6, 10]
    # those of an earlier command count; a larger number goes on
    with pytest.raises(NonFiniteError, match="step 10"):
        train(tmp_path, cfg, Poisoned())
    ended = train(tmp_path, dataclasses.replace(cfg, skip_nonfinite=3), Poisoned())
    assert (ended.step, losses(tmp_path)[12] < found[1]) == (12, True)


def test_a_skipped_batch_leaves_no_trace_in_what_is_trained(tmp_path):
    cfg = dataclasses.replace(CFG, steps=3, skip_nonfinite=1, ema_decay=0.9, log_every=1)
    skipped = train(tmp_path / "skipped", cfg, Rows(poison=2))
    shorter = train(tmp_path / "shorter", dataclasses.replace(cfg, steps=2, schedule_steps=3))
    chex.assert_trees_all_equal(params_of(skipped.model), params_of(shorter.model))
    chex.assert_trees_all_equal(params_of(skipped.ema_model), params_of(shorter.ema_model))


def test_the_best_checkpoint_is_written_and_stays(tmp_path):
    cfg = dataclasses.replace(
        CFG, eval_every=3, checkpoint=CheckpointConfig(every=4, keep_last=1, keep_best=True)
    )
    values = iter([3.0, 1.0, 2.0, 4.0])
    result = train(tmp_path, cfg, evaluate=lambda model: {"eval_loss": next(values)})
    assert (result.best, all_steps(tmp_path)) == (6, [6, 12])
    longer = dataclasses.replace(cfg, steps=15)
    result = train(tmp_path, longer, evaluate=lambda model: {"eval_loss": 1.5})
    assert (result.best, all_steps(tmp_path)) == (6, [6, 15])


def test_a_run_goes_on_with_other_settings_of_the_optimizer(tmp_path):
    train(tmp_path, dataclasses.replace(CFG, steps=2))
    optim = OptimConfig(lr=1e-3, clip_norm=None, betas=(0.8, 0.9), weight_decay=0.0)
    result = train(tmp_path, dataclasses.replace(CFG, steps=4, optim=optim))
    assert (result.step, list(losses(tmp_path))) == (4, [1, 2, 3, 4])


def test_the_schedule_may_be_longer_than_the_run(tmp_path):
    cfg = dataclasses.replace(CFG, steps=2, schedule_steps=12)
    train(tmp_path, cfg)
    rates = [r["lr"] for r in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([0.009846, 0.009397], rel=1e-3)  # cosine over 12 steps


def test_ctrl_c_saves_and_the_same_call_goes_on_to_the_bit(tmp_path, whole):
    class Interrupt(Rows):
        def __next__(self):
            if self.place == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    before = signal.getsignal(signal.SIGINT)
    stopped = train(tmp_path, batches=Interrupt())
    assert (stopped.step, stopped.stopped, stopped.preempted) == (6, "SIGINT", True)
    assert signal.getsignal(signal.SIGINT) == before
    train(tmp_path)
    assert losses(tmp_path) == losses(whole()[1])


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


@pytest.mark.parametrize(
    ("kills", "steps", "seed", "half"),
    [  # a fresh process each, a second or two; by this seed, three while a checkpoint is written
        pytest.param(6, 40, 5, 1, marks=pytest.mark.slow),
        pytest.param(20, 80, 2, 3, marks=pytest.mark.grid),
    ],
    ids=["six", "twenty"],
)
def test_kill_9_at_random_moments_leaves_every_loss_bit_equal(tmp_path, kills, steps, seed, half):
    out = kill_and_resume(tmp_path, kills=kills, steps=steps, seed=seed)
    print(out)
    assert out.count("\nkill ") == kills
    assert int(re.search(r"(\d+) kills left half a checkpoint", out)[1]) >= half
