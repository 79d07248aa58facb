"""Adam whose moments are kept in 8 bits: dynamic tree quantisation by blocks.

Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit Optimizers via Block-wise Quantization",
section 2: a block of values is divided by its largest magnitude (absmax, float32), and of each
quotient the index of the nearest of 256 values is kept, signed ones for the first moment and
unsigned ones for the second. Both maps are piecewise linear: encoding is a minimum of straight
lines and decoding a maximum, without a table. Blocks do not run along the flattened array, as in
the paper, but along one dimension, and `block` is their largest length, not their length: codes
keep the parameter's shape, and so its sharding, and 576 values are three blocks of 192 on any mesh.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import UInt8

from llmprep_jax.sharding import has_mesh
from llmprep_jax.types import Array, Float

DECADES = 7  # powers of ten that a map's values spread over, from 1e-6 on
SHORTEST = 32  # of blocks: 4 bytes of absmax on 32 codes are an eighth more
CHUNK = 2**20  # values that are decoded, updated and encoded at one time, at least


class Blocks(NamedTuple):
    """A moment in 8 bits.

    Attributes:
      codes: indices into the map, uint8, of the parameter's shape and sharding.
      absmax: largest magnitude of each block, float32; of the same shape but for the dimension that
        the blocks run along, which is as long as there are blocks.
    """

    codes: Any  # Any throughout: abstract values and shardings come in states too
    absmax: Any


class Adam8bitState(NamedTuple):
    """optax.ScaleByAdamState with a `Blocks`, or a float32 array, for each array of the moments."""

    count: Any
    mu: Any
    nu: Any


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    block: int = 256,
    min_size: int = 4096,
) -> optax.GradientTransformation:
    """optax.scale_by_adam with 8-bit moments: about 2 bytes of state a parameter, not 8.

    The update is made of the moments before they are rounded, as in the paper. Of the second moment
    what is not zero is not rounded to zero but to the least code: after a gradient that small
    against its block, a zero would divide the first moment by eps alone.

    Args:
      block: largest number of values with an absmax of their own.
      min_size: arrays of fewer values keep float32 moments, and so do those with no dimension that
        parts into blocks of at least 32.

    Raises:
      ValueError: block is smaller than 32.
    """
    if block < SHORTEST:
        raise ValueError(f"block must be at least {SHORTEST}, not {block}")

    def zeros(params, signed):
        return jax.tree.map(
            lambda p: _zero_moment(p, signed, block if p.size >= min_size else 1), params
        )

    def init(params):
        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(params, True), zeros(params, False))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        c1, c2 = 1 - b1**count, 1 - b2**count

        def part(g, mu, nu):
            view = _View(mu) if isinstance(mu, Blocks) else _Whole()
            g = view.split(g)
            m = b1 * view.read(mu, True) + (1 - b1) * g
            v = b2 * view.read(nu, False) + (1 - b2) * jnp.square(g)
            step = (m / c1) / (jnp.sqrt(v / c2) + eps)
            return view.join(step), view.write(m, True), view.write(v, False)

        def update_one(g, mu, nu):
            return _in_chunks(part, _num_chunks(mu), (g.astype(jnp.float32), mu, nu))

        leaves, tree = jax.tree.flatten(grads)
        new = [
            update_one(*x) for x in zip(leaves, *map(tree.flatten_up_to, state[1:]), strict=True)
        ]
        step, mu, nu = (tree.unflatten(x) for x in zip(*new, strict=True))
        return step, Adam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _block_length(size: int, longest: int) -> int:
    """The largest divisor of `size` that is at most `longest`: blocks leave no rest."""
    return max(d for d in range(1, min(size, longest) + 1) if size % d == 0)


def _block_axis(shape: tuple[int, ...], longest: int) -> int | None:
    """The last dimension that parts into blocks of at least 32, if any does."""
    fit = [i for i, size in enumerate(shape) if _block_length(size, longest) >= SHORTEST]
    return fit[-1] if fit else None


def _zero_moment(p, signed, block):
    axis = _block_axis(p.shape, block)
    if axis is None:
        return jnp.zeros_like(p, jnp.float32)
    codes, sizes = jnp.full_like(p, 127 if signed else 0, jnp.uint8), list(p.shape)
    sizes[axis] //= _block_length(sizes[axis], block)
    spec = _spec(codes)
    if spec is not None and sizes[axis] % _ways(spec[axis]):
        spec[axis] = None
    axes = None if spec is None else jax.P(*spec)
    return Blocks(codes, jnp.zeros(sizes, jnp.float32, out_sharding=axes))


def _spec(x):
    """The mesh axes of each dimension, as a list; None without a mesh."""
    return list(jax.typeof(x).sharding.spec) if has_mesh() else None


def _ways(axes) -> int:
    """Over how many devices a dimension with these mesh axes is laid."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def _num_chunks(moment) -> int:
    """In how many parts of its first dimension a moment is updated."""
    if not isinstance(moment, Blocks) or moment.codes.shape[0] != moment.absmax.shape[0]:
        return 1
    spec = _spec(moment.codes)
    if spec is not None and spec[0] is not None:
        return 1
    return _block_length(moment.codes.shape[0], max(moment.codes.size // CHUNK, 1))


def _in_chunks(update, num_chunks, arrays):
    """`update(*arrays)` by parts of the first dimension, one after another and in place.

    Else float32 moments of the whole array would exist between decoding and encoding.
    """
    if num_chunks == 1:
        return update(*arrays)

    def part(x):
        return jnp.reshape(x, (num_chunks, x.shape[0] // num_chunks, *x.shape[1:]))

    def body(i, parts):
        new = update(*jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), parts))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return jax.tree.map(lambda x, y: put(x, y), parts, new)

    parts = jax.lax.fori_loop(0, num_chunks, body, jax.tree.map(part, arrays))
    return jax.tree.map(lambda x, part: jnp.reshape(part, x.shape), arrays, parts)


class _Whole:
    """Of an array whose moments stay float32, what `_View` is of one in blocks."""

    def split(self, x):
        return x

    join = split

    def read(self, x, signed):
        return x

    write = read


class _View:
    """An array [.., n, ..] seen as [.., n / part, part, ..], whose parts no device boundary cuts.

    A part is a block where every device holds whole blocks, as on one device; else it is the
    longest that divides both a block and a device's share, and the absmax, which all these devices
    then hold, is the largest of the parts'. So the codes are the same on any mesh.
    """

    def __init__(self, blocks: Blocks):
        shape, counts = blocks.codes.shape, blocks.absmax.shape
        self.axis = next(i for i in range(len(shape)) if shape[i] != counts[i])
        self.size, self.count = shape[self.axis], counts[self.axis]
        self.shape, self.spec = shape, _spec(blocks.codes)
        self.mesh_axes = None if self.spec is None else self.spec[self.axis]
        self.part = math.gcd(self.size // self.count, self.size // _ways(self.mesh_axes))
        self.parts = self.size // self.part

    def split(self, x: Array) -> jax.Array:
        """[.., n, ..] as [.., n / part, part, ..]."""
        return self._reshape(x, (self.parts, self.part), (self.mesh_axes, None))

    def join(self, x: Array) -> jax.Array:
        """The inverse of `split`."""
        return self._reshape(x, (self.size,), (self.mesh_axes,))

    def read(self, blocks: Blocks, signed: bool) -> jax.Array:
        """The values, split."""
        return decode(self.split(blocks.codes), signed) * self._spread(blocks.absmax)

    def write(self, x: Array, signed: bool) -> Blocks:
        """Rounds split values."""
        absmax = self._combine(jnp.max(jnp.abs(x), self.axis + 1))
        tiny = jnp.finfo(jnp.float32).tiny  # the reciprocal of less would be infinite
        inverse = jnp.where(absmax < tiny, 0.0, 1.0 / jnp.maximum(absmax, tiny))
        codes = encode(x * self._spread(inverse), signed)
        if not signed:
            codes = jnp.maximum(codes, (x > 0).astype(jnp.uint8))
        return Blocks(self.join(codes), absmax)

    def _combine(self, largest):
        """One value a part to one a block."""
        if self.parts == self.count:
            return largest
        if self.spec is not None:
            largest = jax.reshard(largest, self._shaped((self.parts,), (None,))[1])
        sizes = (self.count, self.parts // self.count)
        return jnp.max(self._reshape(largest, sizes, (None, None)), self.axis + 1)

    def _spread(self, absmax):
        """One value a block to [.., n / part, 1, ..]."""
        absmax = jnp.expand_dims(absmax, self.axis + 1)
        if self.parts == self.count:
            return absmax
        shape, spec = self._shaped((self.count, self.parts // self.count), (None, None))
        parts = self._reshape(
            jnp.broadcast_to(absmax, shape, out_sharding=spec), (self.parts, 1), (None, None)
        )
        return jax.reshard(parts, self._shaped((self.parts, 1), (self.mesh_axes, None))[1])

    def _reshape(self, x, sizes, axes):
        shape, spec = self._shaped(sizes, axes)
        return jnp.reshape(x, shape, out_sharding=spec)

    def _shaped(self, sizes, axes):
        """The shape and spec with others in place of those of the dimension of the blocks."""

        def put(whole, new):
            return (*whole[: self.axis], *new, *whole[self.axis + 1 :])

        return put(self.shape, sizes), None if self.spec is None else jax.P(*put(self.spec, axes))


def make_map(signed: bool) -> np.ndarray:
    """The 256 values of dynamic tree quantisation, ascending, float32.

    Each power of ten from 1e-6 to 1 is cut into equal intervals, twice as many as the one below,
    whose middles are the values; with them are 0 and 1, and, if signed, the middles' negatives. The
    signed map begins at -0.9929687: there is no -1.
    """
    values = [0.0, 1.0]
    for decade, count in enumerate(_interval_counts(signed)):
        edges = np.linspace(0.1, 1.0, count + 1)
        middles = 10.0 ** (decade + 1 - DECADES) * (edges[1:] + edges[:-1]) / 2
        values += [*middles, *(-middles if signed else ())]
    return np.sort(np.float32(values))


def _interval_counts(signed):
    return [2 ** (decade + (not signed)) for decade in range(DECADES)]


def _decade_lines(signed):
    """(slope, offset) a decade: slope * x + offset is `index` where interval `index` begins.

    The index is that among the values from 0 on. Slopes fall and the lines meet at the powers of
    ten, so that the least of them is the one of the decade that x is in.
    """
    for decade, count in enumerate(_interval_counts(signed)):
        first = count - (not signed)
        yield count / (0.9 * 10.0 ** (decade + 1 - DECADES)), first - count / 9


def encode(x: Float[Array, "..."], signed: bool) -> UInt8[Array, "..."]:
    """Indices of the nearest values of the map, for x in [-1, 1] or, unsigned, [0, 1].

    The nearest value changes at an interval's edge, but for the edge between two decades, where it
    changes (0.9 / intervals of the lower) above it: there a third line cuts the corner, of a slope
    between a half and a quarter of the lower decade's. -1 gives the index of -0.9929687.
    """
    values = make_map(signed)[127 if signed else 0 :].astype(np.float64)
    size, index = jnp.abs(x), jnp.float32(len(values) - 1.5)
    for decade, (slope, offset) in enumerate(_decade_lines(signed)):
        index = _least(index, slope * size + offset)
        first = 2 ** (decade + (not signed)) - (not signed)
        turn, corner = (values[first - 1] + values[first]) / 2, slope * 5 / 3
        index = _least(index, corner * size + (first - corner * turn))
    # 1 is nearest from three quarters of the last interval on: a steeper line, so not of a minimum
    index = index.astype(jnp.int32) + (size > (values[-2] + values[-1]) / 2)
    if signed:
        index = 127 + jnp.where(x < 0, -jnp.minimum(index, 127), index)
    return index.astype(jnp.uint8)


def decode(codes: UInt8[Array, "..."], signed: bool) -> Float[Array, "..."]:
    """The map's values at these indices, to within 1e-6 of themselves."""
    index = codes.astype(jnp.float32) - (127.0 if signed else 0.0)
    middle = jnp.abs(index) + 0.5
    value = jnp.float32(0.0)
    for slope, offset in _decade_lines(signed):
        value = _greatest(value, middle * (1 / slope) - offset / slope)
    value = _least(value, 1.0)
    return jnp.where(index < 0, -value, value) if signed else value


def _least(a, b):
    # jnp.minimum also looks for NaN, which took three times as long on a CPU
    return jnp.where(a < b, a, b)


def _greatest(a, b):
    return jnp.where(a > b, a, b)
