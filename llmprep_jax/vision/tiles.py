"""DeepSeek-VL2's dynamic tiling (section 2.1): a small view of the whole, and tiles of 384.

Of the resolutions that a model was trained on, a picture gets the one that keeps most of its own
pixels. All (384 m, 384 n) with m n <= 9 are released, in an order that decides ties. A picture of
one tile is seen twice, whole and as that tile.
"""

import math
from collections.abc import Sequence

from PIL import Image

from llmprep_jax.vision.resize import Size, fit_on_canvas

# in the order of the released files, whose first is the size of a tile
RESOLUTIONS = (
    *[(384, 384), (384, 768), (768, 384), (384, 1152), (1152, 384), (384, 1536), (768, 768)],
    *[(1536, 384), (384, 1920), (1920, 384), (384, 2304), (768, 1152), (1152, 768), (2304, 384)],
    *[(384, 2688), (2688, 384), (384, 3072), (768, 1536), (1536, 768), (3072, 384), (384, 3456)],
    *[(1152, 1152), (3456, 384)],
)


def best_resolution(width: int, height: int, resolutions: Sequence[Size]) -> Size:
    """The one that keeps most pixels of a picture, then wastes fewest; the first of equals.

    Sides are rounded down: of 1 x 5,000 none keeps any, and the smallest is taken.
    """
    best, kept, wasted = resolutions[0], 0, math.inf
    for across, down in resolutions:
        scale = min(across / width, down / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        rest = across * down - effective
        if effective > kept or (effective == kept and rest < wasted):
            best, kept, wasted = (across, down), effective, rest
    return best


def cut_tiles(
    image: Image.Image, size: Size, edge: int, color: tuple[int, int, int]
) -> list[Image.Image]:
    """The whole picture on one tile, and then the tiles of `size`, row by row from the left."""
    canvas = fit_on_canvas(image, size, color, Image.Resampling.BICUBIC)
    corners = [(x, y) for y in range(0, size[1], edge) for x in range(0, size[0], edge)]
    tiles = [canvas.crop((x, y, x + edge, y + edge)) for x, y in corners]
    return [fit_on_canvas(image, (edge, edge), color, Image.Resampling.BICUBIC), *tiles]


def count_tokens(across: int, down: int, side: int) -> int:
    """Image tokens of across x down tiles, each `side` x `side` tokens after the projector.

    The whole view has a newline token a row, then one separator, then the tiles joined to one
    picture with a newline token a row: 421 for one tile, 2,017 for 3 x 3 at a side of 14.
    """
    return side * (side + 1) + 1 + down * side * (across * side + 1)
