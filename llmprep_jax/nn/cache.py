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
updates to float32 and back at every step, and integers it does not.

Letters of this file: P pages of a pool, J pages of a row.
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
      start_B: each row's first slot. fits_B: whether a full cache has the slots that are wanted.
      columns_BS: of a ring that takes several: the column of the token that each slot takes, -1
        where it keeps its own.
    """

    places: tuple[Int[Array, "B _"], Int[Array, "B _"]]
    start_B: Int[Array, "B"]
    fits_B: Bool[Array, "B"] | None = None
    columns_BS: Int[Array, "B S"] | None = None


class Seen(NamedTuple):
    """What a block's tokens may attend to in one layer.

    Attributes:
      streams: [B, S, K, H] each, or pools [P, page, K, H]. scales: float32 [..., K] of each where
        they are int8; else empty. pages_BJ: of pools.
      places: positions and segments, [B, S]. fits_B: whether the block's own tokens are there.
    """

    streams: tuple[Array, ...]
    scales: tuple[Array, ...]
    pages_BJ: Int[Array, "B J"] | None
    places: tuple[Int[Array, "B S"], Int[Array, "B S"]]
    fits_B: Bool[Array, "B"] | None

    def rows(self, dtype: jax.typing.DTypeLike) -> tuple[Float[Array, "B S K _"], ...]:
        """The streams as contiguous rows of numbers."""
        arrays = [x[..., None] for x in self.scales]
        arrays = [*self.streams, *arrays]
        if self.pages_BJ is not None:
            at_BJ = jnp.maximum(self.pages_BJ, 0)
            arrays = [x[at_BJ].reshape(len(at_BJ), -1, *x.shape[2:]) for x in arrays]
        streams, scales = arrays[: len(self.streams)], arrays[len(self.streams) :]
        if scales:
            streams = [x * scale for x, scale in zip(streams, scales, strict=True)]
        return tuple(x.astype(dtype) for x in streams)

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
        which are both (`nn.mla`). scales: of int8 ones, with H = 1; else empty.
      positions_BS, segments_BS: of the token in each slot; segment 0 is an empty slot or padding.
      length_B: slots that each row has taken; of a ring the tokens so far, of which the next goes
        into slot `length` modulo S.
      pages_BJ: which page of the pool is each row's j-th, -1 for none; None: no pages.
      block: the tokens being written, between `begin` and `end`.
      dtype: of what is kept. is_ring: whether slots are reused.
    """

    streams: tuple[Array, ...]
    scales: tuple[Array, ...]
    positions_BS: Int[Array, "B S"]
    segments_BS: Int[Array, "B S"]
    length_B: Int[Array, "B"]
    pages_BJ: Int[Array, "B J"] | None = None
    block: Block | None = None
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
            shape = (num_layers, num_rows, num_kv_heads, size, width)
            rows = "batch" if page_size is None else None
            lies = spec(None, rows, "kv_heads", None, None, shape=shape)
            return jnp.zeros(shape, dtype, out_sharding=lies)

        streams = tuple(zeros(width, stored) for width in widths)
        scales = tuple(zeros(1, jnp.float32) for _ in widths) if dtype == jnp.int8 else ()
        rows = spec("batch", None, shape=(batch_size, num_slots))
        slots = jnp.zeros((batch_size, num_slots), jnp.int32, out_sharding=rows)
        kind = dict(pages_BJ=pages_BJ, dtype=dtype.name, is_ring=is_ring)
        return cls(streams, scales, slots, slots, slots[:, 0], **kind)

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
            if self.pages_BJ is not None:
                fits_B &= jnp.all((self._pages_of(start_B, num_new) >= 0) | ~real_BT, axis=1)
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

    def _pages_of(self, start_B: Array, num_new: int) -> Int[Array, "B T"]:
        """The page that each of so many slots from `start` on lies in, -1 for none."""
        at_BT = (start_B[:, None] + jnp.arange(num_new)) // self.streams[0].shape[3]
        return jnp.take_along_axis(self.pages_BJ, at_BT, axis=1, mode="fill", fill_value=-1)

    @jax.named_scope("cache")
    def update(
        self, layer: int | Int[Array, ""], *new_BTKH: Float[Array, "B T K _"]
    ) -> tuple["KVCache", Seen]:
        """Writes one layer's new tokens, an array for each stream; and what these may attend to."""
        new = [x.swapaxes(1, 2) for x in new_BTKH]
        new = _in_8_bits(new) if self.scales else [self._encode(x) for x in new]
        written, seen = [], []
        for old, x_BKTH in zip((*self.streams, *self.scales), new, strict=True):
            written.append(self._write(old, x_BKTH, layer))
            if self.block.columns_BS is None:
                seen.append(_layer(written[-1], layer))
            else:
                seen.append(jnp.concatenate([_layer(old, layer), x_BKTH], axis=2))
        count = len(self.streams)
        cache = dataclasses.replace(
            self, streams=tuple(written[:count]), scales=tuple(written[count:])
        )
        return cache, Seen(
            tuple(self._decode(x).swapaxes(1, 2) for x in seen[:count]),
            tuple(x[..., 0].swapaxes(1, 2) for x in seen[count:]),
            self.pages_BJ,
            self.block.places,
            self.block.fits_B,
        )

    def _write(self, old: Array, new_BKTH: Array, layer: int | Int[Array, ""]) -> Array:
        if self.pages_BJ is None:
            return _write(old, new_BKTH, layer, self.block)
        start_B, num_new = self.block.start_B, new_BKTH.shape[2]
        pages_BT = self._pages_of(start_B, num_new)
        at_BT = (start_B[:, None] + jnp.arange(num_new)) % self.streams[0].shape[3]
        # beyond the pool: a token without a page is dropped
        pages_BT = jnp.where(pages_BT < 0, old.shape[1], pages_BT)
        return _put_in_pages(old, new_BKTH, jnp.asarray(layer, jnp.int32), pages_BT, at_BT)

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


