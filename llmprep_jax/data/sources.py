"""Sources: random access to documents in JSON lines, Parquet, plain text and TFDS folders.

A source is a sequence: `source[i]` reads and decodes document i and nothing else, `source.name(i)`
says where it is. The one thing a reader would get wrong: a broken line is found when it is read,
which `pipeline.build` does for all lines at the start only where a hold-out is asked for or the
data are small.
"""

import dataclasses
import glob
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llmprep_jax.data.documents import Document, Source, to_document
from llmprep_jax.data.text_files import TextFiles

Format = Literal["auto", "jsonl", "parquet", "text", "tfds"]
Part = Literal["file", "paragraph", "chunk"]

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".rst"),
}
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How to read a path.

    Attributes:
      format: "auto" goes by suffix; "tfds" is a folder that TFDS has prepared as ArrayRecord.
      field: the key of a JSON line or column of a Parquet file that holds the document; None:
        "text" or "messages".
      part: what a document of a text file is: the file, a paragraph (parted by blank lines) or a
        chunk.
      chunk_bytes: most bytes of a chunk; it ends after a line or word.
      tfds_split: which split of a TFDS folder.
    """

    format: Format = "auto"
    field: str | None = None
    part: Part = "file"
    chunk_bytes: int = 1 << 16
    tfds_split: str = "train"

    def __post_init__(self):
        if self.chunk_bytes < 16:
            raise ValueError(f"chunk_bytes must be at least 16, not {self.chunk_bytes}")


def open_source(path: str | pathlib.Path, options: SourceOptions | None = None) -> Source:
    """Opens a file, a folder (all files below it, hidden ones left out) or a glob pattern.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the format is not clear, the file is not of it, or there is no document in it.
    """
    options = options or SourceOptions()
    prepared = _find_prepared(pathlib.Path(path))
    if options.format == "tfds" or (options.format == "auto" and prepared):
        source: Source = PreparedRecords(prepared or pathlib.Path(path), options)
    else:
        files, kind = find_files(path, options.format)
        if kind == "text":
            source = TextFiles(files, options.part, options.chunk_bytes)
        else:
            source = {"jsonl": JsonLines, "parquet": Parquet}[kind](files, options.field)
    if not len(source):
        raise ValueError(f"{path}: there is no document in it; check the file or data.paths")
    return source


def find_files(path: str | pathlib.Path, kind: Format) -> tuple[list[pathlib.Path], str]:
    """The files that a path means, in order of name, and their format."""
    files = _list_files(path)
    found = {name: [f for f in files if f.suffix in known] for name, known in SUFFIXES.items()}
    found = {name: some for name, some in found.items() if some}
    if kind != "auto":
        # a file or pattern that is named is of the format that is named, whatever its suffix
        return (found.get(kind, []) if pathlib.Path(path).is_dir() else files), kind
    if len(found) == 1:
        name, some = next(iter(found.items()))
        return some, name
    why = f"holds files of formats {', '.join(found)}" if found else "has no suffix that we know"
    raise ValueError(f"{path}: {why}; give format=jsonl, parquet, text or tfds")


def _list_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        below = (p for p in root.rglob("*") if p.is_file())
        visible = [
            p for p in below if not any(s.startswith(".") for s in p.relative_to(root).parts)
        ]
        return sorted(visible)
    matches = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True)]
    files = sorted(p for p in matches if p.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no such file or folder; check data.paths")
    return files


class JsonLines:
    """Files of one JSON object a line; blank lines do not count.

    Only the offsets of lines are held in memory (24 bytes a line).
    """

    def __init__(self, files: Sequence[pathlib.Path], field: str | None = None):
        self._files, self._field = list(files), field
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

    def __getitem__(self, index: int) -> Document:
        start, end, _ = map(int, self._spans[index])
        with self._file(index).open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        name = self.name(index)
        return to_document(_parse_line(line, name), self._field, name)


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


def _parse_line(line: bytes, name: str) -> Any:
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


class Parquet:
    """Parquet files, a row a document.

    The document's column is held in memory as Arrow holds it, since a row group cannot be read in
    part: for more than fits, write ArrayRecord once (`tfds_text.write_array_record`).
    """

    def __init__(self, files: Sequence[pathlib.Path], field: str | None = None):
        self._files, self._field = list(files), field
        self._tables = [_read_table(file, field) for file in self._files]
        self._first = np.cumsum([0, *(table.num_rows for table in self._tables)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, int(index - self._first[file])

    def name(self, index: int) -> str:
        """File and row, counted from 1."""
        file, row = self._find(index)
        return f"{self._files[file]}:row {row + 1}"

    def __getitem__(self, index: int) -> Document:
        file, row = self._find(index)
        table = self._tables[file]
        record = {key: table.column(key)[row].as_py() for key in table.column_names}
        return to_document(record, self._field, self.name(index))


def _read_table(file: pathlib.Path, field: str | None) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        held = pyarrow.parquet.read_schema(file).names
        wanted = [key for key in ((field,) if field else ("text", "messages")) if key in held]
        if not wanted:
            raise ValueError(f"it has the columns {', '.join(held)}; name one by field=")
        return pyarrow.parquet.read_table(file, columns=wanted)
    except (OSError, ValueError) as error:  # Arrow's own errors are both
        raise ValueError(f"{file}: not read as Parquet: {' '.join(str(error).split())}") from None


class PreparedRecords:
    """A folder that TFDS prepared as ArrayRecord, ours (`tfds_text`) or any that holds text."""

    def __init__(self, folder: pathlib.Path, options: SourceOptions):
        if not (folder / "features.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no features.json; give the version folder that TFDS prepared"
            )
        from llmprep_jax.data.tfds_text import open_array_record

        self._folder, self._options = folder, options
        self._records = open_array_record(folder, options.tfds_split)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """Folder, split and record, counted from 1."""
        return f"{self._folder}:{self._options.tfds_split} {index + 1}"

    def __getitem__(self, index: int) -> Document:
        name, record = self.name(index), self._records[index]
        texts = {
            key: value.decode("utf-8") for key, value in record.items() if isinstance(value, bytes)
        }
        messages = texts.pop("messages", "")
        if messages:
            texts |= {"messages": _parse_line(messages.encode(), name), "text": None}
        return to_document(texts, self._options.field, name)


def _find_prepared(path: pathlib.Path) -> pathlib.Path | None:
    """The one folder at or below `path` that TFDS has prepared."""
    if not path.is_dir():
        return None
    found = [path / "features.json"] if (path / "features.json").is_file() else []
    found = found or sorted(path.glob("*/*/features.json")) or sorted(path.glob("*/features.json"))
    return found[0].parent if len(found) == 1 else None
