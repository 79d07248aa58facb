"""How much of a model an adapter trains, as numbers and as a table for people.

A packed weight counts as many parameters as it stands for, and as many bytes as it takes; what
layers share counts once. Per cent is of all parameters, the adapter's own among them, as PEFT
prints it, while a layer's row is of that layer alone.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from flax import nnx

from llmprep_jax.nn.param import AdapterParam, Buffer, Idle, Shared
from llmprep_jax.peft.adapter import Adapted, adapters, split
from llmprep_jax.peft.targets import plain
from llmprep_jax.peft.tuned import tuned
from llmprep_jax.quant.linear import packed_layers


@dataclasses.dataclass(frozen=True)
class Count:
    """Sizes of a model with adapters: parameters and bytes.

    Attributes:
      idle: zeros that stand in stacks for layers that `layers_to_transform` leaves out; they are in
        memory, and in the bytes, with gradients and moments, and are no parameters.
    """

    trainable: int
    frozen: int
    trainable_bytes: int
    frozen_bytes: int
    idle: int = 0

    @property
    def share(self) -> float:
        """Trainable parameters as a share of all."""
        return self.trainable / max(self.trainable + self.frozen, 1)


def count(model: nnx.Module) -> Count:
    """Counts parameters; an abstract model will do."""
    trainable, frozen = split(model)
    frozen = _once(frozen)
    dense = _size(nnx.filter_state(frozen, nnx.Any(Shared, Idle, nnx.Not(Buffer))))
    packed = sum(math.prod(layer.shape) for layer in packed_layers(model).values())
    idle = sum(map(_count_idle, adapters(model).values()))
    sizes = _size(trainable) - idle, dense + packed
    return Count(*sizes, _bytes(trainable), _bytes(frozen), idle)


def _count_idle(layer: Adapted) -> int:
    """The zeros of a stack's layers that are not adapted."""
    return sum(
        math.prod(variable.shape[1:]) * len(adapted.left_out)
        for adapted in layer.owned().values()
        for variable in (getattr(adapted, name) for name in adapted.names)
        if isinstance(variable, AdapterParam)
    )


def count_targets(model: nnx.Module) -> dict[str, Count]:
    """Counts of each target; layers of a list are one target."""
    by_target: dict[str, list[nnx.Module]] = {}
    for path, adapted in (adapters(model) | tuned(model)).items():
        by_target.setdefault(plain(path), []).append(adapted)
    return {name: count(nnx.List(layers)) for name, layers in sorted(by_target.items())}


def print_counts(
    model: nnx.Module,
    console: rich.console.Console | None = None,
    optimizer_bytes: int | None = None,
) -> None:
    """Prints a table of the targets: their trainable parameters, what share these are, and memory.

    Args:
      optimizer_bytes: of the whole optimizer state; None: AdamW's, two float32 moments.
    """
    columns = ("trainable", "frozen", "%", "weights", "gradients", "optimizer")
    title = "what is trained, and MiB of memory (of activations a run tells once compiled)"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("target", overflow="fold")  # cut short, layers would look alike
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    whole = count(model)
    values = whole.trainable + whole.idle
    moments = 8 * values if optimizer_bytes is None else optimizer_bytes
    bytes_of_one = moments / max(values, 1)
    if whole.idle:
        table.caption = (
            f"in memory, of layers that are left out, {whole.idle:,} zeros that stay zero"
        )
    for name, part in count_targets(model).items():
        table.add_row(name, *_cells(part, bytes_of_one))
    table.add_section()
    table.add_row("the whole model", *_cells(whole, bytes_of_one))
    (console or rich.console.Console()).print(table)


def _cells(part: Count, optimizer_bytes: float) -> tuple[str, ...]:
    # gradients are summed in float32, whatever the parameters are
    sizes = (
        part.trainable_bytes + part.frozen_bytes,
        4 * (part.trainable + part.idle),
        optimizer_bytes * (part.trainable + part.idle),
    )
    share = f"{part.share:.4%}".removesuffix("%")
    return f"{part.trainable:,}", f"{part.frozen:,}", share, *(f"{x / 2**20:,.1f}" for x in sizes)


def _once(state: nnx.State) -> nnx.State:
    """Without repetitions of what layers share, which is one array for each name and shape.

    Abstract arrays are told apart by nothing else. Numbers of rows (`several`) are left out.
    """
    kept: dict[tuple, tuple] = {}
    for path, x in nnx.to_flat_state(state):
        if isinstance(x, Shared) and not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        kept.setdefault((path[-1], x.shape) if isinstance(x, Shared) else path, (path, x))
    return nnx.from_flat_state(kept.values())


def _size(state: nnx.State) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def _bytes(state: nnx.State) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
