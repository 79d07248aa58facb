"""Einsum layers: what they compute and in which dtype, their gradients, and how they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.linear import Einsum, Embed, Head, contract, contract_logits
from llmprep_jax.nn.param import AdapterParam, Buffer, Compute, Param, param

SHAPES = {
    "BTD,DNH->BTNH": ((2, 3, 8), (8, 4, 5)),
    "BTNH,NHD->BTD": ((2, 3, 4, 5), (4, 5, 8)),
    "BTD,DF->BTF": ((2, 3, 8), (8, 16)),
    "BTD,VD->BTV": ((2, 3, 8), (32, 8)),
    "BTD,DR->BTR": ((2, 3, 8), (8, 2)),
    "BTNH,NHR->BTR": ((2, 3, 4, 4), (4, 4, 2)),
}
equations = pytest.mark.parametrize("eqn", SHAPES)


def operands(eqn):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in SHAPES[eqn]]


def axes_of(eqn):
    return (None,) * len(eqn.split("->")[1])


@equations
def test_contract_and_its_gradients_are_those_of_einsum(eqn):
    x, w = operands(eqn)
    ours, vjp = jax.vjp(lambda x, w: contract(eqn, x, w, jnp.float32, axes_of(eqn)), x, w)
    plain, plain_vjp = jax.vjp(lambda x, w: jnp.einsum(eqn, x, w), x, w)
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), jnp.float32)
    for found, expected in zip(vjp(dy), plain_vjp(dy), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("num_outputs", "is_turned"), [(8, False), (64, True)])
def test_the_gradient_of_a_narrow_weight_does_not_turn_its_inputs(num_outputs, is_turned):
    def loss(w, x):
        return jnp.sum(jnp.sin(contract("BTD,DR->BTR", x, w, jnp.float32, (None,) * 3)))

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(96, num_outputs), (4, 50, 96)]
    ]
    program = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    assert ("f32[96,200]" in program) == is_turned


@equations
def test_bf16_operands_are_rounded_once_and_summed_in_float32(eqn):
    x, w = operands(eqn)
    ours, vjp = jax.vjp(lambda x, w: contract(eqn, x, w, jnp.bfloat16, axes_of(eqn)), x, w)

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    plain, plain_vjp = jax.vjp(lambda x, w: jnp.einsum(eqn, x, w), rounded(x), rounded(w))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, plain, atol=1e-5)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=ours.shape), jnp.float32)
    for found, expected in zip(vjp(dy), plain_vjp(rounded(dy)), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_in_the_dtype_of_the_activations(dtype):
    x, w = operands("BTD,DF->BTF")
    x, w = x.astype(dtype), w.astype("bfloat16")
    y, vjp = jax.vjp(
        lambda x, w: contract("BTD,DF->BTF", x, w, jnp.bfloat16, axes_of("BTD,DF->BTF")), x, w
    )
    dx, dw = vjp(y)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)


def test_logits_are_float32_whatever_the_activations_are():
    x, w = operands("BTD,VD->BTV")
    logits = contract_logits("BTD,VD->BTV", x.astype("bfloat16"), w, jnp.dtype("bfloat16"))
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("eqn", "shape", "fan_in", "bias"),
    [
        ("BTD,DNH->BTNH", (64, 16, 32), 64, (16, 32)),
        ("BTNH,NHD->BTD", (16, 32, 64), 512, (64,)),
        ("BTD,DF->BTF", (64, 512), 64, (512,)),
    ],
)
def test_weights_begin_with_the_variance_of_their_fan_in(eqn, shape, fan_in, bias):
    layer = Einsum(
        eqn,
        shape,
        (None,) * len(shape),
        axes_of(eqn),
        bias=True,
        compute=Compute(),
        rngs=nnx.Rngs(0),
    )
    w = np.asarray(layer.w[...])
    assert w.std() == pytest.approx(fan_in**-0.5, rel=0.02)
    assert abs(w.mean()) < 0.01
    assert layer.b.shape == bias
    assert not np.any(layer.b[...])


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_layer_by_output_is_the_same_layer(num_rows):
    layer = Einsum(
        "BTD,DNH->BTNH",
        (6, 2, 5),
        ("embed", "heads", "head"),
        ("batch", None, "heads", None),
        bias=True,
        compute=Compute(),
        rngs=nnx.Rngs(0),
    )
    turned = layer.by_output()
    assert (turned.eqn, turned.shape) == ("BTD,NHD->BTNH", (2, 5, 6))
    assert (turned.layer_shape, turned.axes) == ((2, 5, 6), ("heads", "head", "embed"))
    x = np.random.default_rng(0).normal(size=(1, num_rows, 6)).astype(np.float32)
    np.testing.assert_allclose(turned(x), layer(x), atol=1e-6)


def test_a_layer_adds_its_bias():
    layer = Einsum(
        "BTD,DF->BTF", (8, 4), (None,) * 2, (None,) * 3, bias=True, compute=Compute(),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.ones((1, 2, 8))
    before = layer(x)
    layer.b[...] = jnp.arange(4.0)
    np.testing.assert_allclose(layer(x) - before, [[[0, 1, 2, 3]] * 2], atol=1e-6)


def test_an_embedding_looks_up_rows_and_reads_out_against_them():
    embed = Embed(5, 3, compute=Compute(), rngs=nnx.Rngs(0))
    x = embed(jnp.array([[4, 0]]))
    np.testing.assert_array_equal(x[0], embed.w[...][jnp.array([4, 0])])
    np.testing.assert_allclose(embed.unembed(x)[0], x[0] @ embed.w[...].T, atol=1e-6)


def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_known_and_else_gives_the_last_row():
    embed, ids = Embed(5, 3, compute=Compute(), rngs=nnx.Rngs(0)), jnp.array([[99]])
    with pytest.raises(ValueError, match="token 99 is outside the vocabulary of 5"):
        embed(ids)
    np.testing.assert_array_equal(jax.jit(embed)(ids)[0, 0], embed.w[...][4])


def test_parameters_are_made_in_their_dtype_and_used_in_the_activations():
    compute = Compute(dtype="float32", param_dtype="bfloat16")
    embed, head = [kind(*sizes, compute=compute, rngs=nnx.Rngs(0)) for kind, sizes in
                   ((Embed, (5, 3)), (Head, (3, 5)))]  # fmt: skip
    assert embed.w.dtype == head.w.dtype == jnp.bfloat16
    assert embed(jnp.array([[1]])).dtype == jnp.float32


def test_roles_of_variables_do_not_overlap():
    model = nnx.Module()
    model.base = param(nnx.Rngs(0), (2,), (None,), jax.nn.initializers.ones)
    model.adapter, model.state = AdapterParam(jnp.ones(2)), Buffer(jnp.ones(2))
    for kind, name in ((Param, "base"), (AdapterParam, "adapter"), (Buffer, "state")):
        assert list(nnx.to_pure_dict(nnx.state(model, kind))) == [name]
