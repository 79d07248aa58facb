"""Ctrl-C in commands: at once, or at the next good moment where something says that it stops.

An exception that a signal raises while JAX traces or compiles crosses C++ code that does not expect
it: the process ends by a segmentation fault, or a callback swallows the exception and the command
goes on. So in a command no signal raises. A thread reads Python's wakeup pipe, which C code fills
even while the main thread is inside the compiler, and ends the process with code 130; within
`held`, the first signal is only noted.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 130  # of a shell's command that SIGINT ended
_SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it

_held: list[threading.Event] = []
_watching = False


class Interrupted(Exception):
    """A command was stopped by Ctrl-C at a good moment; the message says how to go on."""


def watch() -> None:
    """From now on Ctrl-C ends this process at once, but for what is `held`; main thread only."""
    global _watching
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    threading.Thread(target=_listen, args=(read,), daemon=True).start()
    _watching = True


@contextlib.contextmanager
def held(say: Callable[[], Any] = lambda: None) -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C has come; a second one inside ends at once.

    Outside of commands the second one raises KeyboardInterrupt, and in other threads than the main
    one nothing is held.

    Args:
      say: called when the first one comes, from a thread.
    """
    came = threading.Event()
    if _watching:
        came.say = say
        _held.append(came)
        try:
            yield came.is_set
        finally:
            _held.remove(came)
        return
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def note(number: int, frame: Any) -> None:
        came.set()
        signal.signal(number, before)
        say()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(read: int) -> None:
    while True:
        for number in os.read(read, 64):
            if number == signal.SIGINT:
                _interrupt()


def _interrupt() -> None:
    held = _held[-1] if _held else None
    if held is None or held.is_set():
        end()
    held.set()
    held.say()


def end() -> None:
    """Ends this process with code 130 and one line, whatever its other threads are at."""
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(0.5)  # a full pipe must not keep it
    if sys.stdout.isatty():
        os.write(1, _SHOW_CURSOR)
    os.write(2, b"\nerror: interrupted\n" if sys.stderr.isatty() else b"error: interrupted\n")
    os._exit(EXIT_CODE)
