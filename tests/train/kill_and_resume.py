"""Trains a tiny model on real files through kill -9 at random moments; the test's separate process.

    python -m tests.train.kill_and_resume FOLDER KILLS STEPS SEED

First an uninterrupted run in FOLDER/whole, then one in FOLDER/killed that is killed KILLS times: in
start-up, between steps, while a checkpoint is written. Every loss that any of them wrote must be
bit-equal to the uninterrupted run's, and so must the last checkpoint. Each run is a fork of this
process, which has imported everything and touched no device: a fresh JAX without three seconds of
imports.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console

from llmprep_jax import data
from llmprep_jax.nn.param import Param
from llmprep_jax.train.checkpoint import CheckpointConfig, abstract_of, all_steps, read_params
from llmprep_jax.train.loop import fit
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.state import split_model
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.train.toy import VOCAB, toy


def train(out: pathlib.Path, text: pathlib.Path, steps: int) -> None:
    cfg = data.DataConfig(
        paths=(str(text),),
        source=data.SourceOptions(part="paragraph"),
        seq_len=32,
        batch_size=4,
        pack_window=8,
    )
    batches = data.build(cfg, lambda text: [byte % VOCAB for byte in text.encode()], eos_id=0)
    fitting = FitConfig(
        steps=steps,
        optim=OptimConfig(lr=1e-2, warmup_steps=5),
        accumulate=2,
        ema_decay=0.9,
        checkpoint=CheckpointConfig(every=2, keep_last=2, keep_every=20),
    )
    quiet = rich.console.Console(quiet=True)
    fit(Trainer(toy(), Param, fitting), batches, out=out, console=quiet)


def start(*run: Any) -> int:
    """Runs `train` in a child process; gives its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that JAX has threads: not before it has devices
        child = os.fork()
    if child == 0:
        code = 1
        try:
            train(*run)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def losses(out: pathlib.Path) -> dict[int, float]:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for line in lines:
        if line.endswith("}"):  # not the half line of a run that was killed
            record = json.loads(line)
            found[record["step"]] = record["loss"]
    return found


def kill_at_a_random_moment(
    child: int, out: pathlib.Path, rng: random.Random, startup: float | None
) -> tuple[str, float | None]:
    """Kills in start-up, between steps, or while a checkpoint is written; tells which, and how long
    start-up is."""
    begin, before = time.monotonic(), len(losses(out))
    kind = "step" if startup is None else rng.choice(("start-up", "step", "checkpoint"))
    if kind == "start-up":
        time.sleep(rng.random() * startup)
    elif kind == "step":
        wanted = before + rng.randint(1, 4)
        wait_until(lambda: len(losses(out)) >= wanted)
        startup = startup or time.monotonic() - begin
        time.sleep(rng.random() * 0.05)
    else:
        for _ in range(rng.randint(1, 2)):  # the first or the second of this run
            seen = partial_checkpoints(out)
            wait_until(lambda seen=seen: partial_checkpoints(out) - seen)
        time.sleep(rng.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    return kind, startup


def partial_checkpoints(out: pathlib.Path) -> set[str]:
    """What is being written, or was when a run was killed."""
    return {path.name for path in (out / "checkpoints").glob("*.orbax-checkpoint-tmp*")}


def wait_until(met: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not met():
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.001)


def check_equal(some: dict[int, float], whole: dict[int, float], when: str) -> None:
    for step, loss in some.items():
        assert loss == whole[step], f"{when}: step {step} has loss {loss}, not {whole[step]}"


def main(folder: pathlib.Path, kills: int, steps: int, seed: int) -> None:
    rng, text = random.Random(seed), folder / "text"
    text.mkdir(parents=True)
    for i in range(3):
        words = [f"{rng.choice('abcdefgh') * rng.randint(1, 6)}" for _ in range(3000)]
        paragraphs = [" ".join(words[j : j + 12]) for j in range(0, len(words), 12)]
        (text / f"{i}.txt").write_text("\n\n".join(paragraphs))
    begin = time.monotonic()
    _, status = os.waitpid(start(folder / "whole", text, steps), 0)
    assert status == 0
    whole = losses(folder / "whole")
    assert sorted(whole) == list(range(1, steps + 1))
    print(f"uninterrupted: {time.monotonic() - begin:.1f} s, loss {whole[1]} to {whole[steps]}")
    killed, startup, partial = folder / "killed", None, 0
    for number in range(kills):
        resumed = max(all_steps(killed), default=0)
        child = start(killed, text, steps)
        moment, startup = kill_at_a_random_moment(child, killed, rng, startup)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, f"kill {number} came too late: {status}"
        check_equal(losses(killed), whole, f"kill {number}")
        half = sorted(partial_checkpoints(killed))
        partial += bool(half)
        reached = max(losses(killed), default=0)
        print(f"kill {number}: {moment}, steps {resumed} to {reached}, half written: {half}")
    _, status = os.waitpid(start(killed, text, steps), 0)
    assert status == 0
    assert losses(killed) == whole
    assert (
        all_steps(killed)
        == all_steps(folder / "whole")
        == [*range(20, steps - 2, 20), steps - 2, steps]
    )
    target = abstract_of(split_model(toy(), Param).params)
    for item in ("params", "ema"):
        one, other = [read_params(folder / n, target, item=item) for n in ("whole", "killed")]
        jax.tree.map(np.testing.assert_array_equal, one, other)
    print(f"{partial} kills left half a checkpoint")
    print("every loss and the last checkpoint are bit-equal")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
