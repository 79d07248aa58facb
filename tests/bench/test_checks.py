"""Checks run on whatever one of them does to its process, and no longer than they may."""

import time

from experiments.bench import checks
from tests.bench import some_checks


def run(*names, seconds=60.0, limit=60.0, make=some_checks.make):
    rows = []
    settings = {"names": list(names)} if names else {}
    left = checks.run_checks(make, settings, seconds, rows.append, limit)
    return rows, left


def test_a_check_that_fails_is_a_row_with_its_reason_and_the_next_goes_on():
    rows, left = run("raises", "unfit", "good", "dies", "last")
    pids = [row.pop("found") for row in (rows[3], rows[5])]
    assert rows == [
        {"found": "before"},
        {"check": "raises", "reason": "ValueError: of two lines"},
        {"check": "unfit", "reason": "has no window"},
        {},
        {"check": "dies", "reason": "its process ended with code 9"},
        {},
    ]
    assert pids[0] != pids[1]  # of a new process
    assert left == []


def test_what_does_not_fit_into_the_time_is_named():
    begun = time.monotonic()
    rows, left = run("hangs", "good", "last", seconds=6.0)
    assert rows == [{"check": "hangs", "reason": "cut off: the time was over"}]
    assert left == ["good", "last"]
    assert time.monotonic() - begun < 30


def test_a_check_that_takes_too_long_is_left_for_the_next():
    rows, left = run("hangs", "last", limit=1.0)
    assert rows[0] == {"check": "hangs", "reason": "cut off: it took more than 1 s"}
    assert (list(rows[1]), left) == (["found"], [])


def test_checks_that_cannot_be_made_are_one_row():
    rows, left = run(make=some_checks.broken)
    reason = "ImportError: no such package"
    assert (rows, left) == ([{"check": "all of its checks", "reason": reason}], [])


def test_a_dead_device_ends_its_process_and_a_new_one_goes_on(monkeypatch):
    sent = []

    class Connection:
        send = staticmethod(sent.append)

    monkeypatch.setattr(checks, "_device_answers", lambda: False)
    checks._serve(Connection, some_checks.make, {"names": ["fails", "good"]}, 0)
    assert [kind for kind, _ in sent] == ["names", "begin", "reason"]
    sent.clear()
    monkeypatch.setattr(checks, "_device_answers", lambda: True)
    checks._serve(Connection, some_checks.make, {"names": ["fails", "good"]}, 1)
    assert [kind for kind, _ in sent] == ["names", "begin", "row", "done"]


def test_a_question_is_answered_by_a_process_of_its_own():
    import os

    assert checks.ask(os.getpid) != os.getpid()
