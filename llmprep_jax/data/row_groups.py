"""One value of a Parquet file without the rest of it.

A file is stored in groups of rows, and a column of a group is the least that can be read. So a
process keeps the two that it used last: pictures in the order of the file are read once, and
shuffled ones cost a group each, which is why writers for random access make groups of 100 rows.
"""

import functools
import os
import pathlib
from typing import Any

import numpy as np

MAX_BYTES = 2**30  # of a group; twice that may be in memory, in each process


def read_value(path: str, row: int, column: str) -> Any:
    """A value of a column, as Python's; rows count from 0.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no Parquet, is broken there, has no such row, or a group that is too large.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    stamp = _stamp(path)
    try:
        _, starts = _layout(path, stamp)
        if row >= starts[-1]:
            raise ValueError(f"has {starts[-1]} rows and no row {row + 1}; begin a new run")
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return _column(path, stamp, group, column)[row - int(starts[group])].as_py()
    except (OSError, ValueError, LookupError, MemoryError) as error:  # Arrow's are all of these
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


def _stamp(path: str) -> tuple[int, int]:
    """What a file that is written anew has another of."""
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=64)
def _layout(path: str, stamp: tuple[int, int]) -> tuple[Any, np.ndarray]:
    """The file's metadata, and the row at which each group begins, with the end."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return metadata, np.cumsum([0, *sizes])


@functools.lru_cache(maxsize=2)
def _column(path: str, stamp: tuple[int, int], group: int, column: str) -> Any:
    import pyarrow.parquet

    metadata, _ = _layout(path, stamp)
    # not of the column alone: asking that of a broken file ends Python
    size = metadata.row_group(group).total_byte_size
    if size > MAX_BYTES:
        raise ValueError(
            f"a group of rows holds {size / 2**30:.1f} GiB, and {column!r} of it is read together;"
            " write it again with row_group_size=100"
        )
    with pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
        table = file.read_row_group(group, columns=[column])
    return table.column(column)
