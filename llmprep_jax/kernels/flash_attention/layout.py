"""Where queries and keys lie on a mesh, and which key heads a device's query heads need.

Rows and heads are laid over devices, tokens and head widths are whole. Fewer key heads than devices
are on each device whole, and every device takes those of its own query heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.flash_attention.stored import NOT_STORED, Stored

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The mesh axes of rows, of query heads and of key heads; of none without a mesh.

    Attributes:
      shares_keys: whether query heads are laid over devices and key heads are not.
    """

    rows: Axes = ()
    heads: Axes = ()
    shares_keys: bool = False
    is_mesh: bool = False

    def specs(self, stored: Stored = NOT_STORED) -> dict[str, Any]:
        rows, heads = self.rows or None, self.heads or None
        kv_heads = None if self.shares_keys else heads
        # any row may see any page of a pool
        key_rows = rows if stored.pages is None else None
        scales = jax.P(key_rows, None, kv_heads)
        all_stored = Stored(jax.P(rows, None), scales, scales)
        return dict(
            queries=jax.P(rows, None, heads, None),
            keys=jax.P(key_rows, None, kv_heads, None),
            rows=jax.P(rows, None, heads),
            places=jax.P(rows, None),
            stored=jax.tree.map(lambda spec, x: None if x is None else spec, all_stored, stored),
        )

    def place(self, q: jax.Array, k: jax.Array, v: jax.Array, places: Any, stored: Stored) -> tuple:
        """The arrays as `on_devices` takes them."""
        q, k, v, places, stored = _vary_alike((q, k, v, places, stored))
        if not self.is_mesh:
            return q, k, v, places, stored
        specs = self.specs(stored)
        q, k, v = [
            jax.reshard(x, specs[name]) for x, name in ((q, "queries"), (k, "keys"), (v, "keys"))
        ]
        places = jax.tree.map(lambda x: jax.reshard(x, specs["places"]), places)
        return q, k, v, places, jax.tree.map(jax.reshard, stored, specs["stored"])

    def on_devices(self, function: Callable[..., Any], outs: tuple[str, ...]) -> Callable[..., Any]:
        """`function` of (q, k, v, places, stored, and what is by query) on each device's part."""
        if not self.is_mesh:
            return function

        def call(q, k, v, places, stored, *by_query):
            specs = self.specs(stored)
            others = [specs["queries" if x.ndim == 4 else "rows"] for x in by_query]
            names = "queries", "keys", "keys", "places", "stored"
            # unchecked: the sum over copies of key heads is written out below
            here = jax.shard_map(
                function,
                axis_names=set(_free_axes()),
                in_specs=(*[specs[name] for name in names], *others),
                out_specs=tuple(specs[name] for name in outs),
                check_vma=False,
            )(q, k, v, places, stored, *by_query)
            return _vary_alike((here, q))[0]  # which no check has told them

        return call

    def own_heads(self, q: jax.Array, *by_key: Any) -> tuple[Any, ...]:
        """Arrays [B, S, K, ...], or trees of them, of the key heads that this device's query heads
        see."""
        k = by_key[0]
        if not self.shares_keys or k.shape[2] == 1:
            return by_key
        heads = self._own(q, k)
        return jax.tree.map(lambda x: x[:, :, heads], by_key)

    def own_head(self, q: jax.Array, k: jax.Array) -> jax.Array | None:
        """The one key head of all that are here that this device's query heads see; None: there are
        no others, or they see several."""
        heads = self._own(q, k) if self.shares_keys and k.shape[2] > 1 else ()
        return heads[0] if len(heads) == 1 else None

    def sum_heads(self, dk: jax.Array, dv: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of all key heads out of those of each device's own, which cross the network in
        k's dtype and are summed in float32."""
        if not self.shares_keys:
            return dk, dv

        def add(x_BSKH: jax.Array) -> jax.Array:
            x_BSKH = jax.lax.all_gather(x_BSKH.astype(k.dtype), self.heads, axis=2, tiled=True)
            # copies of one head are neighbours
            copies = x_BSKH.reshape(*k.shape[:3], -1, x_BSKH.shape[3])
            return jnp.sum(copies, axis=3, dtype=jnp.float32)

        return add(dk), add(dv)

    def _own(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """The key head of each query head here; one alone where all see the same."""
        sizes, num_own = dict(jax.sharding.get_abstract_mesh().shape), q.shape[2]
        group = num_own * math.prod(sizes[axis] for axis in self.heads) // k.shape[2]
        first = jax.lax.axis_index(self.heads) * num_own
        return (first + jnp.arange(1 if group % num_own == 0 else num_own)) // group


def layout_of(q: jax.Array, k: jax.Array, splits_heads: bool) -> Layout:
    """The layout for queries as they lie; none without a mesh, or where `jax.shard_map` has taken
    all of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _free_axes():
        return Layout()
    spec = (*jax.typeof(q).sharding.spec, *[None] * 4)[:4]
    rows, heads = [(x,) if isinstance(x, str) else tuple(x or ()) for x in (spec[0], spec[2])]
    heads = heads if splits_heads else ()
    num_shards = math.prod(mesh.shape[axis] for axis in heads)
    return Layout(rows, heads, bool(heads) and k.shape[2] % num_shards > 0, True)


def _free_axes() -> Axes:
    """Of the mesh in force, but those that an outer `jax.shard_map` is over."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)


def _vary_alike(arrays: Any) -> Any:
    """All differ over those axes of an outer `jax.shard_map` that one of them differs over."""
    leaves = jax.tree.leaves(arrays)
    axes = frozenset().union(*[jax.typeof(x).manual_axis_type.varying for x in leaves])

    def vary(x: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, arrays)


def join_widths(x: jax.Array, more: jax.Array) -> jax.Array:
    """x [B, T, N, H] made wider by an array [B or 1, T, N or 1, R] that may lie otherwise."""
    more = jnp.broadcast_to(more, (*x.shape[:3], more.shape[3]))
    spec = _spec(x)
    if spec is not None:
        x, more = jax.reshard(x, spec), jax.reshard(more, spec)
    return jnp.concatenate([x, more], axis=-1)


def repeat_heads(x_BSKH: jax.Array, copies: int) -> jax.Array:
    """Each head so many times in a row; they lie over the mesh as the heads do."""
    return jnp.repeat(x_BSKH, copies, axis=2, out_sharding=_spec(x_BSKH))


def _spec(x_BTNH: jax.Array) -> jax.P | None:
    """How rows, tokens and heads lie on a mesh, and widths whole; None where there is no say."""
    if not _free_axes():
        return None
    return jax.P(*jax.typeof(x_BTNH).sharding.spec[:3])
