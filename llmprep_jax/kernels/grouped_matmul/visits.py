"""Which tiles of rows a kernel goes to, and for which group.

Rows are cut into tiles of one size, wherever groups begin. A visit is one tile with one group that
has rows in it, so a tile on a border is visited once a group, and M rows of E groups take at most
M / tile + E visits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visits(NamedTuple):
    """In order of rows, int32 [V]: rows `starts` to `ends` (not included) of `tiles`.

    Attributes:
      groups: whose rows they are; the number of groups where they are of none.
      count: [1], the visits to make; what follows has no rows and the last tile.
    """

    groups: jax.Array
    tiles: jax.Array
    starts: jax.Array
    ends: jax.Array
    count: jax.Array


def visit_tiles(sizes_E: jax.Array, num_rows: int, tile_rows: int) -> Visits:
    """Every tile at least once, also those of rows that no group has."""
    rest = num_rows - sizes_E.sum(keepdims=True)
    return _visits(jnp.append(sizes_E, rest), num_rows, tile_rows, least=0)


def visit_groups(sizes_E: jax.Array, num_rows: int, tile_rows: int) -> Visits:
    """Every group at least once, also those without rows."""
    return _visits(sizes_E, num_rows, tile_rows, least=1)


def _visits(sizes_G, num_rows, tile_rows, least):
    num_tiles = -(-num_rows // tile_rows)
    ends_G = jnp.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    first_G = starts_G // tile_rows
    counts_G = jnp.where(sizes_G > 0, (ends_G - 1) // tile_rows - first_G + 1, least)
    done_G = jnp.cumsum(counts_G)

    visits_V = jnp.arange(num_tiles + len(sizes_G) - 1)
    groups_V = jnp.searchsorted(done_G, visits_V, side="right")
    at = functools.partial(jnp.take, indices=groups_V, mode="clip")
    tiles_V = at(first_G) + visits_V - at(done_G - counts_G)
    starts_V = jnp.maximum(at(starts_G), tiles_V * tile_rows)
    ends_V = jnp.minimum(at(ends_G), (tiles_V + 1) * tile_rows)
    tiles_V = jnp.minimum(tiles_V, num_tiles - 1)
    arrays = groups_V, tiles_V, starts_V, jnp.maximum(starts_V, ends_V), done_G[-1:]
    return Visits(*[x.astype(jnp.int32) for x in arrays])
