"""Symmetric 8-bit integers with one scale an output channel: w[o, i] = scale[o] q[o, i].

The scale is the row's largest magnitude over 127 (absmax quantisation: Dettmers et al. 2022,
LLM.int8(), section 2, row-wise). -128 is not used, so that the range is symmetric.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llmprep_jax.quant.packed import Packed, check_matrix, slice_rows, static
from llmprep_jax.types import Array, Float

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Packed):
    """A matrix of 8-bit integers.

    Attributes:
      codes: int8 [O, I]. scale: of each row, float32 [O]. shape: (O, I).
    """

    codes: Array
    scale: Array
    shape: tuple[int, int] = static()
    kind = "int8"

    def rows(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        codes = slice_rows(self.codes, start, count).astype(jnp.float32)
        return codes * slice_rows(self.scale, start, count)[:, None]


def quantize(w: Array) -> Int8:
    """Packs a matrix, outputs by inputs.

    Raises:
      ValueError: w is no matrix of floats.
    """
    w = check_matrix(w)
    absmax = jnp.abs(w).max(axis=1)
    scale = jnp.where(absmax == 0, 1.0, absmax / LARGEST)
    codes = jnp.clip(jnp.round(w / scale[:, None]), -LARGEST, LARGEST)
    return Int8(codes.astype(jnp.int8), scale, tuple(w.shape))
