"""Sources: random access to documents in JSON, Parquet, CSV, text, tar shards and TFDS folders.

A source is a sequence: `source[i]` reads and decodes document i and nothing else, `source.name(i)`
says where it is. A broken line is found when it is read, which `pipeline.build` does for all lines
at the start only where a hold-out is asked for or the data are small.
"""

import bisect
import dataclasses
import glob
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llmprep_jax.data.documents import Document, Source
from llmprep_jax.data.images import beside
from llmprep_jax.data.json_files import JsonFile, JsonLines, parse_line
from llmprep_jax.data.records import RecordFormat, to_document
from llmprep_jax.data.tables import Csv, Parquet
from llmprep_jax.data.tars import Tars
from llmprep_jax.data.text_files import TextFiles
from llmprep_jax.remote import fetch

Format = Literal["auto", "jsonl", "json", "parquet", "csv", "text", "tar", "tfds"]
Part = Literal["file", "paragraph", "chunk"]

SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "json": (".json",),
    "parquet": (".parquet",),
    "csv": (".csv", ".tsv"),
    "text": (".txt", ".text", ".md", ".rst"),
    "tar": (".tar",),
}
# what says of a data set what it is, and holds no document
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_ABOUT += ("classnames.txt", "zeroshot_classification_templates.txt")  # beside tars


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How to read a path.

    Attributes:
      format: of the files; "auto" goes by suffix; "tfds" is a folder that TFDS has prepared as
        ArrayRecord.
      field: the key of a record or column of a table that holds the document, or two,
        "question,answer", of a question and its answer; None: as `DataConfig.format` has it.
      image: the key of a record, column, feature or suffix in a tar that holds the image; None:
        "image", "images" or "file_name", and in a tar all suffixes of pictures.
      part: what a document of a text file is: the file, a paragraph (parted by blank lines) or a
        chunk.
      chunk_bytes: most bytes of a chunk; it ends after a line or word.
      tfds_split: which split of a TFDS folder.
    """

    format: Format = "auto"
    field: str | None = None
    image: str | None = None
    part: Part = "file"
    chunk_bytes: int = 1 << 16
    tfds_split: str = "train"

    def __post_init__(self):
        if self.chunk_bytes < 16:
            raise ValueError(f"chunk_bytes must be at least 16, not {self.chunk_bytes}")
        if self.field is not None and not 1 <= len(self.field.split(",")) <= 2:
            raise ValueError(f"field names one column or two, not {self.field!r}")


def open_source(
    path: str | pathlib.Path,
    options: SourceOptions | None = None,
    record_format: RecordFormat = "auto",
) -> Source:
    """Opens a file, a folder (all files below it, hidden ones left out) or a glob pattern.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the format is not clear, the file is not of it, or there is no document in it.
    """
    options, path = options or SourceOptions(), fetch(path)
    prepared = _find_prepared(pathlib.Path(path))
    if options.format == "tfds" or (options.format == "auto" and prepared):
        folder = prepared or pathlib.Path(path)
        source: Source = PreparedRecords(folder, options, record_format)
    else:
        files, kind = find_files(path, options.format)
        columns = (options.field, record_format, options.image)
        if kind == "text":
            source = TextFiles(files, options.part, options.chunk_bytes)
        elif kind in ("json", "csv"):
            reader = {"json": JsonFile, "csv": Csv}[kind]
            source = Chain([reader(file, *columns) for file in files])
        else:
            source = {"jsonl": JsonLines, "parquet": Parquet, "tar": Tars}[kind](files, *columns)
    if not len(source):
        raise ValueError(f"{path}: there is no document in it; check the file or data.paths")
    return source


class Chain:
    """Sources one after another."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - (self._ends[number - 1] if number else 0)

    def name(self, index: int) -> str:
        """As the source of the document names it."""
        source, at = self._find(index)
        return source.name(at)

    def __getitem__(self, index: int) -> Document:
        source, at = self._find(index)
        return source[at]


