"""Jobs of several processes of two CPU devices each, for tests: started, waited for, cleaned up."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from tests.text.samples import make_inputs

DEVICES = 2  # of each process
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")  # kept from one launch to the next
CONFIG = """
import pathlib
from llmprep_jax.data import DataConfig, SourceOptions
from llmprep_jax.models.llama.config import Config
from llmprep_jax.peft import LoRA
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

HERE = pathlib.Path(__file__).parent

def get_config():
    return RunConfig(
        architecture=Config(416, 16, 32, 2, 4, 2, 4, max_seq_len=64, tie_embeddings=True),
        tokenizer=str(HERE / "tokenizer"),
        data=DataConfig(
            paths=(str(HERE / "text"),),
            source=SourceOptions(part="paragraph"),
            seq_len=32,
            batch_size=8,
            pack_window=4,
            holdout=0.2,
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2, schedule="constant"),
        steps=4,
        eval_batches=2,
        checkpoint=CheckpointConfig(every=2),
        out=HERE / "run",
    )
"""


def make_files(folder: pathlib.Path) -> pathlib.Path:
    """A folder with config.py, a tokenizer and text."""
    make_inputs(folder, CONFIG)
    return folder


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: exit code and what it wrote."""

    code: int
    out: str
    err: str


@dataclasses.dataclass
class Job:
    """Processes under way, with the files that take what they write."""

    processes: list[subprocess.Popen]
    folder: pathlib.Path

    def wait(self, seconds: float) -> list[Ended]:
        """Waits for all; what is left after so many seconds fails the test, with its output."""
        end = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                shown = "\n".join(f"--- {i}\n{x.out}\n{x.err}" for i, x in enumerate(self.ended()))
                raise AssertionError(f"no end after {seconds} s:\n{shown}") from None
        return self.ended()

    def ended(self) -> list[Ended]:
        texts = [
            [(self.folder / f"{i}.{name}").read_text() for name in ("out", "err")]
            for i in range(len(self.processes))
        ]
        return [
            Ended(process.returncode if process.poll() is not None else -1, *text)
            for process, text in zip(self.processes, texts, strict=True)
        ]


def free_port(wanted: int = 0) -> int:
    """A port that is free now; 0 where the wanted one is not."""
    with socket.socket() as free:
        try:
            free.bind(("localhost", wanted))
        except OSError:
            return 0
        return free.getsockname()[1]


def environment(devices: int = DEVICES, **more: str) -> dict[str, str]:
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    flags |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # each program runs for a millisecond
    flags |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name}
    flags |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02"}
    return os.environ | flags | {"PYTHONUNBUFFERED": "1"} | more


def plain(count: int, timeout: int) -> list[tuple[list[str], dict[str, str]]]:
    """Settings and variables of each of so many processes on plain machines."""
    address = f"localhost:{free_port()}"
    settings = [
        {"coordinator": address, "count": count, "index": index, "timeout": timeout}
        for index in range(count)
    ]
    return [([f"processes.{k}={v}" for k, v in own.items()], {}) for own in settings]


def slurm(count: int, timeout: int) -> list[tuple[list[str], dict[str, str]]]:
    """The same under SLURM: JAX takes the coordinator's port from the job's number."""
    first = 65535 - 2**12 + 1
    port = free_port()
    while port < first:
        port = free_port(random.randint(first, 65535))
    alike = {"SLURM_JOB_ID": str(port - first), "SLURM_STEP_NODELIST": "localhost"}
    alike |= {"SLURM_NTASKS": str(count)}
    own = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
    return [([f"processes.timeout={timeout}"], alike | variables) for variables in own]


@contextlib.contextmanager
def job(
    folder: pathlib.Path,
    count: int,
    module: str,
    *arguments: str,
    own: Sequence[Sequence[str]] | None = None,
    devices: int = DEVICES,
    timeout: int = 30,
    cluster: Callable[..., Sequence[tuple[list[str], dict[str, str]]]] = plain,
) -> Iterator[Job]:
    """Starts `python -m module arguments` as so many processes of one run; ends what is left.

    Args:
      folder: takes what they write. own: further arguments of each of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    members = cluster(count, timeout) if count > 1 else [([], {})]
    try:
        for index, (settings, variables) in enumerate(members):
            command = [sys.executable, "-m", module, *arguments, *(own[index] if own else ())]
            with contextlib.ExitStack() as stack:
                out, err = [
                    stack.enter_context((folder / f"{index}.{name}").open("w"))
                    for name in ("out", "err")
                ]
                processes.append(
                    subprocess.Popen(
                        [*command, *settings],
                        env=environment(devices, **variables),
                        stdout=out,
                        stderr=err,
                    )
                )
        yield Job(processes, folder)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def losses(out: pathlib.Path) -> dict[int, float]:
    """The loss of each step of a run."""
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}
