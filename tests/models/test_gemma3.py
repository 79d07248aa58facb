"""Gemma 3's layers of two kinds: what they cost where they are scanned."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.grids import cases
from tests.models.tiny import CONFIGS, random_model

CFG = dataclasses.replace(CONFIGS["gemma3"], num_layers=17)  # 8 super-blocks and one layer more


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def memory_of_step(num_slots, rows):
    """(bytes of the caches, temporary bytes) of a decode step that is given them for good."""
    model = random_model(CFG)
    cache, tokens = model.init_cache(rows, num_slots), jnp.ones((rows, 1), jnp.int32)
    leaves, structure = jax.tree.flatten(cache)

    def run(model, tokens, leaves):
        out = model(tokens, cache=jax.tree.unflatten(structure, leaves))
        return jax.tree.leaves(out)

    program = jax.jit(run, donate_argnums=2).lower(model, tokens, leaves).compile()
    return size(cache), program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", cases([1, 2], fast=[2]))
def test_a_scanned_decode_step_copies_no_cache(rows):
    few, many = memory_of_step(64, rows), memory_of_step(2048, rows)
    # keys and values of a layer are read as copies, and scores are of as many slots
    assert many[1] - few[1] < 0.4 * (many[0] - few[0])  # 1.0 and more where the caches are
