"""Layers on packed weights: what they compute, alone and stacked, their gradients, their memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Buffer, Compute, Param
from llmprep_jax.nn.stack import scan, stack, unstack
from llmprep_jax.quant import KINDS, QuantEinsum, dequantize_model, product, quantize_model
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from tests.random_modules import random_module

EQUATIONS = {
    "BTD,DF->BTF": ((40, 24), ("embed", "mlp"), ("batch", "seq", "mlp")),
    "BTD,DNH->BTNH": ((40, 2, 13), ("embed", "heads", "head"), ("batch", "seq", "heads", "head")),
    "BTNH,NHD->BTD": ((5, 8, 24), ("heads", "head", "embed"), ("batch", "seq", "act_embed")),
}
# how a weight is made a matrix and how that is packed know nothing of each other: each once here
SOME = [("BTD,DF->BTF", "nf4"), ("BTD,DNH->BTNH", "fp4"), ("BTNH,NHD->BTD", "int8")]
SOME += [("BTD,DF->BTF", "int4"), ("BTD,DF->BTF", "fp8")]
ALL = [(eqn, kind) for eqn in EQUATIONS for kind in KINDS]
run = jax.jit(lambda layer, x: layer(x))


def grid(some, cells):
    """Some cells in the fast suite, and the rest of them in `make test-all`."""
    rest = [pytest.param(*cell, marks=pytest.mark.grid) for cell in cells if cell not in some]
    return [*some, *rest]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles even of small layers, and for a block of 64 a rest of 26 rows."""
    monkeypatch.setattr(product, "TILE", 320)


def make_layer(eqn="BTD,DF->BTF", bias=True, dtype="float32"):
    shape, axes, out_axes = EQUATIONS[eqn]
    compute = Compute(dtype=dtype, param_dtype=dtype)
    make = functools.partial(Einsum, eqn, shape, axes, out_axes, bias=bias, compute=compute)
    return random_module(lambda: make(rngs=nnx.Rngs(0)))


def make_input(eqn="BTD,DF->BTF", dtype="float32"):
    ins = (5, 8) if eqn.startswith("BTNH") else (40,)
    return jnp.asarray(np.random.default_rng(1).normal(size=(8, 3, *ins)), dtype)


@jax.jit
def run_and_grad(layer, x):
    """y, the gradient of the sum of sin(y), and the weight; one program of all."""
    y, pullback = jax.vjp(layer, x)
    dx = pullback(jnp.cos(y.astype(jnp.float32)).astype(y.dtype))[0]
    return y, dx, layer.weight()


@pytest.mark.parametrize(("eqn", "kind"), grid(SOME, ALL))
def test_a_layer_and_its_gradient_are_those_of_the_dense_weight(eqn, kind):
    x, packed = make_input(eqn), quantize_model(nnx.List([make_layer(eqn)]), kind)
    dense = dequantize_model(packed)
    assert type(packed[0]) is QuantEinsum
    assert type(dense[0]) is Einsum
    assert packed[0].shape == dense[0].shape == EQUATIONS[eqn][0]
    found, expected = run_and_grad(packed[0], x), run_and_grad(dense[0], x)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_bf16_activations_stay_bf16_and_are_summed_in_float32():
    x, layer = make_input(dtype="bfloat16"), make_layer(dtype="bfloat16")
    packed = quantize_model(nnx.List([layer]), "nf4")
    y, dx, _ = run_and_grad(packed[0], x)
    assert y.dtype == dx.dtype == jnp.bfloat16
    dense = dequantize_model(packed)[0]
    assert dense.w.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.float32(z) for z in (y, run(dense, x))), atol=0.03)


# blocks across rows, and rows; nf4 takes LLVM five times as long
@pytest.mark.parametrize(
    ("kind", "remats"), [("nf4", ["dots"]), ("int8", ["none", "full", "dots"])], ids=["nf4", "int8"]
)
def test_a_stack_is_its_layers_under_vmap_and_scan_with_and_without_remat(kind, remats):
    eqn, axes = "BTD,DF->BTF", ("embed", "mlp")
    compute = Compute()
    make = functools.partial(Einsum, eqn, (40, 40), axes, ("batch", "seq", "mlp"), compute=compute)
    layers = random_module(lambda: stack(make, 3, rngs=nnx.Rngs(0)))
    packed = quantize_model(nnx.List([layers]), kind)[0]
    assert packed.shape == (3, 40, 40)
    each, x = unstack(packed), make_input()
    over_layers = jax.jit(jax.vmap(lambda layer, x: layer(x), in_axes=(0, None)))(packed, x)
    one_by_one = [run_and_grad(layer, x) for layer in each]
    for i, (y, _, w) in enumerate(one_by_one):
        chex.assert_trees_all_close((over_layers[i], packed.weight()[i]), (y, w), atol=1e-5)

    def total(layers, x, remat):
        step = lambda layer, x: jnp.tanh(layer(x))  # noqa: E731
        return scan(step, layers, x, compute=Compute(remat=remat)).sum()

    grad = jax.jit(jax.grad(total, argnums=1), static_argnums=2)
    expected = grad(dequantize_model(nnx.List([packed]))[0], x, "none")
    for remat in remats:
        np.testing.assert_allclose(grad(packed, x, remat), expected, atol=1e-5)
    if "none" in remats:
        np.testing.assert_allclose(grad(each, x, "none"), expected, atol=1e-5)


