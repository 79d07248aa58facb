"""Pictures from anywhere, upright and in RGB: files, bytes, Pillow images, arrays, pages of a PDF.

Cameras store a picture as the sensor saw it and say in EXIF which side is up. Both files and Pillow
images that still carry that tag are turned; transformers turns only the files that it opens
itself. Nothing is decoded before the header's size has been checked.
"""

import contextlib
import functools
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from llmprep_jax.vision import pdf
from llmprep_jax.vision.modes import rgb_of_array, to_rgb
from llmprep_jax.vision.source import MAX_PIXELS, check_size, name_of, one_line, opened

# those of users and data sets. Pillow has 40 more, of which one starts another program (EPS)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # width and height change places
_limit = threading.RLock()


def open_image(
    source: Any,
    *,
    page: int = 0,
    dpi: int | float = pdf.DPI,
    password: str | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as bytes of RGB, upright; of an animated one its first frame.

    Args:
      source: a path (gs:// and s3:// too), bytes, an open file (read to its end), a Pillow image,
        or an array [H, W] or [H, W, channels].
      page: of a PDF, from 0.
      dpi: dots an inch of a PDF's page, which has no pixels of its own.
      password: of a PDF.
      max_pixels: how many a picture may have.
      name: what errors call the source, if it has no path ("shard-3.tar: 17.jpg").

    Raises:
      FileNotFoundError: no such file.
      ValueError: what it is not, or why it cannot be decoded; one line, with the name and a remedy.
      ImportError: a PDF, and pypdfium2 is not installed.
    """
    image = open_rgb(
        source, page=page, dpi=dpi, password=password, max_pixels=max_pixels, name=name
    )
    return np.array(image)


def open_rgb(
    source: Any,
    *,
    page: int = 0,
    dpi: int | float = pdf.DPI,
    password: str | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """As `open_image`, as a Pillow image of mode RGB; the source itself where it is that."""
    name = name or name_of(source)
    if isinstance(source, Image.Image):
        check_size(*source.size, name, max_pixels)
        return _decode(source, name, max_pixels)
    if hasattr(source, "__array__"):
        return _open_array(np.asarray(source), name, max_pixels)
    with opened(source, name) as file:
        if pdf.is_pdf(file):
            return pdf.render(file, page, dpi, password, max_pixels, name)
        _refuse_page(page, name)
        return _decode(_read_header(file, name, max_pixels), name, max_pixels)


def image_size(
    source: Any,
    *,
    page: int = 0,
    dpi: int | float = pdf.DPI,
    password: str | None = None,
    max_pixels: int = MAX_PIXELS,
    name: str | None = None,
) -> tuple[int, int]:
    """The width and height that `open_image` would give, from the header alone.

    Raises as `open_image`, but what is wrong behind the header is not seen.
    """
    name = name or name_of(source)
    if isinstance(source, Image.Image):
        return _upright_size(source, name, max_pixels)
    if hasattr(source, "__array__"):
        return _open_array(np.asarray(source), name, max_pixels).size
    with opened(source, name) as file:
        if pdf.is_pdf(file):
            return pdf.page_size(file, page, dpi, password, max_pixels, name)
        _refuse_page(page, name)
        image = _read_header(file, name, max_pixels)
        if image.format == "PNG" and _has_late_text(file):
            _load(image, name, max_pixels)
        return _upright_size(image, name, max_pixels)


def _refuse_page(page: int, name: str) -> None:
    if page:
        raise ValueError(f"{name}: is no PDF and has no page {page}; leave page out")


def _open_array(array: np.ndarray, name: str, max_pixels: int) -> Image.Image:
    try:
        if array.ndim in (2, 3):
            check_size(array.shape[1], array.shape[0], name, max_pixels)
        return rgb_of_array(array)
    except ValueError as error:
        raise _named(name, error) from None


def _named(name: str, error: ValueError) -> ValueError:
    return error if str(error).startswith(name) else ValueError(f"{name}: {error}")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _own_limit(max_pixels: int) -> Iterator[None]:
    """Has Pillow refuse at `max_pixels`; its own limit warns at 2^26.4, whoever asks.

    It is a global of Pillow's, and so are warnings: one thread at a time, and only for headers.
    """
    with _limit, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _read_header(file: io.BufferedIOBase, name: str, max_pixels: int) -> Image.Image:
    """Opens without decoding. Raises ValueError on other formats, and beyond the cap."""
    start = file.read(8)
    try:
        with _own_limit(max_pixels):
            image = Image.open(file, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"{name}: has more than {max_pixels:,} pixels; scale it down, or raise max_pixels"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name}: begins with {start!r}, no picture that can be read ({', '.join(_FORMATS)} or"
            " PDF); save it as PNG or JPEG"
        ) from None
    except MemoryError:
        raise ValueError(f"{name}: does not fit into memory; scale it down") from None
    except Exception as error:  # decoders raise what they like on broken headers
        raise _broken(name, error) from None
    check_size(*image.size, name, max_pixels)
    return image


def _broken(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name}: cannot be decoded ({one_line(error)}); copy or download it again")


def _load(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    large = Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS
    try:
        # some decoders ask Pillow's limit once more
        with _own_limit(max_pixels) if large else contextlib.nullcontext():
            image.load()
    except MemoryError:
        raise ValueError(
            f"{name}: {width:,} x {height:,} pixels do not fit into memory; scale it down"
        ) from None
    except Exception as error:  # as above: OSError, SyntaxError, struct.error, IndexError, ...
        raise _broken(name, error) from None


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _load(image, name, max_pixels)
    try:
        upright = to_rgb(image)
        turn = _TURNS.get(_orientation(image))
        return upright if turn is None else upright.transpose(turn)
    except MemoryError:
        raise ValueError(f"{name}: does not fit into memory; scale it down") from None
    except Exception as error:
        raise ValueError(
            f"{name}: mode {image.mode} cannot become RGB ({one_line(error)}); save it as RGB"
        ) from None


def _orientation(image: Image.Image) -> int:
    """EXIF's number of the side that is up; 1 where it is not said, or EXIF is broken."""
    try:
        # not PNG's own method, which decodes the picture to look behind it
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # any error of a parser: the pixels are still good
        return 1


def _upright_size(image: Image.Image, name: str, max_pixels: int) -> tuple[int, int]:
    width, height = image.size
    check_size(width, height, name, max_pixels)
    # a TIFF's size is upright before it is loaded, and its tag is gone after
    lies = image.format != "TIFF" and _orientation(image) in _LYING
    return (height, width) if lies else (width, height)


def _has_late_text(file: io.BufferedIOBase) -> bool:
    """Whether a PNG has chunks behind its pixels that may say which side is up."""
    file.seek(8)
    is_behind = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        is_behind |= kind == b"IDAT"
        if is_behind and kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return True
        file.seek(length + 4, io.SEEK_CUR)
    return False
