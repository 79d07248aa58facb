"""Key/value caches: all positions, or a ring of the window's size for layers with a sliding window.

A cache is a value: it goes into a forward pass and a new one comes out, and inside jit its buffers
are updated in place. Slots carry the position and segment of the token that they hold (segment 0:
empty), so attention needs no notion of full or ring. Each row has a length of its own. In a full
cache a block of tokens goes into the slots from there on; what follows the last real token of a row
takes none. A ring counts real tokens alone, for padding would take the slot of a token which is
still in the window. W slots are enough for a window of W only while one token comes at a time; a
longer block attends to the old ring and to itself, and writes afterwards.

A row of a full cache that is asked for more slots than it has cannot raise where its length is
traced: what it then holds is NaN, and so are its logits that follow (`place_tokens` raises where it
can).

On a CPU bf16 is kept as 16-bit integers: XLA's CPU compiler copies the whole of a bf16 array that a
loop updates to float32 and back at every step, and integers it does not.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh, platform, sharding_of, spec
from llmprep_jax.types import Array, Bool, Float, Int


class Block(NamedTuple):
    """Tokens on their way into a cache, and where they go.

    Attributes:
      places: positions and segments of what they may attend to, in the order of `update`'s.
      start_B: each row's first slot. fits_B: whether a full cache has so many slots left.
      columns_BS: of a ring that takes several: the column of the token that each slot takes, -1
        where it keeps its own.
    """

    places: tuple[Int[Array, "B _"], Int[Array, "B _"]]
    start_B: Int[Array, "B"]
    fits_B: Bool[Array, "B"] | None = None
    columns_BS: Int[Array, "B S"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of past tokens, for some layers.

    Attributes:
      streams: [L, B, K, S, H] each: keys and values, or latents, which are both (`nn.mla`).
      positions_BS, segments_BS: of the token in each slot; segment 0 is an empty slot or padding.
      length_B: slots that each row has taken; of a ring the tokens so far, of which the next goes
        into slot `length` modulo S.
      block: the tokens being written, between `begin` and `end`.
      dtype: of what is kept. is_ring: whether slots are reused.
    """

    streams: tuple[Array, ...]
    positions_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]
    length_B: Int[Array, "B"]
    block: "Block | None" = None
    dtype: str = dataclasses.field(default="float32", metadata=dict(static=True))
    is_ring: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @classmethod
    def create(
        cls,
        num_layers: int,
        batch_size: int,
        num_slots: int,
        num_kv_heads: int,
        widths: Sequence[int],
        *,
        dtype: str | jnp.dtype = "float32",
        is_ring: bool = False,
    ) -> "KVCache":
        """An empty cache; `widths` of a head's keys and of its values, or of latents."""
        dtype = jnp.dtype(dtype)
        stored = jnp.dtype("uint16") if _as_bits(dtype) else dtype
        streams = []
        for width in widths:
            shape = (num_layers, batch_size, num_kv_heads, num_slots, width)
            lies = spec(None, "batch", "kv_heads", None, None, shape=shape)
            streams.append(jnp.zeros(shape, stored, out_sharding=lies))
        rows = spec("batch", None, shape=(batch_size, num_slots))
        slots = jnp.zeros((batch_size, num_slots), jnp.int32, out_sharding=rows)
        return cls(tuple(streams), slots, slots, slots[:, 0], None, dtype.name, is_ring)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def begin(self, positions_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]) -> "KVCache":
        """Announces a forward pass's tokens; each layer then calls `update`, the model `end`."""
        num_new, real_BT = positions_BT.shape[1], segments_BT > 0
        start_B, fits_B, columns_BS = self.length_B, None, None
        if not self.is_ring:
            fits_B = start_B + num_new <= self.num_slots
            num_taken_B = jnp.max(jnp.where(real_BT, 1 + jnp.arange(num_new), 0), axis=1)
        else:
            num_taken_B = jnp.sum(real_BT, axis=1)
            start_B = start_B % self.num_slots  # a token of padding is overwritten by the next
            columns_BS = self._columns(real_BT) if num_new > 1 else None
        block = Block((), start_B, fits_B, columns_BS)
        old, new = (self.positions_BS, self.segments_BS), (positions_BT, segments_BT)
        written = [_write_places(x, y, block) for x, y in zip(old, new, strict=True)]
        places = written
        if columns_BS is not None:
            places = [jnp.concatenate(pair, axis=1) for pair in zip(old, new, strict=True)]
        length_B = self.length_B + num_taken_B.astype(jnp.int32)
        block = block._replace(places=tuple(places))
        return dataclasses.replace(
            self, positions_BS=written[0], segments_BS=written[1], length_B=length_B, block=block
        )

    def _columns(self, real_BT: Bool[Array, "B T"]) -> Int[Array, "B S"]:
        """The column of the last real token that goes into each slot of a ring, or -1."""
        count_BT = jnp.cumsum(real_BT, axis=1)
        # the last token of the block that a slot takes, as its number in the block, from 1 on
        ends_B1 = self.length_B[:, None] + count_BT[:, -1:]
        number_BS = count_BT[:, -1:] - (ends_B1 - 1 - jnp.arange(self.num_slots)) % self.num_slots
        hit_BST = real_BT[:, None] & (count_BT[:, None] == number_BS[:, :, None])
        return jnp.where(jnp.any(hit_BST, axis=2), jnp.argmax(hit_BST, axis=2), -1)

    @jax.named_scope("cache")
    def update(
        self, layer: int | Int[Array, ""], *new_BTKH: Float[Array, "B T K _"]
    ) -> tuple["KVCache", tuple[Array, ...], tuple[Array, Array]]:
        """Writes one layer's new tokens, an array for each stream.

        Returns:
          the cache, then each stream [B, S, K, ...] and the (positions, segments) that the new
          tokens may attend to, in slot order.
        """
        streams, found = [], []
        for old, new in zip(self.streams, new_BTKH, strict=True):
            new_BKTH = self._encode(new.swapaxes(1, 2))
            seen = [_layer(old, layer), new_BKTH] if self.block.columns_BS is not None else None
            streams.append(_write(old, new_BKTH, layer, self.block))
            seen = _layer(streams[-1], layer) if seen is None else jnp.concatenate(seen, axis=2)
            found.append(self._decode(seen).swapaxes(1, 2))
        return dataclasses.replace(self, streams=tuple(streams)), tuple(found), self.block.places

    def end(self) -> "KVCache":
        """The cache once all layers have written the announced tokens."""
        return dataclasses.replace(self, block=None)

    def back_to(self, length_B: Int[Array, "B"]) -> "KVCache":
        """Empties the slots of each row from a length on; not for rings."""
        assert not self.is_ring
        is_kept_BS = jnp.arange(self.num_slots) < length_B[:, None]
        segments_BS = jnp.where(is_kept_BS, self.segments_BS, 0)
        return dataclasses.replace(self, segments_BS=segments_BS, length_B=length_B)

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
        last_B = jnp.max(jnp.where(is_last_BS, jnp.arange(self.num_slots), -1), axis=1)
        segments_BS = jnp.where(held_BS, self.segments_BS, 0)
        length_B = (1 + last_B).astype(jnp.int32)
        cut = dataclasses.replace(self, segments_BS=segments_BS, length_B=length_B)
        return cut, jnp.all(jnp.sum(in_reach_BS, axis=1) == needed)

    def fit(self, empty: "KVCache") -> "KVCache":
        """The same tokens with the slots and the rows of an empty cache.

        That one has as many slots or more (further ones are the last; a ring must not have gone
        round), and a whole multiple of the rows, each of which is repeated.
        """
        copies = empty.positions_BS.shape[0] // self.positions_BS.shape[0]

        def fill(new: Array, old: Array, axis: int = 0) -> Array:
            if copies > 1:
                old = jax.reshard(old, spec(*[None] * old.ndim)) if has_mesh() else old
                old = jnp.repeat(old, copies, axis=axis)
            old = jax.reshard(old, sharding_of(new).spec) if has_mesh() else old
            if old.shape == new.shape:
                return old
            return jax.lax.dynamic_update_slice(new, old, [0] * new.ndim)

        streams = [fill(*pair, axis=1) for pair in zip(empty.streams, self.streams, strict=True)]
        return dataclasses.replace(
            self,
            streams=tuple(streams),
            positions_BS=fill(empty.positions_BS, self.positions_BS),
            segments_BS=fill(empty.segments_BS, self.segments_BS),
            length_B=fill(empty.length_B, self.length_B),
        )

    def _encode(self, x_BKTH: Array) -> Array:
        if self.block.fits_B is not None:  # a clamped write would be over tokens that are seen
            x_BKTH = jnp.where(self.block.fits_B[:, None, None, None], x_BKTH, jnp.nan)
        x_BKTH, stored = x_BKTH.astype(self.dtype), self.streams[0].dtype
        return x_BKTH if stored == x_BKTH.dtype else jax.lax.bitcast_convert_type(x_BKTH, stored)

    def _decode(self, x: Array) -> Array:
        if x.dtype == self.dtype:
            return x
        return jax.lax.bitcast_convert_type(x, jnp.dtype(self.dtype))


