"""Resizing, cropping and padding, byte for byte as Pillow does them.

Released models saw pictures that Pillow had resized in bytes: its bicubic has a = -0.5 and, where a
picture shrinks, a filter as wide as the shrinking (torch and `jax.image` differ by several steps of
255). So Pillow does the work here, and this file decides sizes. Where most of a resized picture
would be cropped away, only what is kept is computed.
"""

import math

from PIL import Image, ImageOps

from llmprep_jax.vision.source import MAX_PIXELS

Size = tuple[int, int]  # width, height
# the radius of each filter, in pixels of the larger of source and result
_RADII = {
    Image.Resampling.NEAREST: 0.5,
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}
FILTERS = tuple(sorted(int(name) for name in _RADII))
_WHOLE = 2**22  # pixels of a resized picture that is made whole before it is cropped


def shortest_edge_size(width: int, height: int, edge: int) -> Size:
    """The size whose shorter side is `edge`; the longer is rounded down, as torchvision does."""
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def longest_edge_size(width: int, height: int, edge: int, least: int) -> Size:
    """The size whose longer side is `edge`; no side below `least`. Halves go to the even number.

    DeepSeek's own code rounds down here, transformers does not: one pixel, in some pictures.
    """
    scale = edge / max(width, height)
    return max(round(width * scale), least), max(round(height * scale), least)


def resize_and_crop(image: Image.Image, size: Size, crop: Size, resample: int) -> Image.Image:
    """The middle of `image.resize(size)`, black where that is smaller than `crop`.

    A picture of 1 x 5,000 whose shorter side becomes 224 has 224 x 1,120,000 pixels before it is
    cropped. Beyond 2^22 (aspects of 80 at 224) only the middle is resized, from a part of the
    source that holds all that the filter reaches. Pillow takes the part's place in float32, so
    that 1 % of the values are one off there.
    """
    width, height = size
    left, top = (width - crop[0]) // 2, (height - crop[1]) // 2
    if width * height <= _WHOLE:
        resized = image.resize(size, resample)
        if crop == size:
            return resized
        return resized.crop((left, top, left + crop[0], top + crop[1]))
    across = _reach(image.width, width, left, crop[0], resample)
    down = _reach(image.height, height, top, crop[1], resample)
    part = image.crop((across.start, down.start, across.stop, down.stop))
    box = (*across.box(part.width), *down.box(part.height))
    kept = part.resize((across.length, down.length), resample, (box[0], box[2], box[1], box[3]))
    if kept.size == crop:
        return kept
    canvas = Image.new("RGB", crop)
    canvas.paste(kept, (max(-left, 0), max(-top, 0)))
    return canvas


class _Reach:
    """One axis: which pixels of the source a stretch of the result is made of."""

    def __init__(self, first: float, last: float, start: int, stop: int, length: int):
        self.first, self.last = first, last  # of the source, where the stretch begins and ends
        self.start, self.stop = start, stop
        self.length = length  # of the stretch, in pixels of the result

    def box(self, size: int) -> tuple[float, float]:
        return max(self.first - self.start, 0.0), min(self.last - self.start, float(size))


def _reach(source: int, resized: int, offset: int, crop: int, resample: int) -> _Reach:
    begin, end = max(offset, 0), min(offset + crop, resized)
    scale = source / resized
    margin = math.ceil(_RADII[Image.Resampling(resample)] * max(scale, 1.0)) + 1
    first, last = begin * scale, end * scale
    start, stop = max(math.floor(first) - margin, 0), min(math.ceil(last) + margin, source)
    return _Reach(first, last, start, stop, end - begin)


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side."""
    width, height = image.size
    edge = max(width, height)
    if width == height:
        return image
    if edge * edge > MAX_PIXELS:
        raise ValueError(
            f"{width:,} x {height:,} pixels are a square of {edge * edge:,} when padded, and"
            f" {MAX_PIXELS:,} are allowed; scale it down, or cut it in pieces"
        )
    square = Image.new("RGB", (edge, edge), color)
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


def fit_on_canvas(
    image: Image.Image, size: Size, color: tuple[int, int, int], resample: int
) -> Image.Image:
    """The picture as large as it goes into `size`, in its middle, as `PIL.ImageOps.pad`.

    That leaves pictures out whose shorter side would round to nothing: here it has one pixel.
    """
    width, height = image.size
    if width * size[1] >= height and height * size[0] >= width:
        return ImageOps.pad(image, size, resample, color)
    thin = (1, size[1]) if width < height else (size[0], 1)
    canvas = Image.new("RGB", size, color)
    canvas.paste(image.resize(thin, resample), ((size[0] - thin[0]) // 2, (size[1] - thin[1]) // 2))
    return canvas
