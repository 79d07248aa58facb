"""The tensors in which bitsandbytes stores a 4-bit weight, written and read.

For a weight called `name`: `name` (the codes, uint8 [n / 2, 1]), `.absmax`, `.quant_map`, with
double quantisation `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`,
a JSON text as bytes. The offset of double quantisation is in that text and not a tensor, and
`shape` there is the weight's, outputs by inputs.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmprep_jax.quant.nf4 import CODES, NESTED_BLOCK, NESTED_MAP, Block4
from llmprep_jax.types import Array
from llmprep_jax.weights.safetensors import one_line, quoted

_NEEDED = {"quant_type", "blocksize", "dtype", "shape"}
_TOLERANCE = 1e-6  # between code books


def to_tensors(packed: Block4, name: str, dtype: str = "bfloat16") -> dict[str, np.ndarray]:
    """One weight's tensors by their stored names.

    Args:
      packed: one matrix. name: of the weight, ending in ".weight".
      dtype: in which bitsandbytes dequantises it.

    Raises:
      ValueError: it is a stack of matrices.
    """
    if packed.stacked:
        raise ValueError(f"{name} is a stack of {packed.stacked} weights; give one at a time")
    state = {
        "quant_type": packed.kind,
        "blocksize": packed.block,
        "dtype": dtype,
        "shape": list(packed.shape),
    }
    tensors = {
        name: np.asarray(packed.codes)[:, None],
        f"{name}.absmax": np.asarray(packed.absmax),
        f"{name}.quant_map": CODES[packed.kind],
    }
    if packed.nested_absmax is not None:
        tensors[f"{name}.nested_absmax"] = np.asarray(packed.nested_absmax)
        tensors[f"{name}.nested_quant_map"] = NESTED_MAP
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(packed.offset),
        }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors | {f"{name}.quant_state.bitsandbytes__{packed.kind}": text}


def from_tensors(tensors: Mapping[str, Array], name: str) -> Block4:
    """The weight `name` from the tensors of a checkpoint.

    Raises:
      ValueError: a tensor is missing or misshapen, or the code books are not bitsandbytes' own.
    """
    state = _state(tensors, name)
    kind, shape, block = state["quant_type"], tuple(state["shape"]), state["blocksize"]
    num_blocks = -(-shape[0] * shape[1] // block)
    nested = "nested_offset" in state
    absmax_dtype = np.uint8 if nested else np.float32
    codes = _take(tensors, name, np.uint8, -(-shape[0] * shape[1] // 2))
    absmax = _take(tensors, f"{name}.absmax", absmax_dtype, num_blocks)
    _check_map(tensors, f"{name}.quant_map", CODES[kind])
    if not nested:
        return Block4(codes, absmax, None, None, shape, kind, block)
    if state.get("nested_blocksize") != NESTED_BLOCK:
        raise ValueError(
            f"{name} has nested blocks of {state.get('nested_blocksize')}; {NESTED_BLOCK} are read"
        )
    _check_map(tensors, f"{name}.nested_quant_map", NESTED_MAP)
    num_nested = -(-num_blocks // NESTED_BLOCK)
    nested_absmax = _take(tensors, f"{name}.nested_absmax", np.float32, num_nested)
    offset = np.array(state["nested_offset"], np.float32)
    return Block4(codes, absmax, nested_absmax, offset, shape, kind, block)


def _state(tensors: Mapping[str, Array], name: str) -> dict:
    keys = [key for key in tensors if key.startswith(f"{name}.quant_state.bitsandbytes__")]
    if len(keys) != 1:
        raise ValueError(f"{name} has {len(keys)} tensors .quant_state.bitsandbytes__*; one is due")
    return read_state(tensors[keys[0]], keys[0])


def read_state(text: Array, label: str) -> dict[str, Any]:
    """What a tensor `.quant_state.bitsandbytes__*` says of a matrix.

    Raises:
      ValueError: it is no JSON text, or does not describe a matrix.
    """
    try:
        state = json.loads(np.asarray(text, np.uint8).tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{label} is no JSON text: {one_line(error)}") from error
    whole = isinstance(state, dict) and set(state) >= _NEEDED
    if not whole or not _are_sizes(state["shape"], 2) or not _are_sizes([state["blocksize"]], 1):
        raise ValueError(f"{label} does not describe a matrix: {quoted(state)}")
    if state["quant_type"] not in CODES:
        raise ValueError(
            f"{label} is of the unknown 4-bit kind {state['quant_type']!r}; {', '.join(CODES)} are"
            " read"
        )
    if not isinstance(state.get("nested_offset", 0), int | float):
        raise ValueError(f"{label} has the offset {quoted(state['nested_offset'])}; it is a number")
    return state


def _are_sizes(values: Any, count: int) -> bool:
    sizes = isinstance(values, list) and len(values) == count
    return sizes and all(type(value) is int and 0 < value < 2**40 for value in values)


def _take(tensors: Mapping[str, Array], key: str, dtype: type, size: int) -> np.ndarray:
    """A tensor as a vector, checked."""
    if key not in tensors:
        raise ValueError(f"the tensor {key} is missing")
    value = tensors[key]
    if value.dtype != dtype or value.size != size:
        raise ValueError(
            f"{key} is {value.dtype} of {value.size} elements; {np.dtype(dtype)} of {size} are due"
        )
    return np.asarray(value).reshape(-1)


def _check_map(tensors: Mapping[str, Array], key: str, expected: np.ndarray) -> None:
    stored = _take(tensors, key, np.float32, expected.size)
    if not np.abs(stored - expected).max() <= _TOLERANCE:
        raise ValueError(f"{key} is not the code book of bitsandbytes; only that is read")
