"""The training loop: step, log, evaluate, save; resumed by running the same command again.

A run is bit-equal however often it is stopped: parameters, moments, step, key and the data
iterator's state are saved together, and everything else is a function of these and of the config.
SIGTERM, Ctrl-C and the end of the data save and return. `steps` is where the run ends, not how many
steps are added; a run that has reached it returns at once.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import rich.console
from flax import nnx

from llmprep_jax import processes
from llmprep_jax.remote import AnyPath, as_path, is_remote
from llmprep_jax.train.checkpoint import Checkpoints, abstract_of, all_steps
from llmprep_jax.train.flops import Flops
from llmprep_jax.train.metrics import Numbers, read_up_to
from llmprep_jax.train.monitor import METRICS_FILE, Monitor
from llmprep_jax.train.state import TrainState
from llmprep_jax.train.stopping import stop_signals
from llmprep_jax.train.trainer import FitConfig, Step, Trainer, TrainSteps

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
      stopped: what ended it before `steps`: "SIGTERM", "SIGINT" or "data", which were at an end.
      best: the step whose eval_loss was the lowest of the checkpoints, where the best is kept.
      metrics: of the last step.
    """

    model: nnx.Module
    ema_model: nnx.Module | None
    step: int
    stopped: str | None
    best: int | None
    metrics: Numbers

    @property
    def preempted(self) -> bool:
        """Whether a signal ended it; the same call goes on from there."""
        return self.stopped in ("SIGTERM", "SIGINT")


def fit(
    trainer: Trainer,
    batches: Batches,
    *,
    out: str | os.PathLike,
    evaluate: Evaluate | None = None,
    meta: Mapping[str, Any] | None = None,
    flops: Flops | None = None,
    console: rich.console.Console | None = None,
    locked: bool = False,
) -> FitResult:
    """Trains, from the last checkpoint in `out` if there is one.

    SIGTERM and a first Ctrl-C save and end it, as the end of the data does.

    Args:
      evaluate: numbers by name for a model.
      meta: JSON saved with each checkpoint, from which the model can be rebuilt.
      flops: of a token and an image, for MFU.
      locked: whether the caller holds the folder's lock (`lock_folder`).

    Raises:
      NonFiniteError: a loss or gradient is not finite, and `skip_nonfinite` steps were skipped;
        nothing after it was saved.
      ValueError: a checkpoint of another model, no data.
      OSError: a checkpoint cannot be written; earlier ones are whole.
    """
    out, cfg = as_path(out), trainer.cfg
    with contextlib.ExitStack() as stack:
        if not locked:
            stack.enter_context(lock_folder(out))
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
                skip_nonfinite=cfg.skip_nonfinite,
                console=console,
            )
        )
        run = _Run(trainer, batches, checkpoints, monitor, evaluate, _find_best(out, cfg))
        if done:
            monitor.progress.say(f"resumed from step {done} of {out}")
        stop = stack.enter_context(stop_signals(monitor.progress.say))
        state = run.go_on(state, stop)
    ema_model = None if state.ema is None else trainer.model(state, ema=True)
    step, best = int(state.step), run.best and run.best[1]
    return FitResult(trainer.model(state), ema_model, step, run.stopped, best, monitor.last)


def _find_best(out: AnyPath, cfg: FitConfig) -> tuple[float, int] | None:
    """The lowest eval_loss among the run's checkpoints, and its step, where the best is kept."""
    path = out / METRICS_FILE
    if not cfg.checkpoint.keep_best or not path.exists():
        return None
    steps = all_steps(out)
    records = read_up_to(path, max(steps, default=0))
    losses = [(r["eval_loss"], r["step"]) for r in records if r.get("eval_loss") is not None]
    return min((pair for pair in losses if pair[1] in steps), default=None)


def _resume(state: TrainState, batches: Batches, checkpoints: Checkpoints) -> TrainState:
    step = checkpoints.latest
    if step is None:
        return state
    abstract = abstract_of(state)
    jax.tree.map(lambda x: x.delete(), state)  # room for what is read in its place
    state, data_state = checkpoints.restore(step, abstract)
    batches.set_state(data_state)
    return state


