"""Contenders take turns, first calls do not count, and medians do."""

import pytest

from experiments.bench import timing
from experiments.bench.timing import Contender


def test_contenders_take_turns_and_their_first_calls_do_not_count(monkeypatch):
    clock, order = [0.0], []

    def contender(name, seconds):
        times = iter(seconds)

        def call():
            order.append(name)
            clock[0] += next(times)

        return Contender(call, lambda _: None)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    contenders = {
        "a": contender("a", [100.0, 0.5, 1.0, 9.0, 2.0]),
        # a call of 0.04 s is timed with a second one
        "b": contender("b", [50.0, 0.04, 0.1, 0.3, 0.1, 0.1, 0.6, 0.2]),
    }
    assert timing.in_turn(contenders, rounds=3) == pytest.approx({"a": 2.0, "b": 0.2})
    assert "".join(order) == "aabbabbabbabb"
