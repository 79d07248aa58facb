"""What a program sends between devices: its collectives with dtypes and shapes.

The text that is read is that right after XLA's partitioner: later on the CPU compiler, which has no
bf16 sums, makes float32 of what TPUs and GPUs send as it stands there.
"""

import math
import re
import tempfile
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


def collectives(lowered: jax.stages.Lowered) -> list[Collective]:
    """The collectives of a lowered program; one in a loop is there once."""
    with tempfile.TemporaryDirectory() as folder:
        # a pattern that an earlier compilation did not have: a program of the cache is not dumped
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        lowered.compile(compiler_options=options)
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
