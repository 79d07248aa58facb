"""Rows of results as lines of JSON and tables, after each row."""

import json

import pytest

from experiments.bench.results import Results, best, cell, line, slug

TABLES = """# speed: A/B 100

How it was measured.

## forward

| shape | contender | ms | note |
| --- | --- | --- | --- |
| s | ours | 1.5 |  |
| s | theirs |  | has no / in it |

## backward

| shape | ms |
| --- | --- |
| s | 1,234 |
"""


def test_files_hold_all_rows_after_each(tmp_path):
    results = Results(tmp_path / "deep" / "er", "speed", "A/B 100", "How it was measured.")
    results.add({"section": "forward", "shape": "s", "contender": "ours", "ms": 1.5})
    assert len(results.numbers.read_text().splitlines()) == 1
    row = {"section": "forward", "shape": "s", "contender": "theirs", "note": "has no | in it"}
    results.add(row)
    results.add({"section": "backward", "shape": "s", "ms": 1234.4})
    assert results.tables.read_text() == TABLES
    assert [json.loads(x) for x in results.numbers.read_text().splitlines()][1] == row


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *[(None, ""), (0.0, "0"), (1.23456, "1.23"), (123.456, "123"), (12345.6, "12,346")],
        *[(2e-5, "2.0e-05"), (3e9, "3.0e+09"), (12345, "12,345"), (True, "True"), ("a|b", "a/b")],
    ],
)
def test_numbers_are_shown_to_three_figures(value, shown):
    assert cell(value) == shown


def test_a_row_is_told_in_a_line():
    told = line({"section": "forward", "ms": 1.5, "note": None})
    assert told.split() == ["forward", "1.5", "ms"]


def test_a_device_names_a_folder():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("v5p:2x2x1, ahead of time") == "v5p-2x2x1-ahead-of-time"


def test_the_best_of_rows_is_that_of_those_alike():
    rows = [{"a": 1, "x": 3.0}, {"a": 1, "x": 5.0}, {"a": 2, "x": 9.0}, {"a": 1}]
    assert best(rows, "x", a=1) == 5.0
    assert best(rows, "x", a=3) is None
