"""What all models have in common: where their weights came from, and what checkpoints call them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's weights came from, as it was given; None: they are found nowhere.

    Adapters are saved as those of this place, so who changes the weights takes it away
    (`without_source`).

    All are equal, so that models from two places share their compiled programs.
    """

    path: str | None = dataclasses.field(default=None, compare=False)


class BaseModel(nnx.Module):
    """A model that is loaded, saved, adapted and trained; see `models.protocol`.

    Attributes:
      cfg: its Config. source: of the weights.
      weights: the table of its tensors' names (`weights.rows`).
      stacks: paths of its stacks of layers. extras: of what transformers' model has not.
      drawing: what draws, see `models.protocol`; None: the model does not.
    """

    cfg: Any
    source: Source
    weights: Any
    stacks: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    drawing: Any = None

    def weights_among(self, names: Sequence[str]) -> Any:
        """The table for files that hold tensors of these names, in whichever form that is."""
        return self.weights

    def named_as(self, names: Sequence[str]) -> "BaseModel":
        """The model with the table of files that hold such names; Hugging Face's where none is of
        another form. The weights are shared."""
        return self

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """What parts of the model are called where a run freezes them, and the paths of each."""
        tables = {"embed": self.weights.embed, "head": self.weights.head}
        return {name: (path.removesuffix(".w"),) for name, path in tables.items() if path}

    @property
    def image_work(self) -> dict[str, Work]:
        """What an image passes through, in that order, by paths: how its FLOPs are counted."""
        return {}

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights, as config.json states it."""
        raise AttributeError(f"{type(self).__name__} does not say what dtype its weights are in")

    def probe(self) -> dict[str, Array]:
        """Outputs on fixed inputs, by name, in which every part has a share."""
        raise AttributeError(f"{type(self).__name__} has no outputs that a copy is compared by")


def without_source(model: nnx.Module) -> nnx.Module:
    """The model as one whose weights are found nowhere; the given one is unchanged."""
    if not isinstance(model, BaseModel):  # whatever a training loop was given
        return model
    changed = nnx.merge(*nnx.split(model))
    changed.source = Source()
    return changed
