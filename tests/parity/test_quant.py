"""4-bit blocks against bitsandbytes itself, on a CPU: bytes, values, products, and whole folders.

Models have widths that are multiples of 64, since bitsandbytes 0.50.2 misreads rows shorter than a
block on a CPU, and of 128 for fp8, since transformers 5.23 takes partial blocks for smaller ones
there. The CPU kernel for the 8-bit code takes the second nearest number now and then, so magnitudes
after double quantisation are compared by share. Each test of a layer has its own weight shapes:
rows that are whole blocks, and rows that are not.
"""

import json

import bitsandbytes as bnb
import bitsandbytes.functional as functional
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llmprep_jax as lp
from llmprep_jax.nn.param import Compute
from llmprep_jax.quant import dequantize, nf4, packed_layers
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


TOKENS = np.random.default_rng(0).integers(1, 96, (2, 16), dtype=np.int32)
FOLDERS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4 skipping down": {"load_in_4bit": True, "llm_int8_skip_modules": ["down_proj", "lm_head"]},
    "fp4 in bf16": {"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("dense") / "hf"
    model.save_pretrained(folder)
    return folder


def open_theirs(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **kwargs
    ).eval()


def their_logits(model):
    # with a gradient: without, the CPU kernel multiplies in bf16
    return model(torch.tensor(TOKENS)).logits.detach().float().numpy()


def our_logits(model):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda model, x: model(x).logits)(model, TOKENS))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_transformers_quantised_computes_the_same(name, dense_folder, tmp_path):
    settings = transformers.BitsAndBytesConfig(**FOLDERS[name])
    open_theirs(dense_folder, quantization_config=settings).save_pretrained(tmp_path / "theirs")
    theirs = open_theirs(tmp_path / "theirs")
    if name == "int8":  # which else rounds the activations to 8 bits too
        theirs = theirs.dequantize()
    ours = lp.load_model(tmp_path / "theirs")
    assert len(packed_layers(ours)) == (6 if "skipping" in name else 7)
    expected = their_logits(theirs)
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(our_logits(ours), expected, atol=limit)
    if name == "nf4 double":
        dense = lp.load_model(tmp_path / "theirs", dtype="float32")
        np.testing.assert_allclose(our_logits(dense), expected, atol=limit)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "fp8"])
def test_a_folder_that_we_packed_is_read_by_transformers(kind, dense_folder, tmp_path):
    ours = lp.load_model(dense_folder, dtype=kind, compute=Compute())
    if kind == "fp4":
        ours = lp.quant.quantize_model(lp.load_model(dense_folder), kind, "layers.attn.*")
    theirs = open_theirs(lp.save_model(ours, tmp_path / "ours"))
    packed = {type(module).__name__ for module in theirs.modules()}
    if kind == "int8":
        assert "Linear8bitLt" in packed
        theirs = theirs.dequantize()
    elif kind != "fp8":  # which transformers makes dense without a GPU
        assert "Linear4bit" in packed
    expected = our_logits(ours)
    np.testing.assert_allclose(their_logits(theirs), expected, atol=1e-5 * np.abs(expected).max())
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == ("fp8" if kind == "fp8" else "bitsandbytes")
