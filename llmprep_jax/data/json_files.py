"""JSON as documents: a record a line (.jsonl), or a file that is one list of records (.json).

Lines are read one at a time, a .json file whole. Many files called .json hold a record a line; they
are read as that.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llmprep_jax.data.documents import Document
from llmprep_jax.data.images import beside
from llmprep_jax.data.records import RecordFormat, formats_of, to_document

_BLOCK = 1 << 22


class JsonLines:
    """Files of one JSON object a line; blank lines do not count.

    Only the offsets of lines are held in memory (24 bytes a line).
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        field: str | None = None,
        record_format: RecordFormat = "auto",
        image: str | None = None,
    ):
        self._files, self._columns = list(files), (field, record_format, image)
        spans = [_index_lines(file) for file in self._files]
        self._first = np.cumsum([0, *map(len, spans)])
        self._spans = np.concatenate(spans) if spans else np.zeros((0, 3), np.int64)

    def __len__(self) -> int:
        return len(self._spans)

    def name(self, index: int) -> str:
        """File and line, counted from 1."""
        return f"{self._file(index)}:{self._spans[index, 2]}"

    def _file(self, index: int) -> pathlib.Path:
        return self._files[np.searchsorted(self._first, index, side="right") - 1]

    def record(self, index: int) -> Any:
        """What a line holds."""
        start, end, _ = map(int, self._spans[index])
        with self._file(index).open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        return parse_line(line, self.name(index))

    def __getitem__(self, index: int) -> Document:
        field, *columns = self._columns
        document = to_document(self.record(index), field, self.name(index), *columns)
        return beside(document, self._file(index).parent)


class JsonFile:
    """A file that is one JSON list of records, held in memory; or, if it is none, JSON lines."""

    def __init__(
        self,
        file: pathlib.Path,
        field: str | None = None,
        record_format: RecordFormat = "auto",
        image: str | None = None,
    ):
        self._file, self._columns = file, (field, record_format, image)
        self._records = _read_records(file)
        self._lines = JsonLines([file], *self._columns) if self._records is None else None

    def __len__(self) -> int:
        return len(self._records if self._lines is None else self._lines)

    def name(self, index: int) -> str:
        """File and number of the record in its list, counted from 1; or file and line."""
        if self._lines is not None:
            return self._lines.name(index)
        return f"{self._file}:record {index + 1}"

    def __getitem__(self, index: int) -> Document:
        if self._lines is not None:
            return self._lines[index]
        field, *columns = self._columns
        document = to_document(self._records[index], field, self.name(index), *columns)
        return beside(document, self._file.parent)


def read_records(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .json file, each with its name: file and line, or number.

    Raises:
      ValueError: a line is no JSON object; names it.
    """
    records = _read_records(file) if file.suffix == ".json" else None
    if records is None:
        lines = JsonLines([file])
        named = ((lines.name(i), lines.record(i)) for i in range(len(lines)))
    else:
        named = ((f"{file}:record {i}", record) for i, record in enumerate(records, 1))
    for name, record in named:
        if not isinstance(record, dict):
            raise ValueError(f"{name}: holds a {type(record).__name__}; write objects, {{...}}")
        yield name, record


def _read_records(file: pathlib.Path) -> list[Any] | None:
    """The records of a .json file; None where it holds JSON lines."""
    if _begins_with_a_record(file):
        return None
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start + 1} of the file is no UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        if error.doc.strip():
            raise ValueError(
                f"{file}:{error.lineno}: no JSON ({error.msg}, column {error.colno}); write one"
                " list of records, or one object a line"
            ) from None
        return []
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{file}: {reason}; correct the file") from None
    if isinstance(value, dict) and not formats_of(value):
        lists = [item for item in value.values() if _are_records(item)]
        return lists[0] if len(lists) == 1 else [value]  # {"data": [...]}, say
    return value if isinstance(value, list) else [value]


def _begins_with_a_record(file: pathlib.Path) -> bool:
    """Whether the first line that is not blank is a whole object and others follow it."""
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
        rest = next((line for line in stream if line.strip()), b"")
    try:
        return bool(rest) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _index_lines(file: pathlib.Path) -> np.ndarray:
    """[lines, 3]: start, end (the newline left out) and number of each line that is not blank."""
    ends, has_text, at, open_line = [], [], 0, False
    is_text = np.ones(256, bool)
    is_text[list(b" \t\r\n")] = False
    with file.open("rb") as stream:
        at = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
        start = at
        stream.seek(at)
        while block := stream.read(_BLOCK):
            data = np.frombuffer(block, np.uint8)
            breaks = np.flatnonzero(data == 10)
            marks = np.concatenate([[0], np.cumsum(is_text[data])])
            counts = np.diff(marks[np.concatenate([[0], breaks, [len(data)]])])
            texts = counts > 0
            texts[0] |= open_line
            ends.append(breaks + at)
            has_text.append(texts[:-1])
            open_line, at = bool(texts[-1]), at + len(block)
    ends.append(np.array([at]))
    has_text.append(np.array([open_line]))
    end, keep = np.concatenate(ends), np.concatenate(has_text)
    begin = np.concatenate([[start], end[:-1] + 1])
    number = np.arange(1, len(end) + 1)
    return np.stack([begin, end, number], axis=1).astype(np.int64)[keep]


def parse_line(line: bytes, name: str) -> Any:
    """The value of a line of JSON. Raises ValueError that names it."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start + 1} of the line is no UTF-8; save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: no JSON ({error.msg}, column {error.colno}); write one object a line"
        ) from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{name}: {reason}; correct the line") from None
