"""The training loop: step, log, evaluate, save; resumed by running the same command again.

A run is bit-equal however often it is stopped: parameters, moments, step, key and the data
iterator's state are saved together, and everything else is a function of these and of the config.
SIGTERM saves and returns (preemption). The one thing a reader would get wrong: `steps` is where the
run ends, not how many steps are added; a run that has reached it returns at once.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import rich.console
from flax import nnx
from jax.experimental import multihost_utils

from llmprep_jax.train.checkpoint import CheckpointConfig, Checkpoints, abstract_of
from llmprep_jax.train.losses import training_loss
from llmprep_jax.train.metrics import Flops, Numbers
from llmprep_jax.train.monitor import Monitor
from llmprep_jax.train.optim import (
    OptimConfig,
    make_bias_schedule,
    make_optimizer,
    make_schedule,
)
from llmprep_jax.train.rank_budget import adalora_of, with_orthogonality
from llmprep_jax.train.state import Split, TrainState, create_state, merge, split_model
from llmprep_jax.train.step import LossFn, make_train_step, place_batch

Evaluate = Callable[[nnx.Module], Numbers]


@runtime_checkable
class Batches(Protocol):
    """An iterator over batches whose place can be saved as JSON and taken up again."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how to train, whatever the model and the data are.

    Attributes:
      steps: updates of the whole run.
      accumulate: microbatches that a batch is cut into; the update is the same, memory is less.
      ema_decay: of the running average of the parameters; None: none is kept.
      seed: of the model's random numbers while it trains.
      log_every: steps between looks at the metrics; all steps are recorded whatever it is.
      eval_every: steps between evaluations; None: only at the end.
      peak_flops: FLOP/s of one device for MFU, where it is not known by its name.
    """

    steps: int = 1000
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    accumulate: int = 1
    ema_decay: float | None = None
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    peak_flops: float | None = None

    def __post_init__(self):
        for name in ("steps", "accumulate", "log_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), not {self.seed}")
        make_schedule(self.optim, self.steps)  # that the warmup fits is told of before any loading


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run ends with.

    Attributes:
      model: trained.
      ema_model: of the averaged parameters, where they are kept.
      step: steps done.
      preempted: whether SIGTERM ended it before `steps`.
      metrics: of the last step.
    """

    model: nnx.Module
    ema_model: nnx.Module | None
    step: int
    preempted: bool
    metrics: Numbers


def fit(
    model: nnx.Module,
    trainable: Any,
    batches: Batches,
    cfg: FitConfig,
    *,
    out: str | os.PathLike,
    loss_fn: LossFn = lambda model, batch, key: training_loss(model, batch),
    evaluate: Evaluate | None = None,
    meta: Mapping[str, Any] | None = None,
    flops: Flops | None = None,
    console: rich.console.Console | None = None,
) -> FitResult:
    """Trains, from the last checkpoint in `out` if there is one.

    Call it under the mesh that the model is on. The model's arrays are taken over.

    Args:
      trainable: what is trained, a Variable class or filter (`nnx.split`).
      loss_fn: `loss_fn(model, microbatch, key) -> LossSum`; AdaLoRA's regulariser is added.
      evaluate: numbers by name for a model.
      meta: JSON saved with each checkpoint, from which the model can be rebuilt.
      flops: of one token, for MFU.

    Raises:
      NonFiniteError: a loss or gradient is not finite; nothing after it was saved.
      ValueError: nothing to train, a checkpoint of another model, too little data.
      OSError: a checkpoint cannot be written; earlier ones are whole.
    """
    out, split, ranks = pathlib.Path(out), split_model(model, trainable), adalora_of(model)
    del model
    loss_fn = with_orthogonality(loss_fn, ranks)
    tx = make_optimizer(cfg.optim, split.params, cfg.steps, ranks)
    schedules = make_schedule(cfg.optim, cfg.steps), make_bias_schedule(cfg.optim, cfg.steps)
    train_step = make_train_step(split.graphdef, tx, loss_fn, *schedules, ema_decay=cfg.ema_decay)
    state = create_state(split.params, tx, seed=cfg.seed, ema=cfg.ema_decay is not None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(out))
        checkpoints = stack.enter_context(Checkpoints(out, cfg.checkpoint, dict(meta or {})))
        state = _resume(state, batches, checkpoints)
        done = int(state.step)
        monitor = stack.enter_context(
            Monitor(
                out,
                cfg.steps,
                done,
                flops=flops,
                peak=cfg.peak_flops,
                name=getattr(batches, "name", None),
                console=console,
            )
        )
        run = _Run(cfg, split, batches, checkpoints, monitor, evaluate)
        if done:
            monitor.progress.say(f"resumed from step {done} of {out}")
        state = run.steps(train_step, state, stack.enter_context(_preemption()))
    model = merge(split.graphdef, state.params, split.frozen)
    ema_model = None if state.ema is None else _with_average(split, state)
    step = int(state.step)
    return FitResult(model, ema_model, step, step < cfg.steps, monitor.last)


