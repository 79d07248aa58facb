"""The Pallas kernels, interpreted in tiles of few columns and compiled for real chips."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from llmprep_jax.kernels.grouped_matmul import pallas_gpu, pallas_tpu, tokamax
from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
from llmprep_jax.kernels.grouped_matmul.visits import visit_groups, visit_tiles
from llmprep_jax.nn.dispatch import run_experts
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from tests.grids import cases
from tests.kernels.ahead import TPUS, compile_on, h100_devices, temporaries, tpu_devices
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


def run(x, w, sizes, dy, impl):
    """The product and its gradients, by a program of its own."""

    @jax.jit
    def both(x, w, sizes, dy):
        ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=x.dtype, impl=impl)
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
    monkeypatch.setattr(pallas_gpu, "TILES", {2: (128, 128, 64), 4: (64, 128, 64)})


BORDERS = "borders in tiles"


@pytest.mark.parametrize(
    ("impl", "case", "dtype"),
    cases(
        itertools.product(("pallas_tpu", "pallas_gpu"), SIZES, ("float32", "bfloat16")),
        fast=[("pallas_tpu", BORDERS, "float32"), ("pallas_gpu", BORDERS, "float32")],
    ),
)
def test_products_and_gradients_by_tiles_are_those_of_a_loop_over_groups(
    small_tiles, impl, case, dtype
):
    operands = draw(SIZES[case], dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert_close(run(*operands, impl), expect(*operands), tolerance)


@pytest.mark.parametrize("impl", ["pallas_tpu", "pallas_gpu"])
def test_gradients_in_bf16_are_summed_in_float32(impl):
    """In bf16 a sum of 2,048 ones stays at 256; by tiles, 1 + 2^-7 as often is not 2,064."""
    shapes = (2048, 16), (1, 16, 16), (2048, 16)
    x, w, dy = [jnp.ones(shape, jnp.bfloat16) for shape in shapes]
    dy += 2**-7
    _, _, dw = run(x, w, jnp.array([2048]), dy, impl)
    assert dw.dtype == jnp.bfloat16
    assert (dw == 2064).all()


def test_a_tile_that_begins_earlier_counts_nothing_twice():
    """Of 280 and 300 columns and 40 rows: no power of two divides them."""
    rng = np.random.default_rng(0)
    x, w, dy = [
        rng.normal(size=shape).astype(np.float32) for shape in ((40, 280), (2, 280, 300), (40, 300))
    ]
    operands = x, w, np.array([3, 37], np.int32), dy
    assert_close(run(*operands, "pallas_gpu"), expect(*operands), 1e-5)


@pytest.mark.slow
def test_no_tile_is_read_and_written_at_once(small_tiles):
    operands = draw(SIZES["borders in tiles"])
    checks = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(checks):
        assert_close(run(*operands, "pallas_tpu"), expect(*operands), 1e-5)


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


def abstract(rows, groups, dim=7168, mlp_dim=2048):
    """DeepSeek-V3's experts of one device: (x, w, sizes, cotangent) in bf16."""
    shapes = (rows, dim), (groups, dim, mlp_dim), (groups,), (rows, mlp_dim)
    dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
    return [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]


def gradients(x, w, sizes, dy, impl=None):
    ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=jnp.bfloat16, impl=impl)
    y, vjp = jax.vjp(ours, x, w)
    return y, *vjp(dy)