def _put_in_pages(
    pool_LPKSH: Array, new_BKTH: Array, layer: Int[Array, ""], pages_BT: Array, at_BT: Array
) -> Array:
    """Each token into its slot of its page; every device has all rows' tokens of its heads."""
    if not has_mesh() or jax.sharding.get_abstract_mesh().manual_axes:
        return _put_in_pages_here(pool_LPKSH, new_BKTH, layer, pages_BT, at_BT)
    lies = (*sharding_of(pool_LPKSH).spec, *[None] * 5)[:5]
    ins = (jax.P(*lies), jax.P(None, lies[2], None, None), jax.P(), jax.P(None), jax.P(None))
    new_BKTH, pages_BT, at_BT = [
        jax.reshard(x, where)
        for x, where in ((new_BKTH, ins[1]), (pages_BT, ins[3]), (at_BT, ins[4]))
    ]
    put = jax.shard_map(_put_in_pages_here, in_specs=ins, out_specs=ins[0])
    return put(pool_LPKSH, new_BKTH, layer, pages_BT, at_BT)


def _put_in_pages_here(
    pool_LPKSH: Array, new_BKTH: Array, layer: Array, pages_BT: Array, at_BT: Array
) -> Array:
    at_BT3 = jnp.stack([jnp.broadcast_to(layer, pages_BT.shape), pages_BT, at_BT], axis=-1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2, 3),
        inserted_window_dims=(0, 1, 3),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(pool_LPKSH, at_BT3, new_BKTH.swapaxes(1, 2), numbers, mode="drop")


def _put_here(old_LBKSH: Array, new_BKTH: Array, layer: Array, start_B: Array) -> Array:
    num_rows = len(start_B)
    # on TPUs slice by slice: a scatter, or a loop of them, lays the whole cache out anew
    if num_rows == 1 or platform() == "tpu":
        for row in range(num_rows):
            start = (layer, row, 0, start_B[row], 0)
            old_LBKSH = jax.lax.dynamic_update_slice(old_LBKSH, new_BKTH[None, row, None], start)
        return old_LBKSH
    rows_B = jnp.arange(num_rows, dtype=jnp.int32)
    at_B3 = jnp.stack([jnp.broadcast_to(layer, num_rows), rows_B, start_B], axis=1)
    numbers = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return jax.lax.scatter(old_LBKSH, at_B3, new_BKTH, numbers, unique_indices=True, mode="clip")
