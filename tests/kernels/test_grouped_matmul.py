"""Grouped products: every implementation is the reference, forward and backward, for any sizes."""

import functools
import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.grouped_matmul import blocks, reference
from llmprep_jax.kernels.grouped_matmul.api import BACKENDS, IMPLS, backend, grouped_matmul
from llmprep_jax.kernels.platforms import tell_once
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.grids import cases

DIM, MLP_DIM = 18, 20
CASES = {  # rows, sizes of the groups
    "some-empty": (70, (0, 33, 0, 5, 32, 0)),
    "all-in-one": (70, (0, 0, 70)),
    "rows-beyond": (70, (1, 40, 2)),
    "all-empty": (40, (0, 0)),
    "whole-blocks": (96, (32, 64)),
    "few-rows": (6, (0, 3, 0, 1, 1, 0)),
    "few-rows-full": (16, (10, 0, 6)),
}
HERE = tuple(impl for impl in IMPLS if impl != "tokamax")  # has no kernels for CPUs
LAWFUL = ("blocks", "ragged")  # in a checked `jax.shard_map` on CPUs, where Pallas is not
on_cases = pytest.mark.parametrize("case", CASES)
on_impls = pytest.mark.parametrize("impl", cases(HERE, fast=LAWFUL))


def draw(case, dtype=jnp.float32):
    """(x, w, sizes, cotangent); what lies beyond the groups is NaN, so as to be seen."""
    (num_rows, sizes), rng = CASES[case], np.random.default_rng(0)
    x, w, dy = [
        rng.normal(size=shape)
        for shape in ((num_rows, DIM), (len(sizes), DIM, MLP_DIM), (num_rows, MLP_DIM))
    ]
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return x.astype(dtype), w.astype(dtype), np.array(sizes, np.int32), dy.astype(dtype)


def expect(x, w, sizes, dy):
    """(product, gradients by x and w) in float64, group by group; zeros beyond the groups."""
    x, w, dy = [z.astype(np.float64) for z in (x, w, dy)]
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        rows = slice(start, start + size)
        y[rows], dx[rows] = x[rows] @ w[group], dy[rows] @ w[group].T
        dw[group] = x[rows].T @ dy[rows]
    return y, dx, dw


@functools.partial(jax.jit, static_argnames=("dtype", "impl"))
def run(x, w, sizes, dy, dtype, impl):
    """The product and its gradients, computed."""
    ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=dtype, impl=impl)
    y, vjp = jax.vjp(ours, x, w)
    return y, *vjp(dy)


@on_cases
def test_the_reference_says_what_a_loop_over_groups_does(case):
    x, w, sizes, dy = draw(case)
    found = jax.jit(reference.grouped_matmul)(x, w, sizes)
    np.testing.assert_allclose(found, expect(x, w, sizes, dy)[0], atol=2e-5)


# XLA's own product of groups has no blocks and no way for few rows; tiles have a test below
ANY_IMPL = ("some-empty", "rows-beyond", "all-empty", "few-rows")
PAIRS = cases(
    itertools.product(CASES, HERE),
    fast=[*itertools.product(ANY_IMPL, LAWFUL), *[(case, "blocks") for case in CASES]],
)


@pytest.mark.parametrize(("case", "impl"), PAIRS)
def test_products_and_gradients_are_those_of_a_loop_over_groups(case, impl):
    operands = draw(case)
    found = run(*operands, "float32", impl)
    chex.assert_trees_all_close(found, expect(*operands), atol=2e-5)


@on_impls
def test_bf16_operands_are_rounded_once_and_summed_in_float32(impl):
    x, w, sizes, dy = draw("some-empty")
    found = run(x, w, sizes, dy, "bfloat16", impl)
    rounded = [z.astype(jnp.bfloat16).astype(np.float32) for z in (x, w, dy)]
    chex.assert_type(found, jnp.float32)
    chex.assert_trees_all_close(found, expect(*rounded[:2], sizes, rounded[2]), atol=2e-5)


@on_impls
@pytest.mark.parametrize("case", ["some-empty", "few-rows"])
def test_results_have_the_dtypes_of_what_they_belong_to(case, impl):
    x, w, sizes, dy = draw(case, jnp.bfloat16)
    found = run(x, w.astype(np.float32), sizes, dy, "bfloat16", impl)
    chex.assert_type(found, [jnp.bfloat16, jnp.bfloat16, jnp.float32])
    found = [np.asarray(z, np.float32) for z in found]
    for ours, expected in zip(found, expect(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(ours, expected, atol=0.05, rtol=0.01)


def test_few_rows_and_many_are_two_ways_to_one_result(monkeypatch):
    operands = draw("few-rows-full")
    gathered = run(*operands, "float32", "blocks")
    monkeypatch.setattr(blocks, "GATHERED_ROWS", 0)
    in_blocks = jax.jit(lambda *x: run.__wrapped__(*x, "float32", "blocks"))(*operands)
    chex.assert_trees_all_close(in_blocks, gathered, atol=1e-5)


@pytest.mark.parametrize("impl", LAWFUL)
def test_layers_are_scanned_rematerialised_and_mapped_over_devices(impl):
    x, w, sizes, dy = draw("all-in-one")
    w = np.stack([w, -w])

    def loss(x, w):
        @jax.checkpoint
        def layer(x, w):
            y = grouped_matmul(x, w, jnp.asarray(sizes), dtype=jnp.float32, impl=impl)
            return jnp.tanh(y[:, :DIM]), None

        return (jax.lax.scan(layer, x, w)[0] * dy[:, :DIM]).sum()

    def total(x, w):
        return jax.lax.psum(loss(x, w), "data")

    expected = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w)
    with use_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        mapped = jax.shard_map(total, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
        xs = jax.reshard(np.concatenate([x, x]), jax.P("data"))
        dx, dw = jax.jit(jax.grad(mapped, argnums=(0, 1)))(xs, w)
    np.testing.assert_allclose(dx, np.concatenate([expected[0]] * 2), atol=1e-5)
    np.testing.assert_allclose(dw, 2 * expected[1], atol=1e-5)


def test_the_default_is_by_platform():
    assert backend(None, *map(jnp.asarray, draw("few-rows")[:2])) is blocks
    for platform, name in (("tpu", "pallas_tpu"), ("gpu", "pallas_gpu"), (None, "ragged")):
        assert BACKENDS[platform][0] == name


def test_another_backend_takes_the_place_of_one_that_cannot(recwarn, monkeypatch):
    x, w = map(jnp.asarray, draw("few-rows")[:2])
    tell_once.cache_clear()
    for _ in range(2):
        assert backend("pallas_tpu", x[:0], w) is blocks
    monkeypatch.setitem(sys.modules, "llmprep_jax.kernels.grouped_matmul.pallas_gpu", None)
    assert backend("pallas_gpu", x, w) is blocks
    said = [str(warning.message) for warning in recwarn]
    assert "pallas_gpu cannot do this (import of llmprep_jax.kernels" in said.pop()
    assert said == [
        "grouped_matmul: pallas_tpu cannot do this (there are no rows); another takes its place"
    ]


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="unknown impl 'fast'; there are blocks, ragged, pallas"):
        grouped_matmul(*map(jnp.asarray, draw("few-rows")[:3]), dtype="float32", impl="fast")
