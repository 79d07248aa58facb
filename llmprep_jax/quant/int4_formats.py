"""The tensors in which GPTQ and AWQ checkpoints store 4-bit weights, read into `Int4`.

Both store the transposed matrix, eight numbers an int32 from the lowest bits on: GPTQ eight inputs,
AWQ eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7; zeros are packed along the outputs by both,
each in its order. The one thing a reader would get wrong: GPTQ's files hold the zeros minus one
unless they say `checkpoint_format: gptq_v2`, and what one was taken from is the word of eight: a
zero of 0 borrows from its neighbour.
"""

import numpy as np

from llmprep_jax.quant.int4 import Int4
from llmprep_jax.types import Array

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble
_EIGHT = 8  # numbers an int32
_ONES = np.uint32(0x11111111)  # one in each of them


def from_gptq(
    qweight: Array,
    qzeros: Array,
    scales: Array,
    g_idx: Array | None = None,
    *,
    v2: bool = False,
    group: int | None = None,
) -> Int4:
    """A weight of a GPTQ checkpoint with 4 bits.

    Args:
      qweight: int32 [I / 8, O]. qzeros: int32 [G, O / 8]. scales: float [G, O].
      g_idx: the group of each input, int [I]; None: groups lie side by side.
      v2: whether zeros are stored as they are (`checkpoint_format: gptq_v2`).
      group: inputs a group; None: as many as make groups of one size.

    Raises:
      ValueError: the tensors are not of these shapes, or g_idx names a group that is not there.
    """
    qweight, qzeros, scales = map(np.asarray, (qweight, qzeros, scales))
    inputs, outs = qweight.shape[0] * _EIGHT, qweight.shape[-1]
    _check("GPTQ", qweight, qzeros, scales, inputs, outs)
    # [I / 8, 8, O], inputs in their order
    codes = _nibbles(qweight).transpose(0, 2, 1).reshape(inputs, outs)
    zeros = qzeros if v2 else qzeros.view(np.uint32) + _ONES
    zero = _nibbles(zeros).reshape(len(qzeros), outs)
    return _make(codes, zero, scales, g_idx, group)


def from_awq(qweight: Array, qzeros: Array, scales: Array, *, group: int | None = None) -> Int4:
    """A weight of an AWQ checkpoint with 4 bits (version "gemm").

    Args:
      qweight: int32 [I, O / 8]. qzeros: int32 [G, O / 8]. scales: float [G, O].
      group: inputs a group; None: as many as make groups of one size.

    Raises:
      ValueError: the tensors are not of these shapes.
    """
    qweight, qzeros, scales = map(np.asarray, (qweight, qzeros, scales))
    inputs, outs = qweight.shape[0], qweight.shape[-1] * _EIGHT
    _check("AWQ", qweight, qzeros, scales, inputs, outs)
    place = np.argsort(AWQ_ORDER)  # the nibble of each output
    codes = _nibbles(qweight)[..., place].reshape(inputs, outs)
    zero = _nibbles(qzeros)[..., place].reshape(len(qzeros), outs)
    return _make(codes, zero, scales, None, group)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """The eight numbers of each int32, the lowest bits first, in a last dimension; uint8."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return ((packed.view(np.uint32)[..., None] >> shifts) & 15).astype(np.uint8)


def _check(
    name: str,
    qweight: np.ndarray,
    qzeros: np.ndarray,
    scales: np.ndarray,
    inputs: int,
    outs: int,
) -> None:
    four_bytes = [x.dtype.kind in "iu" and x.dtype.itemsize == 4 for x in (qweight, qzeros)]
    integers = all(four_bytes) and qweight.ndim == qzeros.ndim == 2
    fits = scales.ndim == 2 and scales.shape[1] == outs and 0 < len(scales) <= inputs
    if not integers or not fits or qzeros.shape != (len(scales), -(-outs // _EIGHT)) or outs % 8:
        shown = ", ".join(
            f"{label} {x.dtype} {x.shape}"
            for label, x in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales))
        )
        raise ValueError(f"these are no 4-bit {name} tensors of one weight: {shown}")


def _make(
    codes: np.ndarray,
    zero: np.ndarray,
    scales: np.ndarray,
    g_idx: Array | None,
    group: int | None,
) -> Int4:
    """From codes [I, O], zeros and scales [G, O]."""
    inputs, outs = codes.shape
    group = -(-inputs // len(scales)) if group is None else group
    side_by_side = np.arange(inputs) // group
    group_of = side_by_side if g_idx is None else np.asarray(g_idx)
    if group_of.shape != (inputs,) or group_of.min() < 0 or group_of.max() >= len(scales):
        raise ValueError(
            f"g_idx is {group_of.shape}, from {group_of.min()} to {group_of.max()}; it must name"
            f" one of {len(scales)} groups for each of {inputs} inputs"
        )
    in_order = np.array_equal(group_of, side_by_side)
    pairs = np.pad(codes, ((0, inputs % 2), (0, 0)))
    return Int4(
        np.ascontiguousarray(((pairs[::2] << 4) | pairs[1::2]).T),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zero.T.astype(np.uint8)),
        None if in_order else group_of.astype(np.int32),
        (outs, inputs),
        group,
    )
