"""What was read and said last, kept for a prompt that begins alike: a chat reads only what is new.

A text that goes on otherwise is cut back to what both share. That is not always possible: a ring
(Gemma 3's local layers) has overwritten what lies further back than its window, and then, or when
the model's weights have changed, the prompt is read whole.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmprep_jax.nn.cache import KVCache
from llmprep_jax.types import Array


class PromptCache:
    """Keys and values of one prompt and its answer; give the same one to each call of a chat.

    It holds memory of the device, as many slots as the longest text so far needed, until it is
    deleted. The answers are those of a prompt that is read whole.
    """

    def __init__(self):
        self._kept: tuple[tuple, np.ndarray, Any] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return 0 if self._kept is None else len(self._kept[1])

    def take(
        self, weights: tuple, ids: np.ndarray, spans: np.ndarray | None = None
    ) -> tuple[Any, int] | None:
        """(a cache with the first of these ids in it, how many), for a model of these weights.

        It is empty afterwards: what goes on from the cache uses it up.

        Args:
          ids: of tokens, and what tells images apart in the places of theirs.
          spans: numbers of runs that are read whole, 0 elsewhere; None: there is none.
        """
        kept, self._kept = self._kept, None
        if kept is None or not _are_same(kept[0], weights):
            return None
        _, known, cache = kept
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):  # a call was interrupted
            return None
        shared = min(len(known), len(ids) - 1)  # one token at least is read, for what follows it
        differs = np.flatnonzero(known[:shared] != ids[:shared])
        shared = int(differs[0]) if len(differs) else shared
        while spans is not None and shared and 0 < spans[shared] == spans[shared - 1]:
            shared -= 1
        if not shared:
            return None
        cache, is_whole = _cut(cache, shared)
        return (cache, shared) if is_whole else None

    def put(self, weights: tuple, ids: np.ndarray, cache: Any) -> None:
        """Keeps a cache that holds these ids, and nothing else."""
        self._kept = (weights, ids, cache)


def _are_same(weights: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether weak references are to the same arrays, and these are there."""
    return len(weights) == len(others) and all(
        a() is b() is not None for a, b in zip(weights, others, strict=True)
    )


@jax.jit
def _cut(cache: Any, num_tokens: Array) -> tuple[Any, Array]:
    are_whole = []

    def cut(part: KVCache) -> KVCache:
        part, is_whole = part.cut(num_tokens)
        are_whole.append(is_whole)
        return part

    cache = jax.tree.map(cut, cache, is_leaf=is_cache)
    return cache, jax.numpy.stack(are_whole).all()


def is_cache(node: Any) -> bool:
    """Whether a part of a model's cache is one of keys and values."""
    return isinstance(node, KVCache)


def room(cache: Any) -> tuple[int, int]:
    """(slots, slots that are used), of those parts that do not go round."""
    parts = [part for part in jax.tree.leaves(cache, is_leaf=is_cache) if not part.is_ring]
    return parts[0].num_slots, max(int(part.length_B.max()) for part in parts)
