"""The Pallas kernels for TPUs, interpreted in tiles of few columns and compiled for real chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.grouped_matmul import pallas_tpu
from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
from llmprep_jax.kernels.grouped_matmul.visits import visit_groups, visit_tiles
from tests.grids import cases
from tests.kernels.ahead import TPUS, compile_on, temporaries, tpu_devices
from tests.kernels.test_grouped_matmul import expect

SIZES = {  # rows of groups, of 300 rows in tiles of 128
    "borders in tiles": (0, 100, 0, 129, 1, 40, 0),
    "borders of tiles": (128, 0, 128),
    "one row a group": (1,) * 6,
    "all in the last": (0, 0, 300),
    "none": (0, 0),
}


def draw(sizes, dtype=np.float32, num_rows=300):
    """(x, w, sizes, cotangent) of 256 and 300 columns; rows of no group are NaN."""
    rng = np.random.default_rng(0)
    x, w, dy = [
        rng.normal(size=shape)
        for shape in ((num_rows, 256), (len(sizes), 256, 300), (num_rows, 300))
    ]
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return x.astype(dtype), w.astype(dtype), np.array(sizes, np.int32), dy.astype(dtype)


def run(x, w, sizes, dy):
    """The product and its gradients, by a program of its own."""

    @jax.jit
    def both(x, w, sizes, dy):
        ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=x.dtype, impl="pallas_tpu")
        y, vjp = jax.vjp(ours, x, w)
        return y, *vjp(dy)

    return both(x, w, sizes, dy)


def assert_close(found, expected, tolerance):
    """Each array, to a part of its greatest value."""
    for x, y in zip(found, expected, strict=True):
        error = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1e-3)
        assert error < tolerance, error


@pytest.fixture
def small_tiles(monkeypatch):
    """Of 128 columns: three of 300, the last over the end, and two parts of 256."""
    monkeypatch.setattr(pallas_tpu, "TILES", ((128, 128),))
    monkeypatch.setattr(pallas_tpu, "WIDEST", 128)
    monkeypatch.setattr(pallas_tpu, "PART", 128)


@pytest.mark.parametrize(
    ("case", "dtype"),
    cases(
        [(case, dtype) for case in SIZES for dtype in ("float32", "bfloat16")],
        fast=[("borders in tiles", "float32")],
    ),
)
def test_products_and_gradients_by_tiles_are_those_of_a_loop_over_groups(small_tiles, case, dtype):
    x, w, sizes, dy = draw(SIZES[case], dtype)
    assert_close(
        run(x, w, sizes, dy), expect(x, w, sizes, dy), 1e-5 if dtype == "float32" else 2e-2
    )


def test_gradients_in_bf16_are_summed_in_float32():
    """In bf16 a sum of 2,048 ones would stay at 256."""
    x, w, dy = [jnp.ones(shape, jnp.bfloat16) for shape in ((2048, 8), (1, 8, 8), (2048, 8))]
    _, _, dw = run(x, w, np.array([2048], np.int32), dy)
    assert dw.dtype == jnp.bfloat16
    assert (dw == 2048).all()


@pytest.mark.slow
def test_no_tile_is_read_and_written_at_once(small_tiles):
    operands = draw(SIZES["borders in tiles"])
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(checks):
        assert_close(run(*operands), expect(*operands), 1e-5)


def test_visits_are_every_group_in_every_tile_that_it_has_rows_in():
    sizes = jnp.array([0, 5, 0, 6, 1])  # of 20 rows in tiles of 4
    visits = [
        [tuple(map(int, row)) for row in zip(*found[:4], strict=True)][: int(found.count[0])]
        for found in jax.jit(lambda x: (visit_tiles(x, 20, 4), visit_groups(x, 20, 4)))(sizes)
    ]
    with_rows = [(1, 0, 0, 4), (1, 1, 4, 5), (3, 1, 5, 8), (3, 2, 8, 11), (4, 2, 11, 12)]
    assert visits[0] == [*with_rows, (5, 3, 12, 16), (5, 4, 16, 20)]
    assert [v for v in visits[1] if v[2] < v[3]] == with_rows
    assert [v[0] for v in visits[1]] == [0, 1, 1, 2, 3, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("generation", TPUS)
def test_kernels_compile_for_tpus_and_hold_nothing(generation):
    """At DeepSeek-V3's sizes with eight experts a device; XLA's own hold 896 MiB for dx."""
    rows, dim, mlp_dim, groups = 32768, 7168, 2048, 8
    shapes = (rows, dim), (groups, dim, mlp_dim), (rows, mlp_dim)
    x, w, dy = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def gradients(x, w, sizes, dy):
        ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=jnp.bfloat16)
        y, vjp = jax.vjp(ours, x, w)
        return y, *vjp(dy)

    compiled = compile_on(tpu_devices(generation)[0], gradients, x, w, sizes, dy)
    assert temporaries(compiled) < 8
    flops = compiled.cost_analysis()["flops"]
    assert flops < 1.01 * 3 * 2 * rows * dim * mlp_dim  # each row for its own group alone
    kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert kernels == 3, kernels
