"""A model's multi-token prediction modules as what speculative decoding drafts with
(`models.protocol.Drafts`)."""

from typing import Any

from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.types import Array, Float


class Drafts:
    """The modules of a model, which are used in turn."""

    def __init__(self, model: Any):
        self._model = model

    def __len__(self) -> int:
        return len(self._model.mtp)

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = None) -> KVCache:
        """An empty cache as the model's, a layer for each module."""
        return self._model.make_cache(len(self), batch_size, max_len, dtype)

    def begin(self, place: Tokens) -> tuple[Array, Array]:
        """cos and sin of the tokens' positions, which all modules need."""
        return self._model.rope(place)

    def __call__(
        self,
        number: int,
        hidden_BTD: Float[Array, "B T D"],
        next_BTD: Float[Array, "B T D"],
        place: Tokens,
        rope: tuple[Array, Array],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """What module `number` makes of hidden states and the embeddings of the tokens after."""
        module = self._model.mtp[number]
        hidden_BTD, cache, _ = module(hidden_BTD, next_BTD, place, rope, cache, number)
        return hidden_BTD, cache
