"""4-bit blocks against bitsandbytes itself, on a CPU: bytes, values, products, and stored tensors.

Its CPU kernel for the 8-bit code takes the second nearest number now and then, so magnitudes after
double quantisation are compared by share. Each test has its own weight shapes: rows that are whole
blocks, and rows that are not.
"""

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmprep_jax.quant import dequantize, nf4
from llmprep_jax.quant.bitsandbytes_format import from_tensors, to_tensors
from llmprep_jax.quant.product import multiply

pytestmark = pytest.mark.parity
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
quantize = jax.jit(nf4.quantize, static_argnums=(1, 2, 3))


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 576), (300, 50)])
def test_bytes_are_equal(kind, dtype, shape):
    w = weight(*shape).to(dtype)
    codes, state = functional.quantize_4bit(w, quant_type=kind)
    ours = quantize(jnp.asarray(w.float().numpy()), kind, 64, False)
    np.testing.assert_array_equal(ours.codes[:, None], codes.numpy())
    np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())
    values = functional.dequantize_4bit(codes, state).float().numpy()
    np.testing.assert_array_equal(dequantize(ours, w.numpy().dtype if dtype == torch.float32
                                             else "bfloat16"), values)  # fmt: skip


@kinds
def test_double_quantisation_is_equal_but_for_its_kernels_choices(kind):
    w = weight(1024, 576)
    _, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=True)
    ours = quantize(jnp.asarray(w.numpy()), kind)
    np.testing.assert_allclose(ours.offset, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.nested_absmax, state.state2.absmax.numpy(), rtol=1e-5)
    assert (np.asarray(ours.absmax) == state.absmax.numpy()).mean() >= 0.998


@kinds
def test_a_stored_layer_is_read_and_computes_the_same(kind):
    layer = bnb.nn.Linear4bit(
        576, 192, bias=False, quant_type=kind, compress_statistics=True, compute_dtype=torch.float32
    )
    layer.load_state_dict({"weight": weight(192, 576)})
    layer = layer.to("cpu")
    stored = {name: x.numpy() for name, x in layer.state_dict().items()}
    packed = from_tensors(stored, "weight")
    x = torch.randn(4, 576, generator=torch.Generator().manual_seed(1))
    expected = layer(x).detach().numpy()
    found = multiply(jnp.asarray(x.numpy()), packed, "float32")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert set(to_tensors(packed, "weight", "float32")) == set(stored)


@kinds
@pytest.mark.parametrize("double", [False, True])
def test_tensors_that_we_write_are_read_by_bitsandbytes(kind, double):
    packed = quantize(jnp.asarray(weight(64, 576).numpy()), kind, 64, double)
    tensors = to_tensors(packed, "w", "float32")
    state = {name.removeprefix("w."): torch.tensor(x) for name, x in tensors.items() if name != "w"}
    param = bnb.nn.Params4bit.from_prequantized(torch.tensor(tensors["w"]), state, device="cpu")
    values = functional.dequantize_4bit(param.data, param.quant_state).numpy()
    np.testing.assert_allclose(values, dequantize(packed), atol=1e-7)
