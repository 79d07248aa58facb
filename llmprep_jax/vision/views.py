"""Random views of a picture for contrastive training: a part of it, perhaps mirrored.

As in Inception (Szegedy et al. 2015) and CLIP's training: a share of the area at an aspect ratio
between 3:4 and 4:3, anywhere. What is drawn are numbers between 0 and 1, so that a view is decided
where data are read, before anybody knows the picture's size.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

RATIOS = (3 / 4, 4 / 3)


class View(NamedTuple):
    """A part of a picture.

    Attributes:
      share: of the area; 1 is all of it, whatever the ratio.
      ratio: width by height of the part.
      x, y: where it lies, 0 at the left and top, 1 at the right and bottom.
      is_mirrored: left for right.
    """

    share: float
    ratio: float
    x: float
    y: float
    is_mirrored: bool

    def of(self, image: Image.Image) -> Image.Image:
        """The part of a picture."""
        left, top, right, bottom = self.box(*image.size)
        if (left, top, right, bottom) != (0, 0, *image.size):
            image = image.crop((left, top, right, bottom))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.is_mirrored else image

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels; a part that is too wide or high is cut off."""
        if self.share >= 1:
            return 0, 0, width, height
        area = self.share * width * height
        part_width = min(max(round(math.sqrt(area * self.ratio)), 1), width)
        part_height = min(max(round(math.sqrt(area / self.ratio)), 1), height)
        left, top = round(self.x * (width - part_width)), round(self.y * (height - part_height))
        return left, top, left + part_width, top + part_height


def draw_view(
    rng: np.random.Generator, shares: tuple[float, float] | None, mirrors: bool
) -> View | None:
    """A random view; None where there is nothing to draw.

    Args:
      shares: of the area, least and most; None: all of it.
      mirrors: whether every other view is mirrored.
    """
    if shares is None and not mirrors:
        return None
    share = 1.0 if shares is None else float(rng.uniform(*shares))
    ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
    x, y, side = rng.random(3).tolist()
    return View(share, ratio, x, y, mirrors and side < 0.5)
