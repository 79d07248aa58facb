"""Arrays from devices to the host, a slice at a time, also where they lie over several processes.

A stack of layers is too large for a host (the gates of DeepSeek-V3's experts are 436 GB), one
layer's matrix is not. Where an array lies over processes, all of them must ask for the same slices
in the same order, since each gives its part to the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[str, ...]


def to_host(x: jax.Array | np.ndarray, place: tuple[int, ...] = ()) -> np.ndarray:
    """What is at `place` of an array's leading dimensions, whole and bit by bit, on each process.

    Args:
      place: e.g. the numbers of the layer and the expert; (): the whole array.
    """
    if isinstance(x, np.ndarray):
        return np.asarray(x[place])  # a scalar too
    sharding = x.sharding
    if sharding.is_fully_replicated:
        own = x.addressable_data(0)
        on_cpu = next(iter(own.devices())).platform == "cpu"
        return np.asarray(np.asarray(own)[place] if on_cpu or not place else _take(own, place))
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return np.asarray(jax.device_get(x)[place])
    gathered = np.asarray(_gather(x, np.array(place, np.int32), sharding))
    shape = x.shape[len(place) :]
    return gathered.view(x.dtype).reshape(shape)


@jax.jit
def _take(x: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    for number in place:
        x = jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
    return x


@functools.partial(jax.jit, static_argnums=2)
def _gather(x: jax.Array, place: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """The slice on every device, in bits: a sum of floats makes 0 of -0, a copy another NaN."""
    axes = [_names(part) for part in (*sharding.spec, *(None,) * x.ndim)][: x.ndim]
    depth = place.shape[0]
    over = sum(axes[:depth], ())

    def take(block: jax.Array, place: jax.Array) -> jax.Array:
        is_here, width = True, block.dtype.itemsize
        block = jax.lax.bitcast_convert_type(block, jnp.dtype(f"uint{8 * width}"))
        for dim in range(depth):
            size, number = block.shape[0], place[dim]
            if axes[dim]:
                number -= jax.lax.axis_index(axes[dim]) * size
                is_here &= (number >= 0) & (number < size)
            at = jnp.clip(number, 0, size - 1)
            block = jax.lax.dynamic_index_in_dim(block, at, keepdims=False)
        if over:
            if width > 1:  # not every transport adds 16 bits
                block = jax.lax.bitcast_convert_type(block, jnp.uint8)
            block = jax.lax.psum(jnp.where(is_here, block, jnp.uint8(0)), over)
        for dim, names in enumerate(axes[depth:]):
            if names:
                block = jax.lax.all_gather(block, names, axis=dim, tiled=True)
        return block

    whole = jax.P()
    mapped = jax.shard_map(
        take,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, whole),
        out_specs=whole,
        check_vma=False,
    )
    return mapped(x, place)


def _names(part: str | Axes | None) -> Axes:
    return (part,) if isinstance(part, str) else tuple(part or ())
