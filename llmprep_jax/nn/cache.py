"""Key/value caches: all positions, or a ring of the window's size for layers with a sliding window.

A cache is a value: it goes into a forward pass and a new one comes out, and inside jit its buffers
are updated in place. Slots carry the position and segment of the token that they hold (segment 0:
empty), so attention needs no notion of full or ring. All rows write the same slots: ragged batches
are padded on the left. The one thing a reader would get wrong: a ring of W slots is enough for a
window of W only while one token comes at a time; a longer block attends to the old ring and to
itself, and writes afterwards.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of some layers.

    Attributes:
      k, v: [L, B, K, S, H], or a tuple of one [B * K, S, H] a layer (for layers that run unrolled:
        as its matrix products take it, else XLA's CPU compiler keeps a second copy in step). The
        values' H may be 0: latents are their own values (`nn.mla`).
      positions_BS, segments_BS: of the token in each slot; segment 0 is an empty slot or padding.
      length: tokens written so far, a scalar; the next goes into slot `length` (modulo S in a
        ring).
      block: positions and segments of the tokens being written, between `begin` and `end`.
      is_ring: whether slots are reused.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    positions_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]
    length: Int[Array, ""]
    block: tuple[Array, Array] | None = None
    is_ring: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        num_layers: int,
        batch_size: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: str | jnp.dtype = "float32",
        is_ring: bool = False,
        per_layer: bool = False,
    ) -> "KVCache":
        """An empty cache; `per_layer` keeps one buffer a layer, `value_dim` None is `head_dim`."""
        axes = (None, "batch", "kv_heads", None, None)

        def buffers(width: int) -> Array | tuple[Array, ...]:
            if per_layer:
                one = (batch_size * num_kv_heads, num_slots, width)
                return tuple(jnp.zeros(one, dtype) for _ in range(num_layers))
            shape = (num_layers, batch_size, num_kv_heads, num_slots, width)
            return jnp.zeros(shape, dtype, out_sharding=spec(*axes, shape=shape))

        rows = spec("batch", None, shape=(batch_size, num_slots))
        slots = jnp.zeros((batch_size, num_slots), jnp.int32, out_sharding=rows)
        k, v = buffers(head_dim), buffers(head_dim if value_dim is None else value_dim)
        return cls(k, v, slots, slots, jnp.zeros((), jnp.int32), None, is_ring)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def begin(self, positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]) -> "KVCache":
        """Announces a forward pass's tokens; each layer then calls `update`, the model `end`."""
        return dataclasses.replace(self, block=(positions_BT, segments_BT))

    def update(
        self, layer: int | Int[Array, ""], k_BKTH: Float[Array, "B K T H"], v_BKTH: Array
    ) -> tuple["KVCache", Array, Array, tuple[Array, Array]]:
        """Writes one layer's new keys and values.

        Returns:
          the cache, then the keys, the values, and the (positions, segments) that the new tokens
          may attend to, in slot order.
        """
        k_BKTH, v_BKTH = k_BKTH.astype(self._dtype), v_BKTH.astype(self._dtype)
        old_k, old_v = self._layer(layer)
        new = self._write(layer, k_BKTH, v_BKTH)
        positions_BT, segments_BT = self.block
        if self.is_ring and positions_BT.shape[1] > 1:
            return (
                new,
                jnp.concatenate([old_k, k_BKTH], axis=2),
                jnp.concatenate([old_v, v_BKTH], axis=2),
                (
                    jnp.concatenate([self.positions_BS, positions_BT], axis=1),
                    jnp.concatenate([self.segments_BS, segments_BT], axis=1),
                ),
            )
        slots = (
            self._put(self.positions_BS, positions_BT, axis=1),
            self._put(self.segments_BS, segments_BT, axis=1),
        )
        return new, *new._layer(layer), slots

    def end(self) -> "KVCache":
        """Takes the announced tokens in, once all layers have written them."""
        positions_BT, segments_BT = self.block
        return dataclasses.replace(
            self,
            positions_BS=self._put(self.positions_BS, positions_BT, axis=1),
            segments_BS=self._put(self.segments_BS, segments_BT, axis=1),
            length=self.length + positions_BT.shape[1],
            block=None,
        )

    def keep(self, num_kept_B: Int[Array, "B"], num_written: int) -> "KVCache":
        """Of the last `num_written` tokens, empties all but each row's first `num_kept`.

        The slots at the end that no row keeps are written again next. Not for rings.
        """
        assert not self.is_ring
        start = self.length - num_written
        kept_BT = jnp.arange(num_written) < num_kept_B[:, None]
        old_BT = jax.lax.dynamic_slice_in_dim(self.segments_BS, start, num_written, axis=1)
        new_BT = jnp.where(kept_BT, old_BT, 0)
        segments_BS = jax.lax.dynamic_update_slice_in_dim(self.segments_BS, new_BT, start, axis=1)
        length = start + jnp.max(num_kept_B).astype(jnp.int32)
        return dataclasses.replace(self, segments_BS=segments_BS, length=length)

    def cut(self, num_tokens: Int[Array, ""]) -> tuple["KVCache", Bool[Array, ""]]:
        """The first tokens of each row alone, for a text that goes on otherwise from there.

        Returns:
          the cache, and whether it is one: a ring that went round may have lost what is within the
          window of the token to come.
        """
        held_BS = (self.segments_BS > 0) & (self.positions_BS < num_tokens)
        needed = jnp.minimum(num_tokens, self.num_slots - 1) if self.is_ring else num_tokens
        in_reach_BS = held_BS & (self.positions_BS >= num_tokens - needed)
        is_last_BS = held_BS & (self.positions_BS == num_tokens - 1)
        length = 1 + jnp.max(jnp.where(is_last_BS, jnp.arange(self.num_slots), -1))
        segments_BS = jnp.where(held_BS, self.segments_BS, 0)
        cut = dataclasses.replace(self, segments_BS=segments_BS, length=length.astype(jnp.int32))
        return cut, jnp.all(jnp.sum(in_reach_BS, axis=1) == needed)

    def fit(self, empty: "KVCache") -> "KVCache":
        """The same tokens in the layout, the slots and the rows of an empty cache.

        That one has as many slots or more (further ones are the last; a ring must not have gone
        round), and a whole multiple of the rows, each of which is repeated.
        """
        copies = empty.positions_BS.shape[0] // self.positions_BS.shape[0]
        are_alike = copies == 1 and isinstance(self.k, tuple) == isinstance(empty.k, tuple)

        def fill(new: Array, old: Array, axis: int = 0) -> Array:
            if copies > 1:
                old = jax.reshard(old, spec(*[None] * old.ndim)) if has_mesh() else old
                old = jnp.repeat(old, copies, axis=axis)
            old = jax.reshard(old, sharding_of(new).spec) if has_mesh() else old
            if old.shape == new.shape:
                return old
            return jax.lax.dynamic_update_slice(new, old, [0] * new.ndim)

        def fill_layers(new: Any, old: Any) -> Any:
            if are_alike:
                return jax.tree.map(fill, new, old)
            rows = self.positions_BS.shape[0]
            if isinstance(old, tuple):
                old = jnp.stack([x.reshape(rows, len(x) // rows, *x.shape[1:]) for x in old])
            if not isinstance(new, tuple):
                return fill(new, old, axis=1)
            old = jnp.repeat(old, copies, axis=1) if copies > 1 else old
            return tuple(map(fill, new, map(_matrices, old)))

        return dataclasses.replace(
            self,
            k=fill_layers(empty.k, self.k),
            v=fill_layers(empty.v, self.v),
            positions_BS=fill(empty.positions_BS, self.positions_BS),
            segments_BS=fill(empty.segments_BS, self.segments_BS),
        )

    @property
    def _dtype(self) -> jnp.dtype:
        return (self.k[0] if isinstance(self.k, tuple) else self.k).dtype

    def _layer(self, layer: int | Int[Array, ""]) -> tuple[Array, Array]:
        if isinstance(self.k, tuple):
            k, v = self.k[layer], self.v[layer]
            rows = self.positions_BS.shape[0]
            rows = (rows, len(k) // rows)
            return k.reshape(*rows, *k.shape[1:]), v.reshape(*rows, *v.shape[1:])
        at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)  # noqa: E731
        return at(self.k), at(self.v)

    def _write(self, layer: int | Int[Array, ""], k_BKTH: Array, v_BKTH: Array) -> "KVCache":
        def write(old, new_BKTH):
            if isinstance(old, tuple):
                put = self._put(old[layer], _matrices(new_BKTH), axis=1)
                return (*old[:layer], put, *old[layer + 1 :])
            return self._put(old, new_BKTH[None], axis=3, layer=layer)

        return dataclasses.replace(self, k=write(self.k, k_BKTH), v=write(self.v, v_BKTH))

    def _put(self, slots: Array, new: Array, axis: int, layer: int | Array | None = None) -> Array:
        """Writes `new` along the slot `axis`, at the next free slots (a ring's oldest)."""
        num_new = new.shape[axis]
        start = [0] * slots.ndim
        if layer is not None:
            start[0] = layer
        if not self.is_ring or num_new == 1:
            start[axis] = self.length % self.num_slots if self.is_ring else self.length
            return jax.lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)
        if num_new > self.num_slots:
            new = jax.lax.slice_in_dim(new, num_new - self.num_slots, num_new, axis=axis)
        first = self.length + num_new - new.shape[axis]
        at = (first + jnp.arange(new.shape[axis])) % self.num_slots
        index = [slice(None)] * slots.ndim
        index[axis] = at
        if layer is None:
            return slots.at[tuple(index)].set(new.astype(slots.dtype))
        one = jax.lax.dynamic_index_in_dim(slots, layer, keepdims=False)
        one = one.at[tuple(index[1:])].set(new[0].astype(slots.dtype))
        return jax.lax.dynamic_update_slice(slots, one[None], start)


def _matrices(x_BKSH: Float[Array, "B K S H"]) -> Float[Array, "M S H"]:
    """One matrix a row and head; whole on every device, since lists of layers are for one."""
    if has_mesh():
        x_BKSH = jax.reshard(x_BKSH, spec(None, None, None, None))
    return x_BKSH.reshape(math.prod(x_BKSH.shape[:2]), *x_BKSH.shape[2:])
