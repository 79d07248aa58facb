"""Places in pictures as text (DeepSeek-VL2, section 3.1), and pictures with them drawn.

`<|ref|>what<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`, with whole numbers from 0 to 999 over
the picture's width and height: 999 is its far side.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from llmprep_jax.vision.open import open_rgb

TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
LAST = 999
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
_NUMBER = r"\s*(\d{1,3})\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_PLACE = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>\s*<\|det\|>(.*?)<\|/det\|>", re.DOTALL)

Box = tuple[float, float, float, float]


class Place(NamedTuple):
    """What a text speaks of, and its boxes, (left, top, right, bottom) in pixels."""

    text: str
    boxes: tuple[Box, ...]


def parse_places(text: str, size: tuple[int, int]) -> list[Place]:
    """The places that a text names, in order; what is no box is left out.

    Args:
      size: width and height of the picture, in pixels.
    """
    scales = (size[0] / LAST, size[1] / LAST) * 2
    return [
        Place(
            what,
            tuple(
                tuple(int(value) * scale for value, scale in zip(box, scales, strict=True))
                for box in _BOX.findall(where)
            ),
        )
        for what, where in _PLACE.findall(text)
    ]


def format_place(place: Place, size: tuple[int, int]) -> str:
    """The inverse of `parse_places`, for one place; what is outside the picture is at its side."""
    scales = (LAST / size[0], LAST / size[1]) * 2
    boxes = [
        [min(max(round(value * scale), 0), LAST) for value, scale in zip(box, scales, strict=True)]
        for box in place.boxes
    ]
    return f"<|ref|>{place.text}<|/ref|><|det|>{boxes}<|/det|>"


def draw_places(image: Any, places: Sequence[Place], width: int = 3) -> Image.Image:
    """A copy of a picture with the boxes of places, a colour each, and what they are.

    Args:
      image: as `vision.open.open_rgb` takes it. width: of lines, in pixels.
    """
    drawn = open_rgb(image).copy()
    pen = ImageDraw.Draw(drawn)
    for number, place in enumerate(places):
        color = _COLORS[number % len(_COLORS)]
        for left, top, right, bottom in place.boxes:
            box = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
            pen.rectangle(box, outline=color, width=width)
            corner = (box[0] + width + 1, box[1] + width + 1)
            name = place.text.encode("latin-1", "replace").decode("latin-1")  # of the built-in font
            pen.rectangle(pen.textbbox(corner, name), fill="white")
            pen.text(corner, name, fill=color)
    return drawn