PASSES = [("nf4", "forward"), ("int8", "forward"), ("int4", "backward"), ("fp8", "backward")]
PASSES += [("nf4", "backward")]


@pytest.mark.parametrize(
    ("kind", "pass_"), grid(PASSES, [(kind, x) for kind in KINDS for x in ("forward", "backward")])
)
def test_no_dense_copy_of_a_weight_is_alive(kind, pass_, monkeypatch):
    monkeypatch.setattr(product, "TILE", 2**16)
    size = 1024
    axes = ("batch", "seq", "mlp")

    def make():
        compute = Compute(dtype="bfloat16", param_dtype="bfloat16")
        layer = Einsum("BTD,DF->BTF", (size, size), ("embed", "mlp"), axes, compute=compute,
                       rngs=nnx.Rngs(0))  # fmt: skip
        return quantize_model(nnx.List([layer]), kind)[0]

    x = jax.ShapeDtypeStruct((1, 4, size), jnp.bfloat16)
    f = run if pass_ == "forward" else jax.jit(jax.grad(lambda x, l: l(x).sum(), argnums=0))
    arguments = (jax.eval_shape(make), x) if pass_ == "forward" else (x, jax.eval_shape(make))
    memory = f.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < size * size * 2 / 2  # half a bf16 copy


def test_layers_in_a_list_are_not_dequantised_ahead_of_each_other(monkeypatch):
    monkeypatch.setattr(product, "TILE", 2**20)

    def make():
        layer = Einsum("BTD,DF->BTF", (512, 512), ("embed", "mlp"), ("batch", "seq", "mlp"),
                       compute=Compute(), rngs=nnx.Rngs(0))  # fmt: skip
        return quantize_model(nnx.List([layer]), "int8")[0]

    layers = [jax.eval_shape(make) for _ in range(8)]
    x = jax.ShapeDtypeStruct((1, 4, 512), jnp.float32)
    chain = jax.jit(lambda layers, x: functools.reduce(lambda x, layer: layer(x), layers, x))
    memory = chain.lower(layers, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 512 * 512 * 4  # of eight


def test_nothing_of_a_packed_layer_is_trained():
    packed = quantize_model(nnx.List([make_layer(bias=False)]), "nf4")
    assert not jax.tree.leaves(nnx.state(packed, Param))
    assert len(jax.tree.leaves(nnx.state(packed, Buffer))) == 4


def smollm2():
    return registry.build(registry.preset("smollm2-135m"), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "bits"), [("nf4", 4.127), ("int4", 4.2), ("int8", 8.04), ("fp8", 8.006)]
)
def test_bytes_of_smollm2s_layers(kind, bits):
    packed = jax.eval_shape(lambda: quantize_model(smollm2(), kind))
    found = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(packed, Buffer)))
    assert 8 * found / 106_168_320 == pytest.approx(bits, rel=0.005)


def test_targets_are_a_regex_of_whole_paths():
    model = jax.eval_shape(smollm2)
    packed = jax.eval_shape(lambda: quantize_model(smollm2(), "nf4", r"layers\.mlp\..*"))
    assert type(packed.layers.mlp.up) is QuantEinsum
    assert type(packed.layers.attn.q) is Einsum
    with pytest.raises(ValueError, match="target 'mlp' matches no dense linear layer; there are"):
        quantize_model(model, "nf4", "mlp")
    with pytest.raises(ValueError, match="is no regex"):
        quantize_model(model, "nf4", "(")
    with pytest.raises(ValueError, match="unknown kind 'q4'"):
        quantize_model(model, "q4")


# arrays of one dimension and two, rows of a scale each and of a block; int8 is in test_load
@pytest.mark.parametrize(
    ("eqn", "kind"),
    grid(
        [("BTNH,NHD->BTD", "nf4"), ("BTD,DF->BTF", "int4"), ("BTD,DF->BTF", "fp8")],
        [cell for cell in ALL if cell[0] != "BTD,DNH->BTNH"],  # whose rows devices do not divide
    ),
)
def test_a_mesh_parts_the_rows_of_packed_weights_and_computes_the_same(eqn, kind):
    x, layer = make_input(eqn), nnx.List([make_layer(eqn)])
    packed = quantize_model(layer, kind)[0]
    expected = run_and_grad(packed, x)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        parted = quantize_model(nnx.List([make_layer(eqn)]), kind)[0]
        found = run_and_grad(parted, x)
        laid = jax.typeof(found[-1])
        assert laid.sharding.spec == spec(*parted.axes, shape=laid.shape)
    codes = parted.codes[...]
    assert codes.addressable_shards[0].data.size == codes.size // 8
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(x)) for x in (parted, packed)))
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)
