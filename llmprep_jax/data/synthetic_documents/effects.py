"""What befalls a page on its way to a picture: slant, perspective, light, blur, grain.

Pixels are warped by a homography, and boxes by the same one: that of a warped box is the smallest
upright box around its corners.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageFilter

from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.page import Box
from llmprep_jax.data.synthetic_documents.style import Style

DESKS = ((92, 74, 58), (60, 62, 66), (150, 142, 130), (44, 58, 72), (120, 92, 64))


@dataclasses.dataclass(frozen=True)
class Warp:
    """Where points of the page come to lie.

    Attributes:
      matrix: 3 x 3, from the page's pixels (x, y, 1) to the picture's, up to a factor.
      size: of the picture, width and height.
      scale: pixels of the page's drawing for one of the page.
    """

    matrix: np.ndarray
    size: tuple[int, int]
    scale: float

    def points(self, xy: np.ndarray) -> np.ndarray:
        """[N, 2] points of the page in the picture."""
        mapped = np.concatenate([xy, np.ones((len(xy), 1))], axis=1) @ self.matrix.T
        return mapped[:, :2] / mapped[:, 2:]

    def box(self, box: Box) -> tuple[int, int, int, int]:
        """The smallest box of whole pixels around a warped one, inside the picture."""
        left, top, right, bottom = box
        corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        corners = self.points(corners)
        # an edge on a pixel's border is there to within rounding
        low, high = np.floor(corners.min(0) + 1e-4), np.ceil(corners.max(0) - 1e-4)
        width, height = self.size
        x0, y0 = int(np.clip(low[0], 0, width - 1)), int(np.clip(low[1], 0, height - 1))
        x1, y1 = int(np.clip(high[0], x0 + 1, width)), int(np.clip(high[1], y0 + 1, height))
        return x0, y0, x1, y1

    def image(self, drawing: Image.Image, around: tuple[int, int, int]) -> Image.Image:
        """The page's drawing warped, with a colour around it."""
        border = 2  # of nothing, with which the paper's edges are mixed
        layer = Image.new(
            "RGBA",
            (drawing.width + 2 * border, drawing.height + 2 * border),
            (*drawing.getpixel((0, 0)), 0),
        )
        layer.paste(drawing, (border, border))
        to_layer = np.array([[self.scale, 0, border], [0, self.scale, border], [0, 0, 1]])
        inverse = to_layer @ np.linalg.inv(self.matrix)
        inverse /= inverse[2, 2]
        warped = layer.transform(
            self.size,
            Image.Transform.PERSPECTIVE,
            inverse.ravel()[:8].tolist(),
            Image.Resampling.BICUBIC,
        )
        ground = Image.new("RGB", self.size, around)
        ground.paste(warped, mask=warped.getchannel("A"))
        return ground


def plan_warp(style: Style, size: tuple[int, int], scale: float, dice: Dice) -> Warp:
    """The warp of a page whose drawing has a size; boxes of the page's own pixels enter it.

    Args:
      scale: pixels of the drawing for one of the page.
    """
    width, height = size
    to_drawing = np.diag([scale, scale, 1.0])
    if not style.rotation and not style.tilt and not style.is_photo:
        return Warp(to_drawing, size, scale)
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], float)
    angle = math.radians(style.rotation)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    placed = corners @ turn.T
    reach = style.tilt * min(width, height)
    placed += np.array([[dice.uniform(-reach, reach) for _ in range(2)] for _ in range(4)])
    border = (0.03 if style.is_photo else 0.002) * max(size)
    low, high = placed.min(0) - border, placed.max(0) + border
    # of the size that was asked for: the paper shrinks, not the picture grows
    shrink = width / (high[0] - low[0])
    placed = (placed - low) * shrink
    out = (width, max(1, round((high[1] - low[1]) * shrink)))
    return Warp(_homography(corners, placed) @ to_drawing, out, scale)


def _homography(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The 3 x 3 matrix that takes four points to four others."""
    rows, values = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def age(image: Image.Image, style: Style, dice: Dice) -> Image.Image:
    """Uneven light, blur and grain; the grain's stream is numpy's and no part of the text."""
    if not style.noise and not style.blur and not style.is_photo:
        return image
    if style.blur > 0.05:
        # a picture of 800 pixels and one of 200 are blurred alike
        image = image.filter(ImageFilter.GaussianBlur(style.blur * image.width / 800))
    values = np.asarray(image, np.float32)
    height, width = values.shape[:2]
    if style.is_photo:
        values = values * _light(width, height, dice)[..., None]
    if style.noise:
        grain = np.random.default_rng(dice.below(2**31)).standard_normal((height, width, 1))
        values = values + style.noise * grain.astype(np.float32)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _light(width: int, height: int, dice: Dice) -> np.ndarray:
    """Light that falls from one side: factors from 0.78 to 1, [height, width]."""
    angle, depth = dice.uniform(0.0, 2 * math.pi), dice.uniform(0.05, 0.22)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    along = x * math.cos(angle) + y * math.sin(angle)
    along = (along - along.min()) / max(float(np.ptp(along)), 1e-6)
    return (1 - depth * along**1.5).astype(np.float32)
