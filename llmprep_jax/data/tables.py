"""Tables as documents: Parquet and CSV, a row a document.

Arrow gives all rows of a column one type, so that a key which one row's object has is null in all
others. Such nulls are dropped: a tool call that had two arguments in the data has two again.
"""

import csv
import io
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmprep_jax.data.documents import Document
from llmprep_jax.data.records import RecordFormat, formats_of, to_document


class Parquet:
    """Parquet files.

    The columns of the document are held in memory as Arrow holds them, since a row group cannot be
    read in part: for more than fits, write ArrayRecord once (`tfds_text.write_array_record`). A
    conversation's are all columns but bytes, since the chat template may read any.
    """

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        field: str | None = None,
        record_format: RecordFormat = "auto",
    ):
        self._files, self._field, self._record_format = list(files), field, record_format
        self._tables = [_read_table(file, field, record_format) for file in self._files]
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
        record = {
            key: table.column(key)[row].as_py(maps_as_pydicts="strict")
            for key in table.column_names
        }
        return to_document(drop_nulls(record), self._field, self.name(index), self._record_format)


def drop_nulls(value: Any) -> Any:
    """A copy of JSON values whose objects have no keys that are null."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    return [drop_nulls(item) for item in value] if isinstance(value, list) else value


def _read_table(file: pathlib.Path, field: str | None, record_format: RecordFormat) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow; pip install pyarrow") from None
    try:
        schema = pyarrow.parquet.read_schema(file)
        columns = schema.names
        named = field.split(",") if field else []
        if not set(named) <= set(columns) or not (named or formats_of(columns)):
            raise ValueError(
                f"it has the columns {', '.join(columns)}; name one by data.source.field=NAME"
            )
        is_text = formats_of(columns) == ["text"] or record_format == "text"
        wanted = ["text"] if is_text and not named else columns
        if len(named) == 1 and not pyarrow.types.is_nested(schema.field(field).type):
            wanted = named
        binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
        wanted = [k for k in wanted if not any(is_(schema.field(k).type) for is_ in binary)]
        return pyarrow.parquet.read_table(file, columns=wanted)
    except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are all of these
        raise ValueError(f"{file}: not read as Parquet: {' '.join(str(error).split())}") from None


class Csv:
    """A CSV file with a header (.tsv: parted by tabs), held in memory; every value is a string."""

    def __init__(
        self, file: pathlib.Path, field: str | None = None, record_format: RecordFormat = "auto"
    ):
        self._file, self._field, self._record_format = file, field, record_format
        self._lines, self._records = _read_rows(file)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """File and the line at which the row begins, counted from 1."""
        return f"{self._file}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Document:
        record = self._records[index]
        return to_document(record, self._field, self.name(index), self._record_format)


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
