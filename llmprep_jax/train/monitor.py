"""From metrics on the device to the progress bar and the files, one step late so that nothing
waits.

`note` keeps what a step returned without looking at it; `flush` looks, while the step after it
runs. A non-finite loss is therefore found a step or more late; that is no harm, since such a step
changes nothing and every save flushes first.
"""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import rich.console

from llmprep_jax import processes
from llmprep_jax.remote import AnyPath
from llmprep_jax.train.flops import Flops, peak_flops
from llmprep_jax.train.metrics import (
    JsonLines,
    Numbers,
    Progress,
    TensorBoard,
    memory,
    read_up_to,
)
from llmprep_jax.train.step import Metrics

METRICS_FILE = "metrics.jsonl"


class NonFiniteError(ValueError):
    """The loss or the gradient of a step is infinite or no number."""


class Monitor:
    """Shows and records a run; use as a context.

    Args:
      out: the run's folder.
      total, done: steps of the whole run, and those done before it resumed.
      flops: of a token and an image, for MFU; None: none is shown.
      peak: FLOP/s of one device, where it is not known by its name.
      name: what a document id stands for, for messages.
      skip_nonfinite: steps of the whole run that may be skipped.
    """

    def __init__(
        self,
        out: AnyPath,
        total: int,
        done: int,
        *,
        flops: Flops | None = None,
        peak: float | None = None,
        name: Callable[[int], str] | None = None,
        skip_nonfinite: int = 0,
        console: rich.console.Console | None = None,
    ):
        self._total, self._out, self._name = total, out, name
        self._may_skip = skip_nonfinite
        self._skipped = sum("skipped" in r for r in read_up_to(out / METRICS_FILE, done))
        self._flops, self._peak = flops, peak_flops(peak)
        self._pending: collections.deque[tuple[int, Metrics, Any]] = collections.deque()
        self._since, self._speed = time.monotonic(), math.nan
        # one process writes for all; the others only look for non-finite losses
        self._files = []
        if processes.is_writer():
            self._files = [
                JsonLines(out / METRICS_FILE, done),
                TensorBoard(out / "tensorboard", done),
            ]
        quiet = rich.console.Console(quiet=True) if not processes.is_writer() else console
        self.progress = Progress(total, done, quiet)
        self.last: Numbers = {}

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.close()
        for file in self._files:
            file.close()

    def note(self, step: int, metrics: Metrics, doc_ids: np.ndarray | None) -> None:
        """Keeps the metrics of a step that may still be running."""
        self._pending.append((step, metrics, doc_ids))

    def flush(self, last_good: Callable[[], int | None], keep: int = 0) -> None:
        """Waits for the steps noted, but the latest `keep`, and records them.

        Args:
          last_good: tells the step of the last checkpoint, for the message.

        Raises:
          NonFiniteError: a step's loss or gradient is not finite, and no more may be skipped; names
            the step, its documents and the last good checkpoint.
        """
        steps = [self._pending.popleft() for _ in range(len(self._pending) - keep)]
        if not steps:
            return
        values = jax.device_get([metrics for _, metrics, _ in steps])
        records = [
            {"step": step, **{name: number.item() for name, number in metrics.items()}}
            for (step, _, _), metrics in zip(steps, values, strict=True)
        ]
        counts = [
            sum(record.get(name, 0.0) for record in records)
            for name in ("input_tokens", "images", "drawn")
        ]
        records[-1] |= self._measure(*counts, num_steps=len(steps))
        for record, (_, _, doc_ids) in zip(records, steps, strict=True):
            finite = record.pop("finite")
            if not finite:
                self._skipped += 1
                record["skipped"] = 1
            self._write(record)
            if not finite:
                self._skip(record, doc_ids, last_good)
        self.last = records[-1]
        left = (self._total - self.last["step"]) * self._speed
        self.progress.update(self.last["step"], self.last, left)

    def _skip(self, record: Mapping[str, Any], doc_ids: Any, last_good: Callable) -> None:
        """Tells of a step that is not finite, or ends the run by it."""
        words = self._explain(record, doc_ids)
        if self._skipped <= self._may_skip:
            self.progress.say(f"skipped {words}; {self._skipped} of {self._may_skip} to be skipped")
            return
        step, folder = last_good(), self._out / "checkpoints"
        good = "there is no checkpoint yet" if step is None else folder / str(step)
        more = "look at them, lower optim.lr, or skip such batches by skip_nonfinite=10"
        if self._may_skip:
            more = f"it is one more than skip_nonfinite={self._may_skip}; lower optim.lr"
        raise NonFiniteError(f"{words}; {more}; last good checkpoint: {good}")

    def record(self, step: int, numbers: Numbers) -> None:
        """Records the results of an evaluation, and says them."""
        self._write({"step": step, **numbers})
        words = " ".join(f"{name} {value:,.4f}" for name, value in numbers.items())
        self.progress.say(f"step {step}/{self._total} {words}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the run is at, other than training; its time does not count for the speed."""
        begin = time.monotonic()
        self.progress.phase(name)
        yield
        self.progress.phase("training")
        self._since += time.monotonic() - begin

    def _measure(
        self, tokens: float, images: float, drawn: float, *, num_steps: int
    ) -> dict[str, float]:
        """Speed since the last flush, and memory."""
        now = time.monotonic()
        elapsed, self._since = max(now - self._since, 1e-9), now
        self._speed = elapsed / num_steps
        numbers = {"tokens_per_s": tokens / elapsed, "step_s": self._speed, **memory()}
        if self._flops and self._peak:
            numbers["mfu"] = self._flops.of(tokens, images, drawn) / elapsed / self._peak
        return numbers

    def _write(self, record: Mapping[str, Any]) -> None:
        for file in self._files:
            file.write(record)

    def _explain(self, record: Mapping[str, Any], doc_ids: Any) -> str:
        ids = [] if doc_ids is None else sorted({int(i) for i in np.ravel(doc_ids) if i >= 0})
        names = [f"{i} ({self._name(i)})" if self._name else str(i) for i in ids[:16]]
        shown = ", ".join(names) + (f" and {len(ids) - 16} more" if ids[16:] else "")
        return (
            f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}; "
            f"documents of its batch: {shown or 'not known'}"
        )
