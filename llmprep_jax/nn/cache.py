"""Key/value caches: all positions, or a ring of the window's size for layers with a sliding window.

A cache is a value: it goes into a forward pass and a new one comes out, and inside jit its buffers
are updated in place. Slots carry the position and segment of the token that they hold (segment 0:
empty), so attention needs no notion of full or ring. In a full cache all rows write the same slots,
padding too; in a ring each row counts its own tokens, and padding takes no slot, for it would take
that of a token which is still in the window. A ring of W slots is enough for a window of W only
while one token comes at a time; a longer block attends to the old ring and to itself, and writes
afterwards.

A full cache that is asked for more slots than it has cannot raise where its length is traced: what
it then holds is NaN, and so is every logit that follows (`place_tokens` raises where it can).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, sharding_of, spec
from llmprep_jax.types import Array, Bool, Float, Int


class Block(NamedTuple):
    """Tokens on their way into a cache, and where they go.

    Attributes:
      positions_BT, segments_BT: of the tokens.
      slots: of a full cache the first slot, a scalar; of a ring the slot of each row's one token,
        [B], or the column of the token that each slot takes, [B, S], -1 where it keeps its own.
      fits: whether a full cache has so many slots left.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    slots: Int[Array, "*BS"]
    fits: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of some layers.

    Attributes:
      k, v: [L, B, K, S, H], or a tuple of one [B * K, S, H] a layer (for layers that run unrolled:
        as its matrix products take it, else XLA's CPU compiler keeps a second copy in step). The
        values' H may be 0: latents are their own values (`nn.mla`).
      positions_BS, segments_BS: of the token in each slot; segment 0 is an empty slot or padding.
      length: slots taken so far, a scalar; in a ring the tokens of each row so far, [B], of which
        the next goes into slot `length` modulo S.
      block: the tokens being written, between `begin` and `end`.
      is_ring: whether slots are reused.
    """

    k: Array | tuple[Array, ...]
    v: Array | tuple[Array, ...]
    positions_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]
    length: Int[Array, "*B"]
    block: "Block | None" = None
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
                shape_of_one = (batch_size * num_kv_heads, num_slots, width)
                return tuple(jnp.zeros(shape_of_one, dtype) for _ in range(num_layers))
            shape = (num_layers, batch_size, num_kv_heads, num_slots, width)
            return jnp.zeros(shape, dtype, out_sharding=spec(*axes, shape=shape))

        rows = spec("batch", None, shape=(batch_size, num_slots))
        slots = jnp.zeros((batch_size, num_slots), jnp.int32, out_sharding=rows)
        k, v = buffers(head_dim), buffers(head_dim if value_dim is None else value_dim)
        length = slots[:, 0] if is_ring else jnp.zeros((), jnp.int32)
        return cls(k, v, slots, slots, length, None, is_ring)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def begin(self, positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]) -> "KVCache":
        """Announces a forward pass's tokens; each layer then calls `update`, the model `end`."""
        num_new, fits = positions_BT.shape[1], jnp.bool_(True)
        if not self.is_ring:
            slots, fits = self.length, self.length + num_new <= self.num_slots
        elif num_new == 1:
            slots = self.length % self.num_slots  # a token of padding is overwritten by the next
        else:
            slots = self._columns(segments_BT > 0)
        return dataclasses.replace(self, block=Block(positions_BT, segments_BT, slots, fits))

    def _columns(self, real_BT: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        """The column of the last real token that goes into each slot of a ring, or -1."""
        count_BT = jnp.cumsum(real_BT, axis=1)
        # the last token of the block that a slot takes, as its number in the block, from 1 on
        ends_B1 = self.length[:, None] + count_BT[:, -1:]
        number_BS = count_BT[:, -1:] - (ends_B1 - 1 - jnp.arange(self.num_slots)) % self.num_slots
        hit_BST = real_BT[:, None] & (count_BT[:, None] == number_BS[:, :, None])
        return jnp.where(jnp.any(hit_BST, axis=2), jnp.argmax(hit_BST, axis=2), -1)

    @jax.named_scope("cache")
    def update(
        self, layer: int | Int[Array, ""], k_BTKH: Float[Array, "B T K H"], v_BTKH: Array
    ) -> tuple["KVCache", Array, Array, tuple[Array, Array]]:
        """Writes one layer's new keys and values.

        Returns:
          the cache, then the keys and the values [B, S, K, ...], and the (positions, segments) that
          the new tokens may attend to, in slot order.
        """
        k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        positions_BT, segments_BT, _, fits = self.block
        if not self.is_ring:  # a clamped write would be over tokens that are seen
            k_BKTH, v_BKTH = jnp.where(fits, k_BKTH, jnp.nan), jnp.where(fits, v_BKTH, jnp.nan)
        k_BKTH, v_BKTH = k_BKTH.astype(self._dtype), v_BKTH.astype(self._dtype)
        old_k, old_v = self._layer(layer)
        new = self._write(layer, k_BKTH, v_BKTH)
        if self.is_ring and positions_BT.shape[1] > 1:
            return (
                new,
                jnp.concatenate([old_k, k_BKTH], axis=2).swapaxes(1, 2),
                jnp.concatenate([old_v, v_BKTH], axis=2).swapaxes(1, 2),
                (
                    jnp.concatenate([self.positions_BS, positions_BT], axis=1),
                    jnp.concatenate([self.segments_BS, segments_BT], axis=1),
                ),
            )
        k_BKSH, v_BKSH = new._layer(layer)
        return new, k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2), self._places()

    def _places(self) -> tuple[Array, Array]:
        """Positions and segments with the announced tokens' in them."""
        positions_BS = self._put(self.positions_BS, self.block.positions_BT, axis=1)
        return positions_BS, self._put(self.segments_BS, self.block.segments_BT, axis=1)

    def end(self) -> "KVCache":
        """Takes the announced tokens in, once all layers have written them."""
        positions_BS, segments_BS = self._places()
        segments_BT = self.block.segments_BT
        num_new = segments_BT.shape[1]
        if self.is_ring:
            num_new = jnp.sum(segments_BT > 0, axis=1, dtype=jnp.int32)
        return dataclasses.replace(
            self,
            positions_BS=positions_BS,
            segments_BS=segments_BS,
            length=self.length + num_new,
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
        last_BS = jnp.where(is_last_BS, jnp.arange(self.num_slots), -1)
        length = 1 + jnp.max(last_BS, axis=1 if self.is_ring else None)
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
            length=fill(empty.length, self.length) if self.is_ring else self.length,
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
            if not isinstance(old, tuple):
                return self._put(old, new_BKTH[None], axis=3, layer=layer)
            put = self._put(old[layer], _matrices(new_BKTH), axis=1)
            return (*old[:layer], put, *old[layer + 1 :])

        return dataclasses.replace(self, k=write(self.k, k_BKTH), v=write(self.v, v_BKTH))

    def _put(self, old: Array, new: Array, axis: int, layer: int | Array | None = None) -> Array:
        """Writes the announced tokens' `new` into their slots, along the slot `axis`."""
        new = new.astype(old.dtype)
        if self.is_ring and self.block.positions_BT.size > 1:
            return self._put_by_row(old, new, layer)
        start = [0] * old.ndim
        start[axis] = self.block.slots.reshape(())
        if layer is not None:
            start[0] = layer
        return jax.lax.dynamic_update_slice(old, new, start)

    def _put_by_row(self, old: Array, new: Array, layer: int | Array | None) -> Array:
        """`_put` where each row has slots of its own."""
        slots, (num_rows, num_new) = self.block.slots, self.block.positions_BT.shape
        if layer is None:
            shape = old.shape
            heads = (num_rows, -1, self.num_slots, *shape[2:])
            old, new = old.reshape(heads), new.reshape(num_rows, -1, num_new, *shape[2:])
        else:
            shape, new = old.shape, new[0]
        if num_new == 1 and not has_mesh():
            # as fast on CPUs as one slice for all rows; one after the other 50 times slower in bf16
            at = (jnp.arange(num_rows), slice(None), slots)
            at = at if layer is None else (layer, *at)
            return old.at[at].set(new[:, :, 0]).reshape(shape)
        columns_BS = slots
        if num_new == 1:
            columns_BS = jnp.where(jnp.arange(self.num_slots) == slots[:, None], 0, -1)
        buffer = old if layer is None else jax.lax.dynamic_index_in_dim(old, layer, keepdims=False)
        moved = jax.vmap(lambda x_KT, at_S: x_KT[:, at_S])(new, columns_BS)
        is_moved = (columns_BS >= 0).reshape(num_rows, 1, -1, *[1] * (buffer.ndim - 3))
        buffer = jnp.where(is_moved, moved, buffer)
        if layer is None:
            return buffer.reshape(shape)
        return jax.lax.dynamic_update_index_in_dim(old, buffer, layer, 0)


def _matrices(x_BKSH: Float[Array, "B K S H"]) -> Float[Array, "M S H"]:
    """One matrix a row and head; whole on every device, since lists of layers are for one."""
    if has_mesh():
        x_BKSH = jax.reshard(x_BKSH, spec(None, None, None, None))
    return x_BKSH.reshape(math.prod(x_BKSH.shape[:2]), *x_BKSH.shape[2:])