def _resume(state: TrainState, batches: Batches, checkpoints: Checkpoints) -> TrainState:
    step = checkpoints.latest
    if step is None:
        return state
    abstract = abstract_of(state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is read in its place
    state, data_state = checkpoints.restore(step, abstract)
    batches.set_state(data_state)
    return state


def _with_average(split: Split, state: TrainState) -> nnx.Module:
    average = jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, state.params)
    return merge(split.graphdef, average, split.frozen)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run under way."""

    cfg: FitConfig
    split: Split
    batches: Batches
    checkpoints: Checkpoints
    monitor: Monitor
    evaluate: Evaluate | None

    def steps(
        self, train_step: Callable[..., Any], state: TrainState, must_stop: Callable[[int], bool]
    ) -> TrainState:
        """All steps from the state's on, or until it must stop."""
        cfg, first = self.cfg, int(state.step) + 1
        for step in range(first, cfg.steps + 1):
            batch = self._next_batch(step)
            arrays = place_batch(batch, cfg.accumulate)
            with self.monitor.phase("compiling") if step == first else contextlib.nullcontext():
                state, metrics = train_step(state, self.split.frozen, arrays)
            self.monitor.note(step, metrics, batch.get("doc_ids"))
            stopping = must_stop(step)
            ending = step == cfg.steps
            saving = stopping or ending or _due(step, cfg.checkpoint.every)
            evaluating = not stopping and (ending or _due(step, cfg.eval_every))
            if saving or evaluating or _due(step, cfg.log_every):
                self.checkpoints.check()
                self.monitor.flush(self._last_good, keep=0 if saving or evaluating else 1)
            if evaluating:
                self._evaluate(step, state)
            if saving:
                self.checkpoints.save(state, self.batches.get_state())
            if stopping:
                self.monitor.progress.say(f"stopping at step {step}: SIGTERM")
                break
        return state

    def _next_batch(self, step: int) -> Mapping[str, np.ndarray]:
        try:
            return next(self.batches)
        except StopIteration:
            raise ValueError(
                f"the data ended before step {step} of {self.cfg.steps}; "
                "give more data or epochs, or fewer steps"
            ) from None

    def _last_good(self) -> int | None:
        self.checkpoints.wait()  # a save under way is of a good state
        return self.checkpoints.latest

    def _evaluate(self, step: int, state: TrainState) -> None:
        if self.evaluate is None:
            return
        models = {"": merge(self.split.graphdef, state.params, self.split.frozen)}
        if state.ema is not None:
            models["ema_"] = _with_average(self.split, state)
        numbers = {}
        with self.monitor.phase("evaluating"):
            for prefix, model in models.items():
                numbers |= {prefix + name: value for name, value in self.evaluate(model).items()}
        self.monitor.record(step, numbers)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
    """Keeps a second run out of the folder; a killed run's lock goes with it.

    Raises:
      OSError: the folder cannot be made or written.
      ValueError: another run is in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        yield
        return
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out} is in use by another run; wait for it, or change out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], bool]]:
    """A function that tells after each step whether SIGTERM has come.

    With several processes JAX's own handler agrees on the step among them; a second SIGTERM to a
    single process ends it at once.
    """
    if jax.process_count() > 1:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step)
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python takes signals in its main thread only
        return
    came = threading.Event()

    def take(number: int, frame: Any) -> None:
        came.set()
        signal.signal(number, before)

    before = signal.signal(signal.SIGTERM, take)
    try:
        yield lambda step: came.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
