"""Packed weights: `quantize_model` and `load_model(dtype="nf4")` make models on them."""

from llmprep_jax.quant.kinds import KINDS, quantize
from llmprep_jax.quant.linear import QuantEinsum, dequantize_model, packed_layers, quantize_model
from llmprep_jax.quant.packed import Packed, dequantize

__all__ = [
    "KINDS",
    "Packed",
    "QuantEinsum",
    "dequantize",
    "dequantize_model",
    "packed_layers",
    "quantize",
    "quantize_model",
]
