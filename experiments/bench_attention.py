"""Speed of attention in the shapes of released models: each backend of ours, and torch's kernels.

    python -m experiments.bench_attention [shapes=llama-3-8b,d128] [works=forward] [size=full]

Forward, backward alone, and a decode step after a full cache, all contenders in turn; TFLOP/s count
the pairs of tokens that see each other (causal attention once, not twice), GB/s the bytes of q, k,
v and o once. A backend that cannot do a shape is there with its reason. With target=v5p:2x2x1, the
name of a TPU topology, or target=h100, each backend is compiled for one such chip and not run,
which takes the package libtpu, or jax-cuda12-plugin and jax-cuda12-pjrt, and no chip: the table
then has compiled temporaries in place of times.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_attention:Settings")

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from experiments.bench import attention, environment
from experiments.bench.ahead import chip
from experiments.bench.attention_contenders import compile_for, contenders, prepared
from experiments.bench.checks import Absent, Check, ask, one_line, run_checks
from experiments.bench.results import Results, Row, line
from experiments.bench.shapes import SHAPES, Shape, Work
from experiments.bench.timing import in_turn
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

WORDS = """Medians, all contenders of a shape in turn. TFLOP/s count the pairs of tokens that see
each other, so causal attention once, not twice; backward is its own five products, the scores
computed again. GB/s count q, k, v and o once. B rows of T tokens, N query heads and K key heads."""
COMPILED_WORDS = """Compiled and not run: what the programs hold beside their inputs and outputs. B
rows of T tokens, N query heads and K key heads."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed, or compiled for what."""

    shapes: tuple[str, ...] | None = None  # by name; None: all
    works: tuple[str, ...] = ("forward", "backward", "decode")  # of a shape, what it has of these
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"  # of q, k and v
    size: Literal["full", "tiny"] = "full"  # tiny: an eighth of the tokens and fewer heads
    rounds: int = 5  # turns of each contender
    seconds: float = 600.0  # after which what is left is listed and not timed
    target: str | None = None  # "v5p:2x2x1" or "h100"; None: the device at hand, and timed
    out: pathlib.Path | None = None  # a folder for the numbers; None: docs/results/DEVICE

    def __post_init__(self):
        unknown = [name for name in self.shapes or () if name not in SHAPES]
        if unknown:
            raise ValueError(f"unknown shapes {unknown}; there are {', '.join(SHAPES)}")


def checks(
    shapes: tuple[str, ...] | None,
    works: tuple[str, ...],
    size: str,
    target: str | None,
    **timing: Any,
) -> list[Check]:
    """One for each shape and work of it."""
    todo = []
    for name in shapes or SHAPES:
        shape = SHAPES[name]
        shape = shape.shrunk(32) if size == "tiny" else shape
        for work in shape.works:
            if work in works:
                run = functools.partial(timed, name, shape, work, **timing)
                if target:
                    run = functools.partial(compiled, name, shape, work, timing["dtype"], target)
                todo.append(Check(f"{name}, {work}", run))
    return todo


def timed(
    name: str, shape: Shape, work: Work, dtype: str, rounds: int, at_once: float
) -> Iterator[Row]:
    """A row for each contender, by time; those that cannot do it have a note instead."""
    import jax

    platform, ready, notes = jax.default_backend(), {}, {}
    made = prepared(contenders(platform, shape, work, dtype))
    for contender, result in made.items():
        if isinstance(result, Absent):
            yield {"section": "absent", "contender": contender, "note": str(result)}
        elif isinstance(result, Exception):
            notes[contender] = one_line(result).removeprefix("Unfit: ")
        else:
            ready[contender] = result
    seconds = in_turn(ready, rounds, at_once, pause=0.05 if platform == "cpu" else 0.0)
    alike = {"section": work, "shape": name, "B T N K": shape.sizes}
    peers = [seconds[x] for x in seconds if x.startswith("torch")]
    for contender, each in sorted(seconds.items(), key=lambda x: x[1]):
        yield alike | {
            "contender": contender,
            "ms": each * 1e3,
            "TFLOP/s": shape.flops(work) / each / 1e12,
            "GB/s": shape.bytes(work, 4 if dtype == "float32" else 2) / each / 1e9,
            "x torch's best": min(peers) / each if peers else None,
        }
    for contender, note in notes.items():
        yield alike | {"contender": contender, "note": note}


def compiled(name: str, shape: Shape, work: Work, dtype: str, target: str) -> Iterator[Row]:
    """A row for each backend: what its program holds beside its inputs and outputs."""
    alike = {"section": work, "shape": name, "B T N K": shape.sizes}
    device = chip(target)
    for backend in attention.backends("tpu" if device.platform == "tpu" else "gpu", shape):
        try:
            program = compile_for(device, backend, shape, work, dtype)
        except Exception as error:  # of the compiler: the others go on
            yield alike | {"contender": backend, "note": one_line(error).removeprefix("Unfit: ")}
            continue
        size = program.memory_analysis().temp_size_in_bytes / 2**20
        yield alike | {"contender": backend, "temporaries, MiB": size}


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants some memory too
    target = settings.target
    device = f"{target}, ahead of time" if target else ask(environment.device_name)
    results = Results(settings.out, "attention", device, COMPILED_WORDS if target else WORDS)

    def add(row: Row) -> None:
        if "check" in row:
            row = {"section": "not done"} | dict(row)
        if row not in results.rows:
            results.add(row)
            print(line(row), flush=True)

    fields = ("shapes", "works", "size", "target", "dtype", "rounds")
    what = {field: getattr(settings, field) for field in fields}
    what["at_once"] = 0.1 if settings.size == "full" else 0.01
    for left in run_checks(checks, what, settings.seconds, add):
        add({"check": left, "reason": "did not fit into the time"})
    return {"numbers": results.numbers, "tables": results.tables}


if __name__ == "__main__":
    cli.run(main)
