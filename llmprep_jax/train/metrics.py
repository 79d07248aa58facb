"""Where a run's numbers go: progress bar, JSONL, TensorBoard; and memory."""

import contextlib
import json
import math
import os
import pathlib
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import rich.console
import rich.progress

from llmprep_jax.remote import AnyPath, is_remote, reached, upload_file, write_text

Numbers = Mapping[str, int | float]


def memory() -> dict[str, float]:
    """GiB: `rss` of this process, and `hbm`, the peak of its first device where that counts it."""
    numbers = {"rss_gib": _resident() / 2**30}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        numbers["hbm_gib"] = stats["peak_bytes_in_use"] / 2**30
    return numbers


def _resident() -> int:
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the peak instead, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Names the file where a write fails: the system's error of an open file does not."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(
            f"cannot write {path}: {reason}; free space or check its permissions, and run again"
        ) from error


class _File:
    """A file that keeps nothing back: a kill loses nothing, and what a full disk refuses is told
    of once, where Python's buffer would try it again on closing.

    Nothing can be appended to a file of a store, so it is written here and copied there once a
    minute and at the end: a kill loses the last minute.
    """

    INTERVAL = 60.0

    def __init__(self, path: AnyPath):
        self._path, self._here, self._copied = path, path, time.monotonic()
        with _writing(path):
            if is_remote(path):
                self._here = pathlib.Path(tempfile.mkdtemp()) / path.name
                self._here.write_bytes(path.read_bytes() if path.exists() else b"")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._here.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        with _writing(self._path):
            while data:  # a disk that fills up takes the first bytes without an error
                data = data[self._file.write(data) :]
            if time.monotonic() - self._copied > self.INTERVAL:
                self._copy()

    def _copy(self) -> None:
        if self._here is not self._path:
            with reached(self._path):
                upload_file(self._here, self._path)
            self._copied = time.monotonic()

    def close(self) -> None:
        self._file.close()
        with _writing(self._path):
            self._copy()
        if self._here is not self._path:
            shutil.rmtree(self._here.parent, ignore_errors=True)


class JsonLines:
    """A file of one JSON object a line, in which nothing occurs twice.

    A run that resumes from step n calls the constructor with n: what a killed run wrote after
    its last checkpoint, and half a line, is dropped.
    """

    def __init__(self, path: AnyPath, step: int):
        kept = map(json.dumps, read_up_to(path, step))
        with _writing(path):
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = _File(path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; numbers that JSON has no word for become null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write((json.dumps(finite) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def read_up_to(path: AnyPath, step: int) -> list[dict[str, Any]]:
    """The records of a metrics file up to a step, without what a kill left; none without a file."""
    records = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                records.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records


def read_jsonl(path: AnyPath) -> list[dict[str, Any]]:
    """The records of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class TensorBoard:
    """Scalars in TensorBoard's event files, written without TensorFlow."""

    def __init__(self, folder: AnyPath, step: int):
        # here: a step of training needs no TensorBoard
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # read in the order of their names, so the time leads, finer than a second
        self._file = _File(folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}")
        # written here and now: TensorBoard's own thread prints a traceback when it cannot
        self._writer = RecordWriter(self._file)
        self._add(0, file_version="brain.Event:2")
        # tells TensorBoard to drop what an earlier file holds from here on
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step + 1, session_log=start)

    def _add(self, step: int, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **fields)
        self._writer.write(event.SerializeToString())

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a record under their names."""
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        ]
        self._add(record["step"], summary=self._summary(value=values))

    def close(self) -> None:
        self._file.close()


class Progress:
    """A live bar on a terminal; a line every ten seconds where there is none."""

    INTERVAL = 10.0

    def __init__(self, total: int, done: int, console: rich.console.Console | None = None):
        self._console = console or rich.console.Console()
        self._total, self._last_line = total, -math.inf
        columns = rich.progress
        self._bar = columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(bar_width=None),
            columns.MofNCompleteColumn(),
            columns.TextColumn("{task.fields[numbers]}"),
            columns.TextColumn("eta {task.fields[eta]}"),
            console=self._console,
            transient=False,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=total, completed=done, numbers="", eta="-:--:--"
        )
        self._bar.start()

    def say(self, words: str) -> None:
        """Prints a line above the bar."""
        self._console.print(words, markup=False, highlight=False, soft_wrap=True)

    def phase(self, name: str) -> None:
        """Says what the run is at: training, compiling, evaluating."""
        self._bar.update(self._task, description=name)
        if not self._console.is_terminal and name != "training":
            self.say(f"{name} ...")

    def update(self, step: int, numbers: Numbers, seconds_left: float) -> None:
        """Shows a step's numbers."""
        words, eta = " ".join(_shown(numbers)), _clock(seconds_left)
        self._bar.update(self._task, completed=step, numbers=words, eta=eta)
        due = time.monotonic() - self._last_line >= self.INTERVAL or step == self._total
        if not self._console.is_terminal and due:
            self.say(f"step {step}/{self._total} {words} eta {eta}")
            self._last_line = time.monotonic()

    def close(self) -> None:
        self._bar.stop()


def _shown(numbers: Numbers) -> list[str]:
    words = [f"loss {numbers['loss']:.4f}", f"{numbers['tokens_per_s']:,.0f} tok/s"]
    return [*words, f"MFU {numbers['mfu']:.1%}"] if "mfu" in numbers else words


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
