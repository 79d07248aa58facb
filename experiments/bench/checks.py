"""Checks one after another in a process of their own, within a number of seconds.

A kernel that fails may take its process down, or leave a device that answers nothing more; an
accelerator's memory is given back when a process ends, and not before. So checks run in a child: a
check that raises is a row with its reason, after one that leaves the device dead a new child goes
on with the next, and what does not fit into the seconds is listed.
"""

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

from experiments.bench.results import Row

GRACE = 2.0  # seconds that a child may take to end


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that gives rows when it is called.

    Attributes:
      name: which of the section's checks it is, in a few words.
    """

    name: str
    run: Callable[[], Iterable[Row]]


class Unfit(Exception):
    """Something cannot do what is asked of it; the message says why."""


class Absent(Unfit):
    """Something is not installed, or not for this device."""


def run_checks(
    make: Callable[..., list[Check]],
    settings: Mapping[str, Any],
    seconds: float,
    add: Callable[[Row], None],
    limit: float = math.inf,
) -> list[str]:
    """Runs checks in a child and hands on their rows; returns the names of those that did not fit.

    Args:
      make: a function of some module, which makes the checks in the child from `settings`.
      limit: seconds of one check, after which the next goes on in a new child.
      add: called with each row, and with {"check": name, "reason": why} where there is none.
    """
    deadline, start, names = time.monotonic() + seconds, 0, ["all of its checks"]
    while start < len(names) and time.monotonic() < deadline:
        with _Child(make, settings, start) as child:
            for kind, value in child.messages(deadline, limit):
                if kind == "names":
                    names = value
                elif kind == "begin":
                    start = value
                elif kind == "row":
                    add(value)
                elif kind == "reason":
                    add({"check": names[start], "reason": value})
                elif kind == "done":
                    return []
        start += 1  # what the child ended with is done, or cannot be
    return names[start:]


class _Child:
    """A process that runs checks from one on; it is killed where it does not end."""

    def __init__(self, make: Callable[..., list[Check]], settings: Mapping[str, Any], start: int):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        args = (theirs, make, dict(settings), start)
        self._process = context.Process(target=_serve, args=args, daemon=False)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._process.join(GRACE)
        self._process.kill()
        self._process.join()

    def messages(self, deadline: float, limit: float) -> Iterator[tuple[str, Any]]:
        """What the child says until it ends, or until the deadline or a check's limit ends it."""
        until, why = deadline, "the time was over"
        while self._ours.poll(max(0.0, until - time.monotonic())):
            try:
                kind, value = self._ours.recv()
            except (EOFError, ConnectionResetError):
                self._process.join(GRACE)
                if self._process.exitcode:
                    yield "reason", f"its process ended with code {self._process.exitcode}"
                return
            if kind == "begin" and time.monotonic() + limit < deadline:
                until, why = time.monotonic() + limit, f"it took more than {limit:.0f} s"
            elif kind == "begin":
                until, why = deadline, "the time was over"
            yield kind, value
        self._process.kill()
        yield "reason", f"cut off: {why}"


def _serve(connection: Connection, make: Callable, settings: dict, start: int) -> None:
    try:
        checks = make(**settings)
    except Exception as error:  # of any kind: nothing of the section can be checked
        connection.send(("reason", one_line(error)))
        connection.send(("done", None))
        return
    connection.send(("names", [check.name for check in checks]))
    for index in range(start, len(checks)):
        connection.send(("begin", index))
        try:
            for row in checks[index].run():
                connection.send(("row", row))
        except Unfit as reason:
            connection.send(("reason", str(reason)))
        except Exception as error:  # of any kind: the next check goes on
            connection.send(("reason", one_line(error)))
            if not _device_answers():
                return
    connection.send(("done", None))


def _device_answers() -> bool:
    """Whether a program still runs: after a bad address none does in that process."""
    import jax
    import jax.numpy as jnp

    try:
        return float(jax.jit(lambda x: x + 1)(jnp.float32(1))) == 2.0
    except Exception:  # of the runtime, whatever it is
        return False


def one_line(error: BaseException, width: int = 200) -> str:
    """The kind of an error, and its message's beginning."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:width]


def ask(function: Callable[..., Any], **settings: Any) -> Any:
    """What a function of some module returns in a process of its own.

    Raises:
      RuntimeError: it raised; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, settings))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed; see above") from None
    finally:
        process.join()


def _answer(connection: Connection, function: Callable, settings: dict) -> None:
    connection.send(function(**settings))
