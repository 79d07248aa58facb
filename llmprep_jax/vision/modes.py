"""Colours to RGB: palettes, alpha, grey, 16 bits, CMYK, and arrays of any numbers.

What can be seen through is laid over white, since documents and drawings are made for white paper:
dropping alpha shows whatever colour lies under it, mostly black. 16 bits are scaled to 8; Pillow's
own conversion cuts them off at 255, which turns such pictures white.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_SEEN_THROUGH = ("LA", "La", "PA", "RGBA", "RGBa")


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as RGB; itself where it is that already.

    Raises ValueError where numbers are out of range.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if image.mode in _SEEN_THROUGH or "transparency" in image.info or _has_alpha_palette(image):
        over = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_alpha_palette(image: Image.Image) -> bool:
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _grey(image: Image.Image) -> UInt8[np.ndarray, "H W"]:
    """Grey of 16 or 32 bits. A PNG may name one value that is transparent."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):  # the ">u2" of big-endian files too
        values = values.astype(np.uint16)
    grey = to_uint8(values)
    clear = image.info.get("transparency")
    return np.where(values == clear, np.uint8(255), grey) if isinstance(clear, int) else grey


def rgb_of_array(array: np.ndarray) -> Image.Image:
    """[H, W] or [H, W, C] of 1 to 4 channels (grey, with alpha, RGB, with alpha) as an RGB image.

    Numbers are bytes, 16 bits, booleans, or floats from 0 to 1 or 0 to 255. Raises ValueError on
    other shapes and numbers.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 2, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        remedy = "move its channels last: np.moveaxis(image, 0, -1)" if first else (
            "give [H, W], or [H, W, channels] with 1 to 4 of them"
        )  # fmt: skip
        raise ValueError(f"shape {array.shape} is no picture; {remedy}")
    if not array.size:
        raise ValueError(f"shape {array.shape} has no pixels; leave this picture out")
    values = np.ascontiguousarray(to_uint8(array))
    return to_rgb(Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values))


def to_uint8(array: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Numbers as bytes; which range they are of follows from their type, else from the largest.

    Raises ValueError on negative, infinite or larger ones, and on what is no number.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{array.dtype} are no pixels; give uint8, or floats from 0 to 1")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ValueError(f"has values from {low} to {high}; give 0 to 255, or 0 to 1 as floats")
    is_float = array.dtype.kind == "f"
    if is_float and high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    if high <= 255 and array.dtype != np.uint16:
        return np.rint(array).astype(np.uint8) if is_float else array.astype(np.uint8)
    if high <= 65535 and not is_float:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    raise ValueError(f"has values up to {high}; give 0 to 255, 0 to 65535 as integers, or 0 to 1")
