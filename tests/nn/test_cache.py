"""The cache against a list: what a query finds after any cutting of the tokens into blocks."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.attention import Tokens, attend_cached
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.slots import put_in_pages_by_scatter, put_in_pages_by_slice
from tests.grids import cases

LAYERS, ROWS, HEADS, WIDTH, TOTAL = 2, 1, 1, 1, 12
WIDTHS = (WIDTH, WIDTH)


def keys_of(positions, layer):
    """Keys that tell the position and the layer of their token; values are their negatives."""
    numbers = jnp.asarray(positions, jnp.float32) + 100 * layer
    return numbers.reshape(ROWS, -1, HEADS, WIDTH)


@jax.jit
def write_block(cache, positions):
    """The cache after a block, and what each layer found: keys, values, and where they stand."""
    cache, found = cache.begin(positions, jnp.ones_like(positions)), []
    for layer in range(LAYERS):
        keys = keys_of(positions, layer)
        cache, seen = cache.update(layer, keys, -keys)
        found.append((*seen.rows(jnp.float32), *seen.places))
    return cache.end(), found


def write(cache, start, size):
    """Writes tokens `start` on into every layer; returns the cache and what each layer found."""
    cache, layers = write_block(cache, np.arange(start, start + size, dtype=np.int32)[None])
    found = []
    for layer, (k, v, positions, segments) in enumerate(jax.tree.map(np.asarray, layers)):
        filled = segments[0] > 0
        np.testing.assert_array_equal(k, -v)
        np.testing.assert_array_equal(k.ravel()[filled] - 100 * layer, positions[0][filled])
        found.append(sorted(positions[0][filled].tolist()))
    return cache, found


# blocks of one size and of one token: each size of block is a program for each kind of cache
cuttings = pytest.mark.parametrize("sizes", [[1] * 12, [3] * 4, [3, 1] * 3], ids=str)


@cuttings
def test_a_full_cache_offers_every_token_so_far(sizes):
    cache, end = KVCache.create(LAYERS, ROWS, 16, HEADS, WIDTHS), 0
    for size in sizes:
        cache, found = write(cache, end, size)
        end += size
        assert found == [list(range(end))] * LAYERS
    assert cache.length_B.tolist() == [TOTAL]


# a block of three goes round once or more often, just once at times, and never
@cuttings
@pytest.mark.parametrize("window", [1, 2, 5, 14])
def test_a_ring_offers_each_token_its_window_at_least(sizes, window):
    cache, end = KVCache.create(LAYERS, ROWS, window, HEADS, WIDTHS, is_ring=True), 0
    for size in sizes:
        cache, found = write(cache, end, size)
        for positions in found:
            assert len(positions) == len(set(positions))
            for query in range(end, end + size):
                assert set(range(max(0, query - window + 1), query + 1)) <= set(positions)
        end += size
    kept = np.asarray(cache.positions_BS)[np.asarray(cache.segments_BS) > 0]
    assert sorted(kept) == list(range(max(0, TOTAL - window), TOTAL))


def test_slots_of_a_ring_are_taken_in_turn():
    cache = KVCache.create(LAYERS, ROWS, 5, HEADS, WIDTHS, is_ring=True)
    for start, size in ((0, 3), (3, 1), (4, 1), (5, 3)):
        cache, _ = write(cache, start, size)
    np.testing.assert_array_equal(cache.positions_BS, [[5, 6, 7, 3, 4]])
    np.testing.assert_array_equal(cache.streams[0][1].ravel(), [105, 106, 107, 103, 104])


def test_an_empty_cache_has_nothing_to_see():
    cache = KVCache.create(LAYERS, 3, 8, HEADS, WIDTHS)
    assert cache.streams[0].shape == (LAYERS, 3, HEADS, 8, WIDTH)
    assert cache.num_slots == 8
    assert not np.any(cache.segments_BS)


def test_keys_are_kept_in_the_dtype_of_the_cache():
    cache = KVCache.create(LAYERS, ROWS, 8, HEADS, WIDTHS, dtype="bfloat16")
    positions = np.array([[0, 1, 257]], np.int32)
    cache = cache.begin(positions, np.ones_like(positions))
    cache, seen = cache.update(0, keys_of(positions, 0), -keys_of(positions, 0))
    chex.assert_type(seen.streams, jnp.bfloat16)
    assert seen.streams[0].ravel()[:3].tolist() == [0, 1, 256]  # 257 has 9 bits
    assert [stream.dtype.itemsize for stream in cache.streams] == [2, 2]


def test_in_8_bits_numbers_keep_their_sign_and_half_a_step_of_the_largest():
    cache = KVCache.create(1, 1, 4, 2, (8,), dtype="int8")
    new = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32) * [[[10], [1]]]
    new[0, 1] = 0
    positions = np.arange(3, dtype=np.int32)[None]
    cache, seen = cache.begin(positions, positions + 1).update(0, new)
    assert cache.streams[0].nbytes == 4 * 2 * 8
    error = np.abs(seen.rows(jnp.float32)[0][:, :3] - new)
    assert (error <= np.abs(new).max(-1, keepdims=True) / 254 * 1.001).all()
    assert error[:, 0].max() > 0


def test_what_a_cache_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a cache of int32; it may be of a float dtype, or int8"):
        KVCache.create(1, 1, 4, 1, WIDTHS, dtype="int32")
    with pytest.raises(ValueError, match="a ring has no pages"):
        KVCache.create(1, 1, 4, 1, WIDTHS, is_ring=True, page_size=2)


def test_the_layer_may_be_a_traced_number():
    @jax.jit
    def run(cache, layer):
        positions = jnp.arange(3)[None]
        cache = cache.begin(positions, jnp.ones_like(positions))
        keys = jnp.full((ROWS, 3, HEADS, WIDTH), 7.0)
        return cache.update(layer, keys, keys)[0].end()

    cache = run(KVCache.create(LAYERS, ROWS, 4, HEADS, WIDTHS), 1)
    np.testing.assert_array_equal(cache.streams[0][:, 0, 0, :, 0], [[0, 0, 0, 0], [7, 7, 7, 0]])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_cache_is_updated_in_place_by_a_loop(rows, dtype):
    cache = KVCache.create(LAYERS, rows, 4096, HEADS, (64, 64), dtype=dtype)
    size = cache.streams[0].nbytes
    leaves, structure = jax.tree.flatten(cache)

    def step(_, leaves):
        cache = structure.unflatten(leaves)
        positions = cache.length_B[:, None]
        keys = jnp.ones((rows, 1, HEADS, 64))
        cache = cache.begin(positions, jnp.ones_like(positions))
        for layer in range(LAYERS):
            cache, seen = cache.update(layer, keys, keys)
            keys = keys + jnp.sum(seen.rows("float32")[0][:, :8].astype(jnp.float32))
        return jax.tree.leaves(cache.end())

    run = jax.jit(lambda leaves: jax.lax.fori_loop(0, 5, step, leaves), donate_argnums=0)
    assert run.lower(leaves).compile().memory_analysis().temp_size_in_bytes < size / 100


def test_rows_of_unequal_length_take_slots_of_their_own():
    @jax.jit
    def write_some(cache, segments):
        positions = cache.length_B[:, None] + jnp.arange(3)
        keys = positions[:, :, None, None].astype(jnp.float32)
        cache = cache.begin(positions, segments)
        cache, *_ = cache.update(0, keys, -keys)
        return cache.end()

    cache = KVCache.create(1, 2, 8, HEADS, WIDTHS)
    for counts in ([2, 3], [0, 2], [3, 1]):  # padding at the end of a row takes no slot
        cache = write_some(cache, (np.arange(3) < np.array(counts)[:, None]).astype(np.int32))
    assert cache.length_B.tolist() == [5, 6]
    assert cache.segments_BS.tolist() == [[1] * 5 + [0] * 3, [1] * 6 + [0] * 2]
    for row, length in enumerate((5, 6)):
        stored = np.asarray(cache.streams[0])[0, row, 0, :length, 0]
        assert stored.tolist() == np.asarray(cache.positions_BS)[row, :length].tolist()
        assert stored.tolist() == list(range(length))


def test_tokens_that_are_taken_back_are_written_over():
    @jax.jit
    def write_and_keep(cache, kept):
        positions = cache.length_B[:, None] + jnp.arange(3)
        keys = positions[:, :, None, None].astype(jnp.float32)
        before_B = cache.length_B
        cache = cache.begin(positions, jnp.ones_like(positions))
        cache, *_ = cache.update(0, keys, keys)
        return cache.end().back_to(before_B + kept)

    cache = KVCache.create(1, 2, 8, HEADS, WIDTHS)
    for kept in ([2, 1], [0, 2]):
        cache = write_and_keep(cache, np.array(kept))
    assert cache.length_B.tolist() == [2, 3]
    assert cache.segments_BS.tolist() == [[1, 1] + [0] * 6, [1, 1, 1] + [0] * 5]
    stored = np.asarray(cache.streams[0])[0, :, 0, :, 0]
    assert stored[0, :2].tolist() == [0, 1]
    assert stored[1, :3].tolist() == [0, 1, 2]


def test_a_cache_grows_and_its_rows_are_repeated():
    cache, _ = write(KVCache.create(LAYERS, ROWS, 4, HEADS, WIDTHS, dtype="bfloat16"), 0, 3)
    empty = KVCache.create(LAYERS, 2, 8, HEADS, WIDTHS, dtype="bfloat16")
    grown = jax.jit(KVCache.fit)(cache, empty)
    assert grown.length_B.tolist() == [3, 3]
    assert grown.segments_BS.tolist() == [[1] * 3 + [0] * 5] * 2
    for old, new in zip(cache.streams, grown.streams, strict=True):
        np.testing.assert_array_equal(new[:, :, :, :3], np.repeat(old[:, :, :, :3], 2, axis=1))


COLUMNS, WINDOW = 26, 5
# each row has padding at its start, inside and at its end, and starts a second document somewhere
SEGMENTS = np.array(
    [
        [0] * 3 + [1] * 6 + [0] * 4 + [1] * 6 + [0] * 1 + [2] * 5 + [0],
        [1, 0] * 6 + [0] * 2 + [2] * 12,
    ]
)
POSITIONS = np.array([[np.sum(r[:t] == r[t]) for t in range(COLUMNS)] for r in SEGMENTS])


def dense(q, k, v, window):
    """Each query against every key of its segment, not later and within the window, in float64."""
    out = np.zeros(q.shape)
    for b, t in np.argwhere(SEGMENTS > 0):
        ahead = POSITIONS[b, t] - POSITIONS[b]
        seen = (SEGMENTS[b] == SEGMENTS[b, t]) & (ahead >= 0) & (ahead < window)
        scores = np.einsum("nh,snh->ns", q[b, t], k[b, seen])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, t] = np.einsum("ns,snh->nh", weights / weights.sum(-1, keepdims=True), v[b, seen])
    return out


@functools.cache
def qkv():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, COLUMNS, 2, 4)).astype(np.float32)
    return q, k, v


@jax.jit
def read_block(cache, q_BTNH, k_BTKH, v_BTKH, positions, segments):
    found, cache = [], cache.begin(positions, segments)
    for layer in range(LAYERS):
        cache, seen = cache.update(layer, k_BTKH * (1 + layer), v_BTKH)
        tokens, q = Tokens(positions, segments), q_BTNH / (1 + layer)
        found.append(attend_cached(q, seen, tokens, window=WINDOW, scale=1.0))
    return cache.end(), jnp.stack(found)


def make_cache(kind, dtype):
    """Two rows; pages in no order, more than enough."""
    slots = {"ring": WINDOW, "wide": WINDOW + 2}.get(kind, COLUMNS)
    more = dict(is_ring=slots < COLUMNS, dtype=dtype)
    if kind != "pages":
        return KVCache.create(LAYERS, 2, slots, 2, (4, 4), **more)
    cache = KVCache.create(LAYERS, 2, slots, 2, (4, 4), **more, page_size=4, num_pages=15)
    pages = np.random.default_rng(1).permutation(15)[:14].reshape(2, 7)
    return dataclasses.replace(cache, pages_BJ=jnp.asarray(pages, jnp.int32))


CACHES = cases(
    itertools.product(("ring", "wide", "full", "pages"), ("float32", "bfloat16", "int8")),
    fast=[
        ("ring", "float32"),
        ("ring", "int8"),
        ("wide", "float32"),
        ("full", "bfloat16"),
        ("pages", "float32"),
        ("pages", "int8"),
    ],
)


# blocks of one compile but one of the two programs of the others
@pytest.mark.parametrize(
    "sizes",
    cases([[1] * 26, [7, 1, 7, 1, 7, 1, 1, 1]], fast=[[7, 1, 7, 1, 7, 1, 1, 1]]),
    ids=str,
)
@pytest.mark.parametrize(("kind", "dtype"), CACHES)
def test_padding_inside_rows_hides_no_token_of_the_window(kind, dtype, sizes):
    cache, found, start = make_cache(kind, dtype), [], 0
    q, k, v = [x.astype("bfloat16" if dtype == "bfloat16" else "float32") for x in qkv()]
    for size in sizes:
        part = slice(start, start + size)
        places = [x[:, part].astype(np.int32) for x in (POSITIONS, SEGMENTS)]
        cache, out = read_block(cache, q[:, part], k[:, part], v[:, part], *places)
        found.append(np.asarray(out, np.float32))
        start += size
    found, expected = np.concatenate(found, axis=2), dense(*qkv(), WINDOW)
    for layer in range(LAYERS):
        error = np.abs(found[layer] - expected)[SEGMENTS > 0].max()
        assert error < {"float32": 1e-5, "bfloat16": 0.06, "int8": 0.06}[dtype]
    if cache.is_ring:
        np.testing.assert_array_equal(cache.length_B, (SEGMENTS > 0).sum(1))


def test_a_ring_of_one_row_counts_its_tokens_too():
    @jax.jit
    def write_one(cache, position, segment):
        cache = cache.begin(position, segment)
        cache, *_ = cache.update(0, keys_of(position, 0), keys_of(position, 0))
        return cache.end()

    cache = KVCache.create(1, 1, 3, HEADS, WIDTHS, is_ring=True)
    for position, segment in enumerate([1, 1, 0, 0, 1, 0]):
        cache = write_one(cache, np.full((1, 1), position), np.full((1, 1), segment))
    assert cache.length_B.tolist() == [3]
    kept = np.asarray(cache.segments_BS) > 0
    assert sorted(np.asarray(cache.positions_BS)[kept]) == [1, 4]


@pytest.mark.parametrize("page_size", [None, 4])
def test_a_row_without_room_gives_nan_and_the_other_what_it_should(page_size):
    q, k, v = [x[:, :3] for x in qkv()]
    positions, ones = np.tile(np.arange(3, dtype=np.int32), (2, 1)), np.ones((2, 3), np.int32)
    cache = KVCache.create(LAYERS, 2, 8, 2, (4, 4), page_size=page_size)
    if page_size is None:
        cache = dataclasses.replace(cache, length_B=jnp.asarray([0, 3], jnp.int32))
    else:
        cache = dataclasses.replace(cache, pages_BJ=jnp.asarray([[2, 0], [3, -1]], jnp.int32))
    for number, fits in enumerate([[True, True], [True, False], [False, False]]):
        cache, out = read_block(cache, q, k, v, positions + 3 * number, ones)
        assert np.isfinite(out).all(axis=(0, 2, 3, 4)).tolist() == fits
        assert np.isnan(out).all(axis=(0, 2, 3, 4)).tolist() == np.logical_not(fits).tolist()


def test_slice_by_slice_pages_hold_what_a_scatter_puts_there():
    draw = np.random.default_rng(0)
    pool = draw.normal(size=(2, 6, 2, 4, 3)).astype(np.float32)
    pages = np.array([[5, 0, 3], [1, -1, 4]], np.int32)
    for num_new, start in ((1, [6, 3]), (1, [4, 5]), (7, [2, 0]), (3, [1, 3]), (4, [0, 8])):
        new = draw.normal(size=(2, 2, num_new, 3)).astype(np.float32)
        args = (pool, new, jnp.int32(1), pages, np.array(start, np.int32))
        found, wanted = put_in_pages_by_slice(*args), put_in_pages_by_scatter(*args)
        np.testing.assert_array_equal(found, wanted)
        assert np.any(np.asarray(found) != pool)
