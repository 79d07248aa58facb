"""Key/value caches: all positions, or a ring of the window's size for layers with a sliding window.

A cache is a value: it goes into a forward pass and a new one comes out, and inside jit its buffers
are updated in place. Slots carry the position and segment of the token that they hold (segment 0:
empty), so attention needs no notion of full or ring. Each row has a length of its own. In a full
cache a block of tokens goes into the slots from there on; what follows the last real token of a row
takes none. A ring counts real tokens alone, for padding would take the slot of a token which is
still in the window. W slots are enough for a window of W only while one token comes at a time; a
longer block attends to the old ring and to itself, and writes afterwards.

A row of a full cache that is asked for more slots than it has cannot raise where its length is
traced: its outputs are NaN from there on (`place_tokens` raises where it can).

Slots are contiguous, or lie in pages of a pool that all rows share (PagedAttention, Kwon et al.
2023): `pages_BJ` says which page holds a row's j-th `page_size` slots, and whoever batches requests
hands them out. Numbers are kept as they are or in 8 bits, with a scale a token and head. On a CPU
bf16 is kept as 16-bit integers: XLA's CPU compiler copies the whole of a bf16 array that a loop
updates to float32 and back at every step, and integers it does not. On a TPU widths are filled up
with zeros to whole lanes: it lays narrower arrays out otherwise than its kernels read them.

Letters of this file: P pages of a pool, J pages of a row.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.nn.slots import pages_of, put, put_in_pages
from llmprep_jax.sharding import has_mesh, platform, sharding_of, spec
from llmprep_jax.types import Array, Bool, Float, Int

LANES = 128  # of a TPU's registers


class Block(NamedTuple):
    """Tokens on their way into a cache, and where they go.

    Attributes:
      places: positions, segments and spans, if there are any, of what they may attend to, in the
        order of `update`'s.
      start_B: each row's first slot. fits_B: whether a full cache has the slots that are wanted.
      columns_BS: of a ring that takes several: the column of the token that each slot takes, -1
        where it keeps its own.
    """

    places: tuple[Int[Array, "B _"], ...]
    start_B: Int[Array, "B"]
    fits_B: Bool[Array, "B"] | None = None
    columns_BS: Int[Array, "B S"] | None = None


class Seen(NamedTuple):
    """What a block's tokens may attend to in one layer.

    Attributes:
      streams: [L, B, S, K, H] each, with the `layer` that is meant; or of it alone, [B, S, K, H],
        or pools of all layers, [P, page, K, H]. scales: float32 [..., K] of each where they are
        int8; else empty. pages_BJ: of pools.
      places: positions, segments and spans, if there are any, [B, S]. fits_B: whether the block's
        own tokens are there. widths: of each stream, behind which are zeros.
    """

    streams: tuple[Array, ...]
    scales: tuple[Array, ...]
    layer: int | Int[Array, ""] | None
    pages_BJ: Int[Array, "B J"] | None
    places: tuple[Int[Array, "B S"], ...]
    fits_B: Bool[Array, "B"] | None
    widths: tuple[int, ...]

    def rows(self, dtype: jax.typing.DTypeLike) -> tuple[Float[Array, "B S K _"], ...]:
        """The streams as contiguous rows of numbers."""
        arrays = [x[..., None] for x in self.scales]
        arrays = [*self.streams, *arrays]
        if self.layer is not None:
            arrays = [_layer(x, self.layer) for x in arrays]
        if self.pages_BJ is not None:
            at_BJ = jnp.maximum(self.pages_BJ, 0)
            arrays = [x[at_BJ].reshape(len(at_BJ), -1, *x.shape[2:]) for x in arrays]
        streams, scales = arrays[: len(self.streams)], arrays[len(self.streams) :]
        if scales:
            streams = [x * scale for x, scale in zip(streams, scales, strict=True)]
        streams = zip(streams, self.widths, strict=True)
        return tuple(x[..., :width].astype(dtype) for x, width in streams)

    def or_nan(self, o_BTNU: Float[Array, "B T N U"]) -> Float[Array, "B T N U"]:
        """Outputs, NaN in rows that the cache had no room for."""
        if self.fits_B is None:
            return o_BTNU
        return jnp.where(self.fits_B[:, None, None, None], o_BTNU, jnp.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What attention keeps of past tokens, for some layers.

    Attributes:
      streams: [L, B, K, S, H] each, or pools [L, P, K, page, H]: keys and values, or latents,
        which are both (`nn.mla`). scales: of int8 ones, [L, B, K, 1, S] or [L, P, K, 1, page],
        as kernels read them; else empty.
      positions_BS, segments_BS: of the token in each slot; segment 0 is an empty slot or padding.
      length_B: slots that each row has taken; of a ring the tokens so far, of which the next goes
        into slot `length` modulo S.
      pages_BJ: which page of the pool is each row's j-th, -1 for none; None: no pages.
      block: the tokens being written, between `begin` and `end`.
      widths: of each stream, behind which are zeros. dtype: of what is kept. is_ring: whether
        slots are reused. is_fresh: whether it is known to be empty until `end`, see `fresh`.
    """

    streams: tuple[Array, ...]
    scales: tuple[Array, ...]
    positions_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]
    length_B: Int[Array, "B"]
    pages_BJ: Int[Array, "B J"] | None = None
    block: Block | None = None
    widths: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    dtype: str = dataclasses.field(default="float32", metadata=dict(static=True))
    is_ring: bool = dataclasses.field(default=False, metadata=dict(static=True))
    is_fresh: bool = dataclasses.field(default=False, metadata=dict(static=True))

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
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> "KVCache":
        """An empty cache.

        Args:
          widths: of a head's keys and of its values, or of latents.
          dtype: "int8" keeps 8 bits and scales.
          page_size: slots of a page; None: no pages. num_pages: of the pool, none of them in a
            row's hands; None: as many as all rows need, each row's own.

        Raises:
          ValueError: pages of a ring, or a dtype that is neither a float nor int8.
        """
        dtype = jnp.dtype(dtype)
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"a cache of {dtype}; it may be of a float dtype, or int8")
        if is_ring and page_size is not None:
            raise ValueError("a ring has no pages: it takes no more slots than its window")
        stored, num_rows, pages_BJ = dtype, batch_size, None
        if page_size is not None:
            num_each = -(-num_slots // page_size)
            num_slots = num_each * page_size
            if num_pages is None:
                num_pages = batch_size * num_each
                pages_BJ = jnp.arange(num_pages, dtype=jnp.int32).reshape(batch_size, num_each)
            else:
                pages_BJ = jnp.full((batch_size, num_each), -1, jnp.int32)
            num_rows = num_pages
        if platform() == "cpu" and dtype in (jnp.bfloat16, jnp.float16):
            stored = jnp.dtype("uint16")

        def zeros(width: int, dtype: jnp.dtype) -> Array:
            size = num_slots if page_size is None else page_size
            width = -(-width // LANES) * LANES if platform() == "tpu" and width > 1 else width
            shape = (num_layers, num_rows, num_kv_heads, size, width)
            rows = "batch" if page_size is None else None
            lies = spec(None, rows, "kv_heads", None, None, shape=shape)
            return jnp.zeros(shape, dtype, out_sharding=lies)

        streams = tuple(zeros(width, stored) for width in widths)
        scales = [zeros(1, jnp.float32).swapaxes(3, 4) for _ in widths if dtype == jnp.int8]
        rows = spec("batch", None, shape=(batch_size, num_slots))
        slots = jnp.zeros((batch_size, num_slots), jnp.int32, out_sharding=rows)
        kind = dict(pages_BJ=pages_BJ, widths=tuple(widths), dtype=dtype.name, is_ring=is_ring)
        return cls(streams, tuple(scales), slots, slots, slots[:, 0], **kind)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def fresh(self) -> "KVCache":
        """This empty cache, known to be so: the first block of tokens attends to itself alone, in
        order, and reads nothing that it has written."""
        assert self.pages_BJ is None
        assert self.block is None
        return dataclasses.replace(self, is_fresh=True)

    def begin(
        self,
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        spans_BT: Int[Array, "B T"] | None = None,
    ) -> "KVCache":
        """Announces a forward pass's tokens; each layer then calls `update`, the model `end`.

        Spans are of these tokens alone: none goes on from an earlier pass.
        """
        num_new, real_BT = positions_BT.shape[1], segments_BT > 0
        start_B, fits_B, columns_BS = self.length_B, None, None
        if not self.is_ring:
            fits_B = start_B + num_new <= self.num_slots
            if self.pages_BJ is not None:
                pages_BT = pages_of(self.pages_BJ, start_B, num_new, self.streams[0].shape[3])
                fits_B &= jnp.all((pages_BT >= 0) | ~real_BT, axis=1)
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
        if spans_BT is not None:
            none_BS = jnp.zeros_like(self.segments_BS)
            if columns_BS is None:
                places.append(_write_places(none_BS, spans_BT, block))
            else:
                places.append(jnp.concatenate([none_BS, spans_BT], axis=1))
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
    ) -> tuple["KVCache", Seen]:
        """Writes one layer's new tokens, an array for each stream; and what these may attend to."""
        new = [
            widen(x.swapaxes(1, 2), old.shape[-1])
            for x, old in zip(new_BTKH, self.streams, strict=True)
        ]
        new = _in_8_bits(new) if self.scales else [self._encode(x) for x in new]
        old, count = (*self.streams, *map(_swap, self.scales)), len(self.streams)
        written = [self._write(x, new_BKTH, layer) for x, new_BKTH in zip(old, new, strict=True)]
        seen, pages_BJ, which = written, self.pages_BJ, None
        if self.block.columns_BS is not None:
            pairs = zip(old, new, strict=True)
            seen = [jnp.concatenate([_layer(x, layer), new], axis=2) for x, new in pairs]
        elif pages_BJ is None:
            which = layer
        else:  # one pool has the pages of all layers
            num_pages = self.streams[0].shape[1]
            pages_BJ = jnp.where(pages_BJ < 0, -1, layer * num_pages + pages_BJ)
            seen = [x.reshape(-1, *x.shape[2:]) for x in written]
        return dataclasses.replace(
            self, streams=tuple(written[:count]), scales=tuple(map(_swap, written[count:]))
        ), Seen(
            tuple(self._decode(x).swapaxes(-3, -2) for x in seen[:count]),
            tuple(x[..., 0].swapaxes(-2, -1) for x in seen[count:]),
            which,
            pages_BJ,
            self.block.places,
            self.block.fits_B,
            self.widths,
        )

    def _write(self, old: Array, new_BKTH: Array, layer: int | Int[Array, ""]) -> Array:
        if self.pages_BJ is None:
            return _write(old, new_BKTH, layer, self.block)
        at = jnp.asarray(layer, jnp.int32), self.pages_BJ, self.block.start_B
        return put_in_pages(old, new_BKTH, *at)

    def end(self) -> "KVCache":
        """The cache once all layers have written the announced tokens."""
        return dataclasses.replace(self, block=None, is_fresh=False)

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
        round), and a whole multiple of the rows, each of which is repeated. Not for pages.
        """
        assert self.pages_BJ is None
        copies = empty.positions_BS.shape[0] // self.positions_BS.shape[0]

        def fill(new: Array, old: Array, axis: int = 0) -> Array:
            if copies > 1:
                old = jax.reshard(old, spec(*[None] * old.ndim)) if has_mesh() else old
                old = jnp.repeat(old, copies, axis=axis)
            old = jax.reshard(old, sharding_of(new).spec) if has_mesh() else old
            if old.shape == new.shape:
                return old
            return jax.lax.dynamic_update_slice(new, old, [0] * new.ndim)

        def fill_all(new: tuple[Array, ...], old: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(fill(*pair, axis=1) for pair in zip(new, old, strict=True))

        return dataclasses.replace(
            self,
            streams=fill_all(empty.streams, self.streams),
            scales=fill_all(empty.scales, self.scales),
            positions_BS=fill(empty.positions_BS, self.positions_BS),
            segments_BS=fill(empty.segments_BS, self.segments_BS),
            length_B=fill(empty.length_B, self.length_B),
        )

    def _encode(self, x_BKTH: Array) -> Array:
        x_BKTH, stored = x_BKTH.astype(self.dtype), self.streams[0].dtype
        return x_BKTH if stored == x_BKTH.dtype else jax.lax.bitcast_convert_type(x_BKTH, stored)

    def _decode(self, x: Array) -> Array:
        if x.dtype == self.dtype:
            return x
        return jax.lax.bitcast_convert_type(x, jnp.dtype(self.dtype))


def widen(x: Array, width: int) -> Array:
    """With zeros behind the last axis up to a width."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _swap(x_LBKSH: Array) -> Array:
    return x_LBKSH.swapaxes(3, 4)


