"""Signals that stop a run at the next step: SIGTERM of a preemption, and Ctrl-C.

A second signal of its kind ends a single process at once. Several processes agree on the step by
JAX's own handler of SIGTERM, which Ctrl-C in one of them becomes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from llmprep_jax import interrupts


@contextlib.contextmanager
def stop_signals(say: Callable[[str], Any]) -> Iterator[Callable[[int], str | None]]:
    """A function that names after each step the signal that has come, if one has.

    Args:
      say: tells of Ctrl-C at once; the step under way may take its time.
    """
    if jax.process_count() > 1:
        reached = multihost_utils.reached_preemption_sync_point
        with interrupts.held(lambda: os.kill(os.getpid(), signal.SIGTERM)):
            yield lambda step: "SIGTERM" if reached(step) else None
        return
    words = "Ctrl-C: saving after the step under way; again ends at once"
    with _terminated() as terminated, interrupts.held(lambda: say(words)) as interrupted:
        yield lambda step: "SIGTERM" if terminated() else "SIGINT" if interrupted() else None


@contextlib.contextmanager
def _terminated() -> Iterator[Callable[[], bool]]:
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set  # Python takes signals in its main thread only
        return

    def note(number: int, frame: Any) -> None:
        came.set()
        signal.signal(number, before)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
