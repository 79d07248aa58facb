"""A model that says known words: after each token of a script, in order, it says the next."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.models.tiny import random_model


def scripted(cfg: Any, ids: list[int]) -> nnx.Module:
    """A model of the Llama family whose layers are off; no id may be twice in the script."""
    assert len({*ids}) == len(ids)
    model = random_model(cfg)
    # the layers are switched off, so the next token is a function of the last one alone
    model.layers.attn.o.w[...] *= 0
    model.layers.mlp.down.w[...] *= 0
    model.norm.scale[...] = jnp.ones(cfg.dim)
    rows = jax.random.normal(jax.random.key(0), (cfg.vocab_size, cfg.dim))
    model.embed.w[...] = rows
    head = np.zeros((cfg.dim, cfg.vocab_size), np.float32)
    for now, following in itertools.pairwise(ids):
        head[:, following] += np.asarray(rows[now])
    model.head.w[...] = jnp.asarray(head)
    return model
