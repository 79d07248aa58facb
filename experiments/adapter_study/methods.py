"""The methods of the study, their settings and learning rates, and their ranks at equal budget.

The rates are the best on seed 0 of 1e-3, 3e-3, 1e-2, 3e-2 and 1e-1 (`experiments.adapters lr=...`).
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from llmprep_jax import peft


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method as it is run: its settings (None: all weights) and learning rate."""

    settings: Any
    lr: float

    def apply(self, base: nnx.Module, seed: int) -> nnx.Module:
        """The base with the method's adapters."""
        return base if self.settings is None else peft.inject(base, self.settings, seed=seed)


def methods(steps: int) -> dict[str, Choice]:
    """All of them, for a run of so many steps."""
    size = dict(rank=8, alpha=16)
    phases = dict(warmup_steps=steps // 5, final_steps=steps // 4, every=max(1, steps // 50))
    adalora = peft.AdaLoRA(rank=12, alpha=24, target_rank=8, total_steps=steps, **phases)
    return {
        "full": Choice(None, 3e-3),
        "LoRA": Choice(peft.LoRA(**size), 1e-2),
        "QLoRA": Choice(peft.QLoRA(**size), 1e-2),
        "DoRA": Choice(peft.DoRA(**size), 1e-2),
        "LongLoRA": Choice(peft.LongLoRA(**size, targets="all-linear"), 1e-2),
        "LoHa": Choice(peft.LoHa(**size), 3e-2),
        "LoKr": Choice(peft.LoKr(**size), 3e-2),
        "VeRA": Choice(peft.VeRA(rank=256), 1e-1),
        "IA3": Choice(peft.IA3(), 1e-1),
        "AdaLoRA": Choice(adalora, 3e-2),
    }


def at_budget(choice: Choice, base: nnx.Module, budget: int) -> Choice | None:
    """The method at the rank that trains nearest to `budget` parameters; None if it has no rank."""
    if not hasattr(choice.settings, "rank"):
        return None
    low, high = 1, 512

    def trained(rank: int) -> int | None:
        settings = with_rank(choice.settings, rank)
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
    settings = with_rank(choice.settings, rank)
    return dataclasses.replace(choice, settings=settings)


def with_rank(settings: Any, rank: int) -> Any:
    """The settings at another rank, with a scale that stays as it is."""
    new = {"rank": rank}
    if hasattr(settings, "alpha"):
        new["alpha"] = settings.alpha * rank / settings.rank
    if hasattr(settings, "target_rank"):
        new["target_rank"] = max(1, rank * 2 // 3)
    return dataclasses.replace(settings, **new)