def _as_bits(dtype: jnp.dtype) -> bool:
    return platform() == "cpu" and dtype in (jnp.bfloat16, jnp.float16)


def _layer(stream_LBKSH: Array, layer: int | Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stream_LBKSH, layer, keepdims=False)


def _write(old_LBKSH: Array, new_BKTH: Array, layer: int | Int[Array, ""], block: Block) -> Array:
    """A stream with a block's tokens in their slots of one layer."""
    if block.columns_BS is None:
        return _put(old_LBKSH, new_BKTH, jnp.asarray(layer, jnp.int32), block.start_B)
    old_BKSH, columns_BS = _layer(old_LBKSH, layer), block.columns_BS
    moved_BKSH = jax.vmap(lambda x_KTH, at_S: x_KTH[:, at_S])(new_BKTH, columns_BS)
    is_moved = (columns_BS >= 0)[:, None, :, None]
    new_BKSH = jnp.where(is_moved, moved_BKSH, old_BKSH)
    return jax.lax.dynamic_update_index_in_dim(old_LBKSH, new_BKSH, layer, 0)


def _write_places(old_BS: Array, new_BT: Array, block: Block) -> Array:
    """Positions, or segments, with a block's in their slots."""
    new_B1T1 = new_BT.astype(old_BS.dtype)[:, None, :, None]
    return _write(old_BS[None, :, None, :, None], new_B1T1, 0, block)[0, :, 0, :, 0]


