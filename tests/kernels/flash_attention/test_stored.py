"""Caches in pages and of 8 bits: what each backend computes from them, and what it holds."""

import functools

import jax
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import attention, chunked
from tests.grids import cases
from tests.kernels.flash_attention.caches import Cached
from tests.kernels.flash_attention.problems import assert_close

CACHES = [
    Cached(T=3, bits=8, window=30, soft_cap=2.0, sinks=True),
    Cached(page=0, bits=8, S=90, N=6, H=24, U=8),
    Cached(K=1, N=8, H=40, U=None, width=32, bits=8),
    Cached(bits=16, T=20, S=80, window=25),
    Cached(),
    Cached(K=1, N=8, H=40, U=None, width=32),
    Cached(page=0, bits=8, K=1, N=8, H=40, U=None, width=32, bias=True),
    Cached(bits=8, K=4, page=8, T=20, soft_cap=1.0),
    Cached(page=48, bits=8, T=2, bias=True),
    Cached(page=32, B=1, sinks=True),
    Cached(page=96, bits=16, window=11),
]
FAST = CACHES[:4]


def run(options, impl):
    """(o, lse), compiled."""
    arrays = {k: x for k, x in options.items() if isinstance(x, jax.Array)}
    rest = {k: x for k, x in options.items() if k not in arrays}
    call = jax.jit(functools.partial(attention, **rest, impl=impl, return_lse=True))
    return dict(zip(("o", "lse"), call(**arrays), strict=True))


def wanted_and_found(cache, impl):
    """Of rows of numbers by the reference, and of the cache."""
    stored, rows = cache.problem()
    return run(rows, "reference"), run(stored, impl)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("cache", cases(CACHES, fast=FAST), ids=str)
def test_a_cache_is_the_rows_that_it_holds(cache, impl, monkeypatch):
    monkeypatch.setattr(chunked, "FEW_K_BLOCK", 40)
    monkeypatch.setattr(chunked, "K_BLOCK", 40)
    wanted, found = wanted_and_found(cache, impl)
    assert_close(found, wanted, 2e-2 if cache.bits == 16 else 1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(pages=np.zeros((2, 6), int)), r"pages \(2, 6\) of pools .* for 3 rows"),
        (dict(v_scales=None), "give k_scales and v_scales, or k_scales alone"),
        (dict(k_scales=None), "give k_scales and v_scales, or k_scales alone"),
        (dict(k=np.zeros((10, 16, 2, 16), "float32")), "of float32 and int8 keys and values"),
        (dict(k_scales=np.zeros((3, 96, 2))), r"they must be \(10, 16, 2\), of int8"),
        (dict(bias=(np.zeros((3, 1, 1, 2)), np.zeros((3, 96, 1, 2)))), "factors of a bias"),
        (dict(k_segments=np.zeros((3, 16), int)), r"of k are \(3, 16\); they must be \(3, 96\)"),
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(changed, message):
    stored, _ = Cached(bits=8).problem()
    with pytest.raises(ValueError, match=message):
        attention(**stored | changed)


@pytest.mark.parametrize("cache", [Cached(), Cached(page=0, bits=8)], ids=str)
def test_a_cache_has_no_derivative_and_says_so(cache):
    stored, _ = cache.problem()
    with pytest.raises(ValueError, match="keys in pages or with scales have no derivatives"):
        jax.grad(lambda q: attention(**stored | dict(q=q)).sum())(stored["q"])
