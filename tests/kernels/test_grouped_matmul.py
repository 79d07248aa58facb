"""Grouped products: every implementation is the reference, forward and backward, for any sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.grouped_matmul import blocks, reference
from llmprep_jax.kernels.grouped_matmul.api import IMPLS, grouped_matmul
from llmprep_jax.sharding import make_mesh, use_mesh

DIM, MLP_DIM = 12, 20
CASES = {  # rows, sizes of the groups
    "some-empty": (70, (0, 33, 0, 5, 32, 0)),
    "all-in-one": (70, (0, 0, 70)),
    "rows-beyond": (70, (1, 40, 2)),
    "all-empty": (40, (0, 0)),
    "whole-blocks": (96, (32, 64)),
    "few-rows": (6, (0, 3, 0, 1, 1, 0)),
    "few-rows-full": (16, (10, 0, 6)),
}
on_cases = pytest.mark.parametrize("case", CASES)
on_impls = pytest.mark.parametrize("impl", IMPLS)


def draw(case, dtype=jnp.float32):
    """(x, w, sizes, cotangent); what lies beyond the groups is NaN, so as to be seen."""
    (num_rows, sizes), rng = CASES[case], np.random.default_rng(0)
    x, w, dy = [
        rng.normal(size=shape)
        for shape in ((num_rows, DIM), (len(sizes), DIM, MLP_DIM), (num_rows, MLP_DIM))
    ]
    x[sum(sizes) :] = dy[sum(sizes) :] = np.nan
    return [jnp.asarray(z, dtype) for z in (x, w)] + [jnp.asarray(sizes), jnp.asarray(dy, dtype)]


def expect(x, w, sizes, dy):
    """The reference and its gradients, with nothing beyond the groups."""
    x, w, dy = [z.astype(jnp.float32) for z in (x, w, dy)]
    is_row = np.arange(len(x))[:, None] < int(sizes.sum())
    y, vjp = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes), x, w)
    return y, *vjp(jnp.where(is_row, dy, 0))


@on_impls
@on_cases
def test_products_and_gradients_are_those_of_the_reference(case, impl):
    x, w, sizes, dy = draw(case)

    @jax.jit
    def run(x, w, dy):
        ours = functools.partial(grouped_matmul, sizes_E=sizes, dtype=jnp.float32, impl=impl)
        y, vjp = jax.vjp(ours, x, w)
        return y, *vjp(dy)

    for found, expected in zip(run(x, w, dy), expect(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


@on_impls
def test_bf16_operands_are_rounded_once_and_summed_in_float32(impl):
    x, w, sizes, dy = draw("some-empty")
    rounded = [z.astype(jnp.bfloat16).astype(jnp.float32) for z in (x, w)]
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, dtype=jnp.bfloat16, impl=impl), x, w)
    dy = dy.astype(jnp.bfloat16).astype(jnp.float32)
    for found, expected in zip((y, *vjp(dy)), expect(*rounded, sizes, dy), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


@on_impls
@pytest.mark.parametrize("case", ["some-empty", "few-rows"])
def test_results_have_the_dtypes_of_what_they_belong_to(case, impl):
    x, w, sizes, dy = draw(case, jnp.bfloat16)
    y, vjp = jax.vjp(
        lambda x, w: grouped_matmul(x, w, sizes, dtype=jnp.bfloat16, impl=impl),
        x, w.astype(jnp.float32),
    )  # fmt: skip
    dx, dw = vjp(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    for found, expected in zip((y, dx, dw), expect(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.05, rtol=0.01)


def test_few_rows_and_many_are_two_ways_to_one_result(monkeypatch):
    x, w, sizes, _ = draw("few-rows-full")
    run = functools.partial(grouped_matmul, x, w, sizes, dtype=jnp.float32, impl="blocks")
    gathered = run()
    monkeypatch.setattr(blocks, "GATHERED_ROWS", 0)
    np.testing.assert_allclose(run(), gathered, atol=1e-5)


@on_impls
def test_layers_are_scanned_rematerialised_and_mapped_over_devices(impl):
    x, w, sizes, dy = draw("all-in-one")
    w = jnp.stack([w, -w])

    def loss(x, w):
        @jax.checkpoint
        def layer(x, w):
            y = grouped_matmul(x, w, sizes, dtype=jnp.float32, impl=impl)
            return jnp.tanh(y[:, :DIM]), None

        return (jax.lax.scan(layer, x, w)[0] * dy[:, :DIM]).sum()

    def total(x, w):
        return jax.lax.psum(loss(x, w), "data")

    expected = jax.grad(loss, argnums=(0, 1))(x, w)
    with use_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
        mapped = jax.shard_map(total, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
        xs = jax.reshard(jnp.concatenate([x, x]), jax.P("data"))
        dx, dw = jax.jit(jax.grad(mapped, argnums=(0, 1)))(xs, w)
    np.testing.assert_allclose(dx, jnp.concatenate([expected[0]] * 2), atol=1e-5)
    np.testing.assert_allclose(dw, 2 * expected[1], atol=1e-5)


def test_the_default_is_by_platform():
    run = functools.partial(grouped_matmul, dtype=jnp.float32)
    jaxpr = str(jax.make_jaxpr(run)(*draw("all-in-one")[:3]))
    assert ("ragged_dot" in jaxpr) == (jax.default_backend() != "cpu")
