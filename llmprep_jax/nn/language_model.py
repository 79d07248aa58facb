"""What the language models of all families have in common: how they are called, and trained.

A family's model gives `features` (embeddings to hidden states) and `unembed` (these to logits).
Calls from outside enter the mesh of the weights, so that a model loaded on a mesh works as one on a
single device does.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.nn.linear import Embed, Head
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array, Bool, Float, Int

# (hidden states, targets, weights) -> the weighted sum of their cross-entropies, by the model's own
# head or by another that is given as `head`
SumLosses = Callable[..., Array]
Terms = tuple[Array, Array, Mapping[str, Any] | None]  # total, count, statistics
PLACES = ("positions", "segment_ids", "spans")  # of a batch, beside its tokens


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


class LanguageModel(BaseModel):
    """Tokens to logits.

    Attributes:
      embed, head: the table of embeddings, and the output head; None where that is the table.
      drafts: modules that predict further tokens, see `models.protocol`.
    """

    embed: Any
    head: Any
    drafts: Any = None

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
        x_BTD = self.embed_inputs(tokens)
        x_BTD, cache = self.features(x_BTD, **places, cache=cache, in_order=in_order)
        return Output(self.unembed(x_BTD), cache)

    @property
    def decoder(self) -> "LanguageModel":
        """The language model, which is all there is."""
        return self

    @property
    def dtype(self) -> jnp.dtype:
        return self.embed.w.dtype

    @on_own_mesh
    def embed_inputs(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What `features` takes."""
        return self.embed(tokens)

    def by_row(self, tokens: Int[Array, "B T"], media: Mapping[str, Any]) -> dict[str, Array]:
        """No media: there is nothing that would read any."""
        if any(x is not None for x in media.values()):
            raise ValueError(f"this model reads text only; leave {', '.join(media)} out")
        return {}

    def read_drawn(self, **media: Array) -> dict[str, Array]:
        """Nothing is drawn."""
        return media

    def spans(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        """None: no token sees a later one."""
        return None

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

    def next_token_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Mapping[str, Array], sum_losses: SumLosses
    ) -> Terms:
        """(sum of the next tokens' cross-entropies, of their weights, no statistics) of a batch."""
        places = {name: batch[name] for name in PLACES if name in batch}
        x_BTD, _ = self.features(x_BTD, **places, in_order=True)
        weights_BT = batch["loss_mask"].astype(jnp.float32)
        return sum_losses(x_BTD, batch["targets"], weights_BT), jnp.sum(weights_BT), None

    def training_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Mapping[str, Array], sum_losses: SumLosses
    ) -> Terms:
        """What the model is trained by; see `train.losses.training_loss`."""
        return self.next_token_terms(x_BTD, batch, sum_losses)

    def probe(self) -> dict[str, Array]:
        """Logits of two rows of fixed random ids."""
        rows = np.random.default_rng(0).integers(0, self.cfg.vocab_size, (2, 24), dtype=np.int32)
        return {"logits": self(jnp.asarray(rows)).logits}
