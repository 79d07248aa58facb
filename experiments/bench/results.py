"""Rows of measurements: a line of JSON each as it comes, and tables of all of them.

A run that is cut leaves both files as they were after its last row. Folders are named by device, so
that tables of several lie side by side.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.study.report import table

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "results"

Row = Mapping[str, Any]


class Results:
    """The files NAME.jsonl and NAME.md of a folder.

    Args:
      folder: None: that of the device under docs/results.
      name: of the files.
      device: whose name heads the tables.
      words: what is said above the tables: conventions, and how to come by them.
    """

    def __init__(self, folder: pathlib.Path | None, name: str, device: str, words: str):
        folder = FOLDER / slug(device) if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        self.numbers, self.tables = folder / f"{name}.jsonl", folder / f"{name}.md"
        self._title, self._words, self.rows = f"# {name}: {device}", words, []
        self.numbers.write_text("")

    def add(self, row: Row) -> None:
        """Writes a row to both files; its "section" is the table that it stands in."""
        self.rows.append(dict(row))
        with self.numbers.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        self.tables.write_text(self.text())

    def text(self) -> str:
        """The tables in Markdown."""
        parts = [self._title, self._words]
        for section in dict.fromkeys(row["section"] for row in self.rows):
            rows = [row for row in self.rows if row["section"] == section]
            parts += [f"## {section}", in_columns(rows)]
        return "\n\n".join(part.strip() for part in parts if part) + "\n"


def in_columns(rows: Sequence[Row]) -> str:
    """A table of rows whose columns are what any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "section"))
    return table(columns, [[cell(row.get(column)) for column in columns] for row in rows])


def cell(value: Any) -> str:
    """A value as a table shows it: three figures of a number at least."""
    if value is None:
        return ""
    if isinstance(value, float):
        size = abs(value)
        if value and (size < 1e-3 or size >= 1e7):
            return f"{value:.1e}"
        return f"{value:,.0f}" if size >= 100 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value).replace("|", "/")


def line(row: Row) -> str:
    """A row as it is told while it comes."""
    told = {key: x for key, x in row.items() if x is not None}
    words = [x if isinstance(x, str) else f"{cell(x)} {key}" for key, x in told.items()]
    return "  ".join(f"{word:14}" for word in words).rstrip()


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def best(rows: Iterable[Row], key: str, /, **alike: Any) -> float | None:
    """The greatest value of a key among rows that have these values; None where none has it."""
    found = [
        row[key]
        for row in rows
        if row.get(key) is not None and all(row.get(k) == v for k, v in alike.items())
    ]
    return max(found, default=None)