def _put(old_LBKSH: Array, new_BKTH: Array, layer: Int[Array, ""], start_B: Array) -> Array:
    """Each row's tokens from its own slot on; every device writes the rows and heads it has."""
    if not has_mesh() or jax.sharding.get_abstract_mesh().manual_axes:
        return _put_here(old_LBKSH, new_BKTH, layer, start_B)
    lies = (*sharding_of(old_LBKSH).spec, *[None] * 5)[:5]
    ins = (jax.P(*lies), jax.P(*lies[1:3], None, None), jax.P(), jax.P(lies[1]))
    new_BKTH, start_B = jax.reshard(new_BKTH, ins[1]), jax.reshard(start_B, ins[3])
    put = jax.shard_map(_put_here, in_specs=ins, out_specs=ins[0])
    return put(old_LBKSH, new_BKTH, layer, start_B)


def _put_here(old_LBKSH: Array, new_BKTH: Array, layer: Array, start_B: Array) -> Array:
    num_rows = len(start_B)
    if num_rows == 1:
        start = (layer, 0, 0, start_B[0], 0)
        return jax.lax.dynamic_update_slice(old_LBKSH, new_BKTH[None], start)
    rows_B = jnp.arange(num_rows, dtype=jnp.int32)
    at_B3 = jnp.stack([jnp.broadcast_to(layer, num_rows), rows_B, start_B], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(old_LBKSH, at_B3, new_BKTH, numbers, unique_indices=True, mode="clip")
