"""Draws that are alike on every machine.

`random.Random(text).random()` is the one sequence that Python promises to keep from version to
version; `choice`, `sample` and `shuffle` have changed before. All draws are made of it.
"""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """A stream of draws that its key decides.

    Args:
      key: parts of the seed, as ("style", seed, index): streams of unlike keys are independent.
    """

    def __init__(self, *key: object):
        self._draw = random.Random("/".join(map(str, key))).random

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self._draw() * count)

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + self.below(high - low + 1)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._draw()

    def chance(self, share: float) -> bool:
        return self._draw() < share

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` items, or all where there are fewer, no place twice, in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(min(count, len(rest)))]
