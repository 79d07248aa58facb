"""What a program sends between devices: its collectives with dtypes and shapes.

The text that is read is that right after XLA's partitioner: later on the CPU compiler, which has no
bf16 sums, makes float32 of what TPUs and GPUs send as it stands there.
"""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_OPS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
_LINE = re.compile(rf"= (\w+)\[([\d,]*)\]\S* ({_OPS})(?:-start)?\(")
_TUPLE = re.compile(rf"= \((.*)\) ({_OPS})(?:-start)?\(")


class Collective(NamedTuple):
    """One collective, with what a device has of it afterwards."""

    op: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@contextlib.contextmanager
def _kept_out_of_the_cache() -> Iterator[None]:
    """No program compiled inside is kept: one from the cache would not be dumped again."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def collectives(lowered: jax.stages.Lowered) -> list[Collective]:
    """The collectives of a lowered program; one in a loop is there once."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        with _kept_out_of_the_cache():
            lowered.compile(compiler_options=options | {"xla_backend_optimization_level": 0})
        (path,) = Path(folder).glob("*after_spmd-partitioning*.txt")
        text = path.read_text()
    found = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            parts, op = [(match[1], match[2])], match[3]
        elif match := _TUPLE.search(line):
            parts, op = re.findall(r"(\w+)\[([\d,]*)\]", match[1]), match[2]
        else:
            continue
        found += [
            Collective(op, dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in parts
        ]
    return found
