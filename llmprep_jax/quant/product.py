"""y = x w^T for a packed w, of which only a tile of rows is ever dense.

Tiles are dequantised and multiplied one after the other inside a `jax.lax` loop, forward over the
outputs of y, backward over those of dy; the packed weight gets no gradient. On a mesh its parts
come together, packed, in each pass anew. Letters: O outputs, I inputs. The backward pass
dequantises again instead of keeping tiles, and needs no x, since nothing but x's gradient is asked
for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmprep_jax.nn.linear import PRODUCT
from llmprep_jax.quant.packed import Packed, whole
from llmprep_jax.types import Array, Float

TILE = 2**20  # numbers that are dense at a time: 4 MB in float32


def tile_rows(packed: Packed) -> int:
    """Rows of a tile: what `TILE` allows, of at least two tiles, that leave no rest if possible."""
    (outs, inputs), step = packed.shape, packed.row_step
    # one tile would be no loop, and without one XLA's CPU compiler dequantises every layer of an
    # unrolled model before it multiplies the first: 90 MB in place of 5 for ten of 1536x1536
    most = max(min(TILE // inputs, outs // 2) // step, 1) * step
    whole = next((rows for rows in range(most, 0, -step) if outs % rows == 0), 0)
    return min(whole if 4 * whole >= most else most, outs)


def multiply(
    x: Float[Array, "... I"], packed: Packed, dtype: str | jnp.dtype
) -> Float[Array, "... O"]:
    """x w^T with operands in `dtype`, a float32 sum, and the result in x's dtype."""
    # taken apart, since jax.custom_vjp fills the dataclass with what is no array
    return _multiply(packed.arrange(x), packed.arrays(), type(packed), packed.settings(), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _multiply(x, arrays, form, settings, dtype):
    packed = form.of(settings, whole(arrays))
    tile, outs = tile_rows(packed), packed.shape[0]

    def part(start: int | Array, count: int) -> Array:
        w = packed.tile(start, count).astype(dtype)
        return _dot(x.astype(dtype), w, 1).astype(x.dtype)

    num_tiles, rest = divmod(outs, tile)
    y = jax.lax.map(lambda index: part(index * tile, tile), jnp.arange(num_tiles))
    y = jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], num_tiles * tile)
    return jnp.concatenate([y, part(num_tiles * tile, rest)], axis=-1) if rest else y


def _dot(x: Array, w: Array, axis: int) -> Array:
    """The last dimension of x against `axis` of a matrix, summed in float32."""
    dims = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _forward(x, arrays, form, settings, dtype):
    # kept under remat "dots", as the product of a dense layer is
    return checkpoint_name(_multiply(x, arrays, form, settings, dtype), PRODUCT), arrays


def _backward(form, settings, dtype, arrays, dy):
    packed = form.of(settings, whole(arrays))
    tile, out_dtype = tile_rows(packed), dy.dtype
    dy = dy.astype(dtype)

    def part(start: int | Array, count: int) -> Array:
        w = packed.tile(start, count).astype(dtype)
        return _dot(jax.lax.dynamic_slice_in_dim(dy, start, count, axis=-1), w, 0)

    num_tiles, rest = divmod(packed.shape[0], tile)
    dx = part(0, tile)
    if num_tiles > 1:
        add = lambda dx, index: (dx + part(index * tile, tile), None)  # noqa: E731
        dx = jax.lax.scan(add, dx, jnp.arange(1, num_tiles))[0]
    if rest:
        dx += part(num_tiles * tile, rest)
    return dx.astype(out_dtype), None


_multiply.defvjp(_forward, _backward)
