"""The tensors in which bitsandbytes stores a 4-bit weight, written and read.

For a weight called `name`: `name` (the codes, uint8 [n / 2, 1]), `.absmax`, `.quant_map`, with
double quantisation `.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`,
a JSON text as bytes. The one thing a reader would get wrong: the offset of double quantisation is
in that text and not a tensor, and `shape` there is the weight's, outputs by inputs.
"""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from llmprep_jax.quant.nf4 import CODES, NESTED_BLOCK, NESTED_MAP, Block4
from llmprep_jax.types import Array

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
    if kind not in CODES:
        raise ValueError(
            f"{name} is of the unknown 4-bit kind {kind!r}; {', '.join(CODES)} are read"
        )
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
    return Block4(
        codes, absmax, nested_absmax, jnp.float32(state["nested_offset"]), shape, kind, block
    )


def _state(tensors: Mapping[str, Array], name: str) -> dict:
    keys = [key for key in tensors if key.startswith(f"{name}.quant_state.bitsandbytes__")]
    if len(keys) != 1:
        raise ValueError(f"{name} has {len(keys)} tensors .quant_state.bitsandbytes__*; one is due")
    try:
        state = json.loads(np.asarray(tensors[keys[0]], np.uint8).tobytes())
    except ValueError as error:
        raise ValueError(f"{keys[0]} is no JSON text: {error}") from error
    if not isinstance(state, dict) or not set(state) >= _NEEDED or len(state["shape"]) != 2:
        raise ValueError(f"{keys[0]} does not describe a matrix: {str(state)[:200]}")
    return state


def _take(tensors: Mapping[str, Array], key: str, dtype: type, size: int) -> Array:
    """A tensor as a vector, checked."""
    if key not in tensors:
        raise ValueError(f"the tensor {key} is missing")
    value = tensors[key]
    if value.dtype != dtype or value.size != size:
        raise ValueError(
            f"{key} is {value.dtype} of {value.size} elements; {np.dtype(dtype)} of {size} are due"
        )
    return jnp.asarray(value).reshape(-1)


def _check_map(tensors: Mapping[str, Array], key: str, expected: np.ndarray) -> None:
    found = np.asarray(_take(tensors, key, np.float32, expected.size))
    if np.abs(found - expected).max() > _TOLERANCE:
        raise ValueError(f"{key} is not the code book of bitsandbytes; only that is read")
