"""Tables as documents: Parquet and CSV, a row a document.

Arrow gives all rows of a column one type, so that a key which one row's object has is null in all
others. Such nulls are dropped: a tool call that had two arguments in the data has two again.
"""

import csv
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmprep_jax.data.documents import Document
from llmprep_jax.data.images import beside
from llmprep_jax.data.records import (
    CAPTIONS,
    IMAGES,
    QUESTIONS,
    RecordFormat,
    formats_of,
    to_document,
)


class Parquet:
    """Parquet files.

    The columns of the document are held in memory as Arrow holds them, since a row group cannot be
    read in part: for more than fits, write ArrayRecord once (`tfds_text.write_array_record`). A
    conversation's are all columns but bytes, since the chat template may read any. Pictures stay in
    the file: `{"bytes": ..., "path": ...}`, as Hugging Face's data sets have them, or bytes, or
    lists of either, in `image`, `images` or the column that `image` names.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        field: str | None = None,
        record_format: RecordFormat = "auto",
        image: str | None = None,
    ):
        self._files, self._columns = list(files), (field, record_format, image)
        self._tables = [_read_table(file, *self._columns) for file in self._files]
        self._first = np.cumsum([0, *(table.rows.num_rows for table in self._tables)])

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
        number, row = self._find(index)
        file, table = self._files[number], self._tables[number]
        record = {
            key: table.rows.column(key)[row].as_py(maps_as_pydicts="strict")
            for key in table.rows.column_names
        }
        record = drop_nulls(record) | {
            column: _places(record, column, lengths, file.name, row)
            for column, lengths in table.pictures.items()
        }
        field, *columns = self._columns
        return beside(to_document(record, field, self.name(index), *columns), file.parent)


class _Table(NamedTuple):
    """A file's rows without its pictures.

    Attributes:
      rows: Arrow's table.
      pictures: the columns that hold them, and how many each row has: None where that is one, or
        to be seen in what `rows` holds of the column.
    """

    rows: Any
    pictures: dict[str, np.ndarray | None]


def _places(
    record: Mapping[str, Any], column: str, lengths: np.ndarray | None, table: str, row: int
) -> Any:
    """Where the images of a column are, as `refs` has it; what is left of the column is paths."""
    place = {"table": table, "row": row, "column": column}
    value = record.get(column, {}) if lengths is None else [{}] * int(lengths[row])
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    names = [item.get("path") if isinstance(item, Mapping) else None for item in items]
    places = [place | ({"name": name} if name else {}) for name in names]
    if not isinstance(value, list):
        return places[0]
    return [place | {"item": i} for i, place in enumerate(places)]


def drop_nulls(value: Any) -> Any:
    """A copy of JSON values whose objects have no keys that are null."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _read_table(
    file: pathlib.Path, field: str | None, record_format: RecordFormat, image: str | None
) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            wanted, pictures = _choose_columns(opened.schema_arrow, field, record_format, image)
            lengths = {key: _read_lengths(opened, key) for key in pictures}
            return _Table(opened.read(columns=_leaves_but_bytes(opened, wanted)), lengths)
    except (OSError, ValueError, KeyError, MemoryError) as error:  # Arrow's own are all of these
        raise ValueError(f"{file}: not read as Parquet: {' '.join(str(error).split())}") from None


def _choose_columns(
    schema: Any, field: str | None, record_format: RecordFormat, image: str | None
) -> tuple[list[str], list[str]]:
    """The columns that documents are made of, and those of them that hold pictures."""
    columns, named = schema.names, field.split(",") if field else []
    known = {"image", *columns} if image else columns
    has = f"it has the columns {', '.join(columns)}"
    if image is not None and image not in columns:
        raise ValueError(f"{has}; data.source.image={image} is none of them")
    if not set(named) <= set(columns) or not (named or formats_of(known)):
        told = not set(columns).isdisjoint((*CAPTIONS, *QUESTIONS))
        also = ", and its image's by data.source.image=NAME" if told else ""
        raise ValueError(f"{has}; name one by data.source.field=NAME{also}")
    if record_format in ("caption", "question") and set(known).isdisjoint(IMAGES):
        raise ValueError(f"{has}, and none is an image; name it by data.source.image=NAME")
    pictures = [k for k in ([image] if image else IMAGES) if k in columns and _is_bytes(schema, k)]
    if formats_of(known) == ["text"] or record_format == "text":
        return (named or ["text"]), []
    if len(named) == 1 and not _is_nested(schema.field(field).type):
        return [*named, *(k for k in ([image] if image else IMAGES) if k in columns)], pictures
    return columns, pictures


def _is_nested(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_nested(kind)


def _leaf_types(kind: Any) -> list[Any]:
    """What a column is stored as, in Parquet's order: an object's fields each by themselves."""
    if not _is_nested(kind):
        return [kind]
    return [leaf for i in range(kind.num_fields) for leaf in _leaf_types(kind.field(i).type)]


def _holds_bytes(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_bytes(schema: Any, column: str) -> bool:
    return any(map(_holds_bytes, _leaf_types(schema.field(column).type)))


def _leaves_but_bytes(file: Any, wanted: Sequence[str]) -> list[str]:
    """Parquet's names of what to read."""
    leaves = [kind for field in file.schema_arrow for kind in _leaf_types(field.type)]
    paths = [file.schema.column(i).path for i in range(len(file.schema))]
    return [
        path
        for path, kind in zip(paths, leaves, strict=True)
        if path.split(".")[0] in wanted and not _holds_bytes(kind)
    ]


def _read_lengths(file: Any, column: str) -> np.ndarray | None:
    """How many pictures each row of a column of lists of bytes has, a group of rows at a time."""
    import pyarrow.compute

    kind = file.schema_arrow.field(column).type
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    if not is_list or not all(map(_holds_bytes, _leaf_types(kind))):
        return None
    lengths = [np.zeros(0, np.int64)]
    for i in range(file.num_row_groups):
        values = file.read_row_group(i, columns=[column]).column(0)
        lengths.append(pyarrow.compute.list_value_length(values).fill_null(0).to_numpy())
    return np.concatenate(lengths)


class Csv:
    """A CSV file with a header (.tsv: parted by tabs), held in memory; every value is a string."""

    def __init__(
        self,
        file: pathlib.Path,
        field: str | None = None,
        record_format: RecordFormat = "auto",
        image: str | None = None,
    ):
        self._file, self._columns = file, (field, record_format, image)
        self._lines, self._records = _read_rows(file)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """File and the line at which the row begins, counted from 1."""
        return f"{self._file}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Document:
        field, *columns = self._columns
        document = to_document(self._records[index], field, self.name(index), *columns)
        return beside(document, self._file.parent)


def _read_rows(file: pathlib.Path) -> tuple[list[int], list[dict[str, str]]]:
    """The lines at which rows begin, and the rows by the header's names; empty lines are none."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start + 1} of the file is no UTF-8; save the file as UTF-8"
        ) from None
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines, records, header, begin = [], [], None, 1
    try:
        for row in reader:
            if row and header is None:
                header = row
                if len(set(header)) != len(header):
                    raise ValueError("the header has a name twice; rename one")
            elif row:
                if len(row) != len(header):
                    raise ValueError(
                        f"{len(row)} values under a header of {len(header)}; put values that hold"
                        " a comma in quotes"
                    )
                lines.append(begin)
                records.append(dict(zip(header, row, strict=True)))
            begin = reader.line_num + 1
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file}:{begin}: {error}") from None
    return lines, records
