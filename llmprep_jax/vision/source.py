"""What a picture may be given as, what errors call it, and how large it may be.

A picture's size stands in its first bytes and costs nothing to read, its pixels may be a thousand
times the file: a PNG of 2 MB can hold 2^31 of them. So sizes are checked here, from the header.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from llmprep_jax import remote

MAX_PIXELS = 2**27  # 400 MB of RGB; a page of A3 at 600 dpi has 70 million
# JPEG's own limit is 65,535. The weights of one resize grow with the side: 2^27 x 1 would take 4 GB
MAX_SIDE = 2**16


def one_line(error: object, limit: int = 200) -> str:
    """The text of an error on one line, shortened; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def name_of(source: Any) -> str:
    """What errors call a source: its path where it has one, else what it is."""
    if isinstance(source, str | os.PathLike):
        return one_line(os.fspath(source))
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes"
    if isinstance(source, Image.Image):
        return one_line(getattr(source, "filename", "") or f"image of mode {source.mode}")
    if isinstance(source, np.ndarray):
        return f"array {source.shape}"
    named = getattr(source, "name", None)
    return one_line(named) if isinstance(named, str) and named else type(source).__name__


def check_size(width: int, height: int, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raises ValueError on pictures without pixels, or with too many."""
    if width < 1 or height < 1:
        raise ValueError(f"{name}: {width} x {height} has no pixels; leave this picture out")
    if max(width, height) > MAX_SIDE:
        raise ValueError(
            f"{name}: {width:,} x {height:,} pixels; a side may have {MAX_SIDE:,}: cut it in pieces"
        )
    if width * height > max_pixels:
        raise ValueError(
            f"{name}: {width:,} x {height:,} are {width * height:,} pixels and {max_pixels:,} are"
            " allowed; scale it down, or raise max_pixels"
        )


@contextlib.contextmanager
def opened(source: Any, name: str) -> Iterator[io.BufferedIOBase]:
    """A path, bytes, or an open file, as a file to read and seek in; paths may be remote.

    Raises FileNotFoundError, or ValueError on what is no file or has nothing in it.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        file = _open_path(source, name)
    elif hasattr(source, "read"):
        file = io.BytesIO(_read_all(source, name))
    else:
        raise ValueError(
            f"{name}: cannot be opened as a picture; give a path, bytes, an open file, a Pillow"
            " image or an array"
        )
    with file:
        if not file.seek(0, io.SEEK_END):
            raise ValueError(f"{name}: has 0 bytes; copy or download it again")
        file.seek(0)
        yield file


def _open_path(path: str | os.PathLike, name: str) -> io.BufferedIOBase:
    text = os.fspath(path)
    if isinstance(text, str) and text.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{name}: is no path of a file; download it and give the file's path")
    try:
        local = remote.fetch(text)
        if local.is_dir():
            raise ValueError(f"{name}: is a folder; give a file in it")
        if not local.is_file():
            raise FileNotFoundError(f"{name}: no such file; check the path")
        return local.open("rb")
    except FileNotFoundError:
        raise
    except (OSError, TypeError, ValueError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: cannot be read ({one_line(error)}); check the path") from None


def _read_all(source: Any, name: str) -> bytes:
    """The rest of an open file. Not every stream can seek, and decoders must."""
    try:
        data = source.read()
    except Exception as error:  # sockets, archives and decompressors have errors of their own
        raise ValueError(f"{name}: cannot be read ({one_line(error)}); open it again") from None
    if not isinstance(data, bytes | bytearray):
        raise ValueError(f"{name}: is open as text; open it with mode 'rb'")
    return bytes(data)
