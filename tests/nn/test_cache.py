"""The cache against a list: what a query finds after any cutting of the tokens into blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.nn.cache import KVCache

LAYERS, ROWS, HEADS, WIDTH, TOTAL = 2, 1, 1, 1, 12


def keys_of(positions, layer):
    """Keys that tell the position and the layer of their token; values are their negatives."""
    numbers = jnp.asarray(positions, jnp.float32) + 100 * layer
    return numbers.reshape(ROWS, HEADS, -1, WIDTH)


def write(cache, start, size):
    """Writes tokens `start` on into every layer; returns the cache and what each layer found."""
    positions = jnp.arange(start, start + size)[None]
    cache = cache.begin(positions, jnp.ones_like(positions))
    found = []
    for layer in range(LAYERS):
        keys = keys_of(positions, layer)
        cache, k, v, (slots, segments) = cache.update(layer, keys, -keys)
        filled = np.asarray(segments[0]) > 0
        np.testing.assert_array_equal(k, -v)
        np.testing.assert_array_equal(k.ravel()[filled] - 100 * layer, slots[0][filled])
        found.append(sorted(np.asarray(slots[0])[filled].tolist()))
    return cache.end(), found


cuttings = pytest.mark.parametrize("sizes", [[1] * 12, [5, 4, 3], [9, 1, 1, 1]], ids=str)


@cuttings
@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "listed"])
def test_a_full_cache_offers_every_token_so_far(sizes, per_layer):
    cache, end = KVCache.create(LAYERS, ROWS, 16, HEADS, WIDTH, per_layer=per_layer), 0
    for size in sizes:
        cache, found = write(cache, end, size)
        end += size
        assert found == [list(range(end))] * LAYERS
    assert int(cache.length) == TOTAL


@cuttings
@pytest.mark.parametrize("window", [1, 4, 5, 14])
def test_a_ring_offers_each_token_its_window_at_least(sizes, window):
    cache, end = KVCache.create(LAYERS, ROWS, window, HEADS, WIDTH, is_ring=True), 0
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
    cache = KVCache.create(LAYERS, ROWS, 4, HEADS, WIDTH, is_ring=True)
    for start, size in ((0, 3), (3, 1), (4, 1), (5, 2)):
        cache, _ = write(cache, start, size)
    np.testing.assert_array_equal(cache.positions_BS, [[4, 5, 6, 3]])
    np.testing.assert_array_equal(cache.k[1].ravel(), [104, 105, 106, 103])


def test_an_empty_cache_has_nothing_to_see():
    cache = KVCache.create(LAYERS, 3, 8, HEADS, WIDTH)
    assert cache.k.shape == (LAYERS, 3, HEADS, 8, WIDTH)
    assert cache.num_slots == 8
    assert not np.any(cache.segments_BS)


def test_keys_are_kept_in_the_dtype_of_the_cache():
    cache = KVCache.create(LAYERS, ROWS, 8, HEADS, WIDTH, dtype="bfloat16")
    cache, _ = write(cache, 0, 3)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_the_layer_may_be_a_traced_number():
    @jax.jit
    def run(cache, layer):
        positions = jnp.arange(3)[None]
        cache = cache.begin(positions, jnp.ones_like(positions))
        keys = jnp.full((ROWS, HEADS, 3, WIDTH), 7.0)
        return cache.update(layer, keys, keys)[0].end()

    cache = run(KVCache.create(LAYERS, ROWS, 4, HEADS, WIDTH), 1)
    np.testing.assert_array_equal(cache.k[:, 0, 0, :, 0], [[0, 0, 0, 0], [7, 7, 7, 0]])


def test_a_donated_cache_is_updated_in_place():
    cache = KVCache.create(LAYERS, ROWS, 4096, HEADS, 64)
    size = cache.k.nbytes

    leaves, structure = jax.tree.flatten(cache)

    def run(leaves):
        cache = structure.unflatten(leaves)
        positions = jnp.zeros((1, 1), jnp.int32)
        keys = jnp.ones((ROWS, HEADS, 1, 64))
        cache = cache.begin(positions, positions + 1)
        for layer in range(LAYERS):
            cache, *_ = cache.update(layer, keys, keys)
        return jax.tree.leaves(cache.end())

    compiled = jax.jit(run, donate_argnums=0).lower(leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 100


@pytest.mark.parametrize("is_ring", [False, True])
def test_layers_in_a_list_keep_the_same_numbers(is_ring):
    cache = KVCache.create(LAYERS, ROWS, 8, HEADS, WIDTH, is_ring=is_ring)
    stacked, _ = write(cache, 0, 5)
    listed, _ = write(cache.unstacked(), 0, 5)
    for layer in range(LAYERS):
        for found in (listed, stacked.unstacked()):
            matrices = found.k[layer].reshape(stacked.k[layer].shape)
            np.testing.assert_array_equal(matrices, stacked.k[layer])


@pytest.mark.parametrize("per_layer", [False, True], ids=["stacked", "listed"])
def test_what_no_row_keeps_is_written_again_and_what_one_row_keeps_is_not(per_layer):
    cache = KVCache.create(1, 2, 8, HEADS, WIDTH, per_layer=per_layer)
    for kept in ([2, 1], [0, 2]):
        # places count what a row has kept so far
        positions = jnp.sum(cache.segments_BS > 0, axis=1)[:, None] + jnp.arange(3)
        keys = positions[:, None, :, None].astype(jnp.float32)
        cache = cache.begin(positions, jnp.ones_like(positions))
        cache, *_ = cache.update(0, keys, keys)
        cache = cache.end().keep(jnp.array(kept), 3)
    assert int(cache.length) == 4
    assert cache.segments_BS.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0]]
    stored = np.asarray(cache._layer(0)[0])[:, 0, :, 0]
    assert stored[0, :2].tolist() == [0, 1]
    assert stored[1, [0, 2, 3]].tolist() == [0, 1, 2]
