"""8-bit floats (e4m3fn) with one scale a block of 128x128, as DeepSeek-V3 is released.

w[o, i] = scale_inv[o // 128, i // 128] q[o, i] (DeepSeek-V3, section 3.3.2; README_WEIGHTS.md of
the release); the last blocks of a ragged shape are partial. The one thing a reader would get wrong:
the tensor is called `weight_scale_inv`, and the weight is multiplied by it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llmprep_jax.quant.packed import (
    Packed,
    check_matrix,
    check_positive,
    in_groups,
    slice_rows,
    static,
)
from llmprep_jax.types import Array, Float

LARGEST = 448.0  # of float8_e4m3fn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8(Packed):
    """A matrix of 8-bit floats.

    Attributes:
      codes: the bits of float8_e4m3fn numbers, uint8 [O, I]: of an array of these XLA's CPU
        compiler would make a float16 copy.
      scale_inv: float32 [ceil(O / block), ceil(I / block)].
      shape: (O, I). block: rows and columns of a block.
    """

    codes: Array
    scale_inv: Array
    shape: tuple[int, int] = static()
    block: int = static()
    kind = "fp8"

    def rows(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        raw = slice_rows(self.codes, start, count)
        codes = jax.lax.bitcast_convert_type(raw, jnp.float8_e4m3fn).astype(jnp.float32)
        scale = jnp.asarray(self.scale_inv)[(start + jnp.arange(count)) // self.block]
        scaled = in_groups(codes, self.block) * scale[:, :, None]
        return scaled.reshape(count, -1)[:, : self.shape[1]]


def quantize(w: Array, block: int = 128) -> Fp8:
    """Packs a matrix, outputs by inputs: scale = largest magnitude / 448, q = w / scale.

    Raises:
      ValueError: a block that is no whole number from 1 on, or w is no matrix of floats.
    """
    check_positive("block", block)
    w = check_matrix(w)
    outs, inputs = w.shape
    padded = jnp.pad(w, ((0, -outs % block), (0, -inputs % block)))
    rows, columns = padded.shape[0] // block, padded.shape[1] // block
    tiles = padded.reshape(rows, block, columns, block)
    absmax = jnp.abs(tiles).max(axis=(1, 3))
    scale_inv = jnp.where(absmax == 0, 1.0, absmax / LARGEST)
    codes = jnp.clip(tiles / scale_inv[:, None, :, None], -LARGEST, LARGEST)
    codes = codes.reshape(padded.shape)[:outs, :inputs].astype(jnp.float8_e4m3fn)
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return Fp8(bits, scale_inv, (outs, inputs), block)


def from_tensors(weight: Array, weight_scale_inv: Array, block: int = 128) -> Fp8:
    """A released pair of tensors, `weight` in float8_e4m3fn and `weight_scale_inv`.

    Raises:
      ValueError: the weight is of another dtype, or the scales are not one a block.
    """
    check_positive("block", block)
    if weight.ndim != 2 or weight.dtype != jnp.float8_e4m3fn:
        raise ValueError(
            f"the weight is {weight.dtype} {tuple(weight.shape)}; it must be a matrix of"
            " float8_e4m3fn"
        )
    expected = tuple(-(-size // block) for size in weight.shape)
    if tuple(weight_scale_inv.shape) != expected:
        raise ValueError(
            f"weight_scale_inv is {tuple(weight_scale_inv.shape)} for a weight of"
            f" {tuple(weight.shape)}; blocks of {block} need {expected}"
        )
    scale_inv = np.asarray(weight_scale_inv).astype(np.float32)
    return Fp8(np.asarray(weight).view(np.uint8), scale_inv, tuple(weight.shape), block)
