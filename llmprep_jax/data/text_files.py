"""Plain text files as documents: whole files, paragraphs, or chunks of bounded size.

Only byte offsets are held in memory. Chunks are measured in bytes, and end after a line or a word
where there is one in their second half, never inside a character.
"""

import mmap
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from llmprep_jax.data.documents import Document

_BLANK_LINES = re.compile(rb"\r?\n[ \t\r]*\n\s*")


class TextFiles:
    """Text files in UTF-8.

    Args:
      files: in order.
      part: "file", "paragraph" (parted by blank lines) or "chunk".
      chunk_bytes: most bytes of a chunk.
    """

    def __init__(
        self, files: Sequence[pathlib.Path], part: str = "file", chunk_bytes: int = 1 << 16
    ):
        self._files, self._part = list(files), part
        spans = [_index(file, part, chunk_bytes) for file in self._files]
        self._first = np.cumsum([0, *map(len, spans)])
        self._spans = np.concatenate(spans) if spans else np.zeros((0, 2), np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def _find(self, index: int) -> tuple[pathlib.Path, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._files[file], int(index - self._first[file])

    def name(self, index: int) -> str:
        """The file, and the part of it, counted from 1."""
        file, part = self._find(index)
        return str(file) if self._part == "file" else f"{file}#{part + 1}"

    def __getitem__(self, index: int) -> Document:
        start, end = map(int, self._spans[index])
        path, _ = self._find(index)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        try:
            # the mark that some editors put before a text is no part of it
            text = data.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name(index)}: byte {start + error.start + 1} of the file is no UTF-8; "
                "save the file as UTF-8"
            ) from None
        whole = self._part != "chunk"
        is_end = whole or end == path.stat().st_size
        return Document(self.name(index), text=text, is_start=whole or not start, is_end=is_end)


def _index(file: pathlib.Path, part: str, chunk_bytes: int) -> np.ndarray:
    """[parts, 2]: start and end of each part of a file; none of a file that is empty."""
    size = file.stat().st_size
    if size == 0:
        return np.zeros((0, 2), np.int64)
    if part == "file":
        return np.array([[0, size]], np.int64)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cut = _paragraphs(data) if part == "paragraph" else _chunks(data, chunk_bytes)
        return np.array(list(cut), np.int64).reshape(-1, 2)


def _paragraphs(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    start = re.match(rb"\s*", data).end()
    for gap in _BLANK_LINES.finditer(data, start):
        yield start, gap.start()
        start = gap.end()
    end = len(data)
    while end > start and data[end - 1 : end].isspace():
        end -= 1
    if start < end:
        yield start, end


def _chunks(data: mmap.mmap, size: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(data):
        end = min(start + size, len(data))
        if end < len(data):
            end = _cut_before(data, start + size // 2, end)
        yield start, end
        start = end


def _cut_before(data: mmap.mmap, low: int, high: int) -> int:
    """The best place in (low, high] to cut: after a line, after a word, between characters."""
    for mark in (b"\n", b" "):
        at = data.rfind(mark, low, high)
        if at >= 0:
            return at + 1
    while data[high] & 0xC0 == 0x80:
        high -= 1
    return high
