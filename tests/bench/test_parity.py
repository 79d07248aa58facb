"""A kernel that is off by little is told from one that is right, and one that fails has a note."""

import numpy as np
import pytest

from experiments.bench import agreement, attention_parity, parity
from llmprep_jax.kernels.grouped_matmul import blocks, ragged

ARRAY = np.array([1.0, -4.0])


def test_an_error_is_the_greatest_difference_over_the_greatest_value():
    found = dict(o=np.array([1.0, -3.96]), lse=ARRAY, dq=ARRAY, dk=np.array([1.2, -4.0]))
    wanted = dict.fromkeys(found, ARRAY)
    errors = {"error of o": 0.01, "error of lse": 0.0, "worst gradient's": 0.05}
    assert agreement.compare(found, wanted) == pytest.approx(errors)


def test_what_is_no_number_is_the_worst_error():
    assert agreement.compare({"y": np.array([1.0, np.nan])}, {"y": ARRAY}) == {"error of y": np.inf}


def test_queries_that_see_nothing_have_a_log_sum_exp_alike():
    found, wanted = {"lse": np.array([1.0, -2.4e38])}, {"lse": np.array([1.0, -1.5e38])}
    assert agreement.compare(found, wanted) == {"error of lse": 0.0}
    assert agreement.compare({"lse": np.array([1.0, 0.5])}, wanted)["error of lse"] == 0.5


def test_a_kernel_that_is_wrong_or_fails_is_a_row_of_its_own(monkeypatch):
    multiply = blocks.multiply
    monkeypatch.setattr(blocks, "multiply", lambda *x: multiply(*x) * 1.001)

    def fails(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ragged, "multiply", fails)
    rows = {row["impl"]: row for row in parity.check_grouped("float32")}
    assert rows["blocks"]["error of y"] == pytest.approx(1e-3, rel=0.01)
    assert rows["blocks"]["worst gradient's"] == pytest.approx(1e-3, rel=0.01)
    assert rows["ragged"]["note"] == "RuntimeError: no such instruction"


def test_cases_are_what_their_names_say():
    shape, rest = attention_parity.CASES["decode"]
    places = {name: np.asarray(x) for name, x in attention_parity._options(shape, rest).items()}
    # rows of several lengths, the last token of each a query
    assert places["q_positions"].tolist() == [[699], [602], [505]]
    assert places["k_positions"].shape == (3, 700)
    shape, rest = attention_parity.CASES["not causal, 72"]
    segments = np.asarray(attention_parity._options(shape, rest)["k_segments"])
    assert (segments[0] == 0).all()
    assert set(segments[1]) == {0, 1, 2, 3}
    shape, rest = attention_parity.CASES["spans"]
    spans = np.asarray(attention_parity._options(shape, rest)["q_spans"])
    assert set(spans[0]) == {0, 1, 2}
