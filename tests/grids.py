"""Grids of cases: few run in `make test`, others in the slow tests, the rest in `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def cases(rows: Iterable[Any], *, fast: Iterable[Any] = (), slow: Iterable[Any] = ()) -> list:
    """Parameters for pytest, a value or a tuple each; what is in no list has the mark `grid`."""
    rows, fast, slow = list(rows), list(fast), list(slow)
    strange = [row for row in (*fast, *slow) if row not in rows]
    assert not strange, strange
    params = []
    for row in rows:
        mark = None if row in fast else pytest.mark.slow if row in slow else pytest.mark.grid
        values = row if isinstance(row, tuple) else (row,)
        params.append(pytest.param(*values, marks=mark or ()))
    return params
