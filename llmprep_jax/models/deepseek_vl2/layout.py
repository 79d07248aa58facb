"""Which feature each image token of DeepSeek-VL2 takes (section 2.1, figure 3).

A picture of w x h tiles is, in tokens: the whole on one tile, row by row, each row of `side` tokens
followed by a newline; a separator; then the tiles put together to one picture of w side x h side
tokens, again row by row with newlines. Its features come tile by tile, so that a row of the second
part runs through w of them. With "tail" the whole comes last.

A row of a batch has the features of all its tiles one after another, side^2 each, and then the
newline's and the separator's. All here is arithmetic on whole numbers, of numpy in the processor
and of JAX in the model.

Letters of this file: N images of a row, w and h its tiles across and down.
"""

from typing import Any

import numpy as np

from llmprep_jax.types import Int


def count_tokens(grids: Int[Any, "*B N 2"], side: int) -> Int[Any, "*B N"]:
    """Tokens of each image; 0 where there is none, which a grid of zeros says."""
    across, down = grids[..., 0], grids[..., 1]
    count = side * (side + 1) + 1 + down * side * (across * side + 1)
    return count * (across * down > 0)


def count_tiles(grids: Int[Any, "*B N 2"]) -> Int[Any, "*B N"]:
    """Pictures that the tower sees of each image, the whole among them."""
    tiles = grids[..., 0] * grids[..., 1]
    return tiles + (tiles > 0)


def index_features(
    numbers_BT: Int[Any, "B T"],
    grids_BN2: Int[Any, "B N 2"],
    num_tiles: int,
    side: int,
    view_order: str = "head",
) -> Int[Any, "B T"]:
    """The feature, among those of its row, that an image token takes.

    Args:
      numbers_BT: of image tokens, each row's counted from 0 on; -1 of other tokens.
      grids_BN2: (width, height) of each image in tiles; zeros: no image.
      num_tiles: that a row has features of; the newline's come after those, then the separator's.
      side: tokens across a tile.

    Returns: -1 where there is no feature: other tokens, and those beyond the last image's.
    """
    xp, area = _namespace(numbers_BT), side * side
    lengths_BN, tiles_BN = count_tokens(grids_BN2, side), count_tiles(grids_BN2)
    ends_BN = xp.cumsum(lengths_BN, axis=-1)
    # an image's numbers, for each token of it: a sum over images, of which all others are zero
    past_BTN = numbers_BT[..., None] >= ends_BN[:, None]
    is_of_BTN = ~past_BTN & (numbers_BT[..., None] >= (ends_BN - lengths_BN)[:, None])

    def of_image(x_BN: Any) -> Any:
        return xp.sum(xp.where(is_of_BTN, x_BN[:, None], 0), axis=-1)

    at_BT = numbers_BT - of_image(ends_BN - lengths_BN)
    across_BT = of_image(grids_BN2[..., 0])
    first_BT = of_image(xp.cumsum(tiles_BN, axis=-1) - tiles_BN)
    whole, rest_BT = side * (side + 1), of_image(lengths_BN) - side * (side + 1) - 1
    if view_order == "head":
        separator_BT, of_whole_BT, of_tiles_BT = whole, at_BT, at_BT - whole - 1
        is_whole_BT = at_BT < whole
    else:
        separator_BT, of_whole_BT, of_tiles_BT = rest_BT, at_BT - rest_BT - 1, at_BT
        is_whole_BT = at_BT > rest_BT
    newline, separator = num_tiles * area, num_tiles * area + 1
    row, column = of_whole_BT // (side + 1), of_whole_BT % (side + 1)
    index_BT = xp.where(column == side, newline, first_BT * area + row * side + column)
    width_BT = across_BT * side + 1
    row, column = of_tiles_BT // width_BT, of_tiles_BT % width_BT
    tile_BT = first_BT + 1 + row // side * across_BT + column // side
    within_BT = row % side * side + column % side
    in_tiles_BT = xp.where(column == width_BT - 1, newline, tile_BT * area + within_BT)
    index_BT = xp.where(is_whole_BT, index_BT, in_tiles_BT)
    index_BT = xp.where(at_BT == separator_BT, separator, index_BT)
    return xp.where(xp.any(is_of_BTN, axis=-1), index_BT, -1)


def _namespace(x: Any) -> Any:
    """numpy, or jax.numpy for its arrays."""
    return np if isinstance(x, np.ndarray) else x.__array_namespace__()
