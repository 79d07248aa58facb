"""4-bit integers with a scale, and if asymmetric a zero, for each group of inputs of each output.

w[o, i] = scale[o, g] (q[o, i] - zero[o, g]) with g = i // 128, as GPTQ (Frantar et al. 2023) and
AWQ (Lin et al. 2024) store weights; here numbers are rounded to the nearest. Letters: G groups.
Symmetric codes have 8 for their zero, so that both kinds are one format.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llmprep_jax.quant.packed import (
    Packed,
    check_matrix,
    check_positive,
    in_groups,
    interleave,
    pack_nibbles,
    slice_rows,
    static,
    unpack_nibbles,
)
from llmprep_jax.types import Array, Float

MIDDLE = 8  # the zero of symmetric codes
_SMALLEST = 2.0**-24  # of float16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Packed):
    """A matrix of 4-bit integers in groups.

    Attributes:
      codes: two a byte, the even input in the high half; uint8 [O, ceil(I / 2)].
      scale: float [O, G]. zero: uint8 [O, G]; None: 8 everywhere.
      group_of: the group of each input where they do not lie side by side (GPTQ's act order), int32
        [I]; else None.
      shape: (O, I). group: inputs a group; the last may be short.
    """

    codes: Array
    scale: Array
    zero: Array | None
    group_of: Array | None
    shape: tuple[int, int] = static()
    group: int = static()
    kind = "int4"

    def rows(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        return interleave(*self._halves(start, count))[:, : self.shape[1]]

    @property
    def is_split(self) -> bool:
        return self.shape[1] % 2 == 0

    def tile(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        if not self.is_split:
            return self.rows(start, count)
        return jnp.concatenate(self._halves(start, count), axis=1)

    def _halves(self, start: int | Array, count: int) -> tuple[Array, Array]:
        """The even and the odd columns of some rows."""
        codes = unpack_nibbles(slice_rows(self.codes, start, count))
        return tuple(
            self._scaled(half.astype(jnp.float32), offset, start)
            for offset, half in enumerate(codes)
        )

    def _scaled(self, codes: Array, offset: int, start: int | Array) -> Array:
        """Codes of every other column from `offset` on, less their zeros and times their scales."""
        count, width = codes.shape
        scale = slice_rows(self.scale, start, count).astype(jnp.float32)
        zero = jnp.full_like(scale, MIDDLE)
        if self.zero is not None:
            zero = slice_rows(self.zero, start, count).astype(jnp.float32)
        if self.group_of is None and self.group % 2 == 0:
            grouped = in_groups(codes, self.group // 2)
            return ((grouped - zero[..., None]) * scale[..., None]).reshape(count, -1)[:, :width]
        groups = jnp.arange(self.shape[1]) // self.group if self.group_of is None else self.group_of
        group_of_column = jnp.pad(groups, (0, self.shape[1] % 2), mode="edge")[offset::2]
        return (codes - zero[:, group_of_column]) * scale[:, group_of_column]


def quantize(
    w: Array,
    group: int = 128,
    symmetric: bool = False,
    scale_dtype: str = "float16",
) -> Int4:
    """Packs a matrix, outputs by inputs.

    Codes are chosen for the scale as it is stored. With float16 it takes 4 + 16/128 bits a number,
    and 8/128 more for the zeros of asymmetric groups.

    Raises:
      ValueError: a group that is no whole number from 1 on, or w is no matrix of floats.
    """
    check_positive("group", group)
    w = check_matrix(w)
    outs, inputs = w.shape
    group = min(group, inputs)
    groups = jnp.pad(w, ((0, 0), (0, -inputs % group)), mode="edge").reshape(outs, -1, group)
    if symmetric:
        scale, zero = jnp.abs(groups).max(axis=2) / (MIDDLE - 1), None
    else:  # a range that holds 0, so that 0 is exact
        low, high = jnp.minimum(groups.min(axis=2), 0), jnp.maximum(groups.max(axis=2), 0)
        scale = (high - low) / 15
    scale = jnp.maximum(scale, _SMALLEST).astype(scale_dtype)
    exact = scale.astype(jnp.float32)
    if not symmetric:
        zero = jnp.clip(jnp.round(-low / exact), 0, 15).astype(jnp.uint8)
    shift = MIDDLE if zero is None else zero.astype(jnp.float32)[..., None]
    lowest = 1 if symmetric else 0
    codes = jnp.clip(jnp.round(groups / exact[..., None]) + shift, lowest, 15)
    codes = pack_nibbles(codes.reshape(outs, -1)[:, :inputs])
    return Int4(codes, scale, zero, None, tuple(w.shape), group)