@dataclasses.dataclass
class _Run:
    """A run under way; `best` is the lowest eval_loss of its checkpoints and that one's step."""

    trainer: Trainer
    batches: Batches
    checkpoints: Checkpoints
    monitor: Monitor
    evaluate: Evaluate | None
    best: tuple[float, int] | None
    stopped: str | None = None
    saved: int = 0

    def go_on(self, state: TrainState, stop: Callable[[int], str | None]) -> TrainState:
        """All steps from the state's on, until a signal comes or the data end."""
        cfg, done = self.trainer.cfg, int(state.step)
        self.saved, self.checkpoints.best = done, self.best and self.best[1]
        batches = itertools.islice(self._take_batches(), max(cfg.steps - done, 0))
        step_fn, frozen = self._first_compiles(self.trainer.step), self.trainer.split.frozen
        steps = TrainSteps(step_fn, state, frozen, batches, cfg.accumulate)
        step, evaluates = done, True
        for step, metrics in enumerate(steps, done + 1):
            self.monitor.note(step, metrics, steps.batch.get("doc_ids"))
            self.stopped, ends = stop(step), step == cfg.steps
            saves = bool(self.stopped) or ends or _due(step, cfg.checkpoint.every)
            evaluates = not self.stopped and (ends or _due(step, cfg.eval_every))
            self._attend(step, steps.state, evaluates, saves)
            if self.stopped:
                self.monitor.progress.say(f"stopping at step {step}: {self.stopped}")
                return steps.state
        if step < cfg.steps:
            self._end_with_the_data(step, steps.state, not evaluates)
        return steps.state

    def _end_with_the_data(self, step: int, state: TrainState, evaluates: bool) -> None:
        if not step:
            raise ValueError("the data hold no batch; give more of them, or smaller batches")
        self.stopped = "data"
        self.monitor.progress.say(
            f"the data ended after step {step} of {self.trainer.cfg.steps}, which is the last"
        )
        self._attend(step, state, evaluates, saves=True)

    def _take_batches(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The batches; not by `iter`, which need not be at their place."""
        while True:
            try:
                yield next(self.batches)
            except StopIteration:
                return

    def _attend(self, step: int, state: TrainState, evaluates: bool, saves: bool) -> None:
        """Looks at the metrics, evaluates and saves, as is due after a step."""
        if saves or evaluates or _due(step, self.trainer.cfg.log_every):
            self.checkpoints.check()
            self.monitor.flush(self._last_good, keep=0 if saves or evaluates else 1)
        saves |= evaluates and self._evaluate(step, state)
        if saves and step != self.saved:
            self.checkpoints.save(state, self.batches.get_state())
            self.saved = step

    def _first_compiles(self, step: Step) -> Step:
        """The step, whose first call is shown as compiling, and then what memory it takes."""
        phases = iter([self.monitor.phase("compiling")])

        def call(*args):
            phase = next(phases, None)
            if phase is None:
                return step(*args)
            with phase:
                memory = step.lower(*args).compile().memory_analysis()
                if memory is not None:
                    self.monitor.progress.say(describe_memory(memory))
                return step(*args)  # by the program that was just compiled

        return call

    def _last_good(self) -> int | None:
        self.checkpoints.wait()  # a save under way is of a good state
        return self.checkpoints.latest

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Evaluates, and tells whether a checkpoint of this step is the best to be kept."""
        if self.evaluate is None:
            return False
        averages = {"": False} if state.ema is None else {"": False, "ema_": True}
        numbers = {}
        with self.monitor.phase("evaluating"):
            for prefix, ema in averages.items():
                measured = self.evaluate(self.trainer.model(state, ema=ema))
                numbers |= {prefix + name: value for name, value in measured.items()}
        self.monitor.record(step, numbers)
        loss = numbers.get("eval_loss")
        if not self.trainer.cfg.checkpoint.keep_best or loss is None:
            return False
        if self.best is not None and not loss < self.best[0]:
            return False
        self.best, self.checkpoints.best = (loss, step), step
        return True


def describe_memory(memory: Any) -> str:
    """What a compiled step takes on a device, by its `memory_analysis`."""
    kept, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return (
        f"memory of a step: {kept / 2**20:,.1f} MiB of weights, optimizer state and batch, "
        f"{temporary / 2**20:,.1f} MiB of activations, gradients and buffers"
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


@contextlib.contextmanager
def lock_folder(out: AnyPath) -> Iterator[None]:
    """Makes a run's folder and keeps a second run out of it; a killed run's lock goes with it.

    Raises:
      OSError: the folder cannot be made or written.
      ValueError: another run is in it.
    """
    if not processes.is_writer() or is_remote(out):  # a store has no locks
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
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
