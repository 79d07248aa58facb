"""How often an image meets the weights of a model, which is what its FLOPs are counted by."""

from typing import NamedTuple


class Work(NamedTuple):
    """Of the weights below a path, but for those of longer paths that are named too.

    Attributes:
      places: of one image, at each of which all of these weights are in a product.
      attention: products of a query with a key, times the width of all heads: layers T S width.
      behind: beginnings of the paths of what lies before, so that gradients pass through here to
        it where any of that is trained; "" is all.
      is_drawn: whether this is of pictures that are drawn, not of images that are seen.
    """

    places: int | float
    attention: int | float = 0
    behind: tuple[str, ...] = ()
    is_drawn: bool = False
