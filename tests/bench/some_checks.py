"""Checks that give rows, raise, take their process down and never end; for `test_checks`."""

import os
import time

from experiments.bench.checks import Check, Unfit


def make(names: list[str]) -> list[Check]:
    return [Check(name, RUNS[name]) for name in names]


def good():
    yield {"found": os.getpid()}


def raises():
    yield {"found": "before"}
    raise ValueError("of\ntwo lines")


def unfit():
    raise Unfit("has no window")


def dies():
    os._exit(9)


def hangs():
    time.sleep(600)
    yield {}


def fails():
    raise RuntimeError("a bad address")


RUNS = {f.__name__: f for f in (good, raises, unfit, dies, hangs, fails)}
# a second good one
RUNS["last"] = good


def broken() -> list[Check]:
    raise ImportError("no such package")