def _in_8_bits(streams: list[Array]) -> list[Array]:
    """Streams [B, K, T, H] as int8, then the scales of each, [B, K, T, 1]."""
    scales = []
    for x_BKTH in streams:
        most = jnp.max(jnp.abs(x_BKTH.astype(jnp.float32)), axis=-1, keepdims=True)
        scales.append(most / 127)
    numbers = []
    for x_BKTH, scale in zip(streams, scales, strict=True):
        whole = jnp.round(x_BKTH.astype(jnp.float32) / jnp.where(scale > 0, scale, 1))
        numbers.append(whole.astype(jnp.int8))
    return [*numbers, *scales]


def _layer(stream_LBKSH: Array, layer: int | Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stream_LBKSH, layer, keepdims=False)


def _write(old_LBKSH: Array, new_BKTH: Array, layer: int | Int[Array, ""], block: Block) -> Array:
    """A stream with a block's tokens in their slots of one layer."""
    if block.columns_BS is None:
        return put(old_LBKSH, new_BKTH, jnp.asarray(layer, jnp.int32), block.start_B)
    old_BKSH, columns_BS = _layer(old_LBKSH, layer), block.columns_BS
    moved_BKSH = jax.vmap(lambda x_KTH, at_S: x_KTH[:, at_S])(new_BKTH, columns_BS)
    is_moved = (columns_BS >= 0)[:, None, :, None]
    new_BKSH = jnp.where(is_moved, moved_BKSH, old_BKSH)
    return jax.lax.dynamic_update_index_in_dim(old_LBKSH, new_BKSH, layer, 0)


def _write_places(old_BS: Array, new_BT: Array, block: Block) -> Array:
    """Positions, or segments, with a block's in their slots."""
    new_B1T1 = new_BT.astype(old_BS.dtype)[:, None, :, None]
    return _write(old_BS[None, :, None, :, None], new_B1T1, 0, block)[0, :, 0, :, 0]
