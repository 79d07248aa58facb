"""A model with packed linear layers as the tensors and config fields of a Hugging Face folder.

nf4, fp4 and int8 are written as bitsandbytes does, fp8 as DeepSeek-V3 is released; what was packed
is written bit by bit. A file of int8 holds each row's largest magnitude, of which the scale is a
127th; it is chosen such that the division gives the scale back. Layers that are stored as one
matrix, such as a qkv, are written dense.
"""

from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum, Embed, Head
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.quant import bitsandbytes_format
from llmprep_jax.quant.int8 import LARGEST
from llmprep_jax.quant.linear import dequantize_model, find_layers, packed_layers
from llmprep_jax.quant.packed import Packed
from llmprep_jax.weights import table
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.rows import Table
from llmprep_jax.weights.table import Entry, Rows

_REMEDY = "save lp.quant.dequantize_model(model)"


def check_can_save(model: nnx.Module) -> None:
    """Refuses a model whose packed layers no folder holds as they are.

    Raises:
      ValueError: in one line, with the remedy.
    """
    packed = [layer.packed for layer in packed_layers(model).values()]
    kinds = sorted({weight.kind for weight in packed})
    if len(kinds) > 1 or len({getattr(x, "block", 0) for x in packed if x.kind == "fp8"}) > 1:
        raise ValueError(
            f"the layers are packed in several ways ({', '.join(kinds)}), which no folder holds;"
            f" {_REMEDY}"
        )
    if kinds == ["int4"]:
        raise ValueError(f"packed weights of int4 are not written; {_REMEDY}")


def tensors(model: nnx.Module, names: Table) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array) of every tensor, one layer in host memory at a time."""
    model = _with_dense_parts(model, names)
    layers = packed_layers(model)
    packed = {f"{path}.{name}" for path, layer in layers.items() for name in layer.names}
    flat = nnx.to_flat_state(nnx.state(model))
    dense = [item for item in flat if ".".join(map(str, item[0])) not in packed]
    yield from table.export(nnx.from_flat_state(dense), names)
    dtype = str(model.dtype)
    for path, layer in layers.items():
        stack = layer.packed
        for place, name in _row(path, layer, names).names().items():
            matrix = jax.tree.map(lambda x: to_host(x, place), stack)  # noqa: B023
            yield from _TENSORS[stack.kind](matrix, name, dtype).items()


def _with_dense_parts(model: nnx.Module, names: Table) -> nnx.Module:
    """The model with dense layers where several are one matrix."""
    layers = packed_layers(model)
    parts = {path: x for path, x in layers.items() if _row(path, x, names).row.part[1] > 1}
    return dequantize_model(model, parts) if parts else model


def _row(path: str, layer: Einsum, names: Rows) -> Entry:
    parts = [int(part) if part.isdigit() else part for part in path.split(".")]
    row = table.entry([*parts, "w"], layer.shape, names)
    if row is None:
        raise ValueError(f"the weight table names no tensor for {path}.w")
    return row


def _bitsandbytes4(packed: Packed, name: str, dtype: str) -> dict[str, np.ndarray]:
    return bitsandbytes_format.to_tensors(packed, name, dtype)


def _bitsandbytes8(packed: Packed, name: str, dtype: str) -> dict[str, np.ndarray]:
    layer = name.removesuffix(".weight")
    row_major = np.zeros((), np.uint8)
    return {
        name: packed.codes,
        f"{layer}.SCB": _magnitudes(packed.scale),
        f"{layer}.weight_format": row_major,
    }


def _magnitudes(scale: np.ndarray) -> np.ndarray:
    """Numbers of which these are a 127th, to the last bit where there are such."""
    near = scale * np.float32(LARGEST)
    around = [np.nextafter(near, np.float32(end)) for end in (0, np.inf)]
    for other in around:
        better = other / np.float32(LARGEST) == scale
        near = np.where(better & (near / np.float32(LARGEST) != scale), other, near)
    return near


def _fp8(packed: Packed, name: str, dtype: str) -> dict[str, np.ndarray]:
    codes = packed.codes.view(ml_dtypes.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": packed.scale_inv}


_TENSORS = {
    "nf4": _bitsandbytes4,
    "fp4": _bitsandbytes4,
    "int8": _bitsandbytes8,
    "fp8": _fp8,
}


def config_fields(model: nnx.Module, names: Table) -> dict[str, Any]:
    """`quantization_config` of config.json; nothing for a model without packed layers."""
    model = _with_dense_parts(model, names)
    layers = packed_layers(model)
    if not layers:
        return {}
    first, left = next(iter(layers.values())), _dense_modules(model, names)
    kind, block = first.packed.kind, getattr(first.packed, "block", None)
    if kind == "fp8":
        fields: dict[str, Any] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block, block],
        }
        skipped = "modules_to_not_convert"
    else:
        fields = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": kind != "int8",
            "load_in_8bit": kind == "int8",
        }
        skipped = "llm_int8_skip_modules"
    if kind in ("nf4", "fp4"):
        fields |= {
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": first.packed.nested_absmax is not None,
            "bnb_4bit_compute_dtype": str(first.dtype),
            "bnb_4bit_quant_storage": "uint8",
        }
    head = names.in_memory()[names.head].name.removesuffix(".weight") if names.head else "lm_head"
    # without a list transformers leaves the head alone, with one only what it names
    return {"quantization_config": fields | ({skipped: [head, *left]} if left else {})}


def _dense_modules(model: nnx.Module, names: Table) -> list[str]:
    """Names, in memory, of linear layers that are not packed."""
    dense = find_layers(model, lambda node: isinstance(node, Einsum) and hasattr(node, "w"))
    layers = {path: x for path, x in dense.items() if not isinstance(x, (Embed, Head))}
    modules, in_memory = {}, names.in_memory()
    for path, layer in layers.items():
        for name in _row(path, layer, in_memory).names().values():
            # a layer's experts are one module in transformers
            module = name.rsplit(".", 3)[0] if isinstance(layer, ExpertWeights) else name
            modules[module.removesuffix(".weight")] = None
    return list(modules)
