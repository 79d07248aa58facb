"""Timing contenders in turn, so that a ratio between them survives a noisy machine.

Each contender lives in a process of its own (its threads, its peak memory), is built and run once,
and then all take turns, one call each a round, while the others sleep. Medians are compared. The
first call, which holds tracing and compilation, is reported by itself.
"""

import dataclasses
import json
import multiprocessing
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import rich.console
import rich.table


@dataclasses.dataclass(frozen=True)
class Score:
    """One contender's times, in seconds, and its process's peak memory in bytes."""

    first: float
    times: tuple[float, ...]
    peak_bytes: int

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def compete(
    contenders: Mapping[str, tuple[Callable[..., Callable[[], Any]], Mapping[str, Any]]],
    rounds: int = 5,
    pause: float = 0.3,
    announce: Callable[[str], None] = print,
) -> dict[str, Score]:
    """Times every contender's call, in turn.

    Args:
      contenders: by name, a function of some module and its keyword arguments; it builds what is
        timed and returns the call, which must not return before its work is done.
      rounds: timed calls of each, after the first.
      pause: seconds before each call, in which the others' threads fall asleep.

    Raises:
      RuntimeError: a contender failed; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    workers = {}
    try:
        for name, (make, settings) in contenders.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, dict(settings)))
            process.start()
            theirs.close()
            workers[name] = (process, ours)
            announce(f"{name}: first call {_ask(name, ours)[0]:.1f} s")
        times = {name: [] for name in workers}
        for _ in range(rounds):
            for name, (_, connection) in workers.items():
                time.sleep(pause)
                connection.send("go")
                times[name].append(_ask(name, connection)[0])
        return {name: _score(name, times[name], workers[name][1]) for name in workers}
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(10)
            process.kill()


def _ask(name: str, connection: Connection) -> tuple[float, int]:
    try:
        return connection.recv()
    except EOFError:
        raise RuntimeError(f"contender {name} failed; see above") from None


def _score(name: str, times: list[float], connection: Connection) -> Score:
    connection.send("report")
    first, peak_bytes = _ask(name, connection)
    return Score(first, tuple(times), peak_bytes)


def _serve(connection: Connection, make: Callable[..., Callable[[], Any]], settings: dict) -> None:
    call = make(**settings)
    first = _timed(call)
    connection.send((first, 0))
    while True:
        try:
            order = connection.recv()
        except EOFError:
            return
        if order == "report":
            connection.send((first, _peak_bytes()))
        else:
            connection.send((_timed(call), 0))


def _peak_bytes() -> int:
    # not getrusage, whose peak a process inherits from the one that started it
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(
    out: pathlib.Path | None,
    title: str,
    amount: float,
    scores: Mapping[str, Score],
    unit: str = "tokens",
) -> dict[str, pathlib.Path]:
    """Prints the scores of calls that do so much, and writes them to `out` if it is given."""
    show(title, amount, scores, unit)
    if out is None:
        return {}
    save(out, title, amount, scores, unit)
    return {"scores": out}


def show(title: str, amount: float, scores: Mapping[str, Score], unit: str = "tokens") -> None:
    """Prints scores, each beside every peer: those not "ours"."""
    peers = [name for name in scores if not name.startswith("ours")]
    table = rich.table.Table(title=title)
    table.add_column("")
    for column in ("a call", f"{unit}/s", "first call", "peak memory"):
        table.add_column(column, justify="right")
    for name in peers:
        table.add_column(f"x {name}", justify="right")
    for name, score in scores.items():
        table.add_row(
            name,
            f"{score.median:.2f} s",
            f"{amount / score.median:.0f}",
            f"{score.first:.1f} s",
            f"{score.peak_bytes / 1e9:.1f} GB",
            *(f"{scores[peer].median / score.median:.2f}" for peer in peers),
        )
    rich.console.Console(width=132).print(table)


def save(
    path: pathlib.Path, title: str, amount: float, scores: Mapping[str, Score], unit: str = "tokens"
) -> None:
    """Writes every time of every contender to a JSON file."""
    rows = {name: dataclasses.asdict(score) for name, score in scores.items()}
    content = {"title": title, f"{unit}_per_call": amount, "seconds": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")