@pytest.mark.slow
@pytest.mark.parametrize("generation", TPUS)
def test_kernels_compile_for_tpus_and_hold_nothing(generation):
    """XLA's own hold 896 MiB for dx."""
    device = tpu_devices(generation)[0]
    compiled = compile_on(device, gradients, *abstract(rows=32768, groups=8))
    assert temporaries(compiled) < 8
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    flops = compiled.cost_analysis()["flops"]
    assert flops < 1.01 * 3 * 2 * 32768 * 7168 * 2048  # each row for its own group alone


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "groups"), [(8192, 4), (65536, 32)])
def test_kernels_compile_for_an_h100_and_hold_nothing(rows, groups):
    """XLA's own hold a copy of the rows for each group, 28 GiB at 65,536 rows and 32 of them."""
    compiled = compile_on(h100_devices()[0], gradients, *abstract(rows, groups))
    assert temporaries(compiled) < 8
    assert compiled.as_text().count("__gpu$xla.gpu.triton") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chips", "transport", "kernel"),
    [("v5p", "ragged", "tpu_custom_call"), ("h100", "ring", "__gpu$xla.gpu.triton")],
)
def test_experts_over_four_devices_run_by_the_kernels(chips, transport, kernel):
    """Three forward, which the backward pass needs again in part, and two for each gradient."""
    devices = h100_devices(4) if chips == "h100" else tpu_devices(chips)[:4]
    groups, active, dim, mlp_dim = 8, 2, 256, 128
    axes = {"up": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}

    def apply(x_RD, sizes_E, params):
        product = functools.partial(grouped_matmul, sizes_E=sizes_E, dtype=jnp.bfloat16)
        return product(jax.nn.silu(product(x_RD, params["up"])), params["down"])

    def loss(x_BTD, params, experts_BTA, weights_BTA):
        y_BTD, _ = run_experts(
            *(x_BTD, experts_BTA, weights_BTA, params, axes, apply),
            num_experts=groups,
            transport=transport,
        )
        return jnp.square(y_BTD.astype(jnp.float32)).sum()

    mesh = make_mesh({"expert": 4}, devices)
    with use_mesh(mesh):

        def array(dtype, *shape, axes=("batch", "seq", None)):
            place = jax.NamedSharding(mesh, spec(*axes, shape=shape))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        params = {
            "up": array(jnp.bfloat16, groups, dim, mlp_dim, axes=axes["up"]),
            "down": array(jnp.bfloat16, groups, mlp_dim, dim, axes=axes["down"]),
        }
        x, experts, weights = [
            array(dtype, 4, 256, last)
            for dtype, last in (
                (jnp.bfloat16, dim),
                (jnp.int32, active),
                (jnp.float32, active),
            )
        ]
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        with jax.default_device(devices[0]):
            text = gradient.lower(x, params, experts, weights).compile().as_text()
    assert text.count(f'custom_call_target="{kernel}"') == 6
    assert "ragged-dot" not in text


def test_an_adapter_says_what_a_library_cannot_do(monkeypatch):
    x, w = [jnp.zeros(shape, jnp.bfloat16) for shape in ((256, 128), (2, 128, 192))]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokamax.refusal(x, w) == "tokamax is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert tokamax.refusal(x, w) == "it is for GPUs and TPUs"
    monkeypatch.setattr(tokamax, "platform", lambda: "gpu")
    assert "multiples of 128 columns" in tokamax.refusal(x, w)
    w = jnp.zeros((2, 128, 256))
    assert "Hopper" in tokamax.refusal(x, w)
    monkeypatch.setattr(tokamax, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    assert tokamax.refusal(x, w) is None
    assert "not float32" in tokamax.refusal(x.astype(jnp.float32), w)


@pytest.mark.slow
def test_an_adapter_asks_a_library_for_the_same_products(monkeypatch):
    """By its form for CPUs, which has nothing in common with its kernels but the call."""
    pytest.importorskip("tokamax", reason="tokamax is not installed: its adapter is not run")
    monkeypatch.setattr(tokamax, "KERNELS", "xla")
    x, w, sizes, dy = map(jnp.asarray, draw(SIZES[BORDERS]))
    y = tokamax.multiply(x, w, sizes, 1, x.dtype)
    dx = tokamax.multiply(dy, w, sizes, 2, x.dtype)
    dw = tokamax.accumulate(x, dy, sizes, w.dtype)
    assert_close((y, dx, dw), expect(*map(np.asarray, (x, w, sizes, dy))), 1e-5)


@pytest.mark.slow
def test_a_librarys_kernels_compile_for_an_h100():
    pytest.importorskip("tokamax", reason="tokamax is not installed: its kernels are not compiled")
    call = functools.partial(gradients, impl="tokamax")
    compiled = compile_on(h100_devices()[0], call, *abstract(rows=8192, groups=4))
    assert compiled.as_text().count("mosaic_gpu") >= 3
    assert temporaries(compiled) < 400
