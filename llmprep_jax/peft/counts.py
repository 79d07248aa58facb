"""How much of a model an adapter trains, as numbers and as a table for people.

A packed weight counts as many parameters as it stands for, and as many bytes as it takes. The one
thing a reader would get wrong: per cent is of all parameters, the adapter's own among them, as PEFT
prints it, while a layer's row is of that layer alone.
"""

import dataclasses
import math

import jax
import numpy as np
import rich.console
import rich.table
from flax import nnx

from llmprep_jax.nn.param import Buffer
from llmprep_jax.peft.adapter import adapters, split
from llmprep_jax.peft.targets import plain
from llmprep_jax.peft.tuned import tuned
from llmprep_jax.quant.linear import packed_layers


@dataclasses.dataclass(frozen=True)
class Count:
    """Sizes of a model with adapters: parameters and bytes."""

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / max(self.trainable + self.frozen, 1)


def count(model: nnx.Module) -> Count:
    """Counts parameters; an abstract model will do."""
    trainable, frozen = split(model)
    dense = _size(nnx.filter_state(frozen, nnx.Not(Buffer)))
    packed = sum(math.prod(layer.shape) for layer in packed_layers(model).values())
    return Count(_size(trainable), dense + packed, _bytes(trainable), _bytes(frozen))


def count_targets(model: nnx.Module) -> dict[str, Count]:
    """Counts of each target; layers of a list are one target."""
    each: dict[str, list[nnx.Module]] = {}
    for path, adapted in (adapters(model) | tuned(model)).items():
        each.setdefault(plain(path), []).append(adapted)
    return {name: count(nnx.List(layers)) for name, layers in sorted(each.items())}


def print_counts(model: nnx.Module, console: rich.console.Console | None = None) -> None:
    """Prints a table of the targets, their trainable parameters and what share these are."""
    table = rich.table.Table(title="what is trained")
    table.add_column("target")
    for name in ("trainable", "frozen", "per cent"):
        table.add_column(name, justify="right")
    for name, found in count_targets(model).items():
        table.add_row(name, *_cells(found))
    table.add_section()
    table.add_row("the whole model", *_cells(count(model)))
    (console or rich.console.Console()).print(table)


def _cells(found: Count) -> tuple[str, str, str]:
    return f"{found.trainable:,}", f"{found.frozen:,}", f"{found.share:.4%}".removesuffix("%")


def _size(state: nnx.State) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def _bytes(state: nnx.State) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
