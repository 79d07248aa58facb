"""Answers with their places as DeepSeek-VL2 writes them (section 3.1 of its paper).

Coordinates are whole numbers from 0 to 999 over the picture's width and height, whatever its size.
"""

from collections.abc import Iterable

LAST = 999


def to_text(answer: str, boxes: Iterable[tuple[int, int, int, int]], size: tuple[int, int]) -> str:
    """`<|ref|>answer<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>` for boxes in pixels.

    Args:
      size: width and height of the picture.
    """
    scales = (LAST / size[0], LAST / size[1]) * 2
    scaled = [
        [min(LAST, round(value * scale)) for value, scale in zip(box, scales, strict=True)]
        for box in boxes
    ]
    return f"<|ref|>{answer}<|/ref|><|det|>{scaled}<|/det|>"
