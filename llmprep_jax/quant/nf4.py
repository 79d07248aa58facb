"""The 4-bit block formats of bitsandbytes: NF4 (Dettmers et al. 2023, QLoRA, section 3) and FP4.

The matrix is flattened row by row and cut into blocks of 64 numbers; each block keeps its largest
magnitude and, for each number over it, the nearest of 16 codes. With double quantisation (ibid.,
"Double Quantization") the blocks' magnitudes, less their mean, are 8-bit numbers in blocks of 256.
Blocks run on over the ends of rows where 64 does not divide a row, so only some rows begin a block;
`row_step` says which.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmprep_jax.quant.packed import (
    Packed,
    check_matrix,
    check_positive,
    interleave,
    pack_nibbles,
    slice_rows,
    static,
    unpack_nibbles,
)
from llmprep_jax.types import Array, Float

# QLoRA, appendix E: quantiles of N(0, 1) scaled to [-1, 1], with an exact zero
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# sign, two bits of exponent, one of mantissa, over 12
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
CODES = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([*_FP4_MAGNITUDES, *(-x for x in _FP4_MAGNITUDES)], np.float32) / 12,
}
NESTED_BLOCK = 256


def dynamic_map() -> np.ndarray:
    """The 256 numbers of the signed dynamic 8-bit code (Dettmers 2016), sorted.

    For i in 0..6: +-10^(i - 6) times the midpoints of 2^i equal intervals of [0.1, 1]; 0; and 1.
    Rounded to float32 step by step, so that every bit is as in files of bitsandbytes.
    """
    low, high = np.float32(0.1), np.float32(1)
    numbers = [np.float32(0), high]
    for i in range(7):
        step, k = float((high - low) / np.float32(2**i)), np.arange(2**i + 1)
        rising, falling = float(low) + step * k, 1 - step * k[::-1]
        ends = np.where(2 * k < 2**i + 1, rising, falling).astype(np.float32)
        middle = (ends[:-1] + ends[1:]) / 2 * np.float32(10.0 ** (i - 6))
        numbers += [*middle, *-middle]
    return np.sort(np.array(numbers, np.float32))


NESTED_MAP = dynamic_map()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block4(Packed):
    """A matrix in a 4-bit block format.

    Attributes:
      codes: two numbers a byte, the matrix row by row; uint8 [ceil(O I / 2)].
      absmax: of each block: float32, or with double quantisation uint8; [ceil(O I / block)].
      nested_absmax: of each 256 blocks, float32. offset: the mean taken off, float32 [].
      shape: (O, I). kind: "nf4" or "fp4". block: numbers a block.
    """

    CODES_NDIM = 1
    codes: Array
    absmax: Array
    nested_absmax: Array | None
    offset: Array | None
    shape: tuple[int, int] = static()
    kind: str = static()
    block: int = static()

    @property
    def row_step(self) -> int:
        """The fewest rows that are a whole number of blocks."""
        return self.block // math.gcd(self.block, self.shape[1])

    @property
    def is_split(self) -> bool:
        return self.shape[1] % 2 == 0

    def rows(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        size = count * self.shape[1]
        return interleave(*self._halves(start, count))[:size].reshape(count, -1)

    def tile(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        if not self.is_split:
            return self.rows(start, count)
        # with the halves of a byte interleaved a product of 4096x4096 takes 56 ms on a CPU, not 3
        return jnp.concatenate([x.reshape(count, -1) for x in self._halves(start, count)], axis=1)

    def _halves(self, start: int | Array, count: int) -> tuple[Array, Array]:
        """Every other number of some rows, and those between; without the filling of a block."""
        # whole blocks, since start is a multiple of row_step
        first = start // self.row_step * (self.row_step * self.shape[1] // self.block)
        num_blocks, half = -(-count * self.shape[1] // self.block), self.block // 2
        size = -(-count * self.shape[1] // 2)
        codes = jnp.pad(
            slice_rows(self.codes, first * half, size), (0, num_blocks * half - size)
        ).reshape(num_blocks, half)
        magnitude = self._magnitudes(first, num_blocks)[:, None]
        even, odd = (look_up(x, CODES[self.kind]) * magnitude for x in unpack_nibbles(codes))
        return even.reshape(-1)[:size], odd.reshape(-1)[:size]

    def _magnitudes(self, start: int | Array, count: int) -> Array:
        """The blocks' magnitudes, float32."""
        absmax = slice_rows(self.absmax, start, count)
        if self.nested_absmax is None:
            return absmax
        nested = jnp.asarray(self.nested_absmax)[(start + jnp.arange(count)) // NESTED_BLOCK]
        return jnp.asarray(NESTED_MAP)[absmax] * nested + self.offset


def quantize(w: Array, kind: str = "nf4", block: int = 64, double: bool = True) -> Block4:
    """Packs a matrix.

    Args:
      w: outputs by inputs. kind: "nf4" or "fp4". block: numbers a block; the last may be short.
      double: whether the blocks' magnitudes are quantised too: 4.127 bits a number instead of 4.5.

    Raises:
      ValueError: an unknown kind, a block size that is no even number, or w is no matrix of floats.
    """
    if kind not in CODES:
        raise ValueError(f"unknown 4-bit kind {kind!r}; the kinds are {', '.join(CODES)}")
    check_positive("block", block, even=True)
    w = check_matrix(w)
    blocks, absmax = _normalised(w.reshape(-1), block)
    # an odd number of codes is filled up with that of 0
    codes = pack_nibbles(nearest(blocks.reshape(-1)[: w.size + w.size % 2], CODES[kind]))
    if not double:
        return Block4(codes, absmax, None, None, tuple(w.shape), kind, block)
    offset = absmax.mean()
    blocks, nested_absmax = _normalised(absmax - offset, NESTED_BLOCK)
    nested = nearest(blocks.reshape(-1)[: absmax.size], NESTED_MAP)
    return Block4(codes, nested, nested_absmax, offset, tuple(w.shape), kind, block)


def _normalised(x: Array, block: int) -> tuple[Array, Array]:
    """Blocks of a vector over their largest magnitude, the last filled up with zeros; and those."""
    blocks = jnp.pad(x, (0, -x.size % block)).reshape(-1, block)
    absmax = jnp.abs(blocks).max(axis=1)
    # times the inverse, as bitsandbytes does; the two differ in the last bit
    inverse = jnp.where(absmax == 0, 0.0, 1 / absmax)
    return blocks * inverse[:, None], absmax


def nearest(x: Array, codes: np.ndarray) -> Array:
    """The index of the nearest code, uint8; halfway between two it is the lower code's."""
    order = np.argsort(codes, kind="stable")
    middle = (codes[order][1:] + codes[order][:-1]) / 2
    if len(codes) > 16:
        rank = jnp.searchsorted(jnp.asarray(middle), x, side="left")
        return jnp.asarray(order.astype(np.uint8))[rank]
    rank = sum((x > threshold).astype(jnp.uint8) for threshold in middle)
    return rank if (order == np.arange(16)).all() else look_up(rank, order.astype(np.uint8))


def look_up(index: Array, table: np.ndarray) -> Array:
    """table[index] for 16 entries, by selects: a gather is scalar code on CPU and slow on TPU."""
    values = [jnp.asarray(x) for x in table]
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(odd, high, low) for low, high in pairs]
    return values[0]
