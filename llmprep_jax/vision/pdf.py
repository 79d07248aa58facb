"""Pages of a PDF as pictures, by PDFium.

A page has a size in points (72 an inch) and no pixels: how many it gets is the caller's `dpi`.
PDFium is not thread-safe, so one page is drawn at a time in a process.
"""

import contextlib
import importlib.util
import io
import math
import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image

from llmprep_jax.vision.source import MAX_PIXELS, check_size, name_of, one_line, opened

DPI = 150.0  # a page of A4 is 1,240 x 1,754 pixels
_one_at_a_time = threading.RLock()


def count_pages(source: Any, *, password: str | None = None, name: str | None = None) -> int:
    """How many pages a PDF has: a path, bytes or an open file.

    Raises ValueError, on one line, where it is no PDF, is broken, locked, or has no pages.
    """
    name = name or name_of(source)
    with opened(source, name) as file:
        if not is_pdf(file):
            raise ValueError(f"{name}: is no PDF; give one, or leave out its page")
        with _document(file, password, name) as document:
            return len(document)


def is_pdf(file: io.BufferedIOBase) -> bool:
    """Whether a file says so in its first 1,024 bytes, where PDF's readers look."""
    start = file.read(1024)
    file.seek(0)
    return b"%PDF-" in start


def render(
    file: io.BufferedIOBase,
    page: int,
    dpi: int | float,
    password: str | None,
    max_pixels: int = MAX_PIXELS,
    name: str = "PDF",
) -> Image.Image:
    """One page as an RGB image, with what is filled into its forms."""
    with _page(file, page, dpi, password, max_pixels, name) as (sheet, _):
        try:
            return sheet.render(scale=dpi / 72).to_pil().convert("RGB")
        except Exception as error:  # PDFium's errors, or too little memory
            raise ValueError(
                f"{name}: page {page} cannot be drawn ({one_line(error)}); try another dpi"
            ) from None


def page_size(
    file: io.BufferedIOBase,
    page: int,
    dpi: int | float,
    password: str | None,
    max_pixels: int = MAX_PIXELS,
    name: str = "PDF",
) -> tuple[int, int]:
    """The width and height of `render`'s image."""
    with _page(file, page, dpi, password, max_pixels, name) as (_, size):
        return size


@contextlib.contextmanager
def _page(
    file: io.BufferedIOBase,
    page: int,
    dpi: int | float,
    password: str | None,
    max_pixels: int,
    name: str,
) -> Iterator[tuple[Any, tuple[int, int]]]:
    """A page of PDFium's, and its size in pixels."""
    if not (math.isfinite(dpi) and 0 < dpi <= 4800):
        raise ValueError(f"{name}: dpi is {dpi}; give more than 0 and at most 4800")
    with _document(file, password, name) as document:
        if not 0 <= page < len(document):
            raise ValueError(
                f"{name}: has no page {page}; give 0 to {len(document) - 1}, counted from 0"
            )
        try:
            sheet = document[page]
        except Exception as error:
            raise ValueError(
                f"{name}: page {page} is broken ({one_line(error)}); print it to PDF again"
            ) from None
        with contextlib.closing(sheet):
            width, height = (math.ceil(points * dpi / 72) for points in sheet.get_size())
            check_size(width, height, f"{name}, page {page} at {dpi:g} dpi", max_pixels)
            yield sheet, (width, height)


@contextlib.contextmanager
def _document(file: io.BufferedIOBase, password: str | None, name: str) -> Iterator[Any]:
    if importlib.util.find_spec("pypdfium2") is None:
        raise ImportError(f"{name}: pages of a PDF need pypdfium2; pip install llmprep_jax[pdf]")
    import pypdfium2

    with _one_at_a_time:
        try:
            document = pypdfium2.PdfDocument(file, password=password)
        except pypdfium2.PdfiumError as error:
            raise _unopened(file, error, password, name) from None
        with document:
            document.init_forms()
            yield document


def _unopened(
    file: io.BufferedIOBase, error: Exception, password: str | None, name: str
) -> ValueError:
    """Why a PDF was refused. pypdfium2 refuses those without pages with the last failure's reason,
    which may be another file's, so it is loaded once more."""
    from pypdfium2 import raw

    file.seek(0)
    data = file.read()
    handle = raw.FPDF_LoadMemDocument64(data, len(data), password and password.encode() + b"\0")
    if handle:
        raw.FPDF_CloseDocument(handle)
        return ValueError(f"{name}: is a PDF without pages; export it again")
    if raw.FPDF_GetLastError() == raw.FPDF_ERR_PASSWORD:
        wrong = "is locked; give" if password is None else "is not opened by this password; correct"
        return ValueError(f"{name}: {wrong} password=")
    return ValueError(f"{name}: is a broken PDF ({one_line(error)}); copy or download it again")
