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

from llmprep_jax.train.checkpoint import Checkpoints, abstract_of
from llmprep_jax.train.metrics import Flops, Numbers
from llmprep_jax.train.monitor import Monitor
from llmprep_jax.train.state import TrainState
from llmprep_jax.train.trainer import Step, Trainer, TrainSteps

Evaluate = Callable[[nnx.Module], Numbers]


@runtime_checkable
class Batches(Protocol):
    """An iterator over batches whose place can be saved as JSON and taken up again."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


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
    trainer: Trainer,
    batches: Batches,
    *,
    out: str | os.PathLike,
    evaluate: Evaluate | None = None,
    meta: Mapping[str, Any] | None = None,
    flops: Flops | None = None,
    console: rich.console.Console | None = None,
) -> FitResult:
    """Trains, from the last checkpoint in `out` if there is one.

    Args:
      evaluate: numbers by name for a model.
      meta: JSON saved with each checkpoint, from which the model can be rebuilt.
      flops: of one token, for MFU.

    Raises:
      NonFiniteError: a loss or gradient is not finite; nothing after it was saved.
      ValueError: a checkpoint of another model, too little data.
      OSError: a checkpoint cannot be written; earlier ones are whole.
    """
    out, cfg = pathlib.Path(out), trainer.cfg
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(out))
        checkpoints = stack.enter_context(Checkpoints(out, cfg.checkpoint, dict(meta or {})))
        state = _resume(trainer.start(), batches, checkpoints)
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
        run = _Run(trainer, batches, checkpoints, monitor, evaluate)
        if done:
            monitor.progress.say(f"resumed from step {done} of {out}")
        state = run.go_on(state, stack.enter_context(_preemption()))
    ema_model = None if state.ema is None else trainer.model(state, ema=True)
    step = int(state.step)
    return FitResult(trainer.model(state), ema_model, step, step < cfg.steps, monitor.last)


def _resume(state: TrainState, batches: Batches, checkpoints: Checkpoints) -> TrainState:
    step = checkpoints.latest
    if step is None:
        return state
    abstract = abstract_of(state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is read in its place
    state, data_state = checkpoints.restore(step, abstract)
    batches.set_state(data_state)
    return state


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run under way."""

    trainer: Trainer
    batches: Batches
    checkpoints: Checkpoints
    monitor: Monitor
    evaluate: Evaluate | None

    def go_on(self, state: TrainState, must_stop: Callable[[int], bool]) -> TrainState:
        """All steps from the state's on, or until it must stop."""
        cfg, first = self.trainer.cfg, int(state.step) + 1
        batches = (self._next_batch(step) for step in range(first, cfg.steps + 1))
        step_fn, frozen = self._first_compiles(self.trainer.step), self.trainer.split.frozen
        steps = TrainSteps(step_fn, state, frozen, batches, cfg.accumulate)
        for step, metrics in enumerate(steps, first):
            self.monitor.note(step, metrics, steps.batch.get("doc_ids"))
            stopping = must_stop(step)
            ending = step == cfg.steps
            saving = stopping or ending or _due(step, cfg.checkpoint.every)
            evaluating = not stopping and (ending or _due(step, cfg.eval_every))
            if saving or evaluating or _due(step, cfg.log_every):
                self.checkpoints.check()
                self.monitor.flush(self._last_good, keep=0 if saving or evaluating else 1)
            if evaluating:
                self._evaluate(step, steps.state)
            if saving:
                self.checkpoints.save(steps.state, self.batches.get_state())
            if stopping:
                self.monitor.progress.say(f"stopping at step {step}: SIGTERM")
                break
        return steps.state

    def _first_compiles(self, step: Step) -> Step:
        """The step, whose first call is shown as compiling."""
        phases = iter([self.monitor.phase("compiling")])

        def call(*args):
            with next(phases, contextlib.nullcontext()):
                return step(*args)

        return call

    def _next_batch(self, step: int) -> Mapping[str, np.ndarray]:
        try:
            return next(self.batches)
        except StopIteration:
            raise ValueError(
                f"the data ended before step {step} of {self.trainer.cfg.steps}; "
                "give more data or epochs, or fewer steps"
            ) from None

    def _last_good(self) -> int | None:
        self.checkpoints.wait()  # a save under way is of a good state
        return self.checkpoints.latest

    def _evaluate(self, step: int, state: TrainState) -> None:
        if self.evaluate is None:
            return
        averages = {"": False} if state.ema is None else {"": False, "ema_": True}
        numbers = {}
        with self.monitor.phase("evaluating"):
            for prefix, ema in averages.items():
                found = self.evaluate(self.trainer.model(state, ema=ema))
                numbers |= {prefix + name: value for name, value in found.items()}
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
