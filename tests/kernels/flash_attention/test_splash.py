"""JAX's splash attention behind our call: right, and what it leaves to others."""

import jax.numpy as jnp
import pytest

from llmprep_jax.kernels.flash_attention import splash
from llmprep_jax.kernels.flash_attention.masks import Rule
from tests.grids import cases
from tests.kernels.flash_attention.problems import Problem, assert_close, run

FAST = [Problem(B=2, T=128, S=256, N=2, K=1, H=16, U=8, values="e", window=40, soft_cap=3.0)]
REST = [
    Problem(B=1, T=256, N=2, K=2, H=16),
    Problem(B=1, T=256, N=2, K=1, H=16, causal=False, window=70, sinks=True),
    Problem(B=2, T=256, N=2, K=2, H=16, values="s", dtype="bfloat16"),
]


@pytest.mark.parametrize("problem", cases([*FAST, *REST], fast=FAST), ids=str)
@pytest.mark.filterwarnings("ignore:attention. impl='splash' cannot:UserWarning")  # backward
def test_it_computes_what_the_reference_does(problem):
    tolerance = 2e-2 if problem.dtype == "bfloat16" else 1e-5
    assert_close(run(problem, "splash"), run(problem, "reference"), tolerance)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        (dict(given=("segments",)), None),
        (dict(given=("positions", "segments", "spans")), "not by positions and spans"),
        (dict(bias=lambda head, i, j: i - j), "it adds no bias"),
        (dict(tokens=96), "lengths (96, 128) must be multiples of 128"),
        (dict(dtype="float16"), "not float16"),
        (dict(backward=True), "its backward takes no residuals"),
    ],
)
def test_what_it_cannot_do_it_says(change, reason):
    def refusal(tokens=128, dtype="float32", backward=False, **rule):
        q, k = [jnp.zeros((1, 2, n, 16), dtype) for n in (tokens, 128)]
        return splash.refusal(q, k, k, Rule(**rule), backward)

    found = refusal(**change)
    assert found is None if reason is None else reason in found
