"""The methods of the study, their settings and learning rates, and their ranks at equal budget."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from llmprep_jax import peft, quant


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method as it is run: its settings (None: all weights), learning rate, and base's format."""

    settings: Any
    lr: float
    packed: str | None = None

    def apply(self, base: nnx.Module, seed: int) -> nnx.Module:
        """The base with the method's adapters."""
        if self.packed:
            base = quant.quantize_model(base, self.packed)
        return base if self.settings is None else peft.inject(base, self.settings, seed=seed)


METHODS = {
    "full": Choice(None, 1e-3),
    "LoRA": Choice(peft.LoRA(rank=8, alpha=16), 1e-2),
    "QLoRA": Choice(peft.LoRA(rank=8, alpha=16), 1e-2, packed="nf4"),
    "DoRA": Choice(peft.DoRA(rank=8, alpha=16), 1e-2),
    "LoHa": Choice(peft.LoHa(rank=8, alpha=16), 1e-2),
    "LoKr": Choice(peft.LoKr(rank=8, alpha=16), 1e-2),
    "IA3": Choice(peft.IA3(), 3e-2),
}


def at_budget(choice: Choice, base: nnx.Module, budget: int) -> Choice | None:
    """The method at the rank that trains nearest to `budget` parameters; None if it has no rank."""
    if not hasattr(choice.settings, "rank"):
        return None
    low, high = 1, 512

    def trained(rank: int) -> int | None:
        settings = dataclasses.replace(choice.settings, rank=rank, alpha=2 * rank)
        try:
            model = jax.eval_shape(lambda: peft.inject(base, settings))
        except ValueError:  # above a layer's dimensions
            return None
        return peft.count(model).trainable

    sizes = {}
    while low <= high:
        rank = (low + high) // 2
        sizes[rank] = trained(rank)
        if sizes[rank] is None or sizes[rank] > budget:
            high = rank - 1
        else:
            low = rank + 1
    known = {rank: size for rank, size in sizes.items() if size is not None}
    rank = min(known, key=lambda rank: (abs(known[rank] - budget), rank))
    settings = dataclasses.replace(choice.settings, rank=rank, alpha=2 * rank)
    return dataclasses.replace(choice, settings=settings)