def find_files(path: str | pathlib.Path, kind: Format) -> tuple[list[pathlib.Path], str]:
    """The files that a path means, in order of name, and their format."""
    files = _list_files(path)
    by_kind = {name: [f for f in files if f.suffix in known] for name, known in SUFFIXES.items()}
    by_kind = {name: some for name, some in by_kind.items() if some}
    if kind != "auto":
        # a file or pattern that is named is of the format that is named, whatever its suffix
        return (by_kind.get(kind, []) if pathlib.Path(path).is_dir() else files), kind
    if len(by_kind) == 1:
        name, some = next(iter(by_kind.items()))
        return some, name
    if not files:
        raise ValueError(f"{path}: the folder holds no files; check data.paths")
    why = (
        f"holds files of formats {', '.join(by_kind)}" if by_kind else "has no suffix that we know"
    )
    known = ", ".join(SUFFIXES)
    raise ValueError(f"{path}: {why}; give data.source.format={known} or tfds")


def _list_files(path: str | pathlib.Path) -> list[pathlib.Path]:
    root = pathlib.Path(path)
    if root.is_file():
        return [root]
    if root.is_dir():
        below = (p for p in root.rglob("*") if p.is_file() and p.name not in _ABOUT)
        visible = [
            p for p in below if not any(s.startswith(".") for s in p.relative_to(root).parts)
        ]
        return sorted(visible)
    matches = [pathlib.Path(p) for p in glob.glob(str(path), recursive=True)]
    files = sorted(p for p in matches if p.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: no such file or folder; check data.paths")
    return files


class PreparedRecords:
    """A folder that TFDS prepared as ArrayRecord, ours (`tfds_text`) or any that holds text."""

    def __init__(
        self, folder: pathlib.Path, options: SourceOptions, record_format: RecordFormat = "auto"
    ):
        if not (folder / "features.json").is_file():
            raise FileNotFoundError(
                f"{folder}: no features.json; give the version folder that TFDS prepared"
            )
        from llmprep_jax.data.tfds_text import open_array_record

        self._folder, self._options, self._record_format = folder, options, record_format
        self._records, self._pictures, self._classes = open_array_record(folder, options.tfds_split)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """Folder, split and record, counted from 1."""
        return f"{self._folder}:{self._options.tfds_split} {index + 1}"

    def __getitem__(self, index: int) -> Document:
        name, record = self.name(index), self._records[index]
        pictures = {key: self._places(key, index, record[key]) for key in self._pictures}
        record = {key: _plain(value) for key, value in record.items() if key not in pictures}
        for key, names in self._classes.items():  # -1: a test split does not say
            record[key] = names[record[key]] if record[key] >= 0 else None
        extra = record.pop("extra", None)  # ours: messages, fields and where a text begins and ends
        if isinstance(extra, str) and {"name", "text"} == record.keys():
            fields = parse_line(extra.encode(), name)
            text = record["text"] if fields.get("messages") is None else None
            captions = tuple(fields.pop("captions", ()))
            return Document(name, text, captions=captions, **fields)
        if isinstance(record.get("messages"), str):  # ours as it was before 1.1.0
            is_chat = bool(record["messages"])
            record = {"messages" if is_chat else "text": record["messages" if is_chat else "text"]}
        options = self._options
        columns = (options.field, name, self._record_format, options.image)
        return beside(to_document(record | pictures, *columns), self._folder)

    def _places(self, feature: str, index: int, value: Any) -> Any:
        """Where an image is, or the images of a list, as `refs` has it."""
        place = {"split": self._options.tfds_split, "record": index, "feature": feature}
        if isinstance(value, bytes):
            return place
        return [place | {"item": i} for i in range(len(value))]


def _plain(value: Any) -> Any:
    """Bytes as text, and numpy's scalars and arrays as Python's."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in list(value)]
    return value.item() if isinstance(value, np.generic) else value


def _find_prepared(path: pathlib.Path) -> pathlib.Path | None:
    """The one folder at or below `path` that TFDS has prepared."""
    if not path.is_dir():
        return None
    files = [path / "features.json"] if (path / "features.json").is_file() else []
    files = files or sorted(path.glob("*/*/features.json")) or sorted(path.glob("*/features.json"))
    return files[0].parent if len(files) == 1 else None
