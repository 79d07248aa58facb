"""What the language models of all families have in common: how they are called.

A family's model gives `features` (tokens to hidden states) and `unembed` (these to logits). Calls
from outside enter the mesh of the weights, so that a model loaded on a mesh works as one on a
single device does.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import Embed, Head
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array, Bool, Int


class Output(NamedTuple):
    """Logits [B, T, V] in float32, and the cache if one was given."""

    logits: Array
    cache: Any = None


class Unembedding(NamedTuple):
    """An output head that is one matrix.

    Attributes:
      w: [D, V], or [V, D] where `is_table`: of an embedding that is the head too.
      dtype: of the product's operands.
      soft_cap: of the logits, None for none.
    """

    w: Array
    is_table: bool
    dtype: jnp.dtype
    soft_cap: float | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model's weights came from, as it was given; None: they are found nowhere.

    Adapters are saved as those of this place, so who changes the weights takes it away
    (`without_source`).

    All are equal, so that models from two places share their compiled programs.
    """

    path: str | None = dataclasses.field(default=None, compare=False)


class LanguageModel(nnx.Module):
    """Tokens to logits.

    Attributes:
      source: of the weights.
      embed, head: the table of embeddings, and the output head; None where that is the table.
    """

    source: Source
    embed: Any
    head: Any

    @on_own_mesh
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: Any = None,
        in_order: bool = False,
    ) -> Output:
        """Logits of the token after each token.

        Args:
          tokens: ids.
          positions: of each token in its document; by default counted from 0, or on from the cache.
          segment_ids: documents of a packed row, from 1 on; 0 is padding.
          mask: True for real tokens; an alternative to `segment_ids` for padded rows.
          cache: from `init_cache` or an earlier call; the tokens come after what it holds.
          in_order: that `positions` grow along each document, as counted ones do: what attention
            masks is then not computed on any backend.
        """
        places = dict(positions=positions, segment_ids=segment_ids, mask=mask)
        x_BTD, cache = self.features(tokens, **places, cache=cache, in_order=in_order)
        return Output(self.unembed(x_BTD), cache)

    @property
    def logits_soft_cap(self) -> float | None:
        """c of logits c tanh(l / c); None: plain ones."""
        return None

    def unembedding(self) -> Unembedding | None:
        """The head as the matrix that `unembed` multiplies by, so that a loss need not form all
        logits at once; None where it has an adapter, or is packed."""
        layer = self.embed if self.head is None else self.head
        if not isinstance(layer, Embed | Head):
            return None
        return Unembedding(
            layer.w[...], isinstance(layer, Embed), layer.dtype, self.logits_soft_cap
        )


def without_source(model: nnx.Module) -> nnx.Module:
    """The model as one whose weights are found nowhere; the given one is unchanged."""
    if not isinstance(model, LanguageModel):
        return model
    changed = nnx.merge(*nnx.split(model))
    changed.source = Source()
    return changed
