"""All that waits for an accelerator, in the first eight minutes on one, in order of value.

    python -m experiments.accelerator_check [seconds=480] [sections=parity,steps] [size=tiny]

What the machine has; whether each kernel gives what its reference does, in bf16 and float32; each
transport of experts over the devices there are; LoRA and full steps of a Llama-3-8B of 2 and of 4
layers, laid out to 32 by a line, beside transformers + PEFT (sdpa, and torch.compile); prefill and
decode; attention in the shapes of released models. Rows are written as they come, to check.jsonl
and check.md in docs/results/DEVICE, and what falls short of its goal comes last. Each check runs in
a process apart: one that fails is a row with its reason, and what the time did not suffice for is
listed. Contenders of steps and generation run one after the other, each in a process of its own.
A machine needs jax, flax, optax and orbax; torch, transformers and peft are peers where they are.
size=tiny is for a CPU, and shows that all of it runs.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.accelerator_check:Settings")

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from experiments import bench_attention
from experiments.bench import dispatch, environment, generation, goals, llama, parity
from experiments.bench.checks import Check, ask, run_checks
from experiments.bench.results import Results, Row, line
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

WORDS = """Made by `python -m experiments.accelerator_check`. Errors are the greatest difference
over the greatest value. FLOPs of steps are 4 a token and frozen weight in products, 6 a trained
one, and attention's over half of the row; of attention alone those of pairs that see each other, so
causal attention counts once, not twice. Memory is counted by each side's own allocator."""
# each has this share of the seconds, and what those before it left
SHARES = {"parity": 0.25, "dispatch": 0.08, "steps": 0.4, "generation": 0.1, "attention": 0.17}
LIMIT = 45.0  # seconds of one check, which may hang; a step compiles for longer
CORE = ("d128", "deepseek-v3-decode-tp8", "deepseek-v3-decode", "llama-3-8b-decode")
CORE += ("llama-3-8b", "gemma-3-4b-local", "deepseek-v3", "siglip-so400m")

# of a section: what makes checks, and its settings; each in a process of its own
Part = tuple[Callable[..., list[Check]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long, and what of it."""

    seconds: float = 480.0  # of the whole
    sections: tuple[str, ...] = tuple(SHARES)  # in this order
    size: Literal["full", "tiny"] = "full"  # tiny: for a CPU
    out: pathlib.Path | None = None  # a folder for the results; None: docs/results/DEVICE

    def __post_init__(self):
        unknown = [name for name in self.sections if name not in SHARES]
        if unknown:
            raise ValueError(f"unknown sections {unknown}; there are {', '.join(SHARES)}")


def parts(section: str, size: str) -> Iterator[Part]:
    """What a section is made of, in order of value."""
    if section == "parity":
        yield parity.checks, dict(size=size)
    elif section == "dispatch":
        yield dispatch.checks, dict(size=size)
    elif section == "steps":
        for contender in llama.CONTENDERS[size]:
            yield llama.step_checks, dict(contender=contender, size=size)
    elif section == "generation":
        for contender in llama.CONTENDERS[size][:2]:
            yield generation.decode_checks, dict(contender=contender, size=size)
    else:
        sizes = dict(shapes=CORE, works=("forward", "backward", "decode"), size=size, target=None)
        if size == "tiny":
            sizes["shapes"] = ("gemma-3-4b-local", "deepseek-v3-decode-tp8")
        timing = dict(rounds=3, at_once=0.05 if size == "full" else 0.0)
        yield bench_attention.checks, sizes | timing | dict(dtype="bfloat16")


def run_section(section: str, size: str, until: float, add: Callable[[Row], None]) -> None:
    """Runs a section's parts; each may take what is left, less a fair share of those after it."""
    todo = list(parts(section, size))
    for index, (make, settings) in enumerate(todo):
        left = until - time.monotonic()
        names = [" ".join(str(x) for x in settings.values() if isinstance(x, str))]
        if left > 5:
            # twice a fair share: a part that is quick leaves its time to the others
            share = min(left, 2 * left / (len(todo) - index))
            limit = LIMIT if size == "full" and section != "steps" else math.inf
            names = run_checks(make, settings, share, add, limit)
        for name in names:
            add({"check": name, "reason": "did not fit into the time"})


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    begun = time.monotonic()
    # two frameworks share the device's memory, and each takes what it needs
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    facts, device = ask(environment.facts)
    results = Results(settings.out, "check", device, WORDS)

    def add(section: str, row: Row) -> None:
        if "check" in row:
            row = {"section": "not done", "of": section} | dict(row)
        if row not in results.rows:
            results.add(row)
            print(f"{time.monotonic() - begun:5.0f} s  {line(row)}", flush=True)

    for row in facts:
        add("environment", row)
    for index, section in enumerate(settings.sections):
        rest = settings.sections[index:]
        left = settings.seconds - (time.monotonic() - begun)
        share = left * SHARES[section] / sum(SHARES[name] for name in rest)
        until = time.monotonic() + share
        run_section(section, settings.size, until, functools.partial(add, section))
    for row in goals.missed(results.rows, device):
        add("goals", row)
    return {"numbers": results.numbers, "tables": results.tables}


if __name__ == "__main__":
    cli.run(main)
