"""Gemma 3's pan-and-scan: long pictures are also seen in pieces.

Gemma 3's tower sees squares alone, so that a long picture is squeezed. Cut along its longer side
into pieces that are nearly square, each a picture of its own beside the whole, it is not.
"""

import dataclasses
import math

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class PanAndScan:
    """Which pictures are cut: `min_ratio` and longer, into `max_crops` of `min_size` at least."""

    min_size: int = 256
    max_crops: int = 4
    min_ratio: float = 1.2

    def boxes(self, width: int, height: int) -> list[Box]:
        """The pieces in order, from the left or from the top; none where it is not cut."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return []
        pieces = min(math.floor(long / self.min_size), math.floor(long / short + 0.5))
        pieces = min(max(pieces, 2), self.max_crops)
        step = math.ceil(long / pieces)
        if min(step, short) < self.min_size:
            return []
        # the last may be narrower; of many thin ones the last would be empty, and are left out
        spans = [(start, min(start + step, long)) for start in range(0, long, step)]
        if width >= height:
            return [(start, 0, stop, height) for start, stop in spans]
        return [(0, start, width, stop) for start, stop in spans]
